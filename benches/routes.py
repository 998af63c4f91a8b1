"""Ten thousand routes of a waypoint: what they cost its control plane and itself, for all services together and for each by itself.

Both sides run in processes of their own, so that the memory of each is its own; what the one says is handed to the other in a file. "A
step" is the longest that a waypoint's reactor is held between requests, "a message" what has to be decoded at once. A request's route is
looked for among many and among few.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, TypeAlias

from benches.cpu import resident_kib
from benches.rows import OURS, Record, Row
from benches.stage import Say
from istiod_py.snapshot import diff
from istiod_py.translate import Config, Translation, translate
from mesh.http.message import Request
from mesh.kube.objects import KubeObject
from mesh.model.l7.matching import PathKind, PathMatch, RouteMatch
from mesh.model.l7.routing import DirectResponse, Origin, Route
from mesh.model.l7.waypoint import WaypointSettings
from mesh.runtime.garbage import collect_seldom
from mesh.testing.objects import objects_from_yaml
from mesh.xds.cache import Changes, ResourceCache
from mesh.xds.decode import decode_response
from mesh.xds.l7 import L7_TYPES
from mesh.xds.proto import discovery_pb2 as discovery
from mesh.xds.server import PART_SIZE, Part, split
from waypoint_py.routing.match import compile_routes
from waypoint_py.store import Store

FIGURE: Final = "routes"
ROUTES: Final = 10_000
WILDCARD: Final = f"{ROUTES} matches for a wildcard, 60 services of two ports"
OWN: Final = f"{ROUTES} routes, ten for each of 1000 services"
CASES: Final = (WILDCARD, OWN)
ROUNDS: Final = 3
LOOKUPS: Final = 5_000
FEW: Final = 3

Costs: TypeAlias = dict[str, float]
"""By unit."""

_WAYPOINT: Final = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: waypoint.shop.svc.cluster.local}]}
"""


def measure(say: Say) -> list[Row]:
    """CPU, memory and bytes of the first configuration, then of one VirtualService that changes."""
    record = Record(FIGURE)
    for case in CASES:
        for number in range(ROUNDS):
            say(f"{case}, round {number + 1} of {ROUNDS}")
            for side, costs in _measure_case(case).items():
                for unit, value in costs.items():
                    record.add(f"{case}: {side}", unit, OURS, value)
    say("looking for a request's route")
    for _ in range(ROUNDS):
        for count in (FEW, ROUTES):
            record.add(f"the last of {count} routes by prefix", "cpu us/look-up", OURS, _time_lookup(count))
    return record.rows()


def _measure_case(case: str) -> dict[str, Costs]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ambient-mesh-bench-") as directory:
        told = Path(directory, "told")
        found: dict[str, Costs] = {}
        for run in (run_control_plane, run_waypoint):
            with ProcessPoolExecutor(1, mp_context=context) as process:
                found |= process.submit(run, case, told).result()
    return found


# The objects


def objects_of(case: str, changed: str = "") -> list[KubeObject]:
    """``changed``: part of one path."""
    services, ports = (
        (60, "{name: http, port: 80}, {name: http-other, port: 8080}") if case == WILDCARD else (1000, "{name: http, port: 80}")
    )
    text = [_WAYPOINT, *(_service(number, ports) for number in range(services))]
    if case == WILDCARD:
        text.append(_virtual_service("wildcard", "*.shop.svc.cluster.local", 0, ROUTES, services, changed))
    else:
        each = ROUTES // services
        text += [
            _virtual_service(f"v{number}", f"s{number}", number, each, services, changed if number == 0 else "")
            for number in range(services)
        ]
    return objects_from_yaml("".join(text))[0]


def _service(number: int, ports: str) -> str:
    address = f"10.96.{number // 250}.{number % 250 + 1}"
    spec = f"{{clusterIP: {address}, ports: [{ports}]}}"
    return f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: shop}}\nspec: {spec}\n"


