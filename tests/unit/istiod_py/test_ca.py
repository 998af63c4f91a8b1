import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from istiod_py.ca import DEFAULT_TTL, MAX_TTL, ROOT_LIFETIME, BadRequest, CaError, CertificateAuthority, find_plugged_in
from mesh.model.identity import SpiffeId
from mesh.tls.bundle import CertificateBundle
from mesh.tls.csr import make_request

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ALICE = SpiffeId("cluster.local", "app", "alice")
HOUR = timedelta(hours=1)


@pytest.fixture
def ca(tmp_path):
    return CertificateAuthority.self_signed(tmp_path / "state", "cluster.local", NOW)


def _leaf(chain):
    return x509.load_pem_x509_certificate(chain[0])


def _extension(certificate, kind):
    extension = certificate.extensions.get_extension_for_class(kind)
    return extension.value, extension.critical


def _verify(chain, at):
    """Judge the chain as an independent implementation does."""
    intermediates = [x509.load_pem_x509_certificate(pem) for pem in chain[1:-1]]
    roots = x509.load_pem_x509_certificates(chain[-1])
    verifier = x509.verification.PolicyBuilder().store(x509.verification.Store(roots)).time(at).build_client_verifier()
    return verifier.verify(_leaf(chain), intermediates)


def test_a_leaf_is_as_istio_issues_it(ca):
    request = make_request(ALICE)
    chain = ca.sign_workload(request.csr_pem, ALICE, HOUR, NOW)
    leaf = _leaf(chain)
    assert _extension(leaf, x509.SubjectAlternativeName) == (
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(ALICE))]),
        True,
    )
    assert list(leaf.subject) == []
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=2)
    assert leaf.not_valid_after_utc == NOW + HOUR
    assert _extension(leaf, x509.BasicConstraints) == (x509.BasicConstraints(ca=False, path_length=None), True)
    usage, critical = _extension(leaf, x509.KeyUsage)
    assert critical
    assert (usage.digital_signature, usage.key_encipherment, usage.key_cert_sign, usage.crl_sign) == (True, True, False, False)
    assert set(_extension(leaf, x509.ExtendedKeyUsage)[0]) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert len(chain) == 2
    assert chain[-1] == ca.roots_pem
    assert _verify(chain, NOW).subjects == [x509.UniformResourceIdentifier(str(ALICE))]
    bundle = CertificateBundle.parse(key_pem=request.key_pem, chain_pem=chain[:-1], roots_pem=chain[-1])
    assert bundle.identity == ALICE


def test_openssl_verifies_the_chain(ca, tmp_path):
    chain = ca.sign_workload(make_request(ALICE).csr_pem, ALICE, HOUR, NOW)
    (tmp_path / "leaf.pem").write_bytes(chain[0])
    (tmp_path / "root.pem").write_bytes(chain[-1])
    at = str(int(NOW.timestamp()))
    command = ["openssl", "verify", "-x509_strict", "-attime", at, "-CAfile", tmp_path / "root.pem", tmp_path / "leaf.pem"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("OK\n")


def test_names_in_the_request_are_ignored(ca):
    mallory = make_request(SpiffeId("other", "kube-system", "admin")).csr_pem
    leaf = _leaf(ca.sign_workload(mallory, ALICE, HOUR, NOW))
    names, _ = _extension(leaf, x509.SubjectAlternativeName)
    assert [name.value for name in names] == [str(ALICE)]


def test_the_lifetime_is_a_day_by_default_and_bounded_by_90_days_and_by_the_root(ca):
    csr = make_request(ALICE).csr_pem
    assert _leaf(ca.sign_workload(csr, ALICE, timedelta(0), NOW)).not_valid_after_utc == NOW + DEFAULT_TTL
    assert _leaf(ca.sign_workload(csr, ALICE, MAX_TTL, NOW)).not_valid_after_utc == NOW + MAX_TTL
    with pytest.raises(BadRequest, match="greater than the maximum"):
        ca.sign_workload(csr, ALICE, MAX_TTL + timedelta(seconds=1), NOW)
    with pytest.raises(BadRequest, match="negative"):
        ca.sign_workload(csr, ALICE, -HOUR, NOW)
    near_the_end = NOW + ROOT_LIFETIME - timedelta(days=1)
    assert _leaf(ca.sign_workload(csr, ALICE, MAX_TTL, near_the_end)).not_valid_after_utc == ca.expires
    with pytest.raises(CaError, match="expired"):
        ca.sign_workload(csr, ALICE, HOUR, NOW + ROOT_LIFETIME)


def _csr(key, *, algorithm=None):
    return x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
    ],
)
def test_strong_keys_are_signed(ca, key):
    assert _leaf(ca.sign_workload(_csr(key, algorithm=hashes.SHA256()), ALICE, HOUR, NOW)).public_key() == key.public_key()


