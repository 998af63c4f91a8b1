import trio

from mesh.runtime.http import Request
from mesh.runtime.readiness import Readiness

PROBE = Request("GET", "/healthz/ready", {}, {})


def test_what_is_pending_is_named_in_order_with_its_reason():
    async def main():
        readiness = Readiness()
        assert (await readiness.serve(PROBE)).status == 200
        state, proxy = readiness.register("state manager"), readiness.register("proxy")
        state.pending("cannot reach localhost:15012: connection refused")
        response = await readiness.serve(PROBE)
        assert response.status == 500
        assert response.body == b"not ready, pending: proxy, state manager (cannot reach localhost:15012: connection refused)\n"
        proxy.done()
        state.done()
        assert (await readiness.serve(PROBE)).body == b"ready\n"
        state.pending()
        assert readiness.pending == ("state manager",)

    trio.run(main)


def test_waiting_ends_when_the_last_task_is_done():
    async def main():
        readiness = Readiness()
        tasks = [readiness.register(name) for name in ("a", "b")]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(readiness.wait_ready)
            for task in tasks:
                await trio.testing.wait_all_tasks_blocked()
                assert nursery.child_tasks
                task.done()

    trio.run(main)
