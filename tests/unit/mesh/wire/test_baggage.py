import pytest

from mesh.model.workload import Locality, Workload, WorkloadType
from mesh.wire.baggage import MAX_MEMBERS, Baggage, baggage_of, parse_baggage


def workload(**fields: object) -> Workload:
    return Workload(**{"uid": "u", "name": "client-1", "namespace": "default", "cluster_id": "Kubernetes", **fields})


def test_a_workload_is_described_in_the_order_of_the_golden_vector() -> None:
    client = workload(workload_name="client", canonical_name="client", canonical_revision="v1", locality=Locality("r", "z"))
    assert baggage_of(client) == (
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=client,service.name=client,service.version=v1,"
        "cloud.region=r,cloud.availability_zone=z"
    )


def test_empty_fields_are_left_out_and_so_may_be_everything() -> None:
    assert baggage_of(workload()) == "k8s.cluster.name=Kubernetes,k8s.namespace.name=default"
    assert baggage_of(workload(cluster_id="", namespace="")) == ""


@pytest.mark.parametrize("kind", WorkloadType)
def test_every_kind_of_workload_comes_back(kind: WorkloadType) -> None:
    text = baggage_of(
        workload(workload_type=kind, workload_name="w", canonical_name="c", canonical_revision="v", locality=Locality("r", "z"))
    )
    assert parse_baggage(text) == Baggage("Kubernetes", "default", kind, "w", "c", "v", "r", "z")


@pytest.mark.parametrize("name", ["a,b", "a;b", "a b", "a\r\nx: y", 'a"b', "a\\b"])
def test_a_name_that_would_break_the_header_is_left_out(name: str) -> None:
    assert baggage_of(workload(canonical_name=name)) == "k8s.cluster.name=Kubernetes,k8s.namespace.name=default"


@pytest.mark.parametrize("value", ["", ",", "=", ",,=,", "k8s.cluster.name", "unknown=x", "K8S.CLUSTER.NAME=x", ";".join("ab")])
def test_nonsense_says_nothing(value: str) -> None:
    assert parse_baggage(value) == Baggage()


def test_blanks_around_members_and_equals_signs_in_values_are_kept_apart() -> None:
    assert parse_baggage(" service.name = a , service.version=b=c ") == Baggage(service_name="a", service_version="b=c")


def test_the_last_of_several_wins_and_far_ones_are_not_looked_at() -> None:
    assert parse_baggage("service.name=a,service.name=b").service_name == "b"
    assert parse_baggage("x=y," * MAX_MEMBERS + "service.name=a") == Baggage()