def test_an_ed25519_key_is_signed(ca):
    key = ed25519.Ed25519PrivateKey.generate()
    assert _leaf(ca.sign_workload(_csr(key), ALICE, HOUR, NOW)).public_key() == key.public_key()


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 1024),
        ec.generate_private_key(ec.SECP256K1()),
        dsa.generate_private_key(2048),
    ],
)
def test_weak_and_unusual_keys_are_refused(ca, key):
    with pytest.raises(BadRequest, match="the key must be"):
        ca.sign_workload(_csr(key, algorithm=hashes.SHA256()), ALICE, HOUR, NOW)


def test_a_request_whose_signature_does_not_verify_is_refused(ca):
    der = bytearray(x509.load_pem_x509_csr(make_request(ALICE).csr_pem).public_bytes(Encoding.DER))
    der[der.index(b"alice")] ^= 1
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    with pytest.raises(BadRequest, match="signature does not verify"):
        ca.sign_workload(pem, ALICE, HOUR, NOW)


def test_what_is_no_request_or_too_large_is_refused(ca):
    for noise in (b"", b"not PEM", ca.roots_pem, b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"):
        with pytest.raises(BadRequest, match="not a certificate request"):
            ca.sign_workload(noise, ALICE, HOUR, NOW)
    with pytest.raises(BadRequest, match="bytes"):
        ca.sign_workload(b"x" * 70000, ALICE, HOUR, NOW)


GOOD_DER = x509.load_pem_x509_csr(make_request(ALICE).csr_pem).public_bytes(Encoding.DER)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(GOOD_DER) - 1), st.integers(1, 255))
def test_a_damaged_request_is_refused_and_raises_nothing_else(position, flip):
    import base64
    from pathlib import Path
    from tempfile import TemporaryDirectory

    damaged = bytearray(GOOD_DER)
    damaged[position] ^= flip
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(damaged)) + b"-----END CERTIFICATE REQUEST-----\n"
    with TemporaryDirectory() as directory:
        ca = CertificateAuthority.self_signed(Path(directory), "cluster.local", NOW)
        with pytest.raises(BadRequest):
            ca.sign_workload(pem, ALICE, HOUR, NOW)


# The own root


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_root_is_made_once_and_kept_with_strict_permissions(tmp_path):
    state = tmp_path / "state"
    old = os.umask(0)
    try:
        first = CertificateAuthority.self_signed(state, "cluster.local", NOW)
    finally:
        os.umask(old)
    assert _mode(state) == 0o700
    assert _mode(state / "ca-key.pem") == 0o600
    root = x509.load_pem_x509_certificate(first.roots_pem)
    assert root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "cluster.local"
    assert CertificateAuthority.self_signed(state, "cluster.local", NOW + HOUR).roots_pem == first.roots_pem
    assert sorted(path.name for path in state.iterdir()) == [".lock", "ca-cert.pem", "ca-key.pem"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_touch_is_refused(tmp_path, mode):
    CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    (tmp_path / "ca-key.pem").chmod(mode)
    with pytest.raises(CaError, match=f"ca-key.pem: mode {mode:04o} lets others at a secret"):
        CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)


