"""A BackendTLSPolicy of the Gateway API: how to speak TLS with the endpoints of a service."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Rule, Text
from mesh.kube.hostnames import HOSTNAME_PATTERN, MAX_LENGTH, is_hostname, is_wildcard
from mesh.kube.objects import KubeObject, SourceProblem

MAX_TARGETS: Final = 16
MAX_AUTHORITIES: Final = 8
MAX_NAMES: Final = 5
MAX_OPTIONS: Final = 16
"""All as the Gateway API's schema has them."""
TARGET_GROUPS: Final[Mapping[str, str]] = {"Service": "", "ServiceEntry": "networking.istio.io"}


@dataclass(frozen=True, slots=True)
class BackendTarget:
    """``section`` names a port of the service; empty: all of them."""

    group: str
    kind: str
    name: str
    section: str

    @property
    def is_known(self) -> bool:
        """Whether it is of a kind that has endpoints here."""
        return TARGET_GROUPS.get(self.kind) == ("" if self.group == "core" else self.group)


@dataclass(frozen=True, slots=True)
class AuthorityRef:
    """Where a certificate authority's certificates are: a ConfigMap's ``ca.crt``, if the kind is one."""

    group: str
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class KubeBackendTlsPolicy:
    """``system_roots``: whom the system trusts, instead of ``authorities``. ``names`` (DNS) and ``uris``: one of these the certificate must
    have; none at all: ``hostname``, which is also sent as server name."""

    namespace: str
    name: str
    targets: tuple[BackendTarget, ...]
    hostname: str
    authorities: tuple[AuthorityRef, ...]
    well_known: str
    names: tuple[str, ...]
    uris: tuple[str, ...]
    options: Mapping[str, str]

    @property
    def system_roots(self) -> bool:
        return self.well_known == "System"


def read_backend_tls_policy(obj: KubeObject) -> tuple[KubeBackendTlsPolicy, tuple[SourceProblem, ...]]:
    """The policy and every mistake in it; with a mistake, what it targets must not be spoken to in plaintext."""
    fields = Fields(obj, strict=True)
    return parse_backend_tls_policy(fields), tuple(fields.problems)


def parse_backend_tls_policy(fields: Fields) -> KubeBackendTlsPolicy:
    """``fields`` of the whole object, strict."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("targetRefs", "validation", "options")
    targets = tuple(
        _read_target(item) for item in spec.mappings("targetRefs", required=True, empty="name what the policy is for", most=MAX_TARGETS)
    )
    _check_distinct(targets, spec)
    validation = spec.mapping("validation", required=True) or Fields(obj, ("spec", "validation"), {}, [])
    validation.refuse_unknown("hostname", "caCertificateRefs", "wellKnownCACertificates", "subjectAltNames")
    authorities = tuple(_read_authority(item) for item in validation.mappings("caCertificateRefs", most=MAX_AUTHORITIES))
    well_known = validation.string("wellKnownCACertificates", text=_AT_MOST)
    validation.demand(_NOT_BOTH, [("wellKnownCACertificates",)] if authorities and well_known else ())
    validation.demand(_SOME, [("caCertificateRefs",)] if not authorities and not well_known else ())
    names = [_read_name(item) for item in validation.mappings("subjectAltNames", most=MAX_NAMES)]
    return KubeBackendTlsPolicy(
        namespace=obj.namespace,
        name=obj.name,
        targets=targets,
        hostname=validation.string("hostname", required=True, text=_HOSTNAME),
        authorities=authorities,
        well_known=well_known,
        names=tuple(name for kind, name in names if kind == "Hostname" and name),
        uris=tuple(name for kind, name in names if kind == "URI" and name),
        options=spec.string_map("options"),
    )


def _read_target(item: Fields) -> BackendTarget:
    item.refuse_unknown("group", "kind", "name", "sectionName")
    return BackendTarget(
        group=item.string("group", required=True, text=_AT_MOST),
        kind=item.string("kind", required=True, text=_SOMETHING),
        name=item.string("name", required=True, text=_SOMETHING),
        section=item.string("sectionName", text=_AT_MOST),
    )


def _check_distinct(targets: tuple[BackendTarget, ...], spec: Fields) -> None:
    """Several references to one object have a ``sectionName`` each, and each another."""
    sections: dict[tuple[str, str, str], set[str]] = {}
    mixed, twice = [], []
    for index, target in enumerate(targets):
        known = sections.setdefault((target.group, target.kind, target.name), set())
        if target.section in known:
            twice.append(index)
        elif known and ("" in known or not target.section):
            mixed.append(index)
        known.add(target.section)
    spec.demand(_ALL_SECTIONS, [("targetRefs", index, "sectionName") for index in mixed])
    spec.demand(_SECTIONS_DIFFER, [("targetRefs", index, "sectionName") for index in twice])


def _read_authority(item: Fields) -> AuthorityRef:
    item.refuse_unknown("group", "kind", "name")
    return AuthorityRef(
        item.string("group", required=True), item.string("kind", required=True, text=_SOMETHING), item.string("name", required=True)
    )


def _read_name(item: Fields) -> tuple[str, str]:
    """Which of the two it is, and the name; empty when it is the other's."""
    item.refuse_unknown("type", "hostname", "uri")
    kind = item.string("type", required=True, choices=("Hostname", "URI"))
    hostname = item.string("hostname", text=_SAN_HOSTNAME)
    uri = item.string("uri", text=_URI)
    item.demand(_HOSTNAME_OF_TYPE, [("hostname",)] if kind and (kind == "Hostname") != bool(hostname) else ())
    item.demand(_URI_OF_TYPE, [("uri",)] if kind and (kind == "URI") != bool(uri) else ())
    return kind, hostname if kind == "Hostname" else uri


