from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.runtime import env


@dataclass(frozen=True, slots=True)
class Config:
    node_name: str = env.variable("NODE_NAME", parse=env.nonempty, doc="the node's name")
    cluster: str = env.variable("ISTIO_META_CLUSTER_ID", "CLUSTER_ID", parse=env.text, default="Kubernetes", doc="the cluster's name")
    drain: float = env.variable("DRAIN", parse=env.duration, default="5s", doc="how long to drain")
    ipv6: bool = env.variable("IPV6_ENABLED", parse=env.boolean, default="true", doc="serve IPv6")
    movers: int | None = env.optional("MOVERS", parse=env.integer(1, 64), doc="number of movers")
    token: str | None = env.optional("AUTH_TOKEN", parse=env.nonempty, secret=True, doc="the token")


def test_defaults_and_first_names_are_taken():
    config = env.from_environment(Config, {"NODE_NAME": "n1", "CLUSTER_ID": "b", "ISTIO_META_CLUSTER_ID": "a", "DRAIN": "1m30s"})
    assert config == Config(node_name="n1", cluster="a", drain=90.0, ipv6=True, movers=None, token=None)


def test_every_mistake_is_reported_at_once_with_name_value_and_what_was_expected():
    with pytest.raises(env.InvalidEnvironment) as caught:
        env.from_environment(Config, {"DRAIN": "soon", "IPV6_ENABLED": "yes", "MOVERS": "0", "AUTH_TOKEN": ""})
    assert str(caught.value).splitlines() == [
        "missing env var NODE_NAME (expected the node's name)",
        "invalid env var DRAIN=soon (expected a duration such as 10s, 500ms, 5m or 24h)",
        "invalid env var IPV6_ENABLED=yes (expected true or false)",
        "invalid env var MOVERS=0 (expected a whole number from 1 to 64)",
        "invalid env var AUTH_TOKEN=<hidden> (expected a value that is not empty)",
    ]


def test_an_empty_value_is_not_an_unset_one():
    assert env.from_environment(Config, {"NODE_NAME": "n", "CLUSTER_ID": ""}).cluster == ""
    with pytest.raises(env.InvalidEnvironment, match="IPV6_ENABLED= "):
        env.from_environment(Config, {"NODE_NAME": "n", "IPV6_ENABLED": ""})


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10), ("500ms", 0.5), ("5m", 300), ("24h", 86400), ("1h30m", 5400), ("1.5s", 1.5), ("0", 0), ("0s", 0)]
)
def test_durations(text, seconds):
    assert env.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "s", "-1s", "1s ", " 1s", "1S", "1d", "1s2", "1.s", "1e3s", "١s", "9" * 30 + "s"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="duration"):
        env.duration(text)


@pytest.mark.parametrize("text", ["True", "1", "on", "TRUE", " true"])
def test_booleans_are_true_and_false_only(text):
    with pytest.raises(ValueError, match="true or false"):
        env.boolean(text)


@pytest.mark.parametrize("text", ["", "-", "1.0", "x", "²", "9" * 40, "+1", " 1", "65536", "0"])
def test_what_is_no_port(text):
    with pytest.raises(ValueError, match="from 1 to 65535"):
        env.port(text)


def test_other_parsers():
    assert env.host_and_port("[::1]:80") == ("::1", 80)
    assert env.host_and_port("istiod.istio-system.svc:15012") == ("istiod.istio-system.svc", 15012)
    assert env.paths("a::/b") == (Path("a"), Path("/b"))
    assert env.choice("plain", "json")("json") == "json"
    with pytest.raises(ValueError, match="plain or json"):
        env.choice("plain", "json")("xml")
    for bad in ("::1:80", "host", ":80", "host:0", "host:"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            env.host_and_port(bad)
    with pytest.raises(ValueError, match="a path"):
        env.path("")


def test_the_documentation_has_a_row_for_every_field():
    rows = env.describe(Config)
    assert [row.field for row in rows] == ["node_name", "cluster", "drain", "ipv6", "movers", "token"]
    assert rows[1].names == ("ISTIO_META_CLUSTER_ID", "CLUSTER_ID")
    assert rows[2].default == "5s"
    assert (rows[0].required, rows[4].required) == (True, False)
