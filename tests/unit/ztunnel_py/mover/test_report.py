"""What a mover tells of its connections is what the pods see of them, and no more than was asked for."""

from __future__ import annotations

from mesh.authz.evaluate import Connection, Permit
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.workload import Workload
from ztunnel_py.mover.ledger import Living
from ztunnel_py.mover.report import describe_living

CLIENT, SERVER = SocketAddress.parse("10.0.0.1:40000"), SocketAddress.parse("10.0.0.2:8080")


def living(direction: str) -> Living:
    found = Living("uid", direction, CLIENT, SERVER, 2.0)
    found.counted = (100, 7)
    return found


def test_bytes_are_counted_as_the_pod_sees_them() -> None:
    (outbound, inbound), omitted = describe_living([living("outbound"), living("inbound")], 5.5, 10)
    assert (outbound.sent, outbound.received, outbound.age) == (100, 7, 3.5)
    assert (inbound.sent, inbound.received) == (7, 100)
    assert omitted == 0


def test_who_it_is_and_what_let_it_in_is_told() -> None:
    found = living("inbound")
    found.source_identity = SpiffeId("cluster.local", "shop", "client")
    found.source = Workload("c//Pod/shop/client", "client", "shop")
    found.authority = "10.0.0.2:8080"
    found.verdict = Permit(Connection(CLIENT.ip, found.source_identity, SERVER), "allowed by policy shop/only", "shop/only", 2)
    (told,), _ = describe_living([found], 3.0, 1)
    assert (told.source_identity, told.source_workload) == ("spiffe://cluster.local/ns/shop/sa/client", "shop/client")
    assert (told.policy, told.rule, told.because) == ("shop/only", 2, "allowed by policy shop/only")
    assert (told.protocol, told.opening) == ("HBONE", True)


def test_what_is_not_told_is_counted() -> None:
    told, omitted = describe_living([living("inbound")] * 5, 3.0, 2)
    assert (len(told), omitted) == (2, 3)
    assert describe_living([living("inbound")] * 5, 3.0, 0) == ([], 5)
