import os
import select
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio

from mesh.reactor.loop import CONNECTION, Reactor


def run(body: Callable[[Reactor], Awaitable[None]]) -> list[tuple[BaseException, str]]:
    """Run ``body`` as the guest; what the error hook was told."""
    errors: list[tuple[BaseException, str]] = []
    reactor = Reactor(on_error=lambda error, where: errors.append((error, where)))

    async def main() -> None:
        with trio.fail_after(10):
            await body(reactor)

    try:
        reactor.run(main)
    finally:
        reactor.close()
    return errors


def pair() -> tuple[socket.socket, socket.socket]:
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    return a, b


def test_run_returns_what_the_main_function_returns_and_raises_what_it_raises() -> None:
    reactor = Reactor()

    async def answer(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number + 1

    async def fail() -> None:
        raise ValueError("no")

    assert reactor.run(answer, 41) == 42
    with pytest.raises(ValueError, match="no"):
        reactor.run(fail)
    reactor.close()


def test_a_callback_wakes_a_trio_task_and_starts_another() -> None:
    async def body(reactor: Reactor) -> None:
        a, b = pair()
        seen = trio.Event()
        started = trio.Event()

        async def task() -> None:
            started.set()

        with a, b:
            async with trio.open_nursery() as nursery:

                def on_readable(_events: int) -> None:
                    seen.set()
                    nursery.start_soon(task)

                reactor.add(a.fileno(), CONNECTION & ~select.EPOLLOUT, on_readable)
                b.send(b"x")
                await seen.wait()
                await started.wait()
            reactor.remove(a.fileno())

    assert run(body) == []


def test_trio_io_and_timers_go_on_beside_the_reactor() -> None:
    async def body(reactor: Reactor) -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            await a.send(b"x")
            assert await b.recv(1) == b"x"
            with trio.move_on_after(0.01):
                await b.recv(1)

    assert run(body) == []


def test_an_event_of_a_removed_descriptor_is_not_delivered() -> None:
    async def body(reactor: Reactor) -> None:
        socks = [pair() for _ in range(2)]
        calls = []
        done = trio.Event()

        def closer(me: int) -> Callable[[int], None]:
            def callback(_events: int) -> None:
                calls.append(me)
                for a, _ in socks:  # the first to be called closes both
                    reactor.remove(a.fileno())
                    a.close()
                reactor.call_soon(done.set)

            return callback

        for me, (a, b) in enumerate(socks):
            b.send(b"x")
            reactor.add(a.fileno(), CONNECTION, closer(me))
        await done.wait()
        assert len(calls) == 1
        for _, b in socks:
            b.close()

    assert run(body) == []


def test_an_event_of_a_closed_descriptor_does_not_reach_the_next_owner_of_its_number() -> None:
    async def body(reactor: Reactor) -> None:
        (a1, b1), (a2, b2) = pair(), pair()
        wrong: list[int] = []
        done = trio.Event()
        fresh: list[socket.socket] = []

        def replace(other: socket.socket) -> Callable[[int], None]:
            def callback(_events: int) -> None:
                if fresh:
                    return
                number = other.fileno()
                sock, far = pair()
                reactor.remove(number)
                other.close()
                fresh.extend((sock, far))
                os.dup2(sock.fileno(), number)
                fresh.append(socket.socket(fileno=number))
                reactor.add(number, select.EPOLLIN | select.EPOLLET, wrong.append)
                reactor.call_soon(done.set)

            return callback

        b1.send(b"x")
        b2.send(b"x")
        reactor.add(a1.fileno(), CONNECTION, replace(a2))
        reactor.add(a2.fileno(), CONNECTION, replace(a1))
        await done.wait()
        assert wrong == []
        woken = trio.Event()
        reactor.remove(fresh[2].fileno())
        reactor.add(fresh[2].fileno(), select.EPOLLIN, lambda _events: woken.set())
        fresh[1].send(b"now")
        await woken.wait()
        reactor.remove(fresh[2].fileno())
        for sock in (a1, a2, b1, b2, *fresh):
            sock.close()

    assert run(body) == []


def test_an_exception_in_a_callback_ends_its_own_connection_only() -> None:
    aborted: list[str] = []

    async def body(reactor: Reactor) -> None:
        (a, b), (c, d) = pair(), pair()
        alive = trio.Event()

        def fail(_events: int) -> None:
            raise RuntimeError("bug")

        with a, b, c, d:
            reactor.add(a.fileno(), CONNECTION, fail, aborted.append)
            reactor.add(c.fileno(), select.EPOLLIN, lambda _events: alive.set())
            d.send(b"x")
            await alive.wait()
            b.send(b"again")  # no further call: the descriptor has left the loop
            await trio.sleep(0.01)
            reactor.remove(c.fileno())

    errors = run(body)
    assert [repr(error) for error, _ in errors] == ["RuntimeError('bug')"]
    assert aborted == ["internal error: RuntimeError('bug')"]


def test_an_exception_in_a_call_or_timer_or_abort_is_reported_and_the_loop_goes_on() -> None:
    async def body(reactor: Reactor) -> None:
        done = trio.Event()

        def fail(_reason: str = "") -> None:
            raise RuntimeError("bug")

        reactor.call_soon(fail, fail)
        reactor.call_later(0, fail)
        reactor.call_later(0.001, done.set)
        await done.wait()

    assert len(run(body)) == 3


def test_timers_fire_in_order_of_time_and_cancelled_ones_never() -> None:
    order: list[int] = []

    async def body(reactor: Reactor) -> None:
        done = trio.Event()
        cancelled = [reactor.call_later(0.002, lambda: order.append(-1)) for _ in range(3000)]
        reactor.call_later(0.02, lambda: order.append(3))
        reactor.call_later(0.0, lambda: order.append(1))
        reactor.call_later(0.01, lambda: order.append(2))
        for timer in cancelled:
            timer.cancel()
            timer.cancel()
        assert len(reactor._timers) < 1100  # they do not pile up
        reactor.call_later(0.03, done.set)
        await done.wait()
        assert not reactor._timers
        assert reactor._cancelled_timers == 0

    assert run(body) == []
    assert order == [1, 2, 3]


def test_a_timer_cancelled_by_one_that_is_due_at_the_same_moment_does_not_fire() -> None:
    async def body(reactor: Reactor) -> None:
        done = trio.Event()
        fired: list[str] = []
        second = None

        def first() -> None:
            assert second is not None
            second.cancel()
            done.set()

        reactor.call_later(0, first)
        second = reactor.call_later(0, lambda: fired.append("second"))
        await done.wait()
        assert fired == []

    assert run(body) == []


def test_calls_made_by_a_call_wait_for_the_events_in_between() -> None:
    async def body(reactor: Reactor) -> None:
        a, b = pair()
        done = trio.Event()
        spins = 0

        def spin() -> None:
            nonlocal spins
            spins += 1
            if not done.is_set():
                reactor.call_soon(spin)

        with a, b:
            reactor.call_soon(spin)
            reactor.add(a.fileno(), select.EPOLLIN, lambda _events: done.set())
            b.send(b"x")
            await done.wait()
            reactor.remove(a.fileno())

    assert run(body) == []


def test_what_is_to_come_last_comes_in_the_same_turn_after_the_calls_and_what_it_asks_for_at_once() -> None:
    seen: list[tuple[str, int]] = []

    async def body(reactor: Reactor) -> None:
        a, b = pair()
        done = trio.Event()
        first = 0

        def note(name: str) -> None:
            seen.append((name, reactor.turns - first))

        def last() -> None:
            note("last")
            reactor.call_soon(lambda: note("line"))
            reactor.call_last(lambda: (note("next"), done.set())[0])

        def on_event(_events: int) -> None:
            nonlocal first
            first = reactor.turns
            reactor.call_last(last)
            reactor.call_soon(lambda: note("call"))
            note("event")

        with a, b:
            reactor.add(a.fileno(), select.EPOLLIN | select.EPOLLET, on_event)
            b.send(b"x")
            await done.wait()
            reactor.remove(a.fileno())

    assert run(body) == []
    assert seen == [("event", 0), ("call", 0), ("last", 0), ("line", 0), ("next", 1)]


def test_an_exception_in_a_last_call_is_reported_and_its_abort_told() -> None:
    told: list[str] = []

    async def body(reactor: Reactor) -> None:
        done = trio.Event()

        def fail() -> None:
            raise RuntimeError("bug")

        reactor.call_last(fail, told.append)
        reactor.call_last(done.set)
        await done.wait()

    assert len(run(body)) == 1
    assert told == ["internal error: RuntimeError('bug')"]


def test_another_thread_reaches_the_loop() -> None:
    async def body(reactor: Reactor) -> None:
        done = trio.Event()
        thread = threading.Thread(target=lambda: [reactor.run_soon_threadsafe(lambda: None) for _ in range(1000)])
        thread.start()
        last = threading.Thread(target=lambda: (thread.join(), reactor.run_soon_threadsafe(done.set)))
        last.start()
        await done.wait()
        last.join()

    assert run(body) == []


def test_closing_before_removing_is_forgiven() -> None:
    async def body(reactor: Reactor) -> None:
        a, b = pair()
        fd = a.fileno()
        reactor.add(fd, CONNECTION, lambda _events: None)
        a.close()
        b.close()
        reactor.remove(fd)
        reactor.remove(fd)
        await trio.lowlevel.checkpoint()

    assert run(body) == []


def test_modify_changes_what_is_waited_for() -> None:
    async def body(reactor: Reactor) -> None:
        a, b = pair()
        masks: list[int] = []
        done = trio.Event()

        def callback(mask: int) -> None:
            masks.append(mask)
            reactor.remove(a.fileno())
            done.set()

        with a, b:
            reactor.add(a.fileno(), select.EPOLLIN, callback)
            reactor.modify(a.fileno(), select.EPOLLOUT)
            await done.wait()
        assert masks == [select.EPOLLOUT]

    assert run(body) == []


def test_a_finished_reactor_leaves_no_descriptor() -> None:
    async def body(reactor: Reactor) -> None:
        await trio.lowlevel.checkpoint()

    run(body)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(body)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forgotten_descriptor_has_no_callback_any_more_not_even_for_an_event_that_was_collected() -> None:
    async def body(reactor: Reactor) -> None:
        socks = [pair() for _ in range(2)]
        calls = []
        done = trio.Event()

        def closer(me: int) -> Callable[[int], None]:
            def callback(_events: int) -> None:
                calls.append(me)
                for a, _ in socks:
                    reactor.forget(a.fileno())
                    a.close()
                reactor.call_soon(done.set)

            return callback

        for me, (a, b) in enumerate(socks):
            b.send(b"x")
            reactor.add(a.fileno(), CONNECTION, closer(me))
        await done.wait()
        assert len(calls) == 1
        for _, b in socks:
            b.close()

    assert run(body) == []


def test_closing_completes_what_forget_leaves_out_and_remove_leaves_nothing_out() -> None:
    async def body(reactor: Reactor) -> None:
        def ignore(_events: int) -> None: ...

        a, b = pair()
        with a, b:
            reactor.add(a.fileno(), CONNECTION, ignore)
            reactor.remove(a.fileno())
            reactor.add(a.fileno(), CONNECTION, ignore)
            reactor.forget(a.fileno())
            with pytest.raises(FileExistsError):  # the kernel was not told: that call is what is spared
                reactor.add(a.fileno(), CONNECTION, ignore)
            number = a.fileno()
            c, d = pair()
            with c, d:
                os.dup2(c.fileno(), number)  # closes what was there, and gives the number to another connection
                seen = trio.Event()
                reactor.add(number, CONNECTION & ~select.EPOLLOUT, lambda _events: seen.set())
                d.send(b"x")
                await seen.wait()
                reactor.remove(number)

    assert run(body) == []


def test_exhaustion_is_told_at_once_and_then_again_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = 0.0, list[tuple[float, str]]()
    monkeypatch.setattr("mesh.reactor.loop.time.monotonic", lambda: clock)
    reactor = Reactor(on_exhausted=lambda error: told.append((clock, str(error))))
    for at in (0.0, 0.1, 9.9, 10.0, 10.1, 35.0):
        clock = at
        reactor.exhausted(OSError("no descriptors"))
    reactor.close()
    assert told == [(at, "no descriptors") for at in (0.0, 10.0, 35.0)]
