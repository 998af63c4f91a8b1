"""The control plane as a process, judged by grpcio: configuration, certificates, statuses, and its end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from mesh.model.identity import SpiffeId
from mesh.tls.csr import make_request
from mesh.xds.names import ADDRESS, ADS_METHOD, AUTHORIZATION, CREATE_CERTIFICATE_METHOD
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse
from mesh.xds.proto.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from mesh.xds.proto.workload_pb2 import Address

pytestmark = pytest.mark.interop

CLUSTER = """\
apiVersion: v1
kind: Node
metadata: {name: n1}
---
apiVersion: v1
kind: Namespace
metadata: {name: app, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Service
metadata: {name: client, namespace: app}
spec:
  clusterIP: 10.96.0.10
  selector: {app: client}
  ports: [{name: http, port: 80}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: app}
spec: {mtls: {mode: STRICT}}
"""
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: app, labels: {app: client}}
spec: {nodeName: n1, serviceAccountName: client, containers: [{name: main}]}
"""
STATUS = """\
{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "client", "namespace": "app"},
 "status": {"phase": "Running", "podIP": "ADDRESS", "podIPs": [{"ip": "ADDRESS"}], "conditions": [{"type": "Ready", "status": "True"}]}}
"""
CLIENT = SpiffeId("cluster.local", "app", "client")


class Istiod:
    """A running control plane and the channel of an agent to it."""

    def __init__(self, directory: Path, process: subprocess.Popen[str], agents: str) -> None:
        self.state = directory / "state"
        self.process = process
        credentials = grpc.ssl_channel_credentials((self.state / "root-cert.pem").read_bytes())
        options = [("grpc.ssl_target_name_override", "istiod.istio-system.svc")]
        self.channel = grpc.secure_channel(agents, credentials, options)

    def metadata(self):
        token = (self.state / "tokens" / "n1.token").read_text()
        return (("authorization", f"Bearer {token}"), ("clusterid", "Kubernetes"))

    def sign(self, identity: SpiffeId, *, csr: bytes | None = None, metadata=None) -> list[str]:
        request = IstioCertificateRequest(csr=csr or make_request(identity).csr_pem, validity_duration=86400)
        request.metadata.update({"ImpersonatedIdentity": str(identity)})
        call = self.channel.unary_unary(
            CREATE_CERTIFICATE_METHOD, IstioCertificateRequest.SerializeToString, IstioCertificateResponse.FromString
        )
        return list(call(request, metadata=self.metadata() if metadata is None else metadata, timeout=10).cert_chain)


class Watch:
    """A delta ADS stream that subscribes to everything, acknowledging what it gets."""

    def __init__(self, istiod: Istiod, versions=None) -> None:
        import queue

        self._requests: queue.SimpleQueue[DeltaDiscoveryRequest | None] = queue.SimpleQueue()
        call = istiod.channel.stream_stream(ADS_METHOD, DeltaDiscoveryRequest.SerializeToString, DeltaDiscoveryResponse.FromString)
        for type_url in (ADDRESS, AUTHORIZATION):
            request = DeltaDiscoveryRequest(type_url=type_url, initial_resource_versions=(versions or {}).get(type_url, {}))
            request.node.id = "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local"
            self._requests.put(request)
        self._responses = call(iter(self._requests.get, None), metadata=istiod.metadata(), timeout=30)

    def next(self) -> DeltaDiscoveryResponse:
        response = next(self._responses)
        self._requests.put(DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce))
        return response

    def close(self) -> None:
        self._responses.cancel()
        self._requests.put(None)