def test_a_lost_or_foreign_key_is_an_error_and_never_a_silent_new_root(tmp_path):
    CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    other = CertificateAuthority.self_signed(tmp_path / "other", "cluster.local", NOW)
    assert other.roots_pem
    (tmp_path / "ca-key.pem").write_bytes((tmp_path / "other" / "ca-key.pem").read_bytes())
    with pytest.raises(CaError, match="is not the key of"):
        CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    (tmp_path / "ca-key.pem").unlink()
    with pytest.raises(CaError, match="restore the key"):
        CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)


def test_a_crash_between_key_and_certificate_is_completed_with_the_same_key(tmp_path):
    first = CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    chain = first.sign_workload(make_request(ALICE).csr_pem, ALICE, HOUR, NOW)
    (tmp_path / "ca-cert.pem").unlink()
    second = CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    _verify((chain[0], second.roots_pem), NOW)


def test_damaged_files_are_errors_that_name_the_file(tmp_path):
    CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    (tmp_path / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(CaError, match=r"ca-cert\.pem: no certificate in PEM"):
        CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)
    (tmp_path / "ca-key.pem").write_text("nonsense")
    with pytest.raises(CaError, match=r"ca-key\.pem: not an unencrypted private key"):
        CertificateAuthority.self_signed(tmp_path, "cluster.local", NOW)


_START = """
import pathlib, sys
from datetime import datetime, UTC
from istiod_py.ca import CertificateAuthority
sys.stdin.read()  # all begin when the test says so
print(CertificateAuthority.self_signed(pathlib.Path(sys.argv[1]), "cluster.local", datetime.now(UTC)).roots_pem.decode())
"""


def test_control_planes_that_start_together_agree_on_one_root(tmp_path):
    command = [sys.executable, "-c", _START, str(tmp_path / "state")]
    starting = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for process in starting:
        process.stdin.close()
    roots = set()
    for process in starting:
        with process:
            roots.add(process.stdout.read())
    assert len(roots) == 1
    assert b"BEGIN CERTIFICATE" in roots.pop()


def test_the_root_is_reissued_with_the_same_key_when_a_fifth_of_its_life_is_left(tmp_path, ca):
    assert not ca.refresh(NOW + ROOT_LIFETIME * 0.79)
    late = NOW + ROOT_LIFETIME * 0.81
    before = ca.sign_workload(make_request(ALICE).csr_pem, ALICE, HOUR, late)
    assert ca.refresh(late)
    after = ca.sign_workload(make_request(ALICE).csr_pem, ALICE, HOUR, late)
    assert before[-1] != after[-1] == ca.roots_pem
    _verify((before[0], after[-1]), late)
    _verify((after[0], before[-1]), late)
    assert ca.expires == late + ROOT_LIFETIME
    assert not ca.refresh(late)


