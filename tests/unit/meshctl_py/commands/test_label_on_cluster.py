"""``meshctl label`` on a cluster says and does what kubectl does."""

from __future__ import annotations

import pytest

from tests.unit.meshctl_py.conftest import Cluster


@pytest.fixture
def shop(cluster: Cluster) -> Cluster:
    for name in ("shop", "bank"):
        cluster.server.put({"kind": "Namespace", "metadata": {"name": name, "labels": {"tier": "gold"}}})
    for name in ("web", "db"):
        cluster.server.put({"kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": name}}})
    return cluster


def test_a_namespace_is_enrolled(shop: Cluster) -> None:
    shop.add_mesh("n1")
    result = shop.run("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
    assert (result.output, result.exit_code) == ("namespace/shop labeled\n", 0)
    assert shop.labels("Namespace", "", "shop") == {"tier": "gold", "istio.io/dataplane-mode": "ambient"}
    assert shop.run("label", "ns/shop", "istio.io/dataplane-mode=ambient").output == "namespace/shop not labeled\n"


def test_what_keeps_an_enrolment_from_having_an_effect_is_said(shop: Cluster) -> None:
    assert "warning: the mesh is not installed" in shop.run("label", "ns", "shop", "istio.io/dataplane-mode=ambient").output
    assert "is neither ambient nor none" in shop.run("label", "ns", "bank", "istio.io/dataplane-mode=ambiant").output


def test_another_value_needs_overwrite_and_nothing_is_written_without(shop: Cluster) -> None:
    result = shop.run("label", "ns", "shop", "tier=silver", "a=b")
    assert result.exit_code == 1
    assert "namespace/shop: 'tier' already has a value (gold), and --overwrite is false" in result.output
    assert shop.labels("Namespace", "", "shop") == {"tier": "gold"}
    assert shop.run("label", "ns", "shop", "tier=silver", "--overwrite").output == "namespace/shop labeled\n"
    assert shop.labels("Namespace", "", "shop") == {"tier": "silver"}


def test_labels_are_removed(shop: Cluster) -> None:
    assert shop.run("label", "ns", "shop", "tier-").output == "namespace/shop unlabeled\n"
    assert shop.run("label", "ns", "shop", "tier-").output == 'label "tier" not found.\nnamespace/shop not labeled\n'


def test_several_are_labelled_by_name_by_selector_and_all(shop: Cluster) -> None:
    assert shop.run("label", "pod", "web", "db", "x=1").output == "pod/web labeled\npod/db labeled\n"
    assert shop.run("label", "pods", "-l", "app=db", "y=1").output == "pod/db labeled\n"
    assert shop.run("label", "po", "--all", "z=1").output == "pod/db labeled\npod/web labeled\n"
    assert shop.labels("Pod", "shop", "db") == {"app": "db", "x": "1", "y": "1", "z": "1"}
    assert shop.run("label", "pods", "-l", "app=none", "y=1").output == "no resources found in shop namespace\n"


def test_services_are_labelled_too(shop: Cluster) -> None:
    shop.server.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"}})
    assert shop.run("label", "service", "web", "istio.io/use-waypoint=none").output == "service/web labeled\n"
    assert shop.labels("Service", "shop", "web") == {"istio.io/use-waypoint": "none"}
    assert shop.run("label", "services", "--all", "a=b").output == "service/web labeled\n"
    assert "there is one in namespace shop (-n)" in shop.run("label", "svc", "web", "a=b", "-n", "bank").output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pod", "shop/web", "a=b", "-n", "bank"), 1, "there is no pod shop/web in namespace bank"),
        (("pod", "web", "a=b", "-n", "bank"), 1, "there is no pod web in namespace bank; there is one in namespace shop (-n)"),
        (("ns", "shp", "a=b"), 1, "there is no namespace shp"),
        (("ns", "shop", "a=b c"), 1, "'b c' is no value for a label"),
        (("deployment", "web", "a=b"), 2, "'deployment' can't be labelled"),
        (("pod", "web", "--all", "a=b"), 2, "give either names, --all or --selector"),
        (("pod", "a=b"), 2, "give either names, --all or --selector"),
    ],
)
def test_mistakes_are_told_with_what_to_do(shop: Cluster, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = shop.run("label", *arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output


def test_a_server_that_refuses_or_is_away_is_told_with_where_it_is(shop: Cluster) -> None:
    shop.server.faults.refusals = [(403, "Forbidden", {})]
    result = shop.run("label", "ns", "shop", "a=b")
    assert result.exit_code == 1
    assert "refused: Forbidden" in result.output
    assert "by contexts[fake] of" in result.output
    assert "ask for the right" in result.output
    shop.server.faults.down = True
    assert "is the cluster running" in shop.run("label", "ns", "shop", "a=b").output
