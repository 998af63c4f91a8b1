"""A waypoint between the agents of two nodes: CPU, rate and added latency of HTTP/1.1 and gRPC at 1 KB, and how many rules slow it down.

One lab, one client, one server. Services that are the same server are bound to different waypoints: ours, deployed as `meshctl waypoint
apply` asks for it, and pods that an overlay makes Envoys (`benches.envoy_waypoint`), whose certificates the lab's authority signs. Agents
on both sides are ours and the same. Every request has a token, matches the last route and the last policy, and before anything is measured
either waypoint has refused what it must refuse.

CPU is that of the waypoint's process alone, and in a unit of its own with the agents of both nodes.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from benches import http_load
from benches.cpu import cpu_seconds
from benches.envoy_waypoint import VERSION, Issuer, Rule, waypoint_config
from benches.http_load import GRPC, HTTP1
from benches.rows import ENVOY, OURS, Record, Row
from benches.stage import PORT, Broken, LoadClient, Say, Subject, agent_of, lab_of, load_client, namespace, node, pod, pod_ip, waypoint_of
from benches.turns import Quantity, Seen, Task, take_turns
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import command
from meshctl_py.lab.client import Lab

FIGURE: Final = "waypoint"
ROUNDS: Final = 7
SECONDS: Final = 1.0
RATE: Final = 200
PARALLEL: Final = (1, 16)
ROUTES: Final = 10_000
POLICIES: Final = 1_000
SLICES: Final = 4
MANY: Final = f"{ROUTES} routes, {POLICIES} policies"

_NAMESPACE: Final = "bench"
_PORTS: Final = {HTTP1: 80, GRPC: 81}
_DIRECT, _FEW, _MANY = "direct", "few", "many"
_PATIENCE: Final = 120.0
_ISSUER: Final = "https://issuer.test"
_ALLOWED: Final = "/bench.Echo/Unary"
_REFUSED: Final = "/bench.Secret/Unary"
_LOAD: Final = ("env", f"PYTHONPATH={Path(http_load.__file__).parents[1]}", sys.executable, "-m", http_load.__name__)
"""In a pod, whose directory is another."""


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    tasks = [_saturated(protocol, parallel) for protocol in _PORTS for parallel in PARALLEL]
    tasks += [_paced(protocol) for protocol in _PORTS]
    tasks += [_beside_few(protocol) for protocol in _PORTS]
    with _subjects(say) as taking_part:
        take_turns(record, taking_part, tasks, ROUNDS, say)
    return record.rows()


@dataclass(frozen=True, slots=True)
class Waypoint(Subject):
    """A subject whose ``server`` is the service with few rules. ``pids``: of the waypoint with few rules and of that with many."""

    direct: str
    many: str
    token: str
    agents: tuple[int, ...]

    def ask(self, protocol: str, parallel: int, seconds: float, *, of: str = "", **more: object) -> Seen:
        """Requests of the service whose address is ``of``, of that with few rules unless told. Raises Broken."""
        told = {"path": _ALLOWED, "fields": {VERSION: "v1", "authorization": f"Bearer {self.token}"}, **more}
        return self.client.do(
            "ask", host=of or self.server, port=_PORTS[protocol], protocol=protocol, parallel=parallel, seconds=seconds, **told
        )


def _saturated(protocol: str, parallel: int) -> Task:
    def work(subject: Subject) -> Seen:
        assert isinstance(subject, Waypoint)
        before = cpu_seconds(subject.agents)
        seen = subject.ask(protocol, parallel, SECONDS)
        return {**seen, "agents": cpu_seconds(subject.agents) - before}

    quantities: dict[str, Quantity] = {
        "cpu us/request": lambda cpu, seen: cpu / seen["requests"] * 1e6,
        "cpu us/request, with agents": lambda cpu, seen: (cpu + seen["agents"]) / seen["requests"] * 1e6,
        "requests/s": lambda _, seen: seen["requests"] / seen["seconds"],
    }
    return Task(f"{protocol}, {parallel} at a time", work, quantities)


def _paced(protocol: str) -> Task:
    """At a low rate, beside requests that the same agents carry without a waypoint between them."""

    def work(subject: Subject) -> Seen:
        assert isinstance(subject, Waypoint)
        direct = subject.ask(protocol, 1, SECONDS / 2, of=subject.direct, rate=RATE)
        seen = subject.ask(protocol, 1, SECONDS, rate=RATE)
        return {**seen, "added": seen["p50"] - direct["p50"]}

    quantities: dict[str, Quantity] = {
        "cpu us/request": lambda cpu, seen: cpu / seen["requests"] * 1e6,
        "us p50 added": lambda _, seen: seen["added"] * 1e6,
        "us p50": lambda _, seen: seen["p50"] * 1e6,
        "us p99": lambda _, seen: seen["p99"] * 1e6,
    }
    return Task(f"{protocol}, {RATE}/s", work, quantities)


def _beside_few(protocol: str) -> Task:
    """In short turns with the waypoint that has few rules: what is compared differs by less than a machine does from second to second."""

    def work(subject: Subject) -> Seen:
        assert isinstance(subject, Waypoint)
        spent = {"few": 0.0, "many": 0.0}
        done = {"few": 0.0, "many": 0.0}
        for number in range(2 * SLICES):
            which, of = ("few", subject.server) if number % 4 in (0, 3) else ("many", subject.many)
            before = cpu_seconds(subject.pids)
            done[which] += subject.ask(protocol, 16, SECONDS / 2 / SLICES, of=of)["requests"]
            spent[which] += cpu_seconds(subject.pids) - before
        return {which: spent[which] / done[which] for which in spent}

    quantities: dict[str, Quantity] = {
        "cpu us/request, many rules": lambda _, seen: seen["many"] * 1e6,
        "cpu, times that of few rules": lambda _, seen: seen["many"] / seen["few"],
    }
    return Task(f"{MANY}: {protocol}, 16 at a time", work, quantities)


# --- the lab


@contextmanager
def _subjects(say: Say) -> Iterator[tuple[Waypoint, ...]]:
    """Ours and Envoy's, warm."""
    key, another = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    issuer = Issuer(_ISSUER, json.dumps({"keys": [{**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "one", "alg": "RS256"}]}))
    token, forged = (
        jwt.encode({"iss": _ISSUER, "sub": "ann", "exp": int(time.time()) + 3600}, each, "RS256", headers={"kid": "one"})
        for each in (key, another)
    )
    rules = {_FEW: (_rules(3), _rules(1)), _MANY: (_rules(ROUTES), _rules(POLICIES))}
    with (
        tempfile.TemporaryDirectory(prefix="ambient-mesh-bench-") as configs,
        lab_of(say, _files(rules, issuer), name=FIGURE) as (lab, files),
    ):
        say("starting Envoys in the places of waypoints")
        server = SocketAddress(parse_ip(pod_ip(lab, _NAMESPACE, "server")), PORT)
        ca = FakeCa.with_key_of(lab.home.istiod)
        for name, (routes, policies) in rules.items():
            bundle = ca.issue(SpiffeId("cluster.local", _NAMESPACE, _gateway(_envoy(name))))
            Path(configs, f"{name}.json").write_text(json.dumps(waypoint_config(bundle, server, routes, policies, issuer)))
        (files / "envoy.yaml").write_text("".join(_envoy_waypoint(name, Path(configs, f"{name}.json")) for name in rules))
        _wait_programmed(lab)
        with load_client(lab, _NAMESPACE, _LOAD) as client:
            found = tuple(_subject(lab, client, name, token) for name in (OURS, ENVOY))
            for subject in found:
                _warm(subject, forged)
            yield found


