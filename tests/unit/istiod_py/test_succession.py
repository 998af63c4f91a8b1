"""Authorities that follow each other: whoever holds a living certificate can at all times shake hands with whoever else does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from istiod_py.ca import CaError, CertificateAuthority, load_plugged_in, new_root, read_root
from istiod_py.succession import DEFAULT_TTL, Material, Succession
from mesh.model.identity import SpiffeId
from mesh.tls.csr import make_request

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
ALICE = SpiffeId("cluster.local", "app", "alice")
REQUEST = make_request(ALICE).csr_pem


FILES = {name: new_root(name, START) for name in "abc"}
A, B, C = (read_root(files, "test") for files in FILES.values())
A_ANEW = read_root(new_root("a", START, FILES["a"].key_pem), "test")


def with_roots(signer: Material, *others: Material) -> Material:
    """The signer with a bundle of several roots."""
    roots = (*signer.roots, *(root for other in others for root in other.roots))
    return Material(signer.key, signer.certificate, signer.intermediates, signer.root, roots, signer.expires)


@dataclass
class Agent:
    """Renews its certificate at half of its life, give or take, as node agents do."""

    rng: random.Random
    chain: tuple[bytes, ...] = ()
    renews: datetime = START

    def live(self, ca: CertificateAuthority, now: datetime) -> None:
        if now >= self.renews:
            self.chain = ca.sign_workload(REQUEST, ALICE, DEFAULT_TTL, now)
            self.renews = now + DEFAULT_TTL * self.rng.uniform(0.4, 0.6)

    def accepts(self, other: Agent, now: datetime) -> bool:
        roots = x509.verification.Store(x509.load_pem_x509_certificates(self.chain[-1]))
        verifier = x509.verification.PolicyBuilder().store(roots).time(now).build_client_verifier()
        try:
            verifier.verify(x509.load_pem_x509_certificate(other.chain[0]), [x509.load_pem_x509_certificate(p) for p in other.chain[1:-1]])
        except x509.verification.VerificationError:
            return False
        return True


def hours(count: int) -> Iterator[datetime]:
    return (START + index * HOUR for index in range(count))


@pytest.mark.parametrize("changes", [
    {30: B},
    {30: with_roots(A, B), 31: with_roots(B, A), 32: B},
    {30: B, 40: C},
    {30: B, 40: A},
    {30: with_roots(B, A), 90: B},
    {30: A_ANEW},
], ids=["at once", "in haste", "two in a row", "and back", "with both", "issued anew"])  # fmt: skip
def test_no_handshake_fails_while_the_authority_changes(changes: dict[int, Material]) -> None:
    present = A
    ca = CertificateAuthority(present, START)
    rng = random.Random(7)
    agents = [Agent(random.Random(seed)) for seed in range(8)]
    for hour, now in enumerate(hours(130)):
        present = changes.get(hour, present)
        ca.adopt(present, now)
        rng.shuffle(agents)
        for agent in agents:
            agent.live(ca, now)
        assert all(one.accepts(two, now) for one in agents[:4] for two in agents), f"hour {hour}"
    assert x509.load_pem_x509_certificates(ca.roots_pem) == list(present.roots), "nothing of the past is left"
    assert ca.waits_until is None
    assert ca.expires == present.expires


def test_a_new_signer_waits_for_the_longest_certificate_that_came_without_its_root() -> None:
    ca = CertificateAuthority(A, START)
    ca.sign_workload(REQUEST, ALICE, 72 * HOUR, START)
    assert ca.adopt(B, START + HOUR)
    assert ca.waits_until == START + 72 * HOUR


def test_a_signer_under_a_root_that_is_trusted_long_since_does_not_wait() -> None:
    succession = Succession(with_roots(A, B), START)
    succession.adopt(with_roots(B, A), START + HOUR)
    assert succession.signer.root == B.root
    assert succession.waits_until is None


def test_a_signer_that_has_expired_is_followed_at_once() -> None:
    succession = Succession(A, START)
    succession.adopt(read_root(new_root("b", A.expires), "test"), A.expires)
    assert succession.waits_until is None


def test_a_root_that_signs_nothing_any_more_is_handed_out_no_longer() -> None:
    succession = Succession(with_roots(A, B), START)
    later = START + DEFAULT_TTL + HOUR
    succession.note_signed(later + HOUR)
    succession.adopt(A, later)
    assert succession.roots == A.roots


def plug(directory: Path, name: str) -> None:
    """Put an operator's files there: a root that signs itself."""
    (directory / "ca-key.pem").write_bytes(FILES[name].key_pem)
    for file in ("ca-cert.pem", "root-cert.pem"):
        (directory / file).write_bytes(FILES[name].certificate_pem)


def test_files_that_the_operator_changes_are_read_again(tmp_path: Path) -> None:
    plug(tmp_path, "a")
    ca = CertificateAuthority.plugged_in(tmp_path, START)
    assert not ca.refresh(START + HOUR)
    plug(tmp_path, "b")
    assert ca.refresh(START + HOUR)
    assert x509.load_pem_x509_certificates(ca.roots_pem) == [*B.roots, *A.roots]


def test_half_of_a_change_is_an_error_and_what_signed_before_goes_on(tmp_path: Path) -> None:
    plug(tmp_path, "a")
    ca = CertificateAuthority.plugged_in(tmp_path, START)
    (tmp_path / "ca-key.pem").write_bytes(FILES["b"].key_pem)
    with pytest.raises(CaError, match="not the key of"):
        ca.refresh(START + HOUR)
    assert ca.sign_workload(REQUEST, ALICE, HOUR, START + HOUR)[-1] == FILES["a"].certificate_pem


def test_a_mounted_volume_is_read_as_one_version_of_it(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"..{name}").mkdir()
        plug(tmp_path / f"..{name}", name)
    (tmp_path / "..data").symlink_to("..b")
    for file in ("ca-key.pem", "ca-cert.pem", "root-cert.pem"):
        (tmp_path / file).symlink_to(f"..{'a' if file == 'ca-key.pem' else 'b'}/{file}")  # as if the link moved after the first was read
    assert load_plugged_in(tmp_path, START + HOUR).root == B.root
