"""What CNI plugins say, ours and Istio's, and what nobody should."""

from __future__ import annotations

import json

import pytest

from mesh.model.address import parse_ip
from ztunnel_py.cni.request import BadRequest, PodAdded, parse_added

ISTIOS = {
    "Netns": "/var/run/netns/cni-1",
    "PodName": "web-1",
    "PodNamespace": "shop",
    "IPs": [{"Interface": 2, "Address": {"IP": "10.1.2.3", "Mask": "////AA=="}, "Gateway": "10.1.2.1"}],
}


def test_the_request_of_istios_plugin_is_understood() -> None:
    assert parse_added(json.dumps(ISTIOS).encode()) == PodAdded("shop", "web-1", "", "/var/run/netns/cni-1", (parse_ip("10.1.2.3"),))


def test_the_request_of_our_plugin_says_the_uid_too() -> None:
    ours = ISTIOS | {"PodUID": "u", "IPs": [{"Interface": None, "Address": {"IP": "fd00::1", "Mask": ""}, "Gateway": ""}]}
    assert parse_added(json.dumps(ours).encode()) == PodAdded("shop", "web-1", "u", "/var/run/netns/cni-1", (parse_ip("fd00::1"),))
    assert parse_added(json.dumps(ISTIOS | {"IPs": None}).encode()).ips == ()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"Netns": "netns"}, "Netns"),
        ({"Netns": "/a\0b"}, "Netns"),
        ({"PodName": ""}, "PodName"),
        ({"PodNamespace": "n" * 300}, "PodNamespace"),
        ({"PodUID": "n" * 300}, "PodUID"),
        ({"PodUID": 5}, "PodUID"),
        ({"IPs": [{"Address": {"IP": "10.0.0.300"}}]}, "IPs"),
        ({"IPs": [{"Address": {"IP": "10.0.0.3"}}] * 17}, "IPs"),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(BadRequest, match=field):
        parse_added(json.dumps(ISTIOS | change).encode())


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"[" * 60_000, b"\xff"])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_added(body)
