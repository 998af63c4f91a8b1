"""What a waypoint is told of a destination: how its endpoints are chosen and reached, port by port and subset by subset, and the labels of
endpoints that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from istiod_py.translate.l7.destination_rules import Merged, MergedSubset
from istiod_py.translate.l7.traffic import CLUSTER, HOSTNAME, TrafficFacts, effective, make_policy, ports_of
from mesh.model.l7.destination import DestinationConfig, Subset, TrafficPolicy, UpstreamTls
from mesh.model.labels import NETWORK, REGION, SUBZONE, ZONE
from mesh.model.workload import Workload


@dataclass(frozen=True, slots=True)
class Destined:
    """A Service, or one host of a ServiceEntry. ``kind`` and ``name`` are the object's; ``ports`` are names (may be empty) by number."""

    kind: str
    namespace: str
    name: str
    hostname: str
    ports: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A workload of the service, and the labels of the object that it was made of. The waypoint's own instances belong among them: what is
    close is found by comparing with theirs."""

    workload: Workload
    labels: Mapping[str, str]


def configure(destined: Destined, merged: Merged, backend: Mapping[str, UpstreamTls], facts: TrafficFacts) -> DestinationConfig:
    """Without labels of endpoints: see `label_endpoints`. ``backend``: TLS of BackendTLSPolicies by the port's name; under ``""``, of all
    others."""
    subsets = [subset.piece.settings for subset in merged.subsets]
    told = ports_of((merged.piece.settings, *subsets))
    every = set(destined.ports) | told

    def make(port: int | None, subset: MergedSubset | None = None) -> TrafficPolicy:
        name = destined.ports.get(port, "") if port is not None else ""
        return make_policy(effective(merged.piece, port, subset), backend.get(name, backend.get("")), facts)

    def make_ports(policy: TrafficPolicy, subset: MergedSubset | None = None) -> dict[int, TrafficPolicy]:
        """Those that are not as the rest is."""
        return {port: alone for port in sorted(every) if (alone := make(port, subset)) != policy}

    policy = make(None)
    made = []
    for subset in merged.subsets:
        whole = make(None, subset)
        made.append(Subset(subset.name, subset.labels, whole, make_ports(whole, subset)))
    origin = ", ".join(f"{key.kind} {key.namespace}/{key.name}" for key in merged.keys)
    return DestinationConfig(destined.namespace, destined.hostname, origin, policy, make_ports(policy), tuple(made))


def wanted_labels(config: DestinationConfig) -> frozenset[str]:
    """The keys of labels that somebody looks at."""
    policies = [config.policy, *config.ports.values()]
    for subset in config.subsets:
        policies += [subset.policy, *subset.ports.values()]
    keys = {key for subset in config.subsets for key in subset.labels}
    for policy in policies:
        locality = policy.load_balancer.locality
        keys |= {item.partition("=")[0] for item in locality.priority} if locality is not None else set()
    return frozenset(keys)


def label_endpoints(keys: frozenset[str], endpoints: Iterable[Endpoint]) -> dict[str, Mapping[str, str]]:
    """By the workload's uid. What is known of a workload's place stands beside the labels that it was given, and before them."""
    if not keys:
        return {}
    found: dict[str, Mapping[str, str]] = {}
    for endpoint in endpoints:
        labels = {**endpoint.labels, **_place_of(endpoint.workload)}
        found[endpoint.workload.uid] = {key: labels[key] for key in sorted(keys) if key in labels}
    return found


def _place_of(workload: Workload) -> dict[str, str]:
    place = {
        NETWORK: workload.network,
        REGION: workload.locality.region,
        ZONE: workload.locality.zone,
        SUBZONE: workload.locality.subzone,
        HOSTNAME: workload.node,
        CLUSTER: workload.cluster_id,
    }
    return {key: value for key, value in place.items() if value}
