import errno
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from mesh.model.address import SocketAddress, parse_ip
from mesh.reactor import tcp
from mesh.reactor.sharing import Share
from mesh.reactor.tcp import connect, listen_on, sockaddr, socket_address
from mesh.testing.proxies import ReactorThread, tcp_listener, wait_until


@pytest.fixture
def thread() -> Iterator[ReactorThread]:
    with ReactorThread() as thread:
        yield thread


def dial(thread: ReactorThread, address: SocketAddress, timeout: float = 5.0) -> OSError | None:
    results: list[OSError | None] = []
    sock = socket.socket(socket.AF_INET6 if address.ip.version == 6 else socket.AF_INET)
    sock.setblocking(False)
    with sock:
        thread.call(lambda: connect(thread.reactor, sock, address, timeout, results.append))
        wait_until(lambda: bool(results), "the connect to be decided")
    return results[0]


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_accepted_connections_come_with_their_peer_address_without_delay_and_with_keepalive(thread: ReactorThread, ip: str) -> None:
    accepted: list[tuple[socket.socket, SocketAddress]] = []
    with tcp_listener(SocketAddress(parse_ip(ip), 0)) as listener:
        server = thread.call(lambda: listen_on(thread.reactor, listener, lambda sock, peer: accepted.append((sock, peer))))
        with socket.create_connection((ip, listener.getsockname()[1])) as client:
            wait_until(lambda: bool(accepted), "the connection")
            sock, peer = accepted[0]
            assert peer == SocketAddress(parse_ip(ip), client.getsockname()[1])
            assert sock.gettimeout() == 0
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 180
            sock.close()
        thread.call(server.close)


def test_a_burst_larger_than_a_batch_is_accepted_whole(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    with tcp_listener() as listener, ExitStack() as stack:
        server = thread.call(lambda: listen_on(thread.reactor, listener, lambda sock, _peer: accepted.append(sock)))
        for _ in range(3 * tcp.ACCEPT_BATCH + 1):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        wait_until(lambda: len(accepted) == 3 * tcp.ACCEPT_BATCH + 1, "all connections")
        for sock in accepted:
            sock.close()
        thread.call(server.close)


def test_two_processes_worth_of_reactors_share_a_listener() -> None:
    accepted: list[socket.socket] = []
    with ReactorThread() as one, ReactorThread() as two, tcp_listener() as listener, ExitStack() as stack:
        servers = [
            (thread, thread.call(lambda thread=thread: listen_on(thread.reactor, listener, lambda sock, _peer: accepted.append(sock))))
            for thread in (one, two)
        ]
        for _ in range(50):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        wait_until(lambda: len(accepted) == 50, "all connections")
        for thread, server in servers:
            thread.call(server.close)
        for sock in accepted:
            sock.close()


def test_connections_that_stay_are_divided_among_those_who_share_a_listener() -> None:
    accepted: tuple[list[socket.socket], list[socket.socket]] = [], []
    leads = [lambda: float(len(accepted[0]) - len(accepted[1])), lambda: float(len(accepted[1]) - len(accepted[0]))]
    with ReactorThread() as one, ReactorThread() as two, tcp_listener() as listener, ExitStack() as stack:
        servers = [
            (thread, thread.call(lambda thread=thread, of=of, lead=lead: listen_on(thread.reactor, listener, of, Share(lead, 1))))
            for thread, of, lead in zip((one, two), (_to(accepted[0]), _to(accepted[1])), leads, strict=True)
        ]
        for count in range(1, 21):
            stack.enter_context(socket.create_connection(listener.getsockname()))
            wait_until(lambda count=count: sum(map(len, accepted)) == count, "the connection")  # type: ignore[misc]  # of the loop's variable
            assert abs(len(accepted[0]) - len(accepted[1])) <= 2
        for thread, server in servers:
            thread.call(server.close)
        for sock in (*accepted[0], *accepted[1]):
            sock.close()


def test_who_lets_others_go_first_takes_what_nobody_took(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    with tcp_listener() as listener, ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        server = thread.call(lambda: listen_on(thread.reactor, listener, _to(accepted), Share(lambda: float(len(accepted)), 1)))
        wait_until(lambda: len(accepted) == 40, "all connections, though the others have none")
        for sock in accepted:
            sock.close()
        thread.call(server.close)


@pytest.mark.parametrize("ending", ["close", "finish"])
def test_a_listener_may_end_while_others_go_first(thread: ReactorThread, ending: str) -> None:
    accepted: list[socket.socket] = []
    with tcp_listener() as listener, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(listener.getsockname()))

        def end(server: tcp.Listener) -> None:
            server._on_readable(select.EPOLLIN)
            server._on_readable(select.EPOLLIN)
            assert len(accepted) == 1
            server.close() if ending == "close" else server.finish()

        thread.call(lambda: end(listen_on(thread.reactor, listener, _to(accepted), Share(lambda: 9.0, 1))))
        assert len(accepted) == (1 if ending == "close" else 3)
        time.sleep(2 * tcp.LOOK_AGAIN)
        thread.call(lambda: None)
        assert thread.errors == []
        assert len(accepted) == (1 if ending == "close" else 3)
        for sock in accepted:
            sock.close()


def test_a_shared_listener_outlives_who_fails_with_a_connection_and_descriptors_that_run_out(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def take(sock: socket.socket, _peer: SocketAddress) -> None:
        if len(accepted) == 2 and not thread.errors:
            raise RuntimeError("bug")
        accepted.append(sock)

    with tcp_listener() as listener, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, hard))
        try:
            server = thread.call(lambda: listen_on(thread.reactor, listener, take, Share(lambda: float(len(accepted)), 1)))
            wait_until(lambda: server.paused, "accepting to pause")
            thread.call(server.look_again)
            assert server.paused
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: len(accepted) == 19, "the others after the pause")
        assert [str(error) for error in thread.errors] == ["bug"]
        for sock in accepted:
            sock.close()
        thread.call(server.close)


