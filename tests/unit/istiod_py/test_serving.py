import ssl
import stat
from datetime import UTC, datetime, timedelta

from cryptography import x509

from istiod_py.ca import ROOT_LIFETIME, CertificateAuthority
from istiod_py.serving import ServingTls


class Clock:
    def __init__(self):
        self.time = datetime.now(UTC) - timedelta(hours=13)

    def __call__(self):
        return self.time


def _shake_hands(server: ssl.SSLContext, roots: bytes) -> x509.Certificate:
    """What a client of the context is shown; raises if it does not trust it as ``localhost``."""
    client = ssl.create_default_context(cadata=roots.decode())
    wires = [ssl.MemoryBIO() for _ in range(2)]
    ours = client.wrap_bio(wires[0], wires[1], server_hostname="localhost")
    theirs = server.wrap_bio(wires[1], wires[0], server_side=True)
    for side in (ours, theirs, ours, theirs):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    return x509.load_der_x509_certificate(ours.getpeercert(binary_form=True))


def test_the_serving_certificate_is_renewed_at_half_life_for_new_connections(tmp_path):
    clock = Clock()
    ca = CertificateAuthority.self_signed(tmp_path, "cluster.local", clock())
    serving = ServingTls(ca, ["istiod.istio-system.svc", "localhost"], tmp_path, clock)
    first = _shake_hands(serving.context(), ca.roots_pem)
    assert stat.S_IMODE((tmp_path / "serving-key.pem").stat().st_mode) == 0o600
    assert not serving.due
    clock.time += timedelta(hours=11)
    assert not serving.due
    clock.time += timedelta(hours=2)
    assert serving.due
    serving.renew()
    assert not serving.due
    assert _shake_hands(serving.context(), ca.roots_pem).serial_number != first.serial_number


def test_a_new_root_makes_a_new_serving_certificate_due(tmp_path):
    clock = Clock()
    ca = CertificateAuthority.self_signed(tmp_path, "cluster.local", clock() - ROOT_LIFETIME * 0.9)
    # The root was in its grace period when it was loaded again below.
    serving = ServingTls(ca, ["localhost"], tmp_path, clock)
    assert not serving.due
    assert ca.refresh(clock())
    assert serving.due
    serving.renew()
    _shake_hands(serving.context(), ca.roots_pem)
