"""The small values a CONNECT carries: any text is read or refused, never a crash; what we write reads back."""

import random
from ipaddress import IPv4Address, IPv6Address

from hypothesis import given
from hypothesis import strategies as st

from mesh.model.address import SocketAddress, unmapped
from mesh.model.workload import Locality, Workload, WorkloadType
from mesh.wire.authority import HostPort, parse_authority
from mesh.wire.baggage import baggage_of, parse_baggage
from mesh.wire.errors import RemoteProtocolError
from mesh.wire.forwarded import Forwarded, parse_forwarded, write_forwarded
from mesh.wire.traceparent import new_traceparent, parse_traceparent

_PORTS = st.integers(1, 65535)
_ADDRESSES = st.builds(SocketAddress, (st.ip_addresses()).map(unmapped), _PORTS)
_HOSTS = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]([a-z0-9-]{0,10}[a-z0-9])?){0,5}", fullmatch=True)
_NAMES = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9._-]{0,20}[a-zA-Z0-9])?", fullmatch=True) | st.just("")
_TEXTS = st.text(max_size=80) | st.text('0123456789abcdef.:[]-%@/,;=" ', max_size=80)


@given(address=_ADDRESSES)
def test_an_address_reads_back(address: SocketAddress) -> None:
    assert parse_authority(str(address)) == address


@given(host=_HOSTS, port=_PORTS)
def test_a_hostname_reads_back(host: str, port: int) -> None:
    assert parse_authority(f"{host}:{port}") == HostPort(host, port)


@given(text=_TEXTS)
def test_any_text_is_an_authority_or_refused(text: str) -> None:
    try:
        authority = parse_authority(text)
    except RemoteProtocolError:
        return
    assert parse_authority(str(authority)) == authority
    assert 0 < authority.port < 65536
    if isinstance(authority, SocketAddress):
        assert isinstance(authority.ip, IPv4Address | IPv6Address)


@given(text=_TEXTS)
def test_any_text_is_taken_for_a_claim(text: str) -> None:
    parse_baggage(text)
    parse_forwarded(text)
    parse_traceparent(text)


@given(text=st.text("0123456789abcdef-", min_size=55, max_size=55))
def test_any_55_characters_are_a_traceparent_or_none(text: str) -> None:
    parsed = parse_traceparent(text)
    assert parsed is None or str(parsed)[2:] == text[2:]


@given(seed=st.integers())
def test_a_new_traceparent_reads_back(seed: int) -> None:
    text = new_traceparent(random.Random(seed))
    assert str(parse_traceparent(text)) == text


@given(client=_ADDRESSES, host=_HOSTS | st.none())
def test_forwarded_reads_back(client: SocketAddress, host: str | None) -> None:
    assert parse_forwarded(write_forwarded(client, host)) == Forwarded(client, host)


@given(kind=st.sampled_from(WorkloadType), names=st.tuples(*[_NAMES] * 7))
def test_baggage_reads_back(kind: WorkloadType, names: tuple[str, ...]) -> None:
    cluster, namespace, name, service, version, region, zone = names
    workload = Workload(
        "uid",
        "pod",
        namespace,
        cluster_id=cluster,
        workload_type=kind,
        workload_name=name,
        canonical_name=service,
        canonical_revision=version,
        locality=Locality(region, zone),
    )
    parsed = parse_baggage(baggage_of(workload))
    assert parsed.workload_type is (kind if name else None)
    read = (parsed.cluster, parsed.namespace, parsed.workload_name, parsed.service_name, parsed.service_version, parsed.region, parsed.zone)
    assert read == names
