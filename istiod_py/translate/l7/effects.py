"""Fields of a DestinationRule that Istio takes and that have no effect at a waypoint: told in the rule's status and as problems, since
nobody would find out else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from istiod_py.translate.l7.notices import Notice
from mesh.kube.destinationrule import KubeDestinationRule
from mesh.kube.objects import FieldPath
from mesh.kube.trafficpolicy import BalancerSettings, Blocks, OutlierSettings, PolicySettings, TlsSettings
from mesh.model.l7.destination import MOST_SLOTS, Balance

NO_EFFECT: Final = "has no effect at waypoints"


def find_without_effect(rule: KubeDestinationRule) -> tuple[Notice, ...]:
    """In order of the fields."""
    if rule.selects_workloads:
        message = f"{NO_EFFECT}: a rule with a workloadSelector is for proxies beside the workloads that it selects"
        return (Notice(("spec", "workloadSelector"), message),)
    return tuple(_look(rule))


def _look(rule: KubeDestinationRule) -> Iterator[Notice]:
    if rule.policy is not None:
        yield from _look_at_policy(rule.policy, ("spec", "trafficPolicy"))
    for index, subset in enumerate(rule.subsets):
        if subset.policy is not None:
            yield from _look_at_policy(subset.policy, ("spec", "subsets", index, "trafficPolicy"))


def _look_at_policy(policy: PolicySettings, path: FieldPath) -> Iterator[Notice]:
    yield from _look_at_blocks(policy.blocks, path)
    seen: set[int] = set()
    for index, (port, blocks) in enumerate(policy.ports):
        here: FieldPath = (*path, "portLevelSettings", index)
        if port in seen:
            yield Notice((*here, "port", "number"), f"has no effect: port {port} stands before it in the list")
        seen.add(port)
        yield from _look_at_blocks(blocks, here)
    if policy.tunnel is not None:
        yield Notice((*path, "tunnel"), f"{NO_EFFECT}: they reach every destination through the mesh's own tunnels, or directly")


def _look_at_blocks(blocks: Blocks, path: FieldPath) -> Iterator[Notice]:
    if blocks.balancer is not None:
        yield from _look_at_balancer(blocks.balancer, blocks.outlier, (*path, "loadBalancer"))
    if blocks.outlier is not None and blocks.outlier.legacy:
        message = "has no effect: Istio gave it up for consecutiveGatewayErrors and consecutive5xxErrors"
        yield Notice((*path, "outlierDetection", "consecutiveErrors"), message)
    if blocks.tls is not None:
        yield from _look_at_tls(blocks.tls, (*path, "tls"))


def _look_at_balancer(balancer: BalancerSettings, outlier: OutlierSettings | None, path: FieldPath) -> Iterator[Notice]:
    if balancer.simple is Balance.PASSTHROUGH:
        yield Notice((*path, "simple"), f"{NO_EFFECT} for services with a virtual address: nobody is there")
    if balancer.zone_aware:
        yield Notice((*path, "zoneAwareLbSetting"), f"{NO_EFFECT}: they know localityLbSetting")
    if balancer.warmup is not None and (balancer.hash is not None or balancer.simple in (Balance.RANDOM, Balance.PASSTHROUGH)):
        yield Notice((*path, "warmup"), "has no effect beside this way of balancing: it is for ROUND_ROBIN and LEAST_REQUEST")
    if balancer.hash is not None and (balancer.hash.table_size or balancer.hash.minimum_ring_size) > MOST_SLOTS:
        yield Notice((*path, "consistentHash"), f"a size beyond {MOST_SLOTS} {NO_EFFECT}: they make none larger")
    locality = balancer.locality
    if locality is None:
        return
    here: FieldPath = (*path, "localityLbSetting")
    if locality.distribute and locality.priority:
        yield Notice((*here, "failoverPriority"), "has no effect beside 'distribute'")
    if outlier is None and locality.enabled is not False and (locality.failover or locality.priority):
        key = "failoverPriority" if locality.priority else "failover"
        yield Notice(
            (*here, key), "has no effect without outlierDetection here, or one for the whole mesh: nothing would tell when to fail over"
        )


def _look_at_tls(tls: TlsSettings, path: FieldPath) -> Iterator[Notice]:
    if tls.mode in ("DISABLE", "ISTIO_MUTUAL"):
        yield Notice(
            (*path, "mode"), f"{NO_EFFECT}: {tls.mode} says how the mesh itself carries traffic, which is by mutual TLS in tunnels"
        )
        return
    for field, value in (("clientCertificate", tls.client_certificate), ("privateKey", tls.private_key), ("caCrl", tls.ca_crl)):
        if value:
            yield Notice((*path, field), _NO_FILES)
    if tls.ca_certificates not in ("", "system"):
        yield Notice((*path, "caCertificates"), _NO_FILES)


_NO_FILES: Final = "waypoints read no files, and let no request through to where this holds: use credentialName"
