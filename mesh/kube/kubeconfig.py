"""How to reach an API server and prove who we are: kubeconfig files, read as kubectl does, or what the kubelet put into our own pod.

Credential plugins (``exec``) are for people's commands. Daemons refuse them: one that starts other programs with its own rights on the
word of a file is not worth what it saves; a token file says the same.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from mesh.kube.credentials import (
    INTERACTIVE_MODES,
    PLUGIN_VERSIONS,
    ClientCertificate,
    ExecPlugin,
    KubeconfigError,
    NoKubeconfigError,
    PluginCommand,
)
from mesh.kube.documents import MalformedDocument, parse_chunk, split_documents
from mesh.rpc.tls import verifying_context

__all__ = [
    "IN_CLUSTER",
    "ClientCertificate",
    "ClusterAccess",
    "KubeconfigError",
    "NoKubeconfigError",
    "Overrides",
    "choose_access",
    "find_access",
    "load_kubeconfig",
]

IN_CLUSTER: Final = "in-cluster"
SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts a pod's own token and the API server's roots."""
_MAX_FILE: Final = 1 << 20

_T = TypeVar("_T")


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
    plugin: ExecPlugin | None = None
    """Asked where there is no token."""
    namespace: str = "default"
    origin: str = ""
    """Where all this was found, for people: ``context kind of ~/.kube/config``."""

    @property
    def renewable(self) -> bool:
        """Whether a token that was refused may be worth getting anew."""
        return self.token_file is not None or self.plugin is not None

    def forget(self) -> None:
        """The server refused the credentials."""
        if self.plugin is not None:
            self.plugin.forget()

    def read_token(self) -> str:
        """The bearer token as it is now, or ``""``; blocks while a plugin is asked. Raises KubeconfigError."""
        if self.token_file is None:
            return self.token if self.token or self.plugin is None else self.plugin.current().token
        token = _read(self.token_file).decode("ascii", "replace").strip()
        if not token or not token.isprintable():
            raise KubeconfigError(f"{self.token_file}: no token in it")
        return token

    def make_context(self) -> ssl.SSLContext | None:
        """For one connection; None where the server speaks plain HTTP. Raises KubeconfigError."""
        if not self.tls:
            return None
        context = verifying_context(self._roots())
        context.set_alpn_protocols(["http/1.1"])
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        certificate = self.certificate if self.certificate is not None or self.plugin is None else self.plugin.current().certificate
        if certificate is not None:
            _load_certificate(context, certificate)
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
            verifying_context(text)
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


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the command line says instead of the files; empty: as they have it."""

    context: str = ""
    cluster: str = ""
    user: str = ""
    namespace: str = ""


def load_kubeconfig(path: Path, context: str = "") -> ClusterAccess:
    """The access of ``context``, or of the file's ``current-context``. Relative paths are the file's. Raises KubeconfigError."""
    access = _Reader([_File(path, _parse(path))], plugins=False).read(Overrides(context=context))
    access.read_token()
    access.make_context()
    return access


def choose_access(
    explicit: Path | None = None, overrides: Overrides | None = None, environ: Mapping[str, str] = os.environ, home: Path | None = None
) -> ClusterAccess:
    """What kubectl would take: the file ``explicit``, else those of KUBECONFIG merged, else ``~/.kube/config``, else our own pod's account.

    Nothing is asked of a plugin yet. Raises KubeconfigError.
    """
    chosen = overrides or Overrides()
    paths = [explicit] if explicit is not None else kubeconfig_files(environ, home or Path.home())
    if not paths:
        if environ.get("KUBERNETES_SERVICE_HOST") and chosen == Overrides(namespace=chosen.namespace):
            access = in_cluster(environ)
            return replace(access, namespace=chosen.namespace or access.namespace, origin="the pod's own service account")
        looked = environ.get("KUBECONFIG") or str((home or Path.home()) / ".kube/config")
        raise NoKubeconfigError(f"there is no kubeconfig ({looked}): give one with --kubeconfig or KUBECONFIG")
    return _Reader([_File(path, _parse(path)) for path in paths], plugins=True).read(chosen)


def kubeconfig_files(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Those that exist: of KUBECONFIG's list, whose other entries kubectl passes over, or the one in the home directory."""
    listed = [Path(part) for part in environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    return list(dict.fromkeys(path for path in listed or [home / ".kube/config"] if path.exists()))


def _parse(path: Path) -> Mapping[str, object]:
    try:
        documents = [value for chunk in split_documents(_read(path).decode("utf-8")) for value in parse_chunk(chunk) if value is not None]
    except (UnicodeDecodeError, MalformedDocument) as exc:
        raise KubeconfigError(f"{path}: not YAML: {exc}") from exc
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise KubeconfigError(f"{path}: not a kubeconfig: expected one mapping")
    return documents[0]


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    config: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A named cluster, user or context, and the file it was found in: relative paths in it start there."""

    path: Path
    where: str
    value: Mapping[str, object]

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong(key, "expected a string")
        return value

    def material(self, key: str) -> bytes:
        """``KEY-data`` in base64, which has precedence, or the file that ``KEY`` names."""
        data = self.text(f"{key}-data")
        if data:
            try:
                return base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError) as exc:
                raise self.wrong(f"{key}-data", f"not base64: {exc}") from exc
        name = self.text(key)
        return _read(self.resolve(name)) if name else b""

    def resolve(self, name: str) -> Path:
        return self.path.parent / name

    def section(self, key: str) -> _Entry | None:
        value = self.value.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "expected a mapping")
        return _Entry(self.path, f"{self.where}.{key}", value)

    def wrong(self, key: str, message: str) -> KubeconfigError:
        return KubeconfigError(f"{self.path}: {'.'.join(filter(None, (self.where, key)))}: {message}")


class _Reader:
    """Reads kubeconfigs that count as one: of entries of one name, and of current-context, the first counts. Every complaint names
    file and field."""

    def __init__(self, files: Sequence[_File], *, plugins: bool) -> None:
        self._files = files
        self._plugins = plugins

    def read(self, overrides: Overrides) -> ClusterAccess:
        context = self._context(overrides)
        cluster_name, user_name = overrides.cluster or context.text("cluster"), overrides.user or context.text("user")
        cluster = self._find("clusters", cluster_name, "cluster")
        user = self._find("users", user_name, "user") if user_name else _Entry(context.path, "users", {})
        for unsupported in (
            ("auth-provider", "username", "password") if self._plugins else ("exec", "auth-provider", "username", "password")
        ):
            if user.value.get(unsupported):
                raise user.wrong(unsupported, "not supported; give a token, tokenFile or client certificate")
        if cluster.value.get("proxy-url"):
            raise cluster.wrong("proxy-url", "not supported")
        tls, host, port, prefix = _server(cluster)
        token_file = user.text("tokenFile")
        plugin = user.section("exec")
        return ClusterAccess(
            host=host,
            port=port,
            tls=tls,
            prefix=prefix,
            server_name=cluster.text("tls-server-name"),
            ca_pem=cluster.material("certificate-authority"),
            insecure=cluster.value.get("insecure-skip-tls-verify") is True,
            certificate=_certificate(user),
            token="" if token_file else user.text("token"),
            token_file=user.resolve(token_file) if token_file else None,
            plugin=ExecPlugin(_plugin(plugin, cluster)) if plugin is not None else None,
            namespace=overrides.namespace or context.text("namespace") or "default",
            origin=f"{context.where} of {context.path}",
        )

    def _context(self, overrides: Overrides) -> _Entry:
        texts = (_Entry(file.path, "", file.config).text("current-context") for file in self._files)
        name = overrides.context or next(filter(None, texts), "")
        if name:
            return self._find("contexts", name, "context")
        if overrides.cluster:
            return _Entry(self._files[0].path, f"clusters[{overrides.cluster}]", {})
        raise self._wrong("current-context", "not set, and no context was asked for (--context)")

    def _find(self, section: str, name: str, key: str) -> _Entry:
        known: list[str] = []
        for file in self._files:
            entries = file.config.get(section)
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, Mapping) and entry.get("name") == name:
                    value = entry.get(key)
                    return _Entry(file.path, f"{section}[{name}]", value if isinstance(value, Mapping) else {})
                if isinstance(entry, Mapping):
                    known.append(str(entry.get("name")))
        raise self._wrong(section, f"there is no '{name}'" + (f" (there are: {', '.join(known[:20])})" if known else ""))

    def _wrong(self, where: str, message: str) -> KubeconfigError:
        return KubeconfigError(f"{os.pathsep.join(str(file.path) for file in self._files)}: {where}: {message}")


def _server(cluster: _Entry) -> tuple[bool, str, int, str]:
    url = cluster.text("server")
    parsed = urlsplit(url)
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host, port = None, None
    if parsed.scheme not in ("https", "http") or not host:
        raise cluster.wrong("server", f"expected https://HOST:PORT, found '{url}'")
    tls = parsed.scheme == "https"
    return tls, host, port or (443 if tls else 80), parsed.path.rstrip("/")


def _certificate(user: _Entry) -> ClientCertificate | None:
    chain, key = user.material("client-certificate"), user.material("client-key")
    if bool(chain) != bool(key):
        raise user.wrong("", "client-certificate and client-key go together")
    return ClientCertificate(chain, key) if chain else None


def _plugin(section: _Entry, cluster: _Entry) -> PluginCommand:
    command, version, mode = section.text("command"), section.text("apiVersion"), section.text("interactiveMode") or "IfAvailable"
    if not command:
        raise section.wrong("command", "missing")
    if version not in PLUGIN_VERSIONS:
        raise section.wrong("apiVersion", f"expected {' or '.join(PLUGIN_VERSIONS)}, found '{version}'")
    if mode not in INTERACTIVE_MODES:
        raise section.wrong("interactiveMode", f"expected {', '.join(INTERACTIVE_MODES)}, found '{mode}'")
    return PluginCommand(
        where=f"{section.path}: {section.where}",
        # As kubectl: a name is looked up in PATH, a path is the file's.
        command=str(section.resolve(command)) if "/" in command else command,
        args=tuple(_list_of(section, "args", str)),
        env=tuple((str(item.get("name")), str(item.get("value"))) for item in _list_of(section, "env", dict)),
        api_version=version,
        interactive_mode=mode,
        install_hint=section.text("installHint"),
        cluster=_cluster_info(cluster) if section.value.get("provideClusterInfo") is True else None,
    )


def _list_of(section: _Entry, key: str, kind: type[_T]) -> list[_T]:
    value = section.value.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise section.wrong(key, f"expected a list of {'strings' if kind is str else 'mappings'}")
    return value


def _cluster_info(cluster: _Entry) -> Mapping[str, object]:
    """The cluster as plugins are told of it."""
    info: dict[str, object] = {"server": cluster.text("server")}
    roots = cluster.material("certificate-authority")
    if roots:
        info["certificate-authority-data"] = base64.b64encode(roots).decode()
    for key in ("tls-server-name", "insecure-skip-tls-verify"):
        if cluster.value.get(key):
            info[key] = cluster.value[key]
    return info


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