def _to(accepted: list[socket.socket]) -> tcp.OnAccept:
    return lambda sock, _peer: accepted.append(sock)


def test_a_process_out_of_descriptors_pauses_accepting_and_resumes(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with tcp_listener() as listener, ExitStack() as stack:
        server = thread.call(lambda: listen_on(thread.reactor, listener, lambda sock, _peer: accepted.append(sock)))
        clients = [stack.enter_context(socket.socket()) for _ in range(3)]
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            for client in clients:
                client.connect(listener.getsockname())
            wait_until(lambda: server.paused, "accepting to pause")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: len(accepted) == 3, "the waiting connections after the pause")
        assert thread.errors == []
        assert [error.errno for error in thread.exhausted] == [errno.EMFILE]
        for sock in accepted:
            sock.close()
        thread.call(server.close)


def test_an_accept_callback_that_raises_costs_its_own_connection_only(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []

    def on_accept(sock: socket.socket, _peer: SocketAddress) -> None:
        if not thread.errors:
            raise RuntimeError("bug")
        accepted.append(sock)

    with tcp_listener() as listener:
        server = thread.call(lambda: listen_on(thread.reactor, listener, on_accept))
        with socket.socket() as first:
            first.settimeout(5)
            with pytest.raises(ConnectionResetError):
                first.recv(1 if first.connect(listener.getsockname()) is None else 0)  # either call may be the one that sees it
        with socket.create_connection(listener.getsockname()):
            wait_until(lambda: bool(accepted), "the next connection")
        accepted[0].close()
        thread.call(server.close)
    assert [str(error) for error in thread.errors] == ["bug"]


def test_a_closed_listener_accepts_no_more_and_leaves_the_socket_to_others(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    with tcp_listener() as listener:
        server = thread.call(lambda: listen_on(thread.reactor, listener, lambda sock, _peer: accepted.append(sock)))
        thread.call(server.close)
        with socket.create_connection(listener.getsockname()):
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            assert poll.poll(5000)
            listener.accept()[0].close()
    assert accepted == []


def test_connect_succeeds(thread: ReactorThread) -> None:
    with tcp_listener() as listener:
        assert dial(thread, socket_address(listener.getsockname())) is None


def test_connect_to_a_closed_port_is_refused(thread: ReactorThread) -> None:
    with tcp_listener() as listener:
        address = socket_address(listener.getsockname())
    error = dial(thread, address)
    assert isinstance(error, ConnectionRefusedError)
    assert error.errno == errno.ECONNREFUSED


@pytest.fixture
def full() -> Iterator[socket.socket]:
    """A listener whose accept queue is full, so that it drops every SYN."""
    with socket.socket() as full, ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        full.setblocking(False)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield full


def test_connect_that_nobody_answers_times_out(thread: ReactorThread, full: socket.socket) -> None:
    assert isinstance(dial(thread, socket_address(full.getsockname()), timeout=0.05), TimeoutError)


def test_connect_that_is_answered_late_succeeds(thread: ReactorThread, full: socket.socket) -> None:
    results: list[OSError | None] = []
    with socket.socket() as sock, ExitStack() as stack:
        sock.setblocking(False)
        thread.call(lambda: connect(thread.reactor, sock, socket_address(full.getsockname()), 30, results.append))
        assert results == []

        def make_room() -> bool:
            with suppress(BlockingIOError):
                stack.enter_context(full.accept()[0])
            return bool(results)

        wait_until(make_room, "a repeated SYN to be answered", timeout=30)
    assert results == [None]


def test_connect_without_a_route_fails_at_once(thread: ReactorThread) -> None:
    error = dial(thread, SocketAddress(parse_ip("255.255.255.255"), 9))
    assert isinstance(error, OSError)


def test_a_cancelled_connect_calls_nobody(thread: ReactorThread) -> None:
    results: list[OSError | None] = []
    with tcp_listener() as listener, socket.socket() as sock:
        sock.setblocking(False)
        address = socket_address(listener.getsockname())
        thread.call(lambda: connect(thread.reactor, sock, address, 5, results.append).cancel())
        settled = threading.Event()
        thread.call(lambda: thread.reactor.call_later(0.02, settled.set))
        assert settled.wait(5)
    assert results == []


def test_addresses_are_unmapped_and_mapped_as_the_socket_needs() -> None:
    assert socket_address(("::ffff:10.0.0.1", 80, 0, 0)) == SocketAddress(parse_ip("10.0.0.1"), 80)
    assert socket_address(("fe80::1%eth0", 80, 0, 2)) == SocketAddress(parse_ip("fe80::1"), 80)
    assert sockaddr(socket.AF_INET6, SocketAddress(parse_ip("10.0.0.1"), 80)) == ("::ffff:10.0.0.1", 80)
    assert sockaddr(socket.AF_INET, SocketAddress(parse_ip("10.0.0.1"), 80)) == ("10.0.0.1", 80)


def test_a_listener_that_is_finished_takes_what_waits_in_the_queue(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    with tcp_listener() as listener, ExitStack() as stack:
        server = thread.call(lambda: listen_on(thread.reactor, listener, lambda sock, _peer: accepted.append(sock)))

        def burst_and_finish() -> None:
            for _ in range(2 * tcp.ACCEPT_BATCH):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            server.finish()

        thread.call(burst_and_finish)
        assert len(accepted) == 2 * tcp.ACCEPT_BATCH
        stack.enter_context(socket.create_connection(listener.getsockname()))
        thread.call(lambda: None)
        assert len(accepted) == 2 * tcp.ACCEPT_BATCH, "what comes later is for others"
        for sock in accepted:
            sock.close()


def test_a_connection_that_a_dead_process_was_woken_for_is_found_by_looking_again(thread: ReactorThread) -> None:
    accepted: list[socket.socket] = []
    with tcp_listener() as listener, select.epoll() as dead:
        dead.register(listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)  # first in the queue of those who wait
        server = thread.call(lambda: listen_on(thread.reactor, listener, lambda sock, _peer: accepted.append(sock)))
        woken: list[object] = []
        waiter = threading.Thread(target=lambda: woken.append(dead.poll(10)))
        waiter.start()
        wait_until(lambda: "epoll" in Path(f"/proc/self/task/{waiter.native_id}/wchan").read_text() or woken, "the other waits")
        with socket.create_connection(listener.getsockname()):
            waiter.join()
            assert woken != [[]], "the kernel woke the other"
            assert not accepted
            thread.call(server.look_again)
            wait_until(lambda: bool(accepted), "the connection")
        thread.call(server.close)
        accepted[0].close()
