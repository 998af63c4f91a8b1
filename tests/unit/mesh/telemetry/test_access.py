import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.telemetry.access import AccessEvent, AccessLog, AccessPeer, AccessRecord, format_json, format_plain
from mesh.telemetry.output import LogOutput

CLIENT = Workload("c//Pod/app/client-0", "client-0", "app", service_account="client")
SERVER = Workload("c//Pod/app/server-0", "server-0", "app", service_account="server")
RECORD = AccessRecord(
    AccessEvent.COMPLETE,
    "outbound",
    SocketAddress.parse("10.0.1.2:40000"),
    AccessPeer.of(CLIENT, CLIENT.identity),
    SocketAddress.parse("10.0.2.2:15008"),
    AccessPeer.of(SERVER, SERVER.identity),
    ended=1767225600.25,
    duration=0.0124,
    hbone_address="10.0.2.2:80",
    service="server.app.svc.cluster.local",
    bytes_sent=11,
    bytes_recv=22,
)


def test_a_plain_line_has_the_node_proxys_fields_in_its_order():
    assert format_plain(RECORD) == (
        "2026-01-01T00:00:00.250000Z\tinfo\taccess\tconnection complete\t"
        'src.addr=10.0.1.2:40000 src.workload="client-0" src.namespace="app" src.cluster="Kubernetes" '
        'src.identity="spiffe://cluster.local/ns/app/sa/client" '
        'dst.addr=10.0.2.2:15008 dst.hbone_addr=10.0.2.2:80 dst.service="server.app.svc.cluster.local" '
        'dst.workload="server-0" dst.namespace="app" dst.cluster="Kubernetes" '
        'dst.identity="spiffe://cluster.local/ns/app/sa/server" '
        'direction="outbound" bytes_sent=11 bytes_recv=22 duration="12ms"\n'
    )


def test_a_refusal_names_policy_rule_and_reason():
    because = "explicitly denied by: app/no"
    error = f"connection closed due to policy rejection: {because}"
    denied = RECORD._replace(error=error, response_flags="DENY", policy="app/no", rule=0, because=because, closed_first="upstream")
    line = format_plain(denied)
    assert "\terror\t" in line
    assert line.endswith(f'error="{error}" response_flags="DENY" policy="app/no" rule=0 because="{because}" closed_first="upstream"\n')
    parsed = json.loads(format_json(denied))
    assert (parsed["level"], parsed["policy"], parsed["rule"], parsed["because"]) == ("error", "app/no", 0, because)


def test_an_early_refusal_has_only_addresses_direction_and_error():
    source, destination, nobody = SocketAddress.parse("[fd00::1]:1"), SocketAddress.parse("[fd00::2]:15008"), AccessPeer()
    record = AccessRecord(AccessEvent.FAILED, "inbound", source, nobody, destination, nobody, 0.0, error="tls error: no certificate")
    assert format_plain(record).split("\t")[4] == (
        'src.addr=[fd00::1]:1 dst.addr=[fd00::2]:15008 direction="inbound" error="tls error: no certificate"\n'
    )


@pytest.mark.parametrize(
    ("event", "error", "level"),
    [
        (AccessEvent.OPENED, None, "debug"),
        (AccessEvent.COMPLETE, None, "info"),
        (AccessEvent.COMPLETE, "x", "error"),
        (AccessEvent.FAILED, "x", "warn"),
    ],
)
def test_the_level_follows_from_what_happened(event, error, level):
    assert RECORD._replace(event=event, error=error).level == level


hostile = st.text(max_size=60)


@given(hostile, hostile, hostile, hostile)
def test_whatever_a_peer_sends_stays_one_line_and_within_its_field(authority, workload, service_account, error):
    peer = AccessPeer(workload, "app", "", SpiffeId("td", "ns", service_account or "sa"))
    record = RECORD._replace(source=peer, hbone_address=authority, service=authority, error=error)
    line = format_plain(record)
    assert line.isascii() or line.replace("\n", "").replace("\t", "").isprintable()
    assert len(line.splitlines()) == 1
    assert line.count("\t") == 4
    outside, inside, escaped = [], False, False
    for character in line.rstrip("\n").split("\t")[4]:
        if inside and not escaped and character == "\\":
            escaped = True
            continue
        if character == '"' and not escaped:
            inside = not inside
        elif not inside:
            outside.append(character)
        escaped = False
    assert not inside
    fields = "".join(outside).split()
    keys = [field.split("=")[0] for field in fields]
    assert len(keys) == len(set(keys))
    assert "error" in keys
    parsed = json.loads(format_json(record))
    assert parsed["error"] == error
    assert len(format_json(record).splitlines()) == 1 or "\n" not in format_json(record)[:-1]


def _log(wanted=lambda level: True, as_json=False):
    reading, writing = os.pipe()
    soon = []
    return AccessLog(soon.append, LogOutput(writing), wanted=wanted, as_json=as_json), soon, reading, writing


def test_lines_of_one_turn_leave_in_one_write_at_its_end():
    access, soon, reading, writing = _log()
    access.write(RECORD)
    access.write(RECORD)
    assert len(soon) == 1
    soon.pop()()
    assert os.read(reading, 65536).decode() == format_plain(RECORD) * 2
    access.write(RECORD)
    assert len(soon) == 1
    os.close(reading)
    soon.pop()()  # the reader is gone: the lines are lost, nothing is raised
    os.close(writing)


def test_levels_that_are_not_wanted_are_not_written():
    access, soon, reading, writing = _log(wanted=lambda level: level != "debug")
    access.write(RECORD._replace(event=AccessEvent.OPENED))
    assert not access.wants("debug")
    assert soon == []
    os.close(reading)
    os.close(writing)
