"""Automatic addresses: everybody's own, out of the way of what somebody chose, and the same wherever they are worked out."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from istiod_py.translate import vips
from istiod_py.translate.vips import Wanting, allocate
from mesh.model.address import Cidr, IpAddress, NamespacedHostname, parse_cidr, parse_ip

KEYS = st.builds(NamespacedHostname, st.sampled_from(["a", "b"]), st.integers(0, 40).map(lambda n: f"h{n}.example.com"))
GIVEN = st.lists(st.sampled_from(["240.240.0.1", "240.240.0.2", "2001:2::1", "10.0.0.1"]).map(parse_ip), max_size=2, unique=True)
WANTING = st.lists(st.builds(Wanting, KEYS, GIVEN.map(tuple)), max_size=20, unique_by=lambda want: want.key)
RESERVED = st.lists(
    st.sampled_from(["240.240.0.1", "240.240.0.0/20", "240.0.0.0/8", "10.0.0.0/8", "2001:2::/64", "0.0.0.0/0"]).map(parse_cidr), max_size=2
)


@pytest.fixture(autouse=True, params=["240.240.0.0/16", "240.240.0.0/28"])
def pool(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collisions are rare in the real pool, and the rule in a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vips, "POOL_V4", ip_network(request.param))
        yield


def free(ip: IpAddress, reserved: list[Cidr]) -> bool:
    return not any(ip in cidr for cidr in reserved if ip.version == cidr.version)


@given(WANTING, RESERVED)
def test_no_two_hosts_share_an_address_and_none_takes_a_reserved_one(wanting: list[Wanting], reserved: list[Cidr]) -> None:
    found = allocate(wanting, reserved)
    assert found.keys() == {want.key for want in wanting}
    addresses = [ip for ips in found.values() for ip in ips]
    assert len(addresses) == len(set(addresses))
    given_before = {ip for want in wanting for ip in want.given}
    for ip in addresses:
        assert ip in given_before or (ip in (vips.POOL_V4 if ip.version == 4 else vips.POOL_V6) and free(ip, reserved))


@given(WANTING, RESERVED)
def test_working_it_out_again_from_the_outcome_changes_nothing(wanting: list[Wanting], reserved: list[Cidr]) -> None:
    found = allocate(wanting, reserved)
    assert allocate([Wanting(key, ips) for key, ips in found.items()], reserved) == found


@given(WANTING, st.builds(Wanting, KEYS))
def test_a_later_host_moves_none_that_came_before(wanting: list[Wanting], later: Wanting) -> None:
    before = allocate(wanting, [])
    if later.key not in before:
        assert {key: ips for key, ips in allocate([*wanting, later], []).items() if key != later.key} == before
