"""Stands in for a waypoint: gets its certificate as one, takes HBONE, tells whom it was called by and for what, and carries the bytes on.

Run as the command of a waypoint's pod, with its environment. Usage: ``standin_waypoint.py IP:PORT``, where all connections go.
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any

import trio
from cryptography import x509

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.reactor.hbone import TunnelRequest
from mesh.rpc import RpcError, open_channel
from mesh.rpc.tls import client_tls
from mesh.testing.proxies import IngressProxy, ReactorThread, tcp_listener
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context
from mesh.tls.csr import make_request
from mesh.tls.peer import spiffe_ids_of
from mesh.xds.client import AdsClientConfig, AdsUpdate, connect_tls, run_ads_client
from mesh.xds.l7 import L7_TYPES
from mesh.xds.names import ADDRESS, CREATE_CERTIFICATE_METHOD, waypoint_node_id
from mesh.xds.proto.ca_pb2 import IstioCertificateRequest, IstioCertificateResponse

ENVIRONMENT = os.environ


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def roots() -> str:
    return Path(ENVIRONMENT["XDS_ROOT_CA"]).read_text()


def token() -> dict[str, str]:
    return {"authorization": f"Bearer {Path(ENVIRONMENT['AUTH_TOKEN']).read_text()}"}


async def fetch_certificate(identity: SpiffeId) -> CertificateBundle:
    request = make_request(identity)
    message = IstioCertificateRequest(csr=request.csr_pem.decode(), validity_duration=3600)
    message.metadata.update({"ImpersonatedIdentity": str(identity)})
    host, _, port = ENVIRONMENT["CA_ADDRESS"].removeprefix("https://").rpartition(":")
    context = client_tls(roots())
    async with open_channel(host, int(port), ssl_context=context, server_hostname=ENVIRONMENT["ALT_CA_HOSTNAME"]) as channel:
        answer = await channel.unary(CREATE_CERTIFICATE_METHOD, message.SerializeToString(), metadata=token(), timeout=10)
    *chain, trusted = IstioCertificateResponse.FromString(answer).cert_chain
    return CertificateBundle.parse(key_pem=request.key_pem, chain_pem=[pem.encode() for pem in chain], roots_pem=trusted.encode())


async def try_certificate(account: str) -> CertificateBundle:
    """As soon as the control plane knows where this pod runs."""
    identity = SpiffeId(ENVIRONMENT["TRUST_DOMAIN"], ENVIRONMENT["POD_NAMESPACE"], account)
    while True:
        try:
            return await fetch_certificate(identity)
        except (RpcError, OSError) as exc:
            say(refused=account, because=str(exc))
            if account != ENVIRONMENT["SERVICE_ACCOUNT"]:
                raise
            await trio.sleep(0.2)


async def follow_configuration() -> None:
    host, _, port = ENVIRONMENT["XDS_ADDRESS"].removeprefix("https://").rpartition(":")
    connect = connect_tls(host, int(port), lambda: client_tls(roots()), server_hostname=ENVIRONMENT["ALT_XDS_HOSTNAME"])
    node = waypoint_node_id(ENVIRONMENT["INSTANCE_IP"], ENVIRONMENT["POD_NAME"], ENVIRONMENT["POD_NAMESPACE"])
    metadata = {"GATEWAY_NAME": ENVIRONMENT["GATEWAY_NAME"], "NODE_NAME": ENVIRONMENT["NODE_NAME"]}
    config = AdsClientConfig(connect, token, node, metadata, types=(*L7_TYPES, ADDRESS))

    def tell(update: AdsUpdate) -> None:
        for assigned in update.delta.l7:
            say(told=type(assigned.resource).__name__, key=assigned.resource.key, waypoint=assigned.waypoint)
        for _, name in update.delta.removed_l7:
            say(gone=name)

    await run_ads_client(config, tell, lambda state: None)


class Proxy(IngressProxy):
    """Tells of every request, and connects all to one address."""

    backend: SocketAddress

    def _on_request(self, request: TunnelRequest) -> None:
        certificate = request.link.peer_certificate
        assert certificate is not None
        (peer,) = spiffe_ids_of(x509.load_der_x509_certificate(certificate))
        say(authority=str(request.target), peer=str(peer))
        request.target = self.backend
        super()._on_request(request)


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


class Dual(socketserver.ThreadingMixIn, http.server.HTTPServer):
    address_family = socket.AF_INET6  # takes IPv4 too


async def certificates() -> CertificateBundle:
    own = await try_certificate(ENVIRONMENT["SERVICE_ACCOUNT"])
    try:
        await try_certificate("server")
        say(mistake="got another's certificate")
    except RpcError:
        say(identity=str(own.identity))
    return own


def main() -> None:
    bundle = trio.run(certificates)
    with ReactorThread() as loop:
        listener = tcp_listener(SocketAddress(parse_ip("::"), 15008))
        proxy = loop.call(lambda: Proxy(loop.reactor, listener, hbone_context(bundle)))
        proxy.backend = SocketAddress.parse(sys.argv[1])
        threading.Thread(target=Dual(("::", 15021), Ready).serve_forever, daemon=True).start()
        threading.Thread(target=lambda: trio.run(follow_configuration), daemon=True).start()
        while True:
            time.sleep(60)


if __name__ == "__main__":
    main()
