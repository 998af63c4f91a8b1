"""The agent's pages answer what was asked, say what they left out, and name what they do not understand."""

from __future__ import annotations

import msgspec
import pytest
import trio

from mesh.model.address import parse_ip
from mesh.model.enrolment import Enrolment
from mesh.model.identity import SpiffeId
from mesh.model.policy import Action, Policy, Scope
from mesh.model.workload import Workload
from mesh.runtime import inspection
from mesh.runtime.http import Request, Response
from mesh.runtime.readiness import Readiness
from mesh.state.store import Delta, MeshState
from mesh.tls.bundle import CertificateBundle
from mesh.tls.rotation import CertificateManager
from mesh.xds.client import AdsState, Phase
from ztunnel_py import messages
from ztunnel_py.brain.pages import Pages
from ztunnel_py.brain.pods import CannotServe
from ztunnel_py.config import read_config
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.lifecycle import Phase as PodPhase
from ztunnel_py.pods.lifecycle import PodStatus
from ztunnel_py.redirect.apply import CaptureReading

CONFIG = {"NODE_NAME": "n1", "MESH_SOURCE": "/src", "MESH_STATUS_DIR": "/status"}


def living(pod: str, direction: str = "inbound") -> inspection.LivingConnection:
    return inspection.LivingConnection(pod, direction, "HBONE", "10.0.0.9:1", "10.0.0.1:80")


class FakePods:
    def __init__(self) -> None:
        self.pods = {
            name: (PodFacts(name, name, "shop", "web", Enrolment(True, "label"), (parse_ip("10.0.0.1"),), f"/n/{name}"), status)
            for name, status in {
                "web": PodStatus(PodPhase.CAPTURED, "label"),
                "stuck": PodStatus(PodPhase.PENDING, "no such namespace"),
            }.items()
        }

    def statuses(self) -> dict[str, tuple[PodFacts, PodStatus]]:
        return self.pods

    def identity_of(self, pod: PodFacts) -> SpiffeId:
        return SpiffeId("cluster.local", pod.namespace, pod.service_account)

    async def read_rules(self, uid: str) -> CaptureReading:
        await trio.lowlevel.checkpoint()
        if uid == "stuck":
            raise CannotServe("the pod's namespace is not open")
        return CaptureReading(("a rule is missing",), (), ("theirs",))


class FakeMovers:
    def living(self) -> list[object]:
        return [object()]

    async def scrape(self, connections: int = 0) -> list[tuple[object, messages.Scraped]]:
        await trio.lowlevel.checkpoint()
        told = [living("web"), living("web", "outbound"), living("web"), living("unknown")]
        return [(object(), messages.Scraped(1, b"", told[:connections], 5))]


async def no_certificate(identity: SpiffeId) -> CertificateBundle:
    raise AssertionError("not asked for here")


async def ask(path: str, **query: str) -> Response:
    state = MeshState("n1")
    workload = Workload("c//Pod/shop/web", "web", "shop", authorization_policies=("shop/only",))
    policies = (
        Policy("only", "shop", Scope.WORKLOAD_SELECTOR, Action.DENY, ()),
        Policy("other", "bank", Scope.NAMESPACE, Action.ALLOW, ()),
    )
    state.apply(Delta(workloads=(workload,), policies=policies))
    readiness = Readiness()
    readiness.register("state manager").pending("waiting")
    certificates = CertificateManager(no_certificate)
    certificates.request(SpiffeId("cluster.local", "shop", "web"))
    pages = Pages(
        read_config(CONFIG),
        state,
        certificates,
        FakeMovers(),
        FakePods(),
        readiness,
        lambda: AdsState(Phase.FAILED, True, "no route", 1.0),
    )
    return await pages.routes()[path].handler(Request("GET", path, query, {}))


def get(path: str, **query: str) -> Response:
    return trio.run(lambda: ask(path, **query))


def test_the_status_says_what_is_pending_and_which_pods_are_in_trouble() -> None:
    status = msgspec.json.decode(get("/debug/status").body, type=inspection.StatusPage)
    assert (status.node, status.ready, status.connected, status.synced) == ("n1", False, False, True)
    assert status.pending == [inspection.PendingTask("state manager", "waiting")]
    assert status.pods == {"captured": 1, "pending": 1}
    assert [(pod.name, pod.because) for pod in status.troubled] == [("stuck", "no such namespace")]
    assert "no route" in status.configuration
    assert (status.certificates, status.unavailable, status.next_expiry) == (1, 1, None)
    assert (status.workloads, status.policies) == (1, 2)


def test_connections_are_those_of_the_pods_asked_for_and_what_is_beyond_the_limit_is_counted() -> None:
    page = msgspec.json.decode(get("/debug/connections", pod="shop/web", limit="2").body, type=inspection.ConnectionsPage)
    assert [(item.namespace, item.name, item.connection.direction) for item in page.items] == [
        ("shop", "web", "inbound"),
        ("shop", "web", "outbound"),
    ]
    assert page.omitted == 1 + 5


def test_pods_are_told_with_the_number_of_their_connections() -> None:
    page = msgspec.json.decode(get("/debug/pods", namespace="shop").body, type=inspection.PodsPage)
    assert [(pod.name, pod.phase, pod.inbound, pod.outbound) for pod in page.items] == [
        ("stuck", "pending", 0, 0),
        ("web", "captured", 2, 1),
    ]
    assert page.items[0].identity == "spiffe://cluster.local/ns/shop/sa/web"


def test_rules_that_cannot_be_read_say_why_and_the_others_are_shown() -> None:
    page = msgspec.json.decode(get("/debug/rules").body, type=inspection.AllRulesPage)
    stuck, web = page.items
    assert stuck.error == "no such namespace"
    assert (web.error, web.differences, web.foreign_tables) == ("", ["a rule is missing"], ["theirs"])


def test_policies_of_a_pod_are_those_that_apply_to_it() -> None:
    def names(**query: str) -> list[object]:
        return [item["name"] for item in msgspec.json.decode(get("/debug/policies", **query).body, type=inspection.ObjectsPage).items]

    assert names() == ["other", "only"]
    assert names(pod="shop/web") == ["only"]
    assert names(namespace="bank") == ["other"]


def test_policies_of_a_pod_that_nobody_knows_are_not_none() -> None:
    response = get("/debug/policies", pod="shop/wbe")
    assert (response.status, response.body) == (404, b"it knows no pod wbe in namespace shop\n")


def test_a_certificate_that_is_awaited_is_told_without_a_chain() -> None:
    (page,) = msgspec.json.decode(get("/debug/certificates", pod="web").body, type=inspection.CertificatesPage).items
    assert (page.identity, page.state, page.chain) == ("spiffe://cluster.local/ns/shop/sa/web", "Initializing", [])


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ({"pod": "shop/wbe"}, 404, "it has nothing to do with a pod wbe in namespace shop"),
        ({"limit": "0"}, 400, "limit=0: expected 1 to 100000"),
        ({"limit": "٣"}, 400, "expected 1 to 100000"),
        ({"nod": "n"}, 400, "unknown parameter nod: there are limit, namespace, pod"),
    ],
)
def test_a_question_that_cannot_be_answered_is_told_why(query: dict[str, str], status: int, text: str) -> None:
    response = get("/debug/pods", **query)
    assert (response.status, text in response.body.decode()) == (status, True)
