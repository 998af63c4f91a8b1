"""Delta xDS with grpcio as the other side: a foreign control plane's habits for our client, a foreign agent's for our server."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent import futures
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
import trio

from mesh.model.workload import Workload
from mesh.rpc import serve
from mesh.rpc.tls import client_tls, server_tls
from mesh.state.store import Delta, MeshState
from mesh.testing.serving import write_serving_certificate
from mesh.xds.cache import ResourceCache
from mesh.xds.client import AdsClientConfig, AdsState, AdsUpdate, connect_tls, run_ads_client
from mesh.xds.names import ADDRESS, ADS_METHOD, AUTHORIZATION, node_id
from mesh.xds.proto import authorization_pb2 as authz
from mesh.xds.proto import discovery_pb2 as discovery
from mesh.xds.proto import workload_pb2 as wds
from mesh.xds.server import AdsServer

pytestmark = pytest.mark.interop

PATIENCE = 60.0
NAME = "istiod.istio-system.svc"


class _ForeignIstiod(grpc.GenericRpcHandler):
    """Answers as istiod does: content versions for addresses, empty ones for policies; ends the first connection after both were taken."""

    def __init__(self) -> None:
        self.seen: queue.Queue[discovery.DeltaDiscoveryRequest] = queue.Queue()
        self.metadata: list[dict[str, str]] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        assert details.method == ADS_METHOD
        self.metadata.append(dict(details.invocation_metadata))
        return grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=discovery.DeltaDiscoveryRequest.FromString,
            response_serializer=discovery.DeltaDiscoveryResponse.SerializeToString,
        )

    def _serve(
        self, requests: Iterator[discovery.DeltaDiscoveryRequest], context: grpc.ServicerContext
    ) -> Iterator[discovery.DeltaDiscoveryResponse]:
        acknowledged = 0
        for request in requests:
            self.seen.put(request)
            if not request.response_nonce:
                yield self._addresses() if request.type_url == ADDRESS else self._policies()
            else:
                acknowledged += 1
                if acknowledged == 2 and len(self.metadata) == 1:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "transport is closing")

    def _addresses(self) -> discovery.DeltaDiscoveryResponse:
        response = discovery.DeltaDiscoveryResponse(type_url=ADDRESS, nonce="2026-01-01/1abc", system_version_info="2026-01-01/1")
        for uid in ("Kubernetes//Pod/ns/a", "Kubernetes//Pod/ns/b"):
            workload = wds.Workload(uid=uid, name=uid[-1], namespace="ns", addresses=[bytes((10, 0, 0, ord(uid[-1])))])
            entry = response.resources.add(name=uid, version="v" + uid[-1], aliases=["/10.0.0.9"])
            entry.resource.Pack(wds.Address(workload=workload))
        return response

    def _policies(self) -> discovery.DeltaDiscoveryResponse:
        response = discovery.DeltaDiscoveryResponse(type_url=AUTHORIZATION, nonce="2026-01-01/1def")
        entry = response.resources.add(name="ns/p")
        entry.resource.Pack(authz.Authorization(name="p", namespace="ns", scope=authz.NAMESPACE, rules=[authz.Rule()]))
        return response


def test_our_client_follows_a_foreign_control_plane_across_its_connections(tmp_path: Path) -> None:
    certificate = write_serving_certificate(tmp_path, NAME)
    istiod = _ForeignIstiod()
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[istiod])
    credentials = grpc.ssl_server_credentials([(certificate.key.read_bytes(), certificate.chain.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    state = MeshState()

    async def main() -> None:
        done = trio.Event()
        synced = 0

        def on_update(update: AdsUpdate) -> None:
            nonlocal synced
            state.apply(update.delta)
            synced += update.type_url == AUTHORIZATION
            if synced == 2:
                done.set()

        def ignore(ads: AdsState) -> None:
            pass

        config = AdsClientConfig(
            connect_tls("127.0.0.1", port, lambda: client_tls(certificate.root_pem), server_hostname=NAME),
            lambda: {"authorization": "Bearer t", "clusterid": "Kubernetes"},
            node_id("", "agent", "istio-system"),
        )
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_ads_client, config, on_update, ignore)
                await done.wait()
                nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    finally:
        server.stop(None).wait(PATIENCE)
    assert {workload.name for workload in state.workloads()} == {"a", "b"}
    assert [policy.key for policy in state.policies()] == ["ns/p"]
    assert istiod.metadata[0]["authorization"] == "Bearer t"
    requests = [istiod.seen.get_nowait() for _ in range(istiod.seen.qsize())]
    opening = [request for request in requests if not request.response_nonce]
    assert [request.type_url for request in opening] == [ADDRESS, AUTHORIZATION, ADDRESS, AUTHORIZATION]
    assert [dict(request.initial_resource_versions) for request in opening] == [
        {},
        {},
        {"Kubernetes//Pod/ns/a": "va", "Kubernetes//Pod/ns/b": "vb"},
        {"ns/p": ""},
    ]


def test_a_foreign_agent_follows_our_server(tmp_path: Path) -> None:
    certificate = write_serving_certificate(tmp_path, NAME)
    cache = ResourceCache()
    server = AdsServer(cache)

    def workload(name: str) -> Workload:
        return Workload(f"Kubernetes//Pod/ns/{name}", name, "ns", addresses=(ip_address("10.0.0.1"),))

    def follow(port: int) -> None:
        credentials = grpc.ssl_channel_credentials(certificate.root_pem.encode())
        options = [("grpc.ssl_target_name_override", NAME)]
        requests: queue.Queue[discovery.DeltaDiscoveryRequest | None] = queue.Queue()
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            stream = channel.stream_stream(
                ADS_METHOD,
                request_serializer=discovery.DeltaDiscoveryRequest.SerializeToString,
                response_deserializer=discovery.DeltaDiscoveryResponse.FromString,
            )
            call = stream(iter(requests.get, None), timeout=PATIENCE)
            first = discovery.DeltaDiscoveryRequest(type_url=ADDRESS)
            first.node.id = "ztunnel~1.1.1.1~agent.istio-system~istio-system.svc.cluster.local"
            requests.put(first)
            requests.put(discovery.DeltaDiscoveryRequest(type_url=AUTHORIZATION))
            got = [next(call), next(call)]
            assert [each.type_url for each in got] == [ADDRESS, AUTHORIZATION]
            assert [each.name for each in got[0].resources] == ["Kubernetes//Pod/ns/a"]
            for each in got:
                requests.put(discovery.DeltaDiscoveryRequest(type_url=each.type_url, response_nonce=each.nonce))
            trio.from_thread.run_sync(lambda: server.publish(cache.apply(Delta(workloads=(workload("b"),)))))
            assert [each.name for each in next(call).resources] == ["Kubernetes//Pod/ns/b"]
            trio.from_thread.run_sync(lambda: server.publish(cache.apply(Delta(removed_addresses=("Kubernetes//Pod/ns/a",)))))
            assert list(next(call).removed_resources) == ["Kubernetes//Pod/ns/a"]
            requests.put(None)
            assert list(call) == []

    async def main() -> None:
        cache.apply(Delta(workloads=(workload("a"),)))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        context = server_tls(certificate.chain, certificate.key)
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: serve(listeners, server.handlers(), tls=lambda: context))
                await trio.to_thread.run_sync(follow, listeners[0].socket.getsockname()[1])
                nursery.cancel_scope.cancel()

    trio.run(main)
