"""A control plane that has a mesh of any size: ``python -m benches.served_mesh PORT DIRECTORY``.

Writes its root and the agents' token into the directory. Reads commands from standard input, a JSON object a line, and answers each with
one: ``{"do": "have", "workloads": N}`` to have a mesh of N workloads from now on, ``{"do": "change", "times": N}`` to change one endpoint
N times, each a push of its own that all agents have acknowledged a moment before the next.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import structlog
import trio

from benches import synthetic
from mesh.rpc import serve
from mesh.rpc.tls import server_tls
from mesh.state.store import Delta
from mesh.testing.serving import write_serving_certificate
from mesh.xds.cache import ResourceCache
from mesh.xds.server import AdsServer

PAUSE = 0.003
"""Seconds between changes, so that each finds the agents as a change finds them: at rest."""
ROOT = "root.pem"
TOKEN = "token"


class ControlPlane:
    """Serves one mesh at a time; an agent that was there before is to be gone when it changes."""

    def __init__(self) -> None:
        self._cache = ResourceCache()
        self._server = AdsServer(self._cache)
        self._held = Delta()
        self._turn = 0

    async def run(self, port: int, directory: Path) -> None:
        """Until standard input ends."""
        certificate = write_serving_certificate(directory, "localhost", "127.0.0.1")
        (directory / ROOT).write_text(certificate.root_pem)
        (directory / TOKEN).write_text("not looked at")
        context = server_tls(certificate.chain, certificate.key)
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, listeners, self._server.handlers(), tls=lambda: context))
            _answer({"ready": True})
            while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
                command = json.loads(line)
                match command.pop("do"):
                    case "have":
                        self._have(**command)
                    case "change":
                        await self._change(**command)
                _answer({"done": True})
            nursery.cancel_scope.cancel()

    def _have(self, workloads: int) -> None:
        gone = Delta(
            removed_addresses=(*(each.uid for each in self._held.workloads), *(str(each.key) for each in self._held.services)),
            removed_policies=tuple(policy.key for policy in self._held.policies),
        )
        self._held = synthetic.mesh(workloads)
        self._cache.apply(gone)
        self._cache.apply(self._held)

    async def _change(self, times: int) -> None:
        while not self._server.connections():  # noqa: ASYNC110  # the server tells nobody that somebody has connected
            await trio.sleep(PAUSE)
        for _ in range(times):
            self._turn += 1
            number = self._turn * 7919 % len(self._held.workloads)  # a prime: all over the mesh
            self._server.publish(self._cache.apply(Delta(workloads=(synthetic.moved(number, self._turn),))))
            await self._server.wait_taken(waypoints=False)
            await trio.sleep(PAUSE)


def _answer(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    # Answers alone go to standard output: a line of the log would be taken for one.
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr), wrapper_class=structlog.make_filtering_bound_logger("warning")
    )
    trio.run(ControlPlane().run, int(sys.argv[1]), Path(sys.argv[2]))
