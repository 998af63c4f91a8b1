"""Every metric, access log field and response flag is in its reference page, and no other is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.telemetry.access import AccessEvent, AccessPeer, AccessRecord, format_json
from mesh.telemetry.metrics import DnsMetrics, Registry, TcpMetrics, WorkloadManagerMetrics, XdsMetrics, add_build, add_process, tcp_labels
from ztunnel_py.mover.ledger import Failure
from ztunnel_py.mover.outbound import flag_of

ROOT = Path(__file__).parents[3]
SECTIONS = dict(
    section.partition("\n")[::2] for section in re.split(r"^## ", (ROOT / "docs/reference/telemetry.md").read_text(), flags=re.MULTILINE)
)


def listed(text: str) -> set[str]:
    """The names in the first column of the tables."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def metrics_of_the_agent() -> set[str]:
    registry = Registry()
    TcpMetrics(registry).series(
        tcp_labels("source", source=None, destination=None, service=None, source_identity=None, mutual_tls=False)
    ).close("CONNECT")
    lookups = DnsMetrics(registry).series("A", "udp", None)
    lookups.forwarded()
    lookups.ended(0.1, failed=True)
    xds = XdsMetrics(registry)
    xds.terminated("Error")
    xds.received("type", 1)
    WorkloadManagerMetrics(registry)
    add_build(registry, "ztunnel", "1")
    add_process(registry)
    return {family.name for family in registry.snapshot().families}


def test_the_metrics_of_the_agent_are_listed() -> None:
    assert listed(SECTIONS["Metrics of the agent"]) == metrics_of_the_agent()


def test_the_metrics_of_istiod_are_listed() -> None:
    source = "".join(path.read_text() for path in (ROOT / "istiod_py").rglob("*.py"))
    built = set(re.findall(r'"((?:pilot|citadel)_[a-z_]+)"', source))
    assert listed(SECTIONS["Metrics of istiod"]) == built | {"istio_build", "process_open_fds", "process_max_fds"}


def test_the_fields_and_flags_of_the_access_log_are_listed() -> None:
    peer = AccessPeer(SocketAddress(parse_ip("10.0.0.1"), 1), "w", "n", "c", SpiffeId("cluster.local", "n", "a"))
    record = AccessRecord(
        AccessEvent.COMPLETE, "inbound", peer, peer, 0.0, hbone_address="10.0.0.1:1", service="s", error="e", response_flags="DENY",
        policy="p", rule=0, because="b", closed_first="downstream",
    )  # fmt: skip
    fields = json.loads(format_json(record)).keys() - {"level", "time", "scope", "message"}
    reasons = ("", "connection timed out, maybe a NetworkPolicy", "identity error", "tls failed", "h2 failed")
    flags = {"DENY", Failure("broke").flags, *map(flag_of, reasons)}
    assert listed(SECTIONS["The access log"]) == fields | flags
