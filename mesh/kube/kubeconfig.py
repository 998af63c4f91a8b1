"""How to reach an API server and prove who we are: a kubeconfig file, or what the kubelet put into our own pod.

Credential plugins (``exec``, ``auth-provider``) are refused: a daemon that starts other programs with its own rights on the word of a file
is not worth what it saves; a token file says the same.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from mesh.kube.documents import MalformedDocument, parse_chunk, split_documents

IN_CLUSTER: Final = "in-cluster"
SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts a pod's own token and the API server's roots."""
_MAX_FILE: Final = 1 << 20


class KubeconfigError(Exception):
    """There is no usable way to an API server; the text names file and field. The operator must act."""


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """PEM, the chain with the leaf first."""

    chain: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """Where an API server is and what proves us to it. Files are read at each use, since tokens and roots are renewed in place."""

    host: str
    port: int
    tls: bool = True
    prefix: str = ""
    """Path in front of every request: an API server behind a proxy."""
    server_name: str = ""
    """What its certificate must name; the host if empty."""
    ca_pem: bytes = b""
    ca_file: Path | None = None
    """Roots of the server's certificate; without either those of the system."""
    insecure: bool = False
    certificate: ClientCertificate | None = None
    token: str = field(default="", repr=False)
    token_file: Path | None = None
    namespace: str = "default"

    def read_token(self) -> str:
        """The bearer token as it is now, or ``""``. Raises KubeconfigError."""
        if self.token_file is None:
            return self.token
        token = _read(self.token_file).decode("ascii", "replace").strip()
        if not token or not token.isprintable():
            raise KubeconfigError(f"{self.token_file}: no token in it")
        return token

    def make_context(self) -> ssl.SSLContext | None:
        """For one connection; None where the server speaks plain HTTP. Raises KubeconfigError."""
        if not self.tls:
            return None
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=self._roots())
        context.set_alpn_protocols(["http/1.1"])
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            _load_certificate(context, self.certificate)
        return context

    def read_roots(self) -> bytes:
        """The roots in PEM as they are now; ``b""``: the system's. Raises KubeconfigError."""
        return _read(self.ca_file) if self.ca_file is not None else self.ca_pem

    def _roots(self) -> str | None:
        pem = self.read_roots()
        if not pem:
            return None
        try:
            text = pem.decode("ascii")
            ssl.create_default_context(cadata=text)
        except (UnicodeDecodeError, ssl.SSLError) as exc:
            raise KubeconfigError(f"{self.ca_file or 'certificate-authority-data'}: no certificates in PEM: {exc}") from exc
        return text


def find_access(where: str, environ: Mapping[str, str] = os.environ) -> ClusterAccess:
    """``in-cluster``, or the path of a kubeconfig, whose current context counts. Raises KubeconfigError."""
    return in_cluster(environ) if where == IN_CLUSTER else load_kubeconfig(Path(where))


