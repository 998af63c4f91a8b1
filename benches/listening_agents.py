"""Many agents of a control plane that take what they are told, and do nothing about it: ``python -m benches.listening_agents PORT DIRECTORY
COUNT``. Writes a line once each has the whole mesh, and ends with its standard input."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import structlog
import trio

from benches.served_mesh import ROOT
from mesh.rpc.tls import client_tls
from mesh.xds.client import AdsClientConfig, AdsState, connect_tls, run_ads_client
from mesh.xds.names import node_id


async def run(port: int, directory: Path, count: int) -> None:
    """Until standard input ends."""
    tls = client_tls((directory / ROOT).read_text())
    synced: set[int] = set()
    all_synced = trio.Event()

    async def listen(number: int) -> None:
        def note(state: AdsState) -> None:
            if state.synced:
                synced.add(number)
            if len(synced) == count:
                all_synced.set()

        connect = connect_tls("127.0.0.1", port, lambda: tls, server_hostname="localhost")
        await run_ads_client(AdsClientConfig(connect, dict, node_id("10.0.0.1", f"agent-{number}", "mesh")), lambda update: None, note)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(listen, number)
        await all_synced.wait()
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    trio.run(run, int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
