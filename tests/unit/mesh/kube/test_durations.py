"""Durations in Go's notation, as Istio and as the Gateway API take them."""

from __future__ import annotations

import pytest

from mesh.kube.durations import DURATION, GATEWAY_DURATION, parse_duration


@pytest.mark.parametrize(("text", "seconds"), [
    ("1s", 1), ("1.5s", 1.5), (".5s", 0.5), ("1.s", 1), ("100ms", 0.1), ("1h2m3.5s", 3723.5), ("1us", 1e-6), ("1µs", 1e-6), ("1ns", 1e-9),
    ("0s", 0), ("1h1h", 7200), ("", None), ("5", None), ("-1s", None), ("1 s", None), ("1d", None), ("s", None), (".s", None),
    ("1e3s", None),
    ("9" * 70 + "s", None), ("9999999999999h", None), ("１s", None),
])  # fmt: skip
def test_a_duration_is_read_exactly(text: str, seconds: float | None) -> None:
    found = parse_duration(text)
    assert (None if found is None else float(found)) == seconds


@pytest.mark.parametrize(("text", "istio", "gateway"), [
    ("1s", True, True), ("1ms", True, True), ("0s", False, True), ("0.5ms", False, False), ("1.5s", True, False), ("1.5ms", False, False),
    ("1us", False, False), ("1000us", True, False), ("1h30m", True, True), ("1h1m1s1ms", True, True), ("1h1m1s1ms1s", True, False),
    ("100000s", True, False), ("x", False, False),
])  # fmt: skip
def test_istio_wants_milliseconds_and_the_gateway_api_no_fractions(text: str, istio: bool, gateway: bool) -> None:
    assert (DURATION.find_mistake(text) is None, GATEWAY_DURATION.find_mistake(text) is None) == (istio, gateway)
