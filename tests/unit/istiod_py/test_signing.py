from datetime import UTC, datetime

import pytest
import trio
import trio.testing
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from istiod_py.authenticate import NodeAuthorizer, TokenAuthenticator
from istiod_py.ca import BadRequest, CertificateAuthority
from istiod_py.signing import SigningMetrics, SigningService, parse_request
from istiod_py.tokens import TokenStore
from mesh.model.identity import SpiffeId
from mesh.rpc import Call, Peer, RpcError, Status
from mesh.telemetry.metrics import Registry, render
from mesh.tls.csr import make_request
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ALICE, BOB = SpiffeId("cluster.local", "app", "alice"), SpiffeId("cluster.local", "app", "bob")


class OnePod:
    def runs_on(self, node, namespace, service_account):
        return (node, namespace, service_account) == ("n1", "app", "alice")

    async def wait_changed(self):
        await trio.sleep_forever()


@pytest.fixture
def world(tmp_path):
    tokens = TokenStore(tmp_path / "tokens")
    tokens.reconcile(["n1"])
    registry = Registry()
    ca = CertificateAuthority.self_signed(tmp_path / "state", "cluster.local", NOW)
    authorizer = NodeAuthorizer("cluster.local", OnePod())
    service = SigningService(ca, TokenAuthenticator(tokens, "istio-system"), authorizer, SigningMetrics(registry), lambda: NOW)
    token = (tmp_path / "tokens" / "n1.token").read_text()

    def ask(identity, *, token=token, csr=None, lifetime=86400, raw=None):
        request = IstioCertificateRequest(csr=csr if csr is not None else make_request(ALICE).csr_pem.decode(), validity_duration=lifetime)
        if identity is not None:
            request.metadata.update({"ImpersonatedIdentity": str(identity)})
        call = Call("/x", {"authorization": f"Bearer {token}", "clusterid": "Kubernetes"}, Peer("10.0.0.1:1"))
        data = raw if raw is not None else request.SerializeToString()
        answer = trio.run(service.create_certificate, data, call, clock=trio.testing.MockClock(autojump_threshold=0))
        return list(IstioCertificateResponse.FromString(answer).cert_chain)

    ask.registry = registry
    return ask


def _identity(chain):
    leaf = x509.load_pem_x509_certificate(chain[0].encode())
    return leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)


def test_an_agent_gets_the_certificate_of_a_pod_on_its_node(world):
    chain = world(ALICE)
    assert len(chain) == 2
    assert _identity(chain) == [str(ALICE)]
    assert "citadel_server_success_cert_issuance_count_total 1" in render(world.registry.snapshot()).decode()


def test_without_impersonation_an_agent_gets_its_own(world):
    assert _identity(world(None)) == ["spiffe://cluster.local/ns/istio-system/sa/ztunnel"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ({"identity": ALICE, "token": "wrong"}, Status.UNAUTHENTICATED, "request authenticate failure"),
        ({"identity": BOB}, Status.UNAUTHENTICATED, "request impersonation authentication failure"),
        ({"identity": "spiffe://evil/ns/app/sa/alice"}, Status.UNAUTHENTICATED, "request impersonation authentication failure"),
        ({"identity": ""}, Status.UNAUTHENTICATED, "request impersonation authentication failure"),
        ({"identity": ALICE, "csr": "nonsense"}, Status.INVALID_ARGUMENT, "not a certificate request"),
        ({"identity": ALICE, "lifetime": 91 * 86400}, Status.INVALID_ARGUMENT, "greater than the maximum"),
        ({"identity": ALICE, "lifetime": -1}, Status.INVALID_ARGUMENT, "negative"),
        ({"identity": ALICE, "lifetime": 2**62}, Status.INVALID_ARGUMENT, "out of range"),
        ({"identity": ALICE, "raw": b"\xff\xff"}, Status.INVALID_ARGUMENT, "not an IstioCertificateRequest"),
    ],
)
def test_a_refusal_has_the_right_status_and_tells_no_more_than_it_must(world, arguments, status, message):
    with pytest.raises(RpcError) as caught:
        world(**arguments)
    assert caught.value.status is status
    assert message in caught.value.message
    if status is Status.UNAUTHENTICATED:
        assert caught.value.message == message


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_bad_request(data):
    try:
        parse_request(data)
    except BadRequest:
        pass
