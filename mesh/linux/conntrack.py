"""Where a UDP packet was going before nat redirected it: the kernel's connection table knows, and no socket option tells.

`SO_ORIGINAL_DST` (`mesh.linux.sockets`) is for TCP only, and the ancillary data of a datagram name the address after the redirection.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

from mesh.linux.netlink import NETLINK_NETFILTER, NLM_F_REQUEST, NetlinkError, attribute, parse_attributes
from mesh.model.address import SocketAddress, ip_from_bytes

# linux/netfilter/nfnetlink_conntrack.h
_GET_CONNECTION: Final = 1 << 8 | 1
_NESTED: Final = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_ADDRESSES: Final = {4: (1, 2), 6: (3, 4)}
"""Attributes of source and destination."""
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3

_HEADER: Final = struct.Struct("=IHHII")
_PORT: Final = struct.Struct("!H")
_ANSWER_BYTES: Final = 4096
_ANSWER_TIME: Final = struct.pack("@ll", 1, 0)


def original_udp_destination(local: SocketAddress, peer: SocketAddress) -> SocketAddress | None:
    """Where datagrams that arrive at ``local`` from ``peer`` were sent to; None if nothing redirected them.

    Acts in the network namespace of the calling thread and needs NET_ADMIN over it. The kernel answers within the call. Raises OSError.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as netlink:
        netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ANSWER_TIME)
        netlink.send(_request(local, peer))
        answer = netlink.recv(_ANSWER_BYTES)
    return _read(answer, local)


def _request(local: SocketAddress, peer: SocketAddress) -> bytes:
    """The connection whose answers go from ``local`` to ``peer``: what nat has not touched of it."""
    source, destination = _ADDRESSES[local.ip.version]
    ip = attribute(source, local.ip.packed) + attribute(destination, peer.ip.packed)
    ports = (
        attribute(_PROTO_NUM, bytes([socket.IPPROTO_UDP]))
        + attribute(_PROTO_SRC_PORT, _PORT.pack(local.port))
        + attribute(_PROTO_DST_PORT, _PORT.pack(peer.port))
    )
    family = socket.AF_INET if local.ip.version == 4 else socket.AF_INET6
    wanted = attribute(_TUPLE_REPLY | _NESTED, attribute(_TUPLE_IP | _NESTED, ip) + attribute(_TUPLE_PROTO | _NESTED, ports))
    body = bytes([family, 0, 0, 0]) + wanted
    return _HEADER.pack(_HEADER.size + len(body), _GET_CONNECTION, NLM_F_REQUEST, 0, 0) + body


def _read(answer: bytes, local: SocketAddress) -> SocketAddress | None:
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    if kind != 1 << 8:  # an error: no such connection, or no conntrack in this kernel
        return None
    connection = dict(parse_attributes(answer[_HEADER.size + 4 :]))
    try:
        original = dict(parse_attributes(connection[_TUPLE_ORIG]))
        ip = dict(parse_attributes(original[_TUPLE_IP]))[_ADDRESSES[local.ip.version][1]]
        (port,) = _PORT.unpack(dict(parse_attributes(original[_TUPLE_PROTO]))[_PROTO_DST_PORT])
    except (KeyError, struct.error) as exc:
        raise NetlinkError(errno.EBADMSG, "conntrack answered with something else") from exc
    found = SocketAddress(ip_from_bytes(ip), port)
    return found if found != local else None