def in_cluster(environ: Mapping[str, str], directory: Path = SERVICE_ACCOUNT) -> ClusterAccess:
    """As the pod's own service account. Raises KubeconfigError."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise KubeconfigError("not in a pod: KUBERNETES_SERVICE_HOST is not set")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise KubeconfigError(f"KUBERNETES_SERVICE_PORT={port} is no port")
    namespace = directory / "namespace"
    access = ClusterAccess(
        host,
        int(port),
        ca_file=directory / "ca.crt",
        token_file=directory / "token",
        namespace=_read(namespace).decode("ascii", "replace").strip() if namespace.exists() else "default",
    )
    access.read_token()
    access.make_context()
    return access


def load_kubeconfig(path: Path, context: str = "") -> ClusterAccess:
    """The access of ``context``, or of the file's ``current-context``. Relative paths are the file's. Raises KubeconfigError."""
    access = _Reader(path, _parse(path)).read(context)
    access.read_token()
    access.make_context()
    return access


def _parse(path: Path) -> Mapping[str, object]:
    try:
        documents = [value for chunk in split_documents(_read(path).decode("utf-8")) for value in parse_chunk(chunk) if value is not None]
    except (UnicodeDecodeError, MalformedDocument) as exc:
        raise KubeconfigError(f"{path}: not YAML: {exc}") from exc
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise KubeconfigError(f"{path}: not a kubeconfig: expected one mapping")
    return documents[0]


class _Reader:
    """Reads one kubeconfig; every complaint names the file and the field."""

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self._path = path
        self._config = config

    def read(self, name: str) -> ClusterAccess:
        name = name or self._text(self._config, "current-context", "current-context")
        if not name:
            raise self._wrong("current-context", "not set, and no context was asked for")
        context = self._find("contexts", name, "context")
        cluster_name, user_name = (self._text(context, key, f"contexts[{name}].{key}") for key in ("cluster", "user"))
        cluster = self._find("clusters", cluster_name, "cluster")
        user = self._find("users", user_name, "user") if user_name else {}
        where, of_user = f"clusters[{cluster_name}]", f"users[{user_name}]"
        for unsupported in ("exec", "auth-provider", "username", "password"):
            if user.get(unsupported):
                raise self._wrong(f"{of_user}.{unsupported}", "not supported; give a token, tokenFile or client certificate")
        if cluster.get("proxy-url"):
            raise self._wrong(f"{where}.proxy-url", "not supported")
        tls, host, port, prefix = self._server(self._text(cluster, "server", f"{where}.server"), where)
        token_file = self._text(user, "tokenFile", f"{of_user}.tokenFile")
        return ClusterAccess(
            host=host,
            port=port,
            tls=tls,
            prefix=prefix,
            server_name=self._text(cluster, "tls-server-name", f"{where}.tls-server-name"),
            ca_pem=self._material(cluster, "certificate-authority", where),
            insecure=cluster.get("insecure-skip-tls-verify") is True,
            certificate=self._certificate(user, of_user),
            token="" if token_file else self._text(user, "token", f"{of_user}.token"),
            token_file=self._resolve(token_file) if token_file else None,
            namespace=self._text(context, "namespace", f"contexts[{name}].namespace") or "default",
        )

    def _find(self, section: str, name: str, key: str) -> Mapping[str, object]:
        entries = self._config.get(section)
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, Mapping) and entry.get("name") == name:
                value = entry.get(key)
                return value if isinstance(value, Mapping) else {}
        raise self._wrong(section, f"there is no '{name}'")

    def _server(self, url: str, where: str) -> tuple[bool, str, int, str]:
        parsed = urlsplit(url)
        try:
            host, port = parsed.hostname, parsed.port
        except ValueError:
            host, port = None, None
        if parsed.scheme not in ("https", "http") or not host:
            raise self._wrong(f"{where}.server", f"expected https://HOST:PORT, found '{url}'")
        tls = parsed.scheme == "https"
        return tls, host, port or (443 if tls else 80), parsed.path.rstrip("/")

    def _certificate(self, user: Mapping[str, object], where: str) -> ClientCertificate | None:
        chain, key = self._material(user, "client-certificate", where), self._material(user, "client-key", where)
        if bool(chain) != bool(key):
            raise self._wrong(where, "client-certificate and client-key go together")
        return ClientCertificate(chain, key) if chain else None

    def _material(self, entry: Mapping[str, object], key: str, where: str) -> bytes:
        """``KEY-data`` in base64, which has precedence, or the file that ``KEY`` names."""
        data = self._text(entry, f"{key}-data", f"{where}.{key}-data")
        if data:
            try:
                return base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError) as exc:
                raise self._wrong(f"{where}.{key}-data", f"not base64: {exc}") from exc
        name = self._text(entry, key, f"{where}.{key}")
        return _read(self._resolve(name)) if name else b""

    def _resolve(self, name: str) -> Path:
        return self._path.parent / name

    def _text(self, entry: Mapping[str, object], key: str, where: str) -> str:
        value = entry.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._wrong(where, "expected a string")
        return value

    def _wrong(self, where: str, message: str) -> KubeconfigError:
        return KubeconfigError(f"{self._path}: {where}: {message}")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE)
    except OSError as exc:
        raise KubeconfigError(f"{path}: {exc.strerror}") from exc


def _load_certificate(context: ssl.SSLContext, certificate: ClientCertificate) -> None:
    """The standard library takes keys from files only: ours is private (0600) and lives for the length of this call."""
    with tempfile.NamedTemporaryFile(prefix="kube-client-", suffix=".pem") as file:
        file.write(certificate.chain + b"\n" + certificate.key)
        file.flush()
        try:
            context.load_cert_chain(file.name)
        except (ssl.SSLError, OSError) as exc:
            raise KubeconfigError(f"the client certificate and key do not work: {exc}") from exc
