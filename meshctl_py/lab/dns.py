"""The cluster's DNS: `answer` decides on a message (pure), `serve_dns` carries it over UDP and TCP.

What a pod outside the mesh needs of CoreDNS with its ``kubernetes`` plugin: A and AAAA of services, authoritatively; every other name does
not exist. A name that exists without an address of the asked family is answered with no record, not NXDOMAIN, or resolvers would give up
on the other family too (RFC 8020).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import trio

from mesh.model.address import IpAddress
from meshctl_py.lab.endpoints import CLUSTER_DOMAIN

Zone: TypeAlias = Mapping[str, tuple[IpAddress, ...]]
"""Addresses by absolute lower-case name, without the final dot."""

TTL: Final = 5
"""Seconds, as CoreDNS's default for cluster names."""
_UDP_SIZE: Final = 1232
"""Most bytes of an answer over UDP (DNS flag day 2020); a longer one is cut and asked for again over TCP."""
_MAX_TCP_CLIENTS: Final = 64
_TCP_IDLE: Final = 10.0
"""Seconds a TCP client may be silent (RFC 7766 advises a few)."""


def answer(query: bytes, zone: Zone, *, over_tcp: bool = False) -> bytes | None:
    """The answer to one query message; None where silence is right: no DNS header, or itself an answer (two servers would never stop)."""
    try:
        request = dns.message.from_wire(query, ignore_trailing=True)
    except dns.message.ShortHeader:
        return None
    except (dns.exception.DNSException, ValueError):
        return None if len(query) < 12 or query[2] & 0x80 else _format_error(query)
    if request.flags & dns.flags.QR:
        return None
    response = dns.message.make_response(request, our_payload=_UDP_SIZE)
    response.flags |= dns.flags.AA
    if request.opcode() != dns.opcode.QUERY or len(request.question) != 1:
        response.set_rcode(dns.rcode.NOTIMP if request.opcode() != dns.opcode.QUERY else dns.rcode.FORMERR)
    else:
        _resolve(response, zone)
    size = 65535 if over_tcp else max(512, min(request.payload, _UDP_SIZE))
    return _encode(response, size)


def _resolve(response: dns.message.Message, zone: Zone) -> None:
    question = response.question[0]
    name = question.name.to_text(omit_final_dot=True).lower()
    found = zone.get(name)
    if found is None or question.rdclass != dns.rdataclass.IN:
        if not _is_above_some_name(name, zone):
            response.set_rcode(dns.rcode.NXDOMAIN)
    else:
        for kind, version in ((dns.rdatatype.A, 4), (dns.rdatatype.AAAA, 6)):
            addresses = [str(ip) for ip in found if ip.version == version]
            if addresses and question.rdtype in (kind, dns.rdatatype.ANY):
                response.answer.append(dns.rrset.from_text(question.name, TTL, "IN", dns.rdatatype.to_text(kind), *addresses))
    if not response.answer:
        soa = f"ns.dns.{CLUSTER_DOMAIN}. hostmaster.{CLUSTER_DOMAIN}. 1 7200 1800 86400 {TTL}"
        response.authority.append(dns.rrset.from_text(f"{CLUSTER_DOMAIN}.", TTL, "IN", "SOA", soa))


def _is_above_some_name(name: str, zone: Zone) -> bool:
    """``shop.svc.cluster.local`` exists when a service below it does: it has no records, but it is not NXDOMAIN."""
    return any(known.endswith("." + name) for known in zone)


def _encode(response: dns.message.Message, size: int) -> bytes:
    try:
        return response.to_wire(max_size=size)
    except dns.exception.TooBig:
        response.answer.clear()
        response.authority.clear()
        response.flags |= dns.flags.TC
        return response.to_wire(max_size=size)


def _format_error(query: bytes) -> bytes:
    return query[:2] + struct.pack(">HHHHH", 0x8000 | dns.rcode.FORMERR, 0, 0, 0, 0)


async def serve_dns(
    udp: list[trio.socket.SocketType], tcp: list[trio.SocketListener], find_zone: Callable[[], Zone], ready: trio.Event | None = None
) -> None:
    """Answer on these sockets until cancelled; ``find_zone`` gives the zone as it is at each query."""
    async with trio.open_nursery() as nursery:
        for sock in udp:
            nursery.start_soon(_serve_udp, sock, find_zone)
        limit = trio.CapacityLimiter(_MAX_TCP_CLIENTS)
        nursery.start_soon(trio.serve_listeners, lambda stream: _serve_tcp(stream, find_zone, limit), tcp)
        if ready is not None:
            ready.set()


async def _serve_udp(sock: trio.socket.SocketType, find_zone: Callable[[], Zone]) -> None:
    while True:
        try:
            query, peer = await sock.recvfrom(4096)
            response = answer(query, find_zone())
            if response is not None:
                await sock.sendto(response, peer)
        except OSError:
            continue  # an ICMP error of an earlier answer, or no route back: the client asks again


async def _serve_tcp(stream: trio.SocketStream, find_zone: Callable[[], Zone], limit: trio.CapacityLimiter) -> None:
    buffer = b""
    async with limit, stream:
        try:
            while True:
                with trio.fail_after(_TCP_IDLE):
                    while len(buffer) < 2 or len(buffer) < 2 + int.from_bytes(buffer[:2]):
                        data = await stream.receive_some(4096)
                        if not data:
                            return
                        buffer += data
                    end = 2 + int.from_bytes(buffer[:2])
                    response = answer(buffer[2:end], find_zone(), over_tcp=True)
                    buffer = buffer[end:]
                    if response is not None:
                        await stream.send_all(len(response).to_bytes(2) + response)
        except (trio.BrokenResourceError, trio.TooSlowError):
            return