def test_a_serving_certificate_names_the_hosts(ca):
    serving = ca.issue_serving(["istiod.istio-system.svc", "localhost"], NOW)
    leaf = x509.load_pem_x509_certificate(serving.chain_pem)
    names, _ = _extension(leaf, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["istiod.istio-system.svc", "localhost"]
    roots = x509.verification.Store(x509.load_pem_x509_certificates(ca.roots_pem))
    verifier = x509.verification.PolicyBuilder().store(roots).time(NOW).build_server_verifier(x509.DNSName("localhost"))
    verifier.verify(leaf, [])
    assert b"PRIVATE" not in repr(serving).encode()


# The plugged-in authority


class Plugged:
    """Istio's cacerts directory: a root, and below it an intermediate that signs."""

    def __init__(self, directory, *, days=365, ca=True, root_days=3650):
        directory.mkdir()
        self.directory = directory
        self.root_key, self.key = ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)
        self.root = self._certify("root", self.root_key, "root", self.root_key, root_days, True)
        self.certificate = self._certify("intermediate", self.key, "root", self.root_key, days, ca)
        self.write("ca-key.pem", self.key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        self.write("ca-cert.pem", self.certificate)
        self.write("root-cert.pem", self.root)
        self.write("cert-chain.pem", self.certificate + self.root)

    def write(self, name, data):
        (self.directory / name).write_bytes(data)

    @staticmethod
    def _certify(subject, key, issuer, issuer_key, days, ca):
        name = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
        builder = x509.CertificateBuilder().subject_name(name[0]).issuer_name(name[1]).public_key(key.public_key())
        builder = (
            builder.serial_number(x509.random_serial_number()).not_valid_before(NOW - HOUR).not_valid_after(NOW + timedelta(days=days))
        )
        builder = builder.add_extension(x509.BasicConstraints(ca, None), True)
        usage = [False] * 9
        usage[5] = usage[6] = ca
        usage[0] = True
        builder = builder.add_extension(x509.KeyUsage(*usage), True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_a_plugged_in_intermediate_signs_and_the_chain_leads_to_its_root(tmp_path):
    plugged = Plugged(tmp_path / "cacerts")
    ca = CertificateAuthority.plugged_in(plugged.directory, NOW)
    chain = ca.sign_workload(make_request(ALICE).csr_pem, ALICE, HOUR, NOW)
    assert chain[1:] == (plugged.certificate, plugged.root)
    _verify(chain, NOW)
    assert not ca.refresh(NOW + timedelta(days=364))
    assert ca.issue_serving(["localhost"], NOW).chain_pem.count(b"BEGIN CERTIFICATE") == 2


def test_an_authority_is_plugged_in_where_it_is_given_or_mounted(tmp_path):
    given, mounted = tmp_path / "given", tmp_path / "mounted"
    assert find_plugged_in(None, mounted) is None
    assert find_plugged_in(given, mounted) == given, "and it is an error later if nothing is there"
    mounted.mkdir()
    assert find_plugged_in(None, mounted) is None
    (mounted / "..2026_01_01_00_00_00.1").mkdir()
    (mounted / "..data").symlink_to("..2026_01_01_00_00_00.1")
    assert find_plugged_in(None, mounted) is None, "so a kubelet mounts a Secret that is not there"
    (mounted / "ca-cert.pem").touch()
    assert find_plugged_in(None, mounted) == mounted, "incomplete files are an error, never a root of our own"
    assert find_plugged_in(given, mounted) == given


def test_a_plugged_in_root_that_signs_itself_needs_no_chain(tmp_path):
    plugged = Plugged(tmp_path / "cacerts")
    plugged.write("ca-key.pem", plugged.root_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    plugged.write("ca-cert.pem", plugged.root)
    (plugged.directory / "cert-chain.pem").unlink()
    chain = CertificateAuthority.plugged_in(plugged.directory, NOW).sign_workload(make_request(ALICE).csr_pem, ALICE, HOUR, NOW)
    assert chain[1:] == (plugged.root,)


def test_nothing_outlives_the_plugged_in_path(tmp_path):
    plugged = Plugged(tmp_path / "cacerts", days=60, root_days=30)
    ca = CertificateAuthority.plugged_in(plugged.directory, NOW)
    assert _leaf(ca.sign_workload(make_request(ALICE).csr_pem, ALICE, MAX_TTL, NOW)).not_valid_after_utc == NOW + timedelta(days=30)


def test_every_defect_of_a_plugged_in_authority_is_named(tmp_path):
    def refused(directory, match, at=NOW):
        with pytest.raises(CaError, match=match):
            CertificateAuthority.plugged_in(directory, at)

    good, other = Plugged(tmp_path / "good"), Plugged(tmp_path / "other")
    refused(tmp_path / "missing", r"ca-key\.pem: No such file")
    refused(good.directory, "expired at", NOW + timedelta(days=366))
    refused(good.directory, "not valid before", NOW - timedelta(days=1))
    refused(Plugged(tmp_path / "no-ca", ca=False).directory, "CA:true is missing")
    good.write("ca-key.pem", other.root_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    refused(good.directory, "is not the key of")
    other.write("root-cert.pem", good.root)
    other.write("cert-chain.pem", b"")
    refused(other.directory, "no path from ca-cert.pem to a root")
    other.write("root-cert.pem", b"nonsense")
    refused(other.directory, r"root-cert\.pem: no certificate")
