"""What the agent makes of its environment."""

from __future__ import annotations

import pytest

from mesh.runtime.env import InvalidEnvironment
from ztunnel_py.brain.processes import slots
from ztunnel_py.config import SPARE, AgentConfig, read_config

NEEDED = {"NODE_NAME": "n1", "MESH_SOURCE": "/source", "MESH_STATUS_DIR": "/status"}


def read(**environ: str) -> AgentConfig:
    return read_config(NEEDED | environ)


def test_look_ups_are_answered_and_captured_unless_told_otherwise() -> None:
    config = read()
    assert (config.dns_proxy, config.dns_capture, config.cluster_domain, config.preferred_namespace) == (True, True, "cluster.local", None)
    config = read(ISTIO_META_DNS_CAPTURE="false", AMBIENT_DNS_CAPTURE="false", PREFERED_SERVICE_NAMESPACE="infra")
    assert (config.dns_proxy, config.dns_capture, config.preferred_namespace) == (False, False, "infra")


def test_every_mover_has_a_name_and_the_one_apart_the_first_place_however_many_there_are() -> None:
    for movers, own in (("2", 1), ("4", 3)):
        config = read(MOVERS=movers, SPARE_MOVER="true")
        assert config.mover_names == (SPARE, *slots(own))
    assert read(MOVERS="2").mover_names == tuple(slots(2))


@pytest.mark.parametrize(("text", "domain"), [("cluster.local", "cluster.local"), ("Example.Test.", "example.test"), ("k8s", "k8s")])
def test_the_domain_of_the_cluster(text: str, domain: str) -> None:
    assert read(CLUSTER_DOMAIN=text).cluster_domain == domain


@pytest.mark.parametrize("text", ["", ".", "a..b", "-a.b", "a b", "a" * 64 + ".b", "*.local"])
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InvalidEnvironment) as refusal:
        read(CLUSTER_DOMAIN=text)
    assert str(refusal.value) == f"invalid env var CLUSTER_DOMAIN={text} (expected a domain such as cluster.local)"
