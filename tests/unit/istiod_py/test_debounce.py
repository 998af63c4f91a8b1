import trio
import trio.testing

from istiod_py.debounce import Debounce


def run(test):
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_burst_of_changes_is_one_wake_up_after_it_went_quiet():
    async def test():
        debounce = Debounce(0.1, 10)
        start = trio.current_time()

        async def burst():
            for _ in range(5):
                debounce.notify()
                await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(burst)
            await debounce.wait()
            assert 0.29 <= trio.current_time() - start <= 0.31
        with trio.move_on_after(100) as none_left:
            await debounce.wait()
        assert none_left.cancelled_caught

    run(test)


def test_changes_that_never_stop_are_pushed_at_the_bound():
    async def test():
        debounce = Debounce(0.1, 10)

        async def for_ever():
            while True:
                debounce.notify()
                await trio.sleep(0.03)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(for_ever)
            start = trio.current_time()
            for number in (1, 2, 3):
                await debounce.wait()
                assert number * 10 - 0.1 <= trio.current_time() - start <= number * 10 + 0.5
            nursery.cancel_scope.cancel()

    run(test)


def test_a_change_while_the_push_goes_on_is_the_next_push():
    async def test():
        debounce = Debounce(0.1, 10)
        debounce.notify()
        await debounce.wait()
        debounce.notify()
        await trio.sleep(5)
        with trio.fail_after(0.2):
            await debounce.wait()

    run(test)