def _virtual_service(name: str, host: str, first: int, rules: int, services: int, changed: str) -> str:
    return (
        f"---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: shop}}\n"
        f"spec:\n  hosts: ['{host}']\n  http:\n"
    ) + "".join(
        f"  - match: [{{uri: {{prefix: /p{number}{changed if number == 0 else ''}/}}}}]\n"
        f"    route: [{{destination: {{host: s{(first + number) % services}, port: {{number: 80}}}}}}]\n"
        for number in range(rules)
    )


# The two sides


def run_control_plane(case: str, told: Path) -> dict[str, Costs]:
    """Leaves what it has to say in ``told``: the first messages, and those of the change."""
    first, second = objects_of(case), objects_of(case, "changed")
    new = next(obj for obj in second if obj.kind == "VirtualService")
    # What did not change is the same object, as a source keeps it.
    second = [new if obj.key == new.key else obj for obj in first]
    gc.collect()
    before = resident_kib(os.getpid())
    cache, config = ResourceCache(), Config()
    began = time.process_time()
    translated = translate(first, None, config)
    messages = list(_messages(cache, cache.apply(diff(Translation(), translated))))
    whole = time.process_time() - began
    memory = resident_kib(os.getpid()) - before
    began = time.process_time()
    again = list(_messages(cache, cache.apply(diff(translated, translate(second, translated, config)))))
    change = time.process_time() - began
    told.write_bytes(pickle.dumps((messages, again)))
    return {
        "control plane": {
            "cpu s": whole,
            "MB more": memory / 1024,
            "MB to say": _megabytes(messages),
            "MB, a message": max(map(len, messages)) / 1e6,
        },
        "control plane, one VirtualService changes": {"cpu s": change, "MB to say": _megabytes(again)},
    }


def run_waypoint(case: str, told: Path) -> dict[str, Costs]:
    """``case`` is that of the other side."""
    messages, again = pickle.loads(told.read_bytes())
    collect_seldom()
    before = resident_kib(os.getpid())
    store = Store(WaypointSettings("shop", "waypoint"))
    cpu, step = _take(store, messages)
    memory = resident_kib(os.getpid()) - before
    change, _ = _take(store, again)
    return {
        "waypoint": {"cpu s": cpu, "MB more": memory / 1024, "cpu ms, a step": step * 1000},
        "waypoint, one VirtualService changes": {"cpu s": change},
    }


def _messages(cache: ResourceCache, changes: Changes) -> Iterator[bytes]:
    for type_url in L7_TYPES:
        names = changes.get(type_url, ())
        found = {name: cache.get(type_url, name) for name in names}
        new, gone = [each for each in found.values() if each is not None], [name for name, each in found.items() if each is None]
        for part in split(Part(new, gone), PART_SIZE) if names else ():
            response = discovery.DeltaDiscoveryResponse(type_url=type_url, nonce="n", removed_resources=part.removed)
            for each in part.resources:
                response.resources.add(name=each.name, version=each.version, resource={"type_url": type_url, "value": each.body})
            yield response.SerializeToString()


def _take(store: Store, messages: list[bytes]) -> tuple[float, float]:
    """CPU seconds in all, and of the longest step."""
    began, longest = time.process_time(), 0.0
    for raw in messages:
        steps = store.applying(decode_response(raw).delta)
        done = False
        while not done:
            step = time.process_time()
            done = next(steps, True) is True
            longest = max(longest, time.process_time() - step)
    return time.process_time() - began, longest


def _megabytes(messages: list[bytes]) -> float:
    return sum(map(len, messages)) / 1e6


# A request


def _time_lookup(count: int) -> float:
    origin = Origin("VirtualService", "shop", "v")
    matches = [RouteMatch(path=PathMatch(PathKind.PREFIX, f"/p{number}/")) for number in range(count)]
    routes = compile_routes(tuple(Route(origin, DirectResponse(200), matches=(match,)) for match in matches))
    request = Request(b"GET", b"http", b"shop.test", b"/p%d/items" % (count - 1), [])
    began = time.process_time()
    for _ in range(LOOKUPS):
        routes.find(request, 80)
    return (time.process_time() - began) / LOOKUPS * 1e6
