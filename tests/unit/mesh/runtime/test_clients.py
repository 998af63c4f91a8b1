"""Asking the certificate authority: whatever is wrong at either end is a reason, never a crash."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

import mesh.xds.authority
from mesh.model.identity import SpiffeId
from mesh.rpc import Call, RpcError, Status, Unary, serve
from mesh.rpc.tls import server_tls
from mesh.runtime import clients
from mesh.runtime.controlplane import ControlPlaneConfig
from mesh.runtime.env import from_environment
from mesh.testing.ca import FakeCa
from mesh.testing.serving import write_serving_certificate
from mesh.tls.rotation import CertificateFetchFailed
from mesh.xds.authority import request_certificate
from mesh.xds.names import CREATE_CERTIFICATE_METHOD as METHOD
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse

ID = SpiffeId("cluster.local", "shop", "web")
CA = FakeCa()
Answer = Callable[[IstioCertificateRequest, Call], Awaitable[list[str]]]


class Authority:
    """A control plane that answers as the test says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.token = directory / "token"
        self.token.write_text("good\n")
        self.root = directory / "root.pem"
        self.trusted: str | None = ""
        """What that file holds: by default the authority's own root; None: there is no such file."""
        self.calls: list[Call] = []

    def fetch(self, answer: Answer) -> str:
        """Why there was no certificate."""

        async def handle(body: bytes, call: Call) -> bytes:
            self.calls.append(call)
            chain = await answer(IstioCertificateRequest.FromString(body), call)
            return IstioCertificateResponse(cert_chain=chain).SerializeToString()

        async def main() -> str:
            material = write_serving_certificate(self.directory, "localhost")
            if self.trusted is not None:
                self.root.write_text(self.trusted or material.root_pem)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            tls = server_tls(material.chain, material.key)
            async with trio.open_nursery() as nursery:
                await nursery.start(lambda task_status: serve(listeners, {METHOD: Unary(handle)}, tls=lambda: tls, task_status=task_status))
                with pytest.raises(CertificateFetchFailed) as caught:
                    await request_certificate(self.at(port), ID)
                nursery.cancel_scope.cancel()
            return str(caught.value)

        return trio.run(main)

    def at(self, port: int) -> mesh.xds.authority.Authority:
        addresses = {"CA_ADDRESS": f"https://127.0.0.1:{port}", "CA_ROOT_CA": str(self.root), "AUTH_TOKEN": str(self.token)}
        config = from_environment(ControlPlaneConfig, addresses | {"ALT_CA_HOSTNAME": "localhost"})
        return clients.authority(config, impersonate=True)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def nobody(request: IstioCertificateRequest, call: Call) -> list[str]:
    raise AssertionError("the authority is not to be asked")


def test_a_refusal_is_told_with_its_status(authority: Authority) -> None:
    async def refuse(request: IstioCertificateRequest, call: Call) -> list[str]:
        raise RpcError(Status.UNAUTHENTICATED, "request authenticate failure")

    assert authority.fetch(refuse) == "signing gRPC error (UNAUTHENTICATED): request authenticate failure"
    assert authority.calls[0].metadata["authorization"] == "Bearer good"


def test_an_authority_that_is_not_there_is_told(authority: Authority) -> None:
    authority.root.write_text(CA.root_pem.decode())

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        await listeners[0].aclose()
        with pytest.raises(CertificateFetchFailed, match=r"signing gRPC error \(UNAVAILABLE\): no connection to 127.0.0.1:"):
            await request_certificate(authority.at(port), ID)

    trio.run(main)


def test_a_missing_token_is_told_by_its_file(authority: Authority) -> None:
    authority.token.unlink()
    assert "token" in authority.fetch(nobody)


@pytest.mark.parametrize("token", ["two\nlines", "nul\0", "", "ünïcode"])
def test_a_token_that_no_header_can_carry_is_a_failure_of_this_try(authority: Authority, token: str) -> None:
    async def refuse(request: IstioCertificateRequest, call: Call) -> list[str]:
        raise RpcError(Status.UNAUTHENTICATED, "no")

    authority.token.write_text(token)
    assert authority.fetch(refuse)


@pytest.mark.parametrize(
    "trusted",
    [None, "\n", "no PEM", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", CA.root_pem.decode()],
    ids=["missing", "empty", "no PEM", "no certificate", "foreign"],
)
def test_roots_that_are_missing_wrong_or_foreign_are_told(authority: Authority, trusted: str | None) -> None:
    authority.trusted = trusted
    assert authority.fetch(nobody)


@pytest.mark.parametrize("binary", ["token", "root"])
def test_a_file_that_is_no_text_is_told(authority: Authority, binary: str) -> None:
    if binary == "root":
        authority.trusted = None
        authority.root.write_bytes(b"0\x82\x03\xff")  # as DER begins
    else:
        authority.token.write_bytes(b"\xff")
    assert authority.fetch(nobody).startswith("can't ask the certificate authority: ")


@pytest.mark.parametrize(
    ("chain", "because"),
    [
        ([], "chain returned from CA is empty for: spiffe://cluster.local/ns/shop/sa/web"),
        (["x"], "invalid root certificate: no root certificate present"),
        (["x", "y"], "the authority's answer is unusable"),
        ([CA.issue(ID).chain_pem[0].decode(), CA.root_pem.decode()], "the authority's answer is unusable: the private key is not"),
    ],
    ids=["empty", "no root", "garbage", "another's key"],
)
def test_an_answer_that_is_no_certificate_of_ours_is_refused(authority: Authority, chain: list[str], because: str) -> None:
    async def answer(request: IstioCertificateRequest, call: Call) -> list[str]:
        return chain

    assert authority.fetch(answer).startswith(because)
