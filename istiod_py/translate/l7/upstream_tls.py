"""TLS towards endpoints: what a DestinationRule's ``tls`` or a BackendTLSPolicy comes to, with the certificates that they name.

Whatever is missing or wrong breaks it: requests fail then, and never go in plaintext or to somebody who was not verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509

from istiod_py.translate.config import Condition
from istiod_py.translate.reading import Read
from mesh.kube.backendtlspolicy import AuthorityRef, KubeBackendTlsPolicy
from mesh.kube.configmap import KubeConfigMap
from mesh.kube.objects import ObjectKey, by_age
from mesh.kube.secret import KubeSecret
from mesh.kube.trafficpolicy import TlsSettings
from mesh.model.l7.destination import TlsMode, UpstreamTls

ROOTS_KEY: Final = "ca.crt"
_SYSTEM: Final = "system"
_AUTHORITY_SUFFIX: Final = "-cacert"
"""Of the Secret beside another that has the authority's certificates, as Istio looks for them."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """By namespace and name."""

    secrets: Mapping[tuple[str, str], KubeSecret] = field(default_factory=dict)
    config_maps: Mapping[tuple[str, str], KubeConfigMap] = field(default_factory=dict)

    def only(self, names: Iterable[str], namespace: str) -> Credentials:
        """What TLS settings that name these credentials can look at, from a waypoint's ``namespace``."""
        places = {(namespace, _parse_credential(name, namespace)[2]) for name in names}
        places |= {(namespace, f"{name}{_AUTHORITY_SUFFIX}") for _, name in places}
        return Credentials(
            {place: self.secrets[place] for place in sorted(places) if place in self.secrets},
            {place: self.config_maps[place] for place in sorted(places) if place in self.config_maps},
        )


class Unusable(Exception):
    """Why TLS cannot be spoken as asked."""


# DestinationRule


def translate_tls(settings: TlsSettings, namespace: str, credentials: Credentials) -> UpstreamTls | None:
    """``namespace``: the waypoint's, where credentials have to be. None: nothing but what the mesh does anyway (DISABLE, ISTIO_MUTUAL)."""
    if settings.mode not in ("SIMPLE", "MUTUAL"):
        return None
    names = tuple(name for name in settings.subject_alt_names if "://" not in name)
    uris = tuple(name for name in settings.subject_alt_names if "://" in name)
    mode = TlsMode[settings.mode]
    try:
        roots, certificate, key = _find_material(settings, namespace, credentials)
    except Unusable as exc:
        return UpstreamTls(mode, settings.sni, names, uris, broken=str(exc))
    return UpstreamTls(mode, settings.sni, names, uris, roots, certificate, key, settings.skip_verify)


def _find_material(settings: TlsSettings, namespace: str, credentials: Credentials) -> tuple[str | None, str, str]:
    """Roots, certificate and key. Raises Unusable."""
    if settings.credential_name:
        return _find_credential(settings, namespace, credentials)
    files = [
        field
        for field, path in (
            ("clientCertificate", settings.client_certificate),
            ("privateKey", settings.private_key),
            ("caCertificates", settings.ca_certificates if settings.ca_certificates != _SYSTEM else ""),
            ("caCrl", settings.ca_crl),
        )
        if path
    ]
    if files:
        raise Unusable(f"waypoints read no files, which {', '.join(files)} names: use credentialName")
    return None, "", ""


def _find_credential(settings: TlsSettings, namespace: str, credentials: Credentials) -> tuple[str | None, str, str]:
    kind, place, name = _parse_credential(settings.credential_name, namespace)
    if place != namespace:
        raise Unusable(f"credentialName: {kind} {place}/{name} is not in the waypoint's namespace, {namespace}")
    if kind == "ConfigMap":
        if settings.mode == "MUTUAL":
            raise Unusable("credentialName: a ConfigMap has no certificate of ours")
        return read_roots(credentials.config_maps.get((namespace, name)), f"ConfigMap {namespace}/{name}"), "", ""
    secret = credentials.secrets.get((namespace, name))
    beside = credentials.secrets.get((namespace, f"{name}{_AUTHORITY_SUFFIX}"))
    if secret is None and (beside is None or settings.mode == "MUTUAL"):
        raise Unusable(f"credentialName: there is no Secret {namespace}/{name}, or it may not be read")
    for found in (secret, beside):
        if found is not None and (found.data.get("ca.crl") or found.data.get("crl")):
            raise Unusable(f"credentialName: Secret {namespace}/{found.name} has a revocation list, which waypoints can't heed")
    certificate, key = _read_pair(secret, namespace) if secret is not None and settings.mode == "MUTUAL" else ("", "")
    if settings.skip_verify:
        return None, certificate, key
    return _read_authority(beside, secret, f"Secret {namespace}/{name}"), certificate, key


def _parse_credential(text: str, namespace: str) -> tuple[str, str, str]:
    """``name``, ``kubernetes://[namespace/]name`` or ``configmap://[namespace/]name``: kind, namespace, name."""
    kind = "ConfigMap" if text.startswith("configmap://") else "Secret"
    place, slash, name = text.removeprefix("kubernetes://").removeprefix("configmap://").rpartition("/")
    return kind, place if slash else namespace, name


def _read_pair(secret: KubeSecret, namespace: str) -> tuple[str, str]:
    for certificate, key in (("tls.crt", "tls.key"), ("cert", "key")):
        if secret.data.get(certificate) and secret.data.get(key):
            return secret.data[certificate], secret.data[key]
    raise Unusable(f"credentialName: Secret {namespace}/{secret.name} has no tls.crt and tls.key")


