"""Which local ports are taken in turn."""

from __future__ import annotations

import pytest

from mesh.linux.ports import LocalPorts


def taken(ports: LocalPorts, count: int) -> list[int]:
    return [ports.take() for _ in range(count)]


def test_every_other_port_is_taken_from_the_half_that_connect_leaves_and_then_the_first_again() -> None:
    assert taken(LocalPorts.parse("40000\t40007\n", "\n", 0), 6) == [40001, 40003, 40005, 40007, 40001, 40003]
    assert taken(LocalPorts.parse("40001\t40006\n", "\n", 0), 4) == [40002, 40004, 40006, 40002]


def test_the_first_may_be_any() -> None:
    assert taken(LocalPorts.parse("40000 40007", "", 4 * 9 + 3), 2) == [40007, 40001]


def test_reserved_ports_are_passed_over() -> None:
    assert taken(LocalPorts.parse("40000 40009", "80,40003-40006,40009\n", 0), 3) == [40001, 40007, 40001]


@pytest.mark.parametrize(("local_range", "reserved"), [("40000 40000", ""), ("40000 40003", "40000-40003"), ("40003 40000", "")])
def test_where_there_is_none_the_kernel_chooses(local_range: str, reserved: str) -> None:
    assert taken(LocalPorts.parse(local_range, reserved, 7), 3) == [0, 0, 0]


def test_this_namespace_has_some() -> None:
    ports = taken(LocalPorts.here(), 3)
    assert len(set(ports)) == 3
    assert all(0 < port < 65536 for port in ports)


def test_begun_anywhere_two_hardly_meet() -> None:
    assert len({LocalPorts.here().take() for _ in range(8)}) > 1
