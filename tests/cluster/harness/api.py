"""The API server, spoken to directly: a few verbs over HTTPS with a kubeconfig's client certificate. Cheaper than a kubectl each time."""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlencode, urlsplit

_WITHIN: Final = 30.0
_PLURALS: Final[Mapping[str, tuple[str, str]]] = {
    "ClusterRole": ("/apis/rbac.authorization.k8s.io/v1", "clusterroles"),
    "ClusterRoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "DaemonSet": ("/apis/apps/v1", "daemonsets"),
    "Event": ("/api/v1", "events"),
    "Namespace": ("/api/v1", "namespaces"),
    "Node": ("/api/v1", "nodes"),
    "Pod": ("/api/v1", "pods"),
    "Secret": ("/api/v1", "secrets"),
    "Service": ("/api/v1", "services"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "StatefulSet": ("/apis/apps/v1", "statefulsets"),
}

Object = dict[str, Any]
"""An object of the API as JSON has it."""


class ApiRefused(Exception):
    """The API server's answer is not success. ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Api:
    """Thread-safe: every request has a connection of its own. All methods raise ApiRefused, and OSError when the server is away."""

    host: str
    port: int
    context: ssl.SSLContext

    @classmethod
    def of(cls, kubeconfig: Path, server: str | None = None) -> Self:
        """As a kubeconfig of ours (JSON) says, or at another address."""
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as file:  # ssl takes a client's key from files alone
            file.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            file.flush()
            context.load_cert_chain(file.name)
        url = urlsplit(server or cluster["server"])
        assert url.hostname is not None
        assert url.port is not None
        return cls(url.hostname, url.port, context)

    def get(self, path: str, **query: str) -> Object:
        """The object or list at a path such as ``/api/v1/nodes``."""
        return self.request("GET", f"{path}?{urlencode(query)}" if query else path)

    def find(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """One object of a well-known kind, or None."""
        try:
            return self.get(path_of(kind, name, namespace))
        except ApiRefused as exc:
            if exc.status == http.client.NOT_FOUND:
                return None
            raise

    def list(self, kind: str, namespace: str | None = None, **query: str) -> list[Object]:
        """The objects of a well-known kind, in one namespace or all; ``labelSelector`` and ``fieldSelector`` narrow it."""
        items: list[Object] = self.get(path_of(kind, None, namespace), **query).get("items", [])
        return items

    def create(self, path: str, body: Object) -> Object:
        """Post an object to its list, or to a subresource such as ``.../serviceaccounts/NAME/token``."""
        return self.request("POST", path, body)

    def patch(self, path: str, body: Object) -> Object:
        """Merge: null removes a field."""
        return self.request("PATCH", path, body, "application/merge-patch+json")

    def apply(self, body: Object) -> Object:
        """Server-side apply of an object of a well-known kind."""
        metadata = body["metadata"]
        path = path_of(body["kind"], metadata["name"], metadata.get("namespace"))
        return self.request("PATCH", f"{path}?fieldManager=tests&force=true", body, "application/apply-patch+yaml")

    def delete(self, path: str, **options: Any) -> Object:
        return self.request("DELETE", path, options or None)

    def request(self, verb: str, path: str, body: Object | None = None, kind: str = "application/json") -> Object:
        connection = http.client.HTTPSConnection(self.host, self.port, context=self.context, timeout=_WITHIN)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(verb, path, data, {"Content-Type": kind, "Accept": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except http.client.HTTPException as exc:
            raise OSError(f"the API server's answer broke off: {exc!r}") from exc
        finally:
            connection.close()
        if response.status >= http.client.BAD_REQUEST:
            raise ApiRefused(response.status, _message(content))
        result: Object = json.loads(content) if response.headers.get_content_type() == "application/json" else {}
        return result


def path_of(kind: str, name: str | None = None, namespace: str | None = None) -> str:
    """The path of a well-known kind's list or of one object. Raises KeyError for other kinds."""
    root, plural = _PLURALS[kind]
    middle = f"/namespaces/{namespace}" if namespace is not None else ""
    return f"{root}{middle}/{plural}" + (f"/{name}" if name is not None else "")


def condition(item: Object, kind: str) -> bool:
    """Whether a condition of an object's status, such as ``Ready``, is ``True``."""
    return any(each["type"] == kind and each["status"] == "True" for each in item.get("status", {}).get("conditions", ()))


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["message"])
    except (ValueError, KeyError, TypeError):
        return os.fsdecode(content[:500])
