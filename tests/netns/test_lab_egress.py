"""What is no pod: captured pods reach addresses outside the cluster by the names that ServiceEntries and EndpointSlices give them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from istiod_py.translate.vips import Wanting, allocate
from mesh.model.address import IpAddress, NamespacedHostname
from mesh.testing.lab import Lab, running_lab, wait_until
from meshctl_py.lab.assign import ROUTER

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
OUTSIDE = "[" + ", ".join(f"{{address: '{ip}', ports: {{http: 8081}}}}" for ip in ROUTER) + "]"
ENTRY = f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: api, namespace: shop}}
spec:
  hosts: [api.example.com]
  ADDRESSES
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  resolution: STATIC
  endpoints: {OUTSIDE}
"""
SLICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: api, namespace: shop}}
spec: {{clusterIP: 10.96.200.200, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: api-1, namespace: shop, labels: {{kubernetes.io/service-name: api}}}}
addressType: IPv4
ports: [{{name: http, port: 8081}}]
endpoints: [{{addresses: [{ROUTER[0]}]}}]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """With a web server on the router, which is no pod and no node, and the shop in the mesh."""
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("egress")) as lab:
        server = subprocess.Popen(lab.command("router", "python3", str(EXAMPLE / "apps/server.py"), "8081"))
        try:
            lab.label("shop", "istio.io/dataplane-mode=ambient")
            wait_until(lambda: "shop/client" in lab.pods_in_mesh(), "the client is captured")
            wait_until(lambda: get(lab, ROUTER[0], 8081).startswith("hello"), "the server outside serves")
            yield lab
        finally:
            server.kill()
            server.wait()


def get(lab: Lab, ip: IpAddress | str, port: int = 80) -> str:
    host = f"[{ip}]" if ":" in str(ip) else ip
    return lab.curl("shop/client", f"http://{host}:{port}/", "-g", "--noproxy", "*").stdout


def served(lab: Lab, ip: IpAddress | str) -> None:
    """The pod's own address is what the outside sees: nothing stands between."""
    client = lab.pod("shop/client")["ips"]
    answer = wait_until(lambda: get(lab, ip), f"an answer at {ip}")
    assert re.match(r"hello (\S+),", answer), answer
    assert answer.split()[1].rstrip(",") in client


def test_a_service_entrys_automatic_addresses_lead_to_its_endpoints(lab: Lab) -> None:
    key = NamespacedHostname("shop", "api.example.com")
    lab.write("egress.yaml", ENTRY.replace("ADDRESSES", "location: MESH_EXTERNAL"))
    vips = allocate([Wanting(key)], [])[key]
    assert [ip.version for ip in vips] == [4, 6]
    for vip in vips:
        served(lab, vip)
    # Each connection may go to either endpoint, IPv4 or IPv6, whatever the address it was opened to.
    records = wait_until(lambda: lab.access("ztunnel-n1", "api.example.com", ":8081"), "the log says by which name it went where")
    assert any(str(endpoint) in records[0] for endpoint in ROUTER), records[0]


def test_a_service_entrys_own_addresses_and_ranges_lead_to_its_endpoints(lab: Lab) -> None:
    lab.write("egress.yaml", ENTRY.replace("ADDRESSES", "addresses: [198.51.100.7, 203.0.113.0/24]"))
    for address in ("198.51.100.7", "203.0.113.99"):
        served(lab, address)


def test_a_mistake_keeps_the_entry_as_it_was(lab: Lab) -> None:
    lab.write("egress.yaml", ENTRY.replace("ADDRESSES", "addresses: [198.51.100.7]"))
    served(lab, "198.51.100.7")
    lab.write("egress.yaml", ENTRY.replace("ADDRESSES", "addresses: [198.51.100.777]"))
    (problem,) = wait_until(lambda: [p for p in lab.status()["problems"] if p["file"] == "egress.yaml"], "the problem is known")
    assert (problem["line"], problem["field"]) == (7, "spec.addresses[0]"), json.dumps(problem)
    served(lab, "198.51.100.7")


def test_a_service_without_selector_leads_where_its_slice_says(lab: Lab) -> None:
    lab.write("slice.yaml", SLICE)
    served(lab, "10.96.200.200")
