"""Compiles the data path to machine code where that is asked for; everything else about the distribution stands in pyproject.toml.

With AMBIENT_MESH_COMPILED=1 mypyc makes a C extension of each of `COMPILED`, from the same source and its annotations. Needed are a C
compiler, Python's headers, and in the same environment all dependencies and the extra ``compile``: mypyc wants their types, so build
without isolation:

    AMBIENT_MESH_COMPILED=1 pip install --no-build-isolation .

Why, and what may not be compiled: docs/design/decisions/0009-compiled-data-path.md.
"""

import os

from setuptools import setup

COMPILED = [
    *("mesh/wire/frames.py", "mesh/wire/headers.py", "mesh/wire/settings.py", "mesh/wire/authority.py"),
    *("mesh/wire/baggage.py", "mesh/wire/forwarded.py", "mesh/wire/traceparent.py"),
    *("mesh/wire/hbone/client.py", "mesh/wire/hbone/connection.py", "mesh/wire/hbone/patience.py"),
    *("mesh/wire/hbone/server.py", "mesh/wire/hbone/streams.py"),
    *("mesh/authz/evaluate.py", "mesh/authz/match.py"),
    *("mesh/xds/decode.py", "mesh/state/store.py", "mesh/state/index.py"),
    *("mesh/state/memo.py", "mesh/state/inbound.py", "mesh/state/resolve.py", "mesh/state/balance.py"),
    *("mesh/reactor/loop.py", "mesh/reactor/tcp.py", "mesh/reactor/pipes.py", "mesh/reactor/relay.py", "mesh/reactor/tls.py"),
    *("mesh/reactor/hbone.py", "mesh/reactor/pool.py", "mesh/reactor/sharing.py", "mesh/telemetry/access.py"),
    *("ztunnel_py/mover/inbound.py", "ztunnel_py/mover/outbound.py", "ztunnel_py/mover/pod.py", "ztunnel_py/mover/ledger.py"),
    *("ztunnel_py/mover/waiting.py", "ztunnel_py/mover/missed.py", "ztunnel_py/mover/plane.py", "ztunnel_py/mover/credentials.py"),
    "mesh/tls/peer.py",
    *("mesh/http/message.py", "mesh/http/headers.py", "mesh/http/path.py", "mesh/http/blocks.py"),
    *("mesh/http/h1.py", "mesh/http/h2.py", "mesh/http/codec.py"),
    *("waypoint_py/streams/base.py", "waypoint_py/streams/tcp.py", "waypoint_py/streams/tls.py", "waypoint_py/streams/tunnel.py"),
    *("waypoint_py/downstream.py", "waypoint_py/exchange.py", "waypoint_py/attempt.py", "waypoint_py/body.py", "waypoint_py/grpc.py"),
    *("waypoint_py/preparation.py", "waypoint_py/plane.py", "waypoint_py/context.py"),
    *("waypoint_py/upstream/affinity.py", "waypoint_py/upstream/algorithms.py", "waypoint_py/upstream/balancer.py"),
    *("waypoint_py/upstream/client.py", "waypoint_py/upstream/outlier.py"),
    *("waypoint_py/upstream/pool.py", "waypoint_py/upstream/session.py"),
    *("waypoint_py/routing/actions.py", "waypoint_py/routing/grpc.py", "waypoint_py/routing/headers.py"),
    *("waypoint_py/routing/predicates.py", "waypoint_py/routing/retry.py", "waypoint_py/routing/timeouts.py"),
]
"""What an agent runs for every message, connection and change of the mesh, and of a waypoint what every request passes."""


def _extensions() -> list[object]:
    if os.environ.get("AMBIENT_MESH_COMPILED") != "1":
        return []
    from mypyc.build import mypycify  # only needed, and only there, where it is asked for

    return list(mypycify(COMPILED, opt_level="3", debug_level="0", multi_file=True, group_name="ambient_mesh"))


setup(ext_modules=_extensions())
