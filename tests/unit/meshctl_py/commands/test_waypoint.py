"""``meshctl waypoint`` says and does what istioctl does, on a cluster and in a directory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from meshctl_py.__main__ import main
from tests.unit.meshctl_py.conftest import Cluster

GENERATED = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  labels:
    istio.io/rev: canary
    istio.io/waypoint-for: all
  name: waypoint
  namespace: shop
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - name: mesh
    port: 15008
    protocol: HBONE
"""
NO_AMBIENT = "⚠️ Warning: namespace is not enrolled in ambient. Consider running\t`{} namespace shop istio.io/dataplane-mode=ambient`\n"
_YAML = YAML(typ="safe", pure=True)
ENROLLED = "⚠️ Warning: namespace (shop) already has an enrolled Waypoint. Consider adding the `--overwrite` flag to your apply command.\n"
PROGRAMMED = {"type": "Programmed", "status": "True", "reason": "Programmed", "message": "Resource programmed, assigned"}
WAITING = {"type": "Programmed", "status": "False", "reason": "AddressNotUsable", "message": "no instances found"}
ACCEPTED = {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "Resource accepted"}


def gateway(name: str, *conditions: dict[str, str], namespace: str = "shop", kind: str = "istio-waypoint", **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": namespace, "labels": {f"istio.io/{key}": value for key, value in labels.items()}},
        "spec": {"gatewayClassName": kind, "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
        "status": {"conditions": [*conditions]},
    }


class Place(ABC):
    """What both places are for a test."""

    label_command = ""
    untended = ""
    """What is said, besides, to who waits where nobody is at work."""

    @abstractmethod
    def put(self, obj: dict[str, Any]) -> None: ...

    @abstractmethod
    def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None: ...

    @abstractmethod
    def run(self, *arguments: str) -> Result: ...


class OnCluster(Place):
    label_command = "kubectl label"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def put(self, obj: dict[str, Any]) -> None:
        self._cluster.server.put(obj)

    def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self._cluster.server.find(kind, namespace, name)

    def run(self, *arguments: str) -> Result:
        return self._cluster.run("waypoint", *arguments)


class InDirectory(Place):
    label_command = "meshctl label"
    untended = ": no lab follows this directory, so nobody programs it"

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, obj: dict[str, Any]) -> None:
        metadata = obj["metadata"]
        with (self.path / f"{obj['kind']}-{metadata.get('namespace', '')}-{metadata['name']}.yaml").open("w") as file:
            _YAML.dump(obj, file)

    def find(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        objects = [obj for file in self.path.iterdir() for obj in _YAML.load_all(file.read_text())]
        key = (kind, namespace, name)
        return next(
            (obj for obj in objects if (obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"]) == key),
            None,
        )

    def run(self, *arguments: str) -> Result:
        # A cluster's context has a namespace, a directory none.
        spaced = () if {"-n", "--namespace"} & {*arguments} else ("-n", "shop")
        return CliRunner().invoke(main, ["waypoint", *arguments, *spaced, "-f", str(self.path)])


@pytest.fixture(params=["cluster", "directory"])
def place(request: pytest.FixtureRequest) -> Place:
    on_cluster = request.param == "cluster"
    made: Place = OnCluster(request.getfixturevalue("cluster")) if on_cluster else InDirectory(request.getfixturevalue("tmp_path"))
    made.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}})
    made.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bank"}})
    return made


def labels(place: Place, kind: str, namespace: str, name: str) -> dict[str, str]:
    found = place.find(kind, namespace, name)
    assert found is not None
    return dict(found["metadata"].get("labels", {}))


# generate


def generate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["waypoint", "generate", *arguments])


def test_a_waypoint_is_printed() -> None:
    result = generate("--for", "all", "-r", "canary", "-n", "shop")
    assert (result.output, result.exit_code) == (GENERATED, 0)


def test_what_is_not_said_is_not_written() -> None:
    metadata = _YAML.load(generate("--name", "gate").output)["metadata"]
    assert metadata == {"name": "gate"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "none"), "invalid name provided for waypoint, 'none' is a reserved value"),
        (("--name", "My_gate"), "'My_gate' is no name for an object: lower case letters, digits, '-' and '.' only"),
        (("--for", "http"), "invalid traffic type: http. Valid options are: [all none service workload]"),
    ],
)
def test_what_is_no_waypoint_is_refused(arguments: tuple[str, ...], message: str) -> None:
    result = generate(*arguments)
    assert (result.output, result.exit_code) == (f"Error: failed to create gateway: {message}\n", 1)


# apply