def _find_hostname_mistake(host: str) -> str | None:
    return None if is_hostname(host) else f"expected a hostname, found '{host}'"


def _find_san_mistake(host: str) -> str | None:
    return None if not host or is_hostname(host) or is_wildcard(host) else f"expected a hostname or *.hostname, found '{host}'"


def _find_uri_mistake(uri: str) -> str | None:
    return None if not uri or re.fullmatch(_URI_PATTERN, uri) else f"expected a URI with its scheme, found '{uri}'"


_URI_PATTERN: Final = r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+"
_SOMETHING: Final = Text(lambda text: None if text else "is empty", {"minLength": 1, "maxLength": 253})
_AT_MOST: Final = Text(lambda text: None if len(text) <= 253 else f"has {len(text)} characters, of at most 253", {"maxLength": 253})
_HOSTNAME: Final = Text(_find_hostname_mistake, {"pattern": f"^{HOSTNAME_PATTERN}$", "maxLength": MAX_LENGTH})
_SAN_HOSTNAME: Final = Text(_find_san_mistake, {"pattern": rf"^((\*\.)?{HOSTNAME_PATTERN})?$", "maxLength": MAX_LENGTH + 2})
_URI: Final = Text(_find_uri_mistake, {"pattern": f"^({_URI_PATTERN})?$", "maxLength": 253})
_NOT_BOTH: Final = Rule(
    "give caCertificateRefs or wellKnownCACertificates, not both",
    "!has(self.wellKnownCACertificates) || self.wellKnownCACertificates == '' || "
    "!has(self.caCertificateRefs) || size(self.caCertificateRefs) == 0",
    "wellKnownCACertificates",
)
_SOME: Final = Rule(
    "somebody must vouch for the certificate: give caCertificateRefs or wellKnownCACertificates",
    "(has(self.wellKnownCACertificates) && self.wellKnownCACertificates != '') || "
    "(has(self.caCertificateRefs) && size(self.caCertificateRefs) > 0)",
    "caCertificateRefs",
)
_SAME_TARGET: Final = "a.group == b.group && a.kind == b.kind && a.name == b.name"
_ALL_SECTIONS: Final = Rule(
    "of several references to one object each needs a sectionName",
    f"!has(self.targetRefs) || self.targetRefs.all(a, self.targetRefs.all(b, !({_SAME_TARGET}) || "
    "(has(a.sectionName) && a.sectionName != '') == (has(b.sectionName) && b.sectionName != '')))",
    "targetRefs",
)
_SECTIONS_DIFFER: Final = Rule(
    "this target is given twice",
    f"!has(self.targetRefs) || self.targetRefs.all(a, self.targetRefs.exists_one(b, {_SAME_TARGET} && "
    "(has(a.sectionName) ? a.sectionName : '') == (has(b.sectionName) ? b.sectionName : '')))",
    "targetRefs",
)
_HOSTNAME_OF_TYPE: Final = Rule(
    "an alternative name has a hostname if its type is Hostname, and none else",
    "(self.type == 'Hostname') == (has(self.hostname) && self.hostname != '')",
    "hostname",
)
_URI_OF_TYPE: Final = Rule(
    "an alternative name has a uri if its type is URI, and none else", "(self.type == 'URI') == (has(self.uri) && self.uri != '')", "uri"
)