def _rules(number: int) -> tuple[Rule, ...]:
    """So many of which the last is for what is measured."""
    others = tuple(
        Rule(f"/team-{each}.Service/", f"v{each % 7}", SpiffeId("cluster.local", _NAMESPACE, f"app-{each % 50}"))
        for each in range(number - 1)
    )
    return (*others, Rule("/bench.Echo/", "v1", SpiffeId("cluster.local", _NAMESPACE, "client")))


def _subject(lab: Lab, client: LoadClient, name: str, token: str) -> Waypoint:
    own = _envoy if name == ENVOY else str
    waypoints = tuple(waypoint_of(lab.home, _NAMESPACE, _gateway(own(each))) for each in (_FEW, _MANY))
    agents = tuple(pid for each in ("n1", "n2") for pid in agent_of(lab.home, each))
    server, many, direct = (_service_ip(lab, each) for each in (own(_FEW), own(_MANY), _DIRECT))
    return Waypoint(name, client, server, direct, waypoints, direct, many, token, agents)


def _warm(subject: Waypoint, forged: str) -> None:
    """Until every service is served, and with it what must be refused is: nobody goes past a waypoint, and none lets all through."""
    for protocol in _PORTS:
        for of in (subject.server, subject.many):
            _wait_passes(subject, protocol, of)
            subject.ask(protocol, 4, 0.5, of=of)
        _wait_passes(subject, protocol, subject.direct)
    for of in (subject.server, subject.many):
        for what, status in (({"path": _REFUSED}, "403"), ({"fields": {"authorization": f"Bearer {forged}"}}, "401")):
            try:
                subject.ask(HTTP1, 1, 0.0, of=of, **what)
            except Broken as exc:
                if status in str(exc):
                    continue
                raise
            raise Broken(f"{subject.name} lets {what} pass")