def test_a_waypoint_is_applied(place: Place) -> None:
    result = place.run("apply", "--for", "workload")
    assert (result.output, result.exit_code) == ("✅ waypoint shop/waypoint applied\n", 0)
    found = place.find("Gateway", "shop", "waypoint")
    assert found is not None
    assert found["spec"] == gateway("waypoint")["spec"]
    assert found["metadata"]["labels"] == {"istio.io/waypoint-for": "workload"}


def test_applied_again_it_changes_what_is_said(place: Place) -> None:
    place.run("apply", "--for", "workload")
    assert place.run("apply", "--for", "all").output == "✅ waypoint shop/waypoint applied\n"
    assert labels(place, "Gateway", "shop", "waypoint") == {"istio.io/waypoint-for": "all"}


def test_its_namespace_is_enrolled(place: Place) -> None:
    result = place.run("apply", "--name", "gate", "--enroll-namespace")
    assert result.output == '✅ waypoint shop/gate applied\n✅ namespace shop labeled with "istio.io/use-waypoint: gate"\n'
    assert labels(place, "Namespace", "", "shop") == {"istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": "gate"}


def test_a_namespace_that_has_another_is_left_alone_without_overwrite(place: Place) -> None:
    place.run("apply", "--enroll-namespace")
    result = place.run("apply", "--name", "gate", "--enroll-namespace")
    assert (result.output, result.exit_code) == (ENROLLED, 0)
    assert place.find("Gateway", "shop", "gate") is None
    assert place.run("apply", "--name", "gate", "--enroll-namespace", "--overwrite").exit_code == 0
    assert labels(place, "Namespace", "", "shop")["istio.io/use-waypoint"] == "gate"


def test_enrolling_again_with_the_same_waypoint_does_what_it_did(place: Place) -> None:
    first = place.run("apply", "--enroll-namespace").output
    again = place.run("apply", "--enroll-namespace")
    assert (again.output, again.exit_code) == (first, 0)


def test_a_namespace_outside_the_mesh_is_warned_about(place: Place) -> None:
    place.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
    result = place.run("apply", "--enroll-namespace")
    applied = '✅ waypoint shop/waypoint applied\n✅ namespace shop labeled with "istio.io/use-waypoint: waypoint"\n'
    assert (result.output, result.exit_code) == (NO_AMBIENT.format(place.label_command) + applied, 0)


def test_a_namespace_that_is_not_there_is_an_error(place: Place) -> None:
    result = place.run("apply", "-n", "nowhere")
    assert (result.output, result.exit_code) == ("Error: namespace: nowhere not found\n", 1)


def test_who_names_no_namespace_reads_how_where_the_usual_one_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["waypoint", "apply", "-f", str(tmp_path)])
    assert (result.output, result.exit_code) == ("Error: namespace: default not found; name yours with -n\n", 1)


def test_a_waypoint_that_is_programmed_need_not_be_waited_for(place: Place) -> None:
    place.put(gateway("waypoint", PROGRAMMED))
    assert place.run("apply", "--wait").output == "✅ waypoint shop/waypoint applied\n✅ waypoint shop/waypoint is ready!\n"


def test_waiting_ends(place: Place) -> None:
    result = place.run("apply", "--wait", "--waypoint-timeout", "50ms", "--enroll-namespace")
    told = f"✅ waypoint shop/waypoint applied\nError: timed out while waiting for waypoint\tshop/waypoint{place.untended}\n"
    assert (result.output, result.exit_code) == (told, 1)
    assert "istio.io/use-waypoint" not in labels(place, "Namespace", "", "shop")


def test_who_waited_in_vain_reads_what_the_waypoint_lacks(place: Place) -> None:
    place.put(gateway("waypoint", ACCEPTED, WAITING))
    assert "waiting for waypoint\tshop/waypoint: no instances found\n" in place.run("apply", "--wait", "--waypoint-timeout", "50ms").output
    assert "status for waypoint\tshop/waypoint: no instances found\n" in place.run("status", "--waypoint-timeout", "50ms").output


def test_a_duration_has_a_unit(place: Place) -> None:
    result = place.run("apply", "--waypoint-timeout", "90")
    assert result.exit_code == 2
    assert "'90' is no duration such as 90s or 1m30s" in result.output


def test_a_gateway_of_another_class_is_not_made_a_waypoint_of(tmp_path: Path) -> None:
    place = InDirectory(tmp_path)
    place.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
    place.put(gateway("waypoint", kind="nginx"))
    result = place.run("apply")
    assert result.exit_code == 1
    assert "Error: Gateway shop/waypoint is there, and no waypoint: " in result.output


