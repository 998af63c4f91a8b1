"""Waypoints on a test cluster, and everything that has a status because of them."""

from __future__ import annotations

import json
from typing import Any

from mesh.kube.resources import RESOURCES
from mesh.model.labels import USE_WAYPOINT
from mesh.model.ports import READINESS
from tests.cluster.harness.api import Api, Object

READY = f"""
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("", {READINESS}), Handler).serve_forever()
"""
"""A waypoint that is ready, and nothing else."""


def overlay(name: str, namespace: str, **more: Any) -> Object:
    """A ConfigMap for `Gateway.spec.infrastructure.parametersRef`: the waypoint runs `READY`."""
    container = {"name": "istio-proxy", "command": ["python3", "-c", READY]}
    deployment = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 0, "containers": [container]}}}}
    data = {key: json.dumps(value) for key, value in {"deployment": deployment, **more}.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": data}


def gateway(name: str, namespace: str, parameters: str = "", **annotations: str) -> Object:
    spec: Object = {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]}
    if parameters:
        spec["infrastructure"] = {"parametersRef": {"group": "", "kind": "ConfigMap", "name": parameters}}
    told = {f"gateway.istio.io/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return of("Gateway", name, namespace, spec, annotations=told)


def of(kind: str, name: str, namespace: str, spec: Object, **metadata: Any) -> Object:
    head = {"name": name, "namespace": namespace, **metadata}
    return {"apiVersion": RESOURCES[kind].api_version, "kind": kind, "metadata": head, "spec": spec}


def apply(api: Api, obj: Object) -> Object:
    resource, metadata = RESOURCES[obj["kind"]], obj["metadata"]
    path = f"{resource.path(metadata['namespace'], metadata['name'])}?fieldManager=tests&force=true"
    return api.request("PATCH", path, obj, "application/apply-patch+yaml")


def rules(namespace: str) -> list[Object]:
    """A service and one of each kind that is a rule for it, or has a waypoint as it does."""
    service = {"group": "", "kind": "Service", "name": "web"}
    host = f"web.{namespace}.svc.cluster.local"
    routes = {
        "HTTPRoute": (80, {}),
        "GRPCRoute": (80, {}),
        "TCPRoute": (9000, {}),
        "TLSRoute": (443, {"hostnames": [host]}),
    }
    others: dict[str, Object] = {
        "Service": {
            "ports": [{"name": name, "port": port} for name, port in (("http", 80), ("tcp", 9000), ("tls", 443))],
            "selector": {"app": "web"},
        },
        "ServiceEntry": {
            "hosts": ["api.example.com"],
            "ports": [{"name": "http", "number": 80, "protocol": "HTTP"}],
            "resolution": "STATIC",
        },
        "WorkloadEntry": {"address": "192.0.2.1"},
        "VirtualService": {"hosts": [host], "http": [{"route": [{"destination": {"host": host}}]}]},
        "DestinationRule": {"host": host, "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}},
        "RequestAuthentication": {"targetRefs": [service], "jwtRules": [{"issuer": "nobody", "jwks": '{"keys":[]}'}]},
        "BackendTLSPolicy": {"targetRefs": [service], "validation": {"wellKnownCACertificates": "System", "hostname": "web.example.com"}},
    }
    found = []
    for kind, (port, more) in routes.items():
        spec = {"parentRefs": [{**service, "port": port}], "rules": [{"backendRefs": [{"name": "web", "port": port}]}], **more}
        found.append(of(kind, "web", namespace, spec))
    # Of workloads only those are told of a waypoint for services that ask for it themselves; in a labelled namespace it passes over others.
    labels = {"WorkloadEntry": {USE_WAYPOINT: "waypoint"}}
    return [of(kind, "web", namespace, spec, labels=labels.get(kind, {})) for kind, spec in others.items()] + found


def status_of(api: Api, obj: Object) -> Object:
    found = api.get(RESOURCES[obj["kind"]].path(obj["metadata"]["namespace"], obj["metadata"]["name"]))
    status: Object = found.get("status", {})
    return status


def conditions_of(api: Api, obj: Object) -> dict[str, tuple[str, str]]:
    """Status and reason by type, of the object itself and of its first parent."""
    status = status_of(api, obj)
    listed = [*status.get("conditions", ())]
    for parent in [*status.get("parents", ()), *status.get("ancestors", ())][:1]:
        listed += parent["conditions"]
    return {each["type"]: (each["status"], each.get("reason", "")) for each in listed}