def _read_authority(beside: KubeSecret | None, secret: KubeSecret | None, name: str) -> str:
    for found in (beside, secret):
        for key in (ROOTS_KEY, "cacert"):
            if found is not None and found.data.get(key):
                return _check_roots(found.data[key], f"{name}: {key}")
    raise Unusable(f"credentialName: {name} has no {ROOTS_KEY} to verify by")


def read_roots(config_map: KubeConfigMap | None, name: str) -> str:
    """Raises Unusable."""
    if config_map is None:
        raise Unusable(f"there is no {name}")
    if not config_map.data.get(ROOTS_KEY):
        raise Unusable(f"{name} has no {ROOTS_KEY}")
    return _check_roots(config_map.data[ROOTS_KEY], f"{name}: {ROOTS_KEY}")


def _check_roots(pem: str, name: str) -> str:
    try:
        x509.load_pem_x509_certificates(pem.encode())
    except ValueError as exc:
        raise Unusable(f"{name}: no certificates in PEM: {exc}") from exc
    return pem if pem.endswith("\n") else f"{pem}\n"


# BackendTLSPolicy


@dataclass(frozen=True, slots=True)
class BackendVerdict:
    """What a BackendTLSPolicy says in its status, of every waypoint that enforces it."""

    accepted: Condition
    resolved: Condition


class BackendTls:
    """All BackendTLSPolicies: of several for one target (and section) the oldest counts."""

    def __init__(self, reads: Iterable[Read[KubeBackendTlsPolicy]], credentials: Credentials) -> None:
        self._by_target: dict[tuple[str, str, str, str], tuple[ObjectKey, UpstreamTls]] = {}
        self.verdicts: dict[ObjectKey, BackendVerdict] = {}
        by_object = {read.obj: read for read in reads}
        for obj in by_age(list(by_object)):
            read = by_object[obj]
            tls, verdict = _judge(read, credentials)
            policy, conflicts = read.value, []
            for target in policy.targets:
                key = target.kind, policy.namespace, target.name, target.section
                if not target.is_known:
                    continue
                if key in self._by_target:
                    conflicts.append(f"{target.kind} {target.name}" + (f" section {target.section}" if target.section else ""))
                else:
                    self._by_target[key] = obj.key, tls
            self.verdicts[obj.key] = _conflicted(verdict, conflicts) if conflicts else verdict

    def find(self, kind: str, namespace: str, name: str, ports: Iterable[str]) -> dict[str, tuple[ObjectKey, UpstreamTls]]:
        """Of one service, what is said of its ``ports`` (names) one by one, and under ``""`` of all others; each with its policy."""
        sections = dict.fromkeys((*ports, ""))
        found = ((section, self._by_target.get((kind, namespace, name, section))) for section in sections)
        return {section: tls for section, tls in found if tls is not None}


def _conflicted(verdict: BackendVerdict, conflicts: list[str]) -> BackendVerdict:
    message = f"an older policy is in force for {', '.join(conflicts)}"
    return BackendVerdict(Condition("Accepted", False, "Conflicted", message), verdict.resolved)


def _judge(read: Read[KubeBackendTlsPolicy], credentials: Credentials) -> tuple[UpstreamTls, BackendVerdict]:
    policy = read.value
    resolved = Condition("ResolvedRefs", True, "ResolvedRefs", "")
    if not read.good:
        because = f"BackendTLSPolicy {policy.namespace}/{policy.name} has a mistake: {read.problems[0]}"
        invalid = Condition("Accepted", False, "Invalid", f"until corrected no request goes through: {read.problems[0]}")
        return UpstreamTls(TlsMode.SIMPLE, broken=because), BackendVerdict(invalid, resolved)
    if policy.well_known and not policy.system_roots:
        because = f"wellKnownCACertificates {policy.well_known} is not known here, only System"
        return _translate(policy, None, because), BackendVerdict(Condition("Accepted", False, "Invalid", because), resolved)
    roots, refused = _find_roots(policy, credentials)
    if refused:
        resolved = Condition("ResolvedRefs", False, refused[0][0], "; ".join(message for _, message in refused))
    if policy.authorities and not roots:
        because = f"no valid authority: {resolved.message}"
        return _translate(policy, None, because), BackendVerdict(Condition("Accepted", False, "NoValidCACertificate", because), resolved)
    accepted = Condition("Accepted", True, "Accepted", "")
    if read.problems:
        accepted = Condition("Accepted", False, "Invalid", f"the last good version stays in force: {read.problems[0]}")
    return _translate(policy, roots or None), BackendVerdict(accepted, resolved)


def _translate(policy: KubeBackendTlsPolicy, roots: str | None, broken: str = "") -> UpstreamTls:
    names = policy.names if policy.names or policy.uris else (policy.hostname,)
    return UpstreamTls(TlsMode.SIMPLE, policy.hostname, names, policy.uris, roots, broken=broken)


def _find_roots(policy: KubeBackendTlsPolicy, credentials: Credentials) -> tuple[str, list[tuple[str, str]]]:
    """The certificates of all authorities that can be used; reason and message for the others."""
    roots: list[str] = []
    refused: list[tuple[str, str]] = []
    for ref in policy.authorities:
        try:
            roots.append(_resolve(ref, policy.namespace, credentials))
        except Unusable as exc:
            refused.append(("InvalidCACertificateRef" if _is_config_map(ref) else "InvalidKind", str(exc)))
    return "".join(roots), refused


def _is_config_map(ref: AuthorityRef) -> bool:
    return (ref.group, ref.kind) in (("", "ConfigMap"), ("core", "ConfigMap"))


def _resolve(ref: AuthorityRef, namespace: str, credentials: Credentials) -> str:
    if not _is_config_map(ref):
        raise Unusable(f"{ref.kind} {ref.name}: only ConfigMaps are read")
    return read_roots(credentials.config_maps.get((namespace, ref.name)), f"ConfigMap {namespace}/{ref.name}")