def test_a_cluster_without_the_gateway_api_is_told_so(cluster: Cluster) -> None:
    cluster.server.put({"kind": "Namespace", "metadata": {"name": "shop"}})
    cluster.server.faults.absent_groups.add("gateway.networking.k8s.io")
    result = cluster.run("waypoint", "apply")
    assert result.exit_code == 1
    assert result.output.startswith("Error: missing Kubernetes Gateway CRDs need to be installed before applying a waypoint: ")
    assert cluster.run("waypoint", "list").output == (
        "Error: this cluster has no Kubernetes Gateway CRDs, and so no waypoints: 'meshctl install' brings them\n"
    )


# delete


def test_waypoints_are_deleted_by_name(place: Place) -> None:
    for name in ("a", "b"):
        place.put(gateway(name))
    result = place.run("delete", "a", "c")
    assert (result.output, result.exit_code) == ("waypoint shop/a deleted\nwaypoint shop/c not found\n", 0)
    assert place.find("Gateway", "shop", "a") is None
    assert place.find("Gateway", "shop", "b") is not None


def test_all_of_a_namespace_are_deleted_and_gateways_of_others_stay(place: Place) -> None:
    for obj in (gateway("a"), gateway("b"), gateway("c", kind="nginx"), gateway("d", namespace="bank")):
        place.put(obj)
    assert place.run("delete", "--all").output == "waypoint shop/a deleted\nwaypoint shop/b deleted\n"
    assert place.find("Gateway", "shop", "c") is not None
    assert place.find("Gateway", "bank", "d") is not None
    assert place.run("delete", "c").output == "waypoint shop/c not found\n"
    assert place.run("delete", "--all").output == "No waypoints found.\n"


def test_all_of_a_revision_are_deleted(place: Place) -> None:
    place.put(gateway("a", rev="old"))
    place.put(gateway("b"))
    assert place.run("delete", "-r", "old").output == "waypoint shop/a deleted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "must specify a waypoint name or delete all using --all or delete specific revision using --revision"),
        (("a", "--all"), "cannot specify waypoint names when deleting all waypoints"),
    ],
)
def test_what_to_delete_must_be_clear(place: Place, arguments: tuple[str, ...], message: str) -> None:
    result = place.run("delete", *arguments)
    assert result.exit_code == 2
    assert message in result.output


# list


def put_some(place: Place) -> None:
    place.put(gateway("b", PROGRAMMED, rev="canary", **{"waypoint-for": "all"}))
    place.put(gateway("another", ACCEPTED))
    place.put(gateway("c", kind="nginx"))
    place.put(gateway("d", WAITING, namespace="bank"))


def test_the_waypoints_of_a_namespace_are_listed(place: Place) -> None:
    put_some(place)
    assert place.run("list").output == (
        "NAME        REVISION     TRAFFIC TYPE     PROGRAMMED\n"
        "another     default      none             False\n"
        "b           canary       all              True\n"
    )


def test_all_waypoints_are_listed(place: Place) -> None:
    put_some(place)
    assert place.run("list", "-A").output == (
        "NAMESPACE     NAME        REVISION     TRAFFIC TYPE     PROGRAMMED\n"
        "bank          d           default      none             False\n"
        "shop          another     default      none             False\n"
        "shop          b           canary       all              True\n"
    )


@pytest.mark.parametrize("command", ["list", "status"])
def test_there_may_be_none(place: Place, command: str) -> None:
    assert place.run(command).output == "No waypoints found. That is in namespace shop: -A looks in all.\n"
    assert place.run(command, "-n", "other").output == "No waypoints found. That is in namespace other: -A looks in all.\n"
    assert place.run(command, "-A").output == "No waypoints found.\n"


# status


def test_the_status_says_why(place: Place) -> None:
    put_some(place)
    assert place.run("status", "--no-wait").output == (
        "NAME        STATUS     TYPE           REASON         MESSAGE\n"
        "another     True       Accepted       Accepted       Resource accepted\n"
        "b           True       Programmed     Programmed     Resource programmed, assigned\n"
    )


def test_the_status_of_all_namespaces(place: Place) -> None:
    put_some(place)
    assert place.run("status", "-A", "--no-wait").output == (
        "NAMESPACE     NAME        STATUS     TYPE           REASON               MESSAGE\n"
        "bank          d           False      Programmed     AddressNotUsable     no instances found\n"
        "shop          another     True       Accepted       Accepted             Resource accepted\n"
        "shop          b           True       Programmed     Programmed           Resource programmed, assigned\n"
    )


def test_the_status_waits(place: Place) -> None:
    put_some(place)
    result = place.run("status", "--waypoint-timeout", "50ms")
    reason = f"timed out while retrieving status for waypoint\tshop/another{place.untended}"
    told = f"Error: failed to print waypoint status: {reason}\n"
    assert (result.output, result.exit_code) == (told, 1)


def test_help_says_by_its_name_that_status_waits() -> None:
    assert "[default: wait]" in CliRunner().invoke(main, ["waypoint", "status", "--help"]).output
