"""Sockets of transparent proxying: original destinations, transparent listeners, upstream sockets under a client's address.

Everything here acts in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import socket
import struct
from functools import lru_cache
from ipaddress import IPv4Address
from typing import Final

from mesh.linux.netns import ipv6_enabled
from mesh.model.address import IpAddress, SocketAddress, ip_from_bytes, ip_text, parse_ip

# Constants that Python 3.11's socket module lacks; linux/in.h, linux/in6.h, linux/netfilter_ipv4.h.
SOL_IP: Final = 0
SOL_IPV6: Final = 41
IP_TRANSPARENT: Final = 19
IP_BIND_ADDRESS_NO_PORT: Final = 24
IPV6_TRANSPARENT: Final = 75
SO_ORIGINAL_DST: Final = 80
SO_MARK: Final = 36

LISTEN_BACKLOG: Final = 1024
"""ztunnel uses 128; a mover that wakes late on a busy machine must not refuse a burst."""
KEEPALIVE_IDLE_SECONDS: Final = 180
KEEPALIVE_INTERVAL_SECONDS: Final = 180
KEEPALIVE_PROBES: Final = 9
"""As ztunnel (N3)."""


def original_destination(sock: socket.socket) -> SocketAddress | None:
    """Where an accepted connection was going before nat redirected it; None when nothing did.

    Asks as IPv4 first: the kernel answers that on dual-stack sockets too, and an IPv4 peer is looked up nowhere else (ztunnel N4).
    """
    found = _original_v4(sock)
    if found is None and sock.family == socket.AF_INET6:
        found = _original_v6(sock)
    return found


def local_address(sock: socket.socket) -> SocketAddress:
    """The local end of a connection. Raises OSError."""
    return _socket_address(sock.getsockname())


def peer_address(sock: socket.socket) -> SocketAddress:
    """The remote end of a connection. Raises OSError, as when the peer has gone."""
    return _socket_address(sock.getpeername())


def transparent_listener(
    port: int, *, mark: int, ipv6: bool = True, reuse_port: bool = False, backlog: int = LISTEN_BACKLOG
) -> socket.socket:
    """A non-blocking TCP listener on every address, IPv4 and, where the namespace has it, IPv6; connections inherit mark and
    transparency. Raises OSError, e.g. EADDRINUSE when a process of the pod holds the port.

    ``reuse_port`` is off unless asked for: our upgrades pass the very sockets on, and with it a process of the same user in the pod
    could take a share of the connections.
    """
    dual_stack = ipv6 and ipv6_enabled()
    sock = _stream_socket(socket.AF_INET6 if dual_stack else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        if dual_stack:
            sock.setsockopt(SOL_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setsockopt(SOL_IPV6, IPV6_TRANSPARENT, 1)
        sock.setsockopt(SOL_IP, IP_TRANSPARENT, 1)
        sock.bind(("::" if dual_stack else "0.0.0.0", port))
        sock.listen(backlog)
    except OSError as exc:
        sock.close()
        raise OSError(exc.errno, f"listen on port {port}: {exc.strerror}") from exc
    return sock


def loopback_listeners(port: int, *, ipv6: bool = True) -> list[socket.socket]:
    """Non-blocking sockets on the loopback addresses, IPv4 and, where the namespace has it, IPv6; of each one for UDP and one for TCP,
    in this order. What nat redirects is delivered there, and nobody outside reaches them. Raises OSError."""
    opened: list[socket.socket] = []
    try:
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            if family == socket.AF_INET6 and not (ipv6 and ipv6_enabled()):
                continue
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                opened.append(sock)
                if kind == socket.SOCK_STREAM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    sock.listen(LISTEN_BACKLOG)
    except OSError as exc:
        for sock in opened:
            sock.close()
        raise OSError(exc.errno, f"listen on loopback port {port}: {exc.strerror}") from exc
    return opened


def make_datagram_socket(family: int, *, mark: int) -> socket.socket:
    """A non-blocking UDP socket for the agent's own datagrams. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    except OSError:
        sock.close()
        raise
    return sock


def make_upstream_socket(family: int, *, mark: int | None, source: IpAddress | None = None) -> socket.socket:
    """A non-blocking TCP socket for a connection of the agent; ``family`` is AF_INET or AF_INET6 and must fit ``source``, from which it
    shall connect (`bind_foreign`). Raises OSError."""
    sock = _stream_socket(family)
    try:
        if mark is not None:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        set_connection_options(sock)
        if source is not None:
            bind_foreign(sock, source)
    except OSError:
        sock.close()
        raise
    return sock


def set_connection_options(sock: socket.socket) -> None:
    """TCP_NODELAY and the keepalive of ztunnel (N3), for dialled and accepted connections. Raises OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _stream_socket(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def bind_foreign(sock: socket.socket, source: IpAddress, port: int = 0) -> None:
    """Let a socket of the family of ``source`` connect from there, though that is another host's address; from ``port`` (`LocalPorts`), or
    from one of the kernel's choice if that is 0 or somebody else has it.

    Raises OSError: a connection that cannot bear its client's address is not made (ztunnel N5 warns and connects without it; policies of
    the application on addresses would then see the wrong one).
    """
    if source.version == 6:
        sock.setsockopt(SOL_IPV6, IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(SOL_IP, IP_TRANSPARENT, 1)
    if port and _bind_shared(sock, ip_text(source), port):
        return
    # The port is chosen by connect(), per destination: bind() would choose among 28 000 for all destinations together.
    sock.setsockopt(SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((ip_text(source), 0))


def bind_port(sock: socket.socket, port: int) -> None:
    """Let a socket connect from ``port`` (`LocalPorts`) of whatever address leads there, or, if somebody else has that, from one of the
    kernel's choice. Raises OSError."""
    _bind_shared(sock, "", port)


def _bind_shared(sock: socket.socket, host: str, port: int) -> bool:
    """Whether the port is to be had: that a connection to another place, or one in TIME_WAIT, has it as well is no hindrance, and connect()
    will know whether it can be told from them. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _original_v4(sock: socket.socket) -> SocketAddress | None:
    try:
        raw = sock.getsockopt(SOL_IP, SO_ORIGINAL_DST, 16)  # struct sockaddr_in
    except OSError as exc:
        _expect_untranslated(exc)
        return None
    return _parse_v4(raw)


def _original_v6(sock: socket.socket) -> SocketAddress | None:
    try:
        raw = sock.getsockopt(SOL_IPV6, SO_ORIGINAL_DST, 28)  # struct sockaddr_in6
    except OSError as exc:
        _expect_untranslated(exc)
        return None
    return _parse_v6(raw)


# Applications dial the same few destinations; of one destination it is also the same object, by which routes are kept.
@lru_cache(maxsize=4096)
def _parse_v4(raw: bytes) -> SocketAddress:
    port, packed = struct.unpack_from("!2xH4s", raw)
    return SocketAddress(IPv4Address(packed), port)


@lru_cache(maxsize=4096)
def _parse_v6(raw: bytes) -> SocketAddress:
    port, packed = struct.unpack_from("!2xH4x16s", raw)
    return SocketAddress(ip_from_bytes(packed), port)


def _expect_untranslated(exc: OSError) -> None:
    # ENOENT: conntrack does not know the connection. ENOPROTOOPT: no conntrack in this namespace, or not of this family.
    if exc.errno not in (errno.ENOENT, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL):
        raise exc


def _socket_address(raw: tuple[str, int] | tuple[str, int, int, int]) -> SocketAddress:
    host = raw[0].partition("%")[0]
    return SocketAddress(parse_ip(host), raw[1])
