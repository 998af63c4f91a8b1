"""Values mean what they mean to the Helm chart, and mistakes in them are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mesh.kube.documents import parse_chunk, split_documents
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.manifests import Object, load_manifests
from meshctl_py.cluster.values import Values, as_values, configure, image_of, read_values, split_image

CHART = Path(__file__).parents[4] / "deploy/chart/values.yaml"
MANIFESTS = load_manifests()


def configured(*settings: str, image: str = "") -> dict[str, Object]:
    objects = configure(MANIFESTS, as_values(read_values([], settings, image)))
    return {obj["kind"]: obj for obj in objects}


def containers(obj: Object) -> list[Object]:
    found: list[Object] = obj["spec"]["template"]["spec"]["containers"]
    return found


def environment(obj: Object) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in containers(obj)[0]["env"]}


def test_there_are_the_values_of_the_chart_and_no_others_with_the_same_defaults() -> None:
    (chart,) = (value for chunk in split_documents(CHART.read_text()) for value in parse_chunk(chunk))
    ours = msgspec.to_builtins(Values())
    assert chart["image"].pop("repository")  # the chart names one; ours is the manifests'
    ours["image"].pop("repository")
    assert ours == chart


def test_without_values_the_manifests_stay_but_for_the_images_tag() -> None:
    for before, after in zip(MANIFESTS.objects, configure(MANIFESTS, Values()), strict=True):
        if before["kind"] not in ("Deployment", "DaemonSet"):
            assert before == after
            continue
        for container in containers(after):
            assert container["image"] == f"ambient-mesh:{MANIFESTS.tag}"
            container["image"] = "ambient-mesh"
        assert before == after


def test_images_of_all_containers_are_replaced() -> None:
    for kind in ("Deployment", "DaemonSet"):
        assert {container["image"] for container in containers(configured(image="localhost:5000/mesh:7")[kind])} == {
            "localhost:5000/mesh:7"
        }


def test_the_directories_of_cni_plugins_are_where_the_node_has_them() -> None:
    agent = configured("ztunnel.cniBinDir=/k3s/cni", "ztunnel.cniConfDir=/k3s/net.d")["DaemonSet"]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in agent["spec"]["template"]["spec"]["volumes"] if "hostPath" in volume}
    assert (paths["cni-bin"], paths["cni-net"]) == ("/k3s/cni", "/k3s/net.d")
    assert environment(agent)["CNI_NET_DIR_ON_NODE"] == "/k3s/net.d"


@pytest.mark.parametrize(
    ("image", "parts", "whole"),
    [
        ("ambient-mesh", {"repository": "ambient-mesh"}, "ambient-mesh:9"),
        ("reg:5000/a/b", {"repository": "reg:5000/a/b"}, "reg:5000/a/b:9"),
        ("reg:5000/a/b:1.2", {"repository": "reg:5000/a/b", "tag": "1.2"}, "reg:5000/a/b:1.2"),
        ("a@sha256:00ff", {"repository": "a@sha256:00ff"}, "a@sha256:00ff"),
    ],
)
def test_an_image_is_a_name_and_perhaps_a_tag_or_a_digest(image: str, parts: dict[str, str], whole: str) -> None:
    assert split_image(image) == parts
    assert image_of(as_values({"image": parts}).image, "9") == whole


def test_settings_reach_what_they_name() -> None:
    found = configured("istiod.replicas=3,logLevel=access=debug\\,info", r"istiod.podAnnotations.example\.com/a=b", "ztunnel.maxSurge=2")
    assert found["Deployment"]["spec"]["replicas"] == 3
    assert found["Deployment"]["spec"]["template"]["metadata"]["annotations"]["example.com/a"] == "b"
    assert environment(found["DaemonSet"])["RUST_LOG"] == "access=debug,info"
    assert found["DaemonSet"]["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] == 2


def test_a_trust_domain_reaches_both_programs() -> None:
    found = configured("trustDomain=example.org", "ztunnel.terminationGracePeriodSeconds=60")
    assert "--trust-domain=example.org" in containers(found["Deployment"])[0]["args"]
    assert environment(found["DaemonSet"])["TRUST_DOMAIN"] == "example.org"
    assert environment(found["DaemonSet"])["TERMINATION_GRACE_PERIOD_SECONDS"] == "60"


def test_environment_that_is_there_is_replaced_in_its_place_and_the_rest_is_added() -> None:
    before = [item["name"] for item in containers(configured()["DaemonSet"])[0]["env"]]
    after = containers(configured("ztunnel.env.XDS_ADDRESS=https://other:1", "ztunnel.env.MOVERS=2")["DaemonSet"])[0]["env"]
    assert [item["name"] for item in after] == [*before, "MOVERS"]
    assert {"name": "XDS_ADDRESS", "value": "https://other:1"} in after


def test_files_are_merged_in_order_and_settings_come_last(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("istiod: {replicas: 2, env: {A: a}}\nlogAsJson: true\n")
    (tmp_path / "b.yaml").write_text("istiod: {env: {B: b}}\n")
    values = as_values(read_values([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["istiod.env.A=c"], ""))
    assert (values.istiod.replicas, values.istiod.env, values.log_as_json) == (2, {"A": "c", "B": "b"}, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("istiod: {replica: 2}", r"v.yaml: istiod: Object contains unknown field `replica`"),
        ("istiod: {replicas: many}", r"v.yaml: istiod.replicas: Expected `int`, got `str`"),
        ("image: {pullPolicy: Sometimes}", r"v.yaml: image.pullPolicy: "),
        ("- a", r"v.yaml: expected one mapping of values"),
        ("a: [", r"v.yaml:1: "),
    ],
)
def test_a_mistake_in_a_file_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(ClusterProblem, match=message):
        read_values([tmp_path / "v.yaml"], [], "")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("istiod.replicas", "expected NAME=VALUE"),
        ("=1", "expected NAME=VALUE"),
        ("a..b=1", "expected NAME=VALUE"),
        ("istiod.replicas=-1", "istiod.replicas: Expected `int` >= 0"),
        ("istiod.tolerations[0].key=x", "lists are given in a file"),
        ("ztunnel.terminationGracePeriodSeconds=5", "Expected `int` >= 6"),
    ],
)
def test_a_mistake_in_a_setting_names_it(setting: str, message: str) -> None:
    with pytest.raises(ClusterProblem, match=message) as caught:
        read_values([], [setting], "")
    assert f"--set {setting}" in str(caught.value)
