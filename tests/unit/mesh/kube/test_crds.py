"""CustomResourceDefinitions: what is in the repository is what the parsers ask for, and others' definitions are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mesh.kube.crds import find_schema, is_ours, make_definitions, render_files
from mesh.kube.fields import Fields, Rule, Text
from mesh.kube.outline import Outline
from mesh.kube.policies import ACTIONS, MTLS_MODES, OPERATION_ATTRIBUTES, SOURCE_ATTRIBUTES
from mesh.kube.resources import RESOURCES
from mesh.kube.serviceentry import LOCATIONS, RESOLUTIONS

DIRECTORY = Path(__file__).parents[4] / "deploy" / "crds"


def test_the_repository_has_what_make_crds_makes() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in DIRECTORY.iterdir()} == render_files()


def test_every_file_is_the_definition_it_was_made_from() -> None:
    for name, definition in make_definitions().items():
        assert YAML(typ="safe", pure=True).load((DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8")) == definition


def test_every_custom_kind_has_one_that_stores_the_version_we_read() -> None:
    groups = (".istio.io", "gateway.networking.k8s.io")
    custom = {str(resource): resource for resource in RESOURCES.values() if resource.group.endswith(groups)}
    made = make_definitions()
    assert made.keys() == custom.keys()
    for name, definition in made.items():
        assert [version["name"] for version in definition["spec"]["versions"] if version["storage"]] == [custom[name].version]


def test_a_schema_knows_every_attribute_and_choice() -> None:
    rule = find_schema("AuthorizationPolicy")["properties"]["spec"]["properties"]["rules"]["items"]["properties"]
    assert set(rule["from"]["items"]["properties"]["source"]["properties"]) == set(SOURCE_ATTRIBUTES)
    assert set(rule["to"]["items"]["properties"]["operation"]["properties"]) == set(OPERATION_ATTRIBUTES)
    assert find_schema("AuthorizationPolicy")["properties"]["spec"]["properties"]["action"]["enum"] == list(ACTIONS)
    ports = find_schema("PeerAuthentication")["properties"]["spec"]["properties"]["portLevelMtls"]
    assert ports["additionalProperties"]["properties"]["mode"]["enum"] == list(MTLS_MODES)
    entry = find_schema("ServiceEntry")["properties"]["spec"]["properties"]
    assert (entry["location"]["enum"], entry["resolution"]["enum"]) == (list(LOCATIONS), list(RESOLUTIONS))
    assert entry["hosts"]["minItems"] == 1
    assert "address" in entry["endpoints"]["items"]["properties"]


def test_definitions_in_groups_of_kubernetes_say_that_nobody_approved_them() -> None:
    for definition in make_definitions().values():
        approval = definition["metadata"].get("annotations", {}).get("api-approved.kubernetes.io", "")
        assert approval.startswith("unapproved") == definition["spec"]["group"].endswith(".k8s.io")


def test_a_gateway_class_belongs_to_no_namespace() -> None:
    scopes = {definition["spec"]["names"]["kind"]: definition["spec"]["scope"] for definition in make_definitions().values()}
    assert (scopes["Gateway"], scopes["GatewayClass"]) == ("Namespaced", "Cluster")


def test_only_what_the_parser_leaves_open_keeps_unknown_fields() -> None:
    open_at: list[str] = []

    def look(schema: object, path: str) -> None:
        if isinstance(schema, dict):
            if schema.get("x-kubernetes-preserve-unknown-fields"):
                open_at.append(path)
            for key, value in schema.items():
                look(value, f"{path}.{key}" if key not in ("properties", "items") else path)

    istio = ("ServiceEntry", "WorkloadEntry", "AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication", "DestinationRule")
    for kind in (*istio, "VirtualService", "TCPRoute", "TLSRoute", "BackendTLSPolicy", "ReferenceGrant"):
        look(find_schema(kind)["properties"]["spec"], kind)
    assert open_at == []


def test_what_is_read_of_a_route_to_say_that_it_is_not_supported_is_left_open() -> None:
    rule = find_schema("HTTPRoute")["properties"]["spec"]["properties"]["rules"]["items"]["properties"]
    filters = rule["filters"]["items"]["properties"]
    for schema in (rule["sessionPersistence"], filters["extensionRef"], filters["externalAuth"]):
        assert schema["x-kubernetes-preserve-unknown-fields"]
    assert "x-kubernetes-preserve-unknown-fields" not in filters["requestMirror"]


def test_rules_for_api_servers_stand_in_no_list_of_lists() -> None:
    """They let a rule cost so much, times the longest list there could be."""

    def find(schema: object, lists: int) -> int:
        if not isinstance(schema, dict):
            return 0
        here = lists if "x-kubernetes-validations" in schema else 0
        return max([here, *(find(value, lists + (key == "items")) for key, value in schema.items())])

    assert find(find_schema("VirtualService"), 0) == find(find_schema("HTTPRoute"), 0) == 0


def read(fields: Fields) -> None:
    fields.refuse_unknown("a", "b", "c", "d", "e")
    fields.string("a", required=True, text=Text(lambda text: None, {"pattern": "^x$"}))
    fields.integer("b", low=1)
    fields.mappings("c", empty="is empty", most=3)
    fields.require_one_of("a", "b")
    fields.demand(Rule("no", "self.b > 1", "b"), [("b",)])


def test_an_outline_is_what_was_asked() -> None:
    outline = Outline()
    read(outline)
    assert outline.problems == []
    assert outline.schema() == {
        "type": "object",
        "properties": {
            "a": {"type": "string", "pattern": "^x$"},
            "b": {"type": "integer", "minimum": 1},
            "c": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            },
        },
        "required": ["a"],
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "x-kubernetes-validations": [{"message": "no", "rule": "self.b > 1", "fieldPath": ".b"}],
    }


def test_a_strict_outline_keeps_null_for_the_parser_to_refuse() -> None:
    outline = Outline(strict=True)
    outline.refuse_unknown("a")
    outline.string("a")
    assert outline.schema()["properties"]["a"] == {"type": "string", "nullable": True}


@pytest.mark.parametrize(("found", "ours"), [
    (None, True),
    ({"metadata": {"labels": {"app.kubernetes.io/managed-by": "ambient-mesh"}}}, True),
    ({"metadata": {"labels": {"app": "istio-pilot", "release": "istio"}}}, False),
    ({"metadata": {"labels": {"app.kubernetes.io/managed-by": "Helm"}}}, False),
    ({"metadata": {}}, False),
    ({}, False),
])  # fmt: skip
def test_only_definitions_of_ours_are_written_over(found: dict[str, object] | None, ours: bool) -> None:
    assert is_ours(found) == ours