@contextmanager
def running(directory: Path, *options: str):
    command = [sys.executable, "-m", "istiod_py", "--source", directory / "source", "--overlay", directory / "status"]
    command += ["--state-dir", directory / "state", "--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if found := re.search(r'\tistiod\tserving\tagents="([^"]+)"', line):
                    break
            else:
                raise AssertionError(f"istiod ended with {process.wait()}")
            istiod = Istiod(directory, process, found[1])
            with istiod.channel:
                yield istiod
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0, "SIGTERM ends it cleanly"
        finally:
            process.kill()


@pytest.fixture
def directory(tmp_path):
    for name in ("source", "status"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "source" / "pod.yaml").write_text(POD)
    _report(tmp_path, "10.0.1.2")
    return tmp_path


def _report(directory: Path, ip: str) -> None:
    draft = directory / "status" / ".client.json"
    draft.write_text(STATUS.replace("ADDRESS", ip))
    draft.rename(directory / "status" / "client.json")


def test_grpcio_is_told_the_mesh_and_then_only_what_changes(directory):
    with running(directory) as istiod:
        watch = Watch(istiod)
        first = {response.type_url: response for response in (watch.next(), watch.next())}
        names = sorted(resource.name for resource in first[ADDRESS].resources)
        assert names == ["Kubernetes//Pod/app/client", "app/client.app.svc.cluster.local"]
        assert [resource.name for resource in first[AUTHORIZATION].resources] != []
        _report(directory, "10.0.1.3")
        change = watch.next()
        (resource,) = change.resources
        workload = Address.FromString(resource.resource.value).workload
        assert (workload.name, [*map(list, workload.addresses)]) == ("client", [[10, 0, 1, 3]])
        watch.close()
        # On reconnect only the difference to what the client says it holds.
        held = {response.type_url: {each.name: each.version for each in response.resources} for response in first.values()}
        held[ADDRESS]["Kubernetes//Pod/app/gone"] = "1"
        again = Watch(istiod, held)
        answers = {response.type_url: response for response in (again.next(), again.next())}
        assert [each.name for each in answers[ADDRESS].resources] == ["Kubernetes//Pod/app/client"]
        assert list(answers[ADDRESS].removed_resources) == ["Kubernetes//Pod/app/gone"]
        assert list(answers[AUTHORIZATION].resources) == []
        again.close()


def test_grpcio_gets_a_certificate_and_every_refusal_with_its_status(directory):
    with running(directory) as istiod:
        leaf, root = istiod.sign(CLIENT)
        roots = x509.verification.Store(x509.load_pem_x509_certificates(root.encode()))
        verified = x509.verification.PolicyBuilder().store(roots).build_client_verifier().verify(
            x509.load_pem_x509_certificate(leaf.encode()), []
        )  # fmt: skip
        assert verified.subjects == [x509.UniformResourceIdentifier(str(CLIENT))]
        refusals = [
            (grpc.StatusCode.UNAUTHENTICATED, {"identity": CLIENT, "metadata": (("authorization", "Bearer x"),)}),
            (grpc.StatusCode.UNAUTHENTICATED, {"identity": CLIENT, "metadata": ()}),
            (grpc.StatusCode.UNAUTHENTICATED, {"identity": SpiffeId("cluster.local", "app", "other")}),
            (grpc.StatusCode.UNAUTHENTICATED, {"identity": SpiffeId("example.org", "app", "client")}),
            (grpc.StatusCode.INVALID_ARGUMENT, {"identity": CLIENT, "csr": b"nonsense"}),
        ]
        for status, arguments in refusals:
            with pytest.raises(grpc.RpcError) as caught:
                istiod.sign(**arguments)
            assert caught.value.code() is status, arguments


def test_a_restart_keeps_root_and_tokens_and_signs_with_the_same_root(directory):
    with running(directory) as istiod:
        before = istiod.sign(CLIENT)[-1], istiod.metadata()
    with running(directory) as istiod:
        assert (istiod.sign(CLIENT)[-1], istiod.metadata()) == before


def test_what_it_can_not_start_with_is_one_clear_line_and_status_78(directory):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "istiod_py", "--source", directory / "source", "--state-dir", directory / "state"]
        ended = subprocess.run([*command, "--listen", f"127.0.0.1:{port}"], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 78
    assert ended.stderr.splitlines() == [f"istiod-py: failed to bind to address 127.0.0.1:{port}: [Errno 98] Address already in use"]
    missing = subprocess.run([*command[:4], "/no/such", *command[5:]], capture_output=True, text=True, timeout=30, check=False)
    assert (missing.returncode, missing.stderr) == (78, "istiod-py: the source /no/such is not a directory\n")
    (directory / "state" / "ca-key.pem").parent.mkdir(exist_ok=True)
    (directory / "state" / "ca-key.pem").write_text("x")
    unsafe = subprocess.run(
        [*command, "--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0"], capture_output=True, text=True, timeout=30, check=False
    )
    assert unsafe.returncode == 78
    assert "ca-key.pem: mode 0644 lets others at a secret" in unsafe.stderr
