"""Keys, certificates and kubeconfigs of a test cluster, as kubeadm makes them: one authority, a client certificate for each program."""

from __future__ import annotations

import base64
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFETIME: Final = timedelta(days=30)
"""Longer than anybody keeps a test cluster up."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """In PEM. The certificate's and its key."""

    certificate: bytes
    key: bytes


class Authority:
    """Issues what the cluster's programs need. Keys are of the P-256 curve: they are made in no time."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("kubernetes", ())
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = _builder(self._name, self._name, self._key.public_key())
        builder = builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)
        self.pair = KeyPair(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), _pem(self._key))

    def issue(self, user: str, *, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> KeyPair:
        """For clients, and with ``hosts`` (names and addresses) for servers too."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
        builder = _builder(_name(user, groups), self._name, key.public_key())
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return KeyPair(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def service_account_keys() -> KeyPair:
    """The key that tokens are signed with and its public half (in place of a certificate). RSA, as kubeadm has it."""
    key = rsa.generate_private_key(65537, 2048)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return KeyPair(key.public_key().public_bytes(serialization.Encoding.PEM, form), _pem(key))


def kubeconfig(server: str, authority: bytes, client: KeyPair, *, cluster: str) -> str:
    """In JSON, which is YAML too."""

    def encode(data: bytes) -> str:
        return base64.b64encode(data).decode()

    user = {"client-certificate-data": encode(client.certificate), "client-key-data": encode(client.key)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": {"server": server, "certificate-authority-data": encode(authority)}}],
        "users": [{"name": cluster, "user": user}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        "current-context": cluster,
    }
    return json.dumps(config, indent=2) + "\n"


def write_pair(directory: Path, name: str, pair: KeyPair) -> None:
    """``NAME.crt`` and ``NAME.key``, the latter for root alone."""
    (directory / f"{name}.crt").write_bytes(pair.certificate)
    write_secret(directory / f"{name}.key", pair.key)


def write_secret(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + _LIFETIME)


def _name(user: str, groups: Sequence[str]) -> x509.Name:
    organisations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*organisations, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: CertificateIssuerPrivateKeyTypes) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