def _wait_passes(subject: Waypoint, protocol: str, of: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            subject.ask(protocol, 1, 0.0, of=of)
            return
        except Broken:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _wait_programmed(lab: Lab) -> None:
    deadline = time.monotonic() + _PATIENCE
    while len(waypoints := lab.status().waypoints) < 4 or any(each.because for each in waypoints):
        if time.monotonic() > deadline:
            raise Broken(f"not within {_PATIENCE:g} s: {waypoints}")
        time.sleep(0.2)


def _service_ip(lab: Lab, name: str) -> str:
    return next(each.ips[0] for each in lab.status().services if (each.namespace, each.name) == (_NAMESPACE, name))


# --- its objects


def _files(rules: dict[str, tuple[tuple[Rule, ...], tuple[Rule, ...]]], issuer: Issuer) -> dict[str, str]:
    serve = [*_LOAD, "serve", str(PORT)]
    place = [node("n1"), node("n2"), namespace(_NAMESPACE, captured=True)]
    pods = [pod(_NAMESPACE, "client", "n1", ["sleep", "infinity"]), pod(_NAMESPACE, "server", "n2", serve, port=PORT)]
    services = [_service(_DIRECT), *(_service(each, _gateway(each)) for name in rules for each in (name, _envoy(name)))]
    files = {"cluster.yaml": "".join([*place, *pods, *services, *(_waypoint(name, {"nodeName": "n2"}) for name in rules)])}
    for name, (routes, policies) in rules.items():
        files[f"{name}.yaml"] = "".join([_virtual_service(name, routes), _authentication(name, issuer), *_policies(name, policies)])
    return files


def _envoy(name: str) -> str:
    """The service that is the same as another, behind an Envoy."""
    return f"{name}-envoy"


def _gateway(service: str) -> str:
    """The waypoint of a service."""
    return f"waypoint-{service}"


def _service(name: str, waypoint: str = "") -> str:
    ports = [{"name": name, "port": port, "targetPort": PORT} for name, port in (("http", _PORTS[HTTP1]), ("grpc", _PORTS[GRPC]))]
    labels = {"istio.io/use-waypoint": waypoint} if waypoint else {}
    return _object("v1", "Service", name, {"selector": {"app": "server"}, "ports": ports}, labels=labels)


def _envoy_waypoint(name: str, config: Path) -> str:
    """Its pod waits for the configuration, in which its own address may stand."""
    run = f"exec {shlex.join(command(config))}"
    return _waypoint(_envoy(name), {"nodeName": "n2", "containers": [{"name": "istio-proxy", "command": ["sh", "-c", run]}]})


def _waypoint(service: str, overlay: Mapping[str, object]) -> str:
    """As `meshctl waypoint apply` writes it, and where and what its pod is to be."""
    gateway = _gateway(service)
    spec = {
        "gatewayClassName": "istio-waypoint",
        "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
        "infrastructure": {"parametersRef": {"group": "", "kind": "ConfigMap", "name": gateway}},
    }
    data = {"deployment": json.dumps({"spec": {"template": {"spec": overlay}}})}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": gateway, "namespace": _NAMESPACE}, "data": data}
    return f"---\n{json.dumps(config_map)}\n" + _object("gateway.networking.k8s.io/v1", "Gateway", gateway, spec)


def _virtual_service(name: str, routes: tuple[Rule, ...]) -> str:
    to = [{"destination": {"host": name}}]
    http = [{"match": [{"uri": {"prefix": rule.prefix}, "headers": {VERSION: {"exact": rule.version}}}], "route": to} for rule in routes]
    return _object("networking.istio.io/v1", "VirtualService", name, {"hosts": [name], "http": [*http, {"route": to}]})


def _authentication(name: str, issuer: Issuer) -> str:
    rule = {"issuer": issuer.name, "jwks": issuer.jwks}
    return _object("security.istio.io/v1", "RequestAuthentication", name, {"targetRefs": _targets(name), "jwtRules": [rule]})


def _policies(name: str, policies: tuple[Rule, ...]) -> Iterator[str]:
    for number, rule in enumerate(policies):
        caller = {"source": {"principals": [str(rule.caller).removeprefix("spiffe://")]}}
        what = {"operation": {"methods": ["POST"], "paths": [f"{rule.prefix}*"]}}
        spec = {"targetRefs": _targets(name), "action": "ALLOW", "rules": [{"from": [caller], "to": [what]}]}
        yield _object("security.istio.io/v1", "AuthorizationPolicy", f"{name}-{number}", spec)


def _targets(name: str) -> list[dict[str, str]]:
    return [{"group": "", "kind": "Service", "name": name}]


def _object(version: str, kind: str, name: str, spec: Mapping[str, object], labels: dict[str, str] | None = None) -> str:
    metadata = {"name": name, "namespace": _NAMESPACE, "labels": labels or {}}
    return f"---\n{json.dumps({'apiVersion': version, 'kind': kind, 'metadata': metadata, 'spec': spec})}\n"
