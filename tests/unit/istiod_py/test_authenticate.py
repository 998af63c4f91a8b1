import pytest
import trio
import trio.testing

from istiod_py.authenticate import APPEARANCE_TIMEOUT, Caller, IdentityRefused, NodeAuthorizer, TokenAuthenticator, Unauthenticated
from istiod_py.tokens import PodName, TokenStore
from mesh.kube.directory import DirectoryStore
from mesh.model.identity import SpiffeId

CALLER = Caller("n1", "istio-system", "ztunnel")


class Pods:
    def __init__(self, *running):
        self.running = set(running)
        self.changed = trio.Event()

    def runs_on(self, node, namespace, service_account):
        return (node, namespace, service_account) in self.running

    async def wait_changed(self):
        await self.changed.wait()

    def add(self, *pod):
        self.running.add(pod)
        self.changed.set()
        self.changed = trio.Event()


def run(test, *arguments):
    return trio.run(test, *arguments, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_bearer_of_a_nodes_token_is_that_nodes_agent(tmp_path):
    tokens = TokenStore(tmp_path)
    tokens.reconcile(["n1"])
    token = (tmp_path / "n1.token").read_text()
    authenticator = TokenAuthenticator(tokens, "istio-system")
    assert trio.run(authenticator.authenticate, {"authorization": f"Bearer {token}"}) == CALLER
    for metadata in (
        {},
        {"authorization": ""},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {token}"},
        {"authorization": "Bearer x"},
    ):
        with pytest.raises(Unauthenticated, match="request authenticate failure"):
            trio.run(authenticator.authenticate, metadata)


OBJECTS = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint}
---
apiVersion: v1
kind: Pod
metadata: {name: waypoint-0, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: waypoint}}
spec: {nodeName: n1, serviceAccountName: waypoint, containers: [{name: a}]}
"""


def authenticator_with(tmp_path, objects):
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "objects.yaml").write_text(objects)
    store = DirectoryStore([directory], implicit_namespaces={"shop"})
    store.load()
    tokens = TokenStore(tmp_path / "tokens")
    tokens.reconcile(["n1"], [PodName("shop", "waypoint-0")])
    token = (tmp_path / "tokens" / "pod_shop_waypoint-0.token").read_text()
    return TokenAuthenticator(tokens, "istio-system", store), {"authorization": f"Bearer {token}"}


def test_the_bearer_of_a_waypoints_token_is_that_waypoint(tmp_path):
    authenticator, metadata = authenticator_with(tmp_path, OBJECTS)
    caller = trio.run(authenticator.authenticate, metadata)
    assert caller == Caller("n1", "shop", "waypoint", "waypoint")
    assert caller.waypoint == "shop/waypoint"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("kind: Gateway", "kind: GatewayClass"),
        ("name: waypoint, namespace: shop}", "name: other, namespace: shop}"),
        ("serviceAccountName: waypoint", "serviceAccountName: default"),
        ("gateway-name: waypoint", "gateway-name: other"),
        ("nodeName: n1, ", ""),
        ("name: waypoint-0", "name: waypoint-1"),
    ],
    ids=["no Gateway", "another Gateway", "another account", "another label", "not placed", "no such pod"],
)
def test_a_pod_that_only_looks_like_a_waypoint_is_nobody(tmp_path, before, after):
    assert before in OBJECTS
    objects = OBJECTS.replace(before, after, 1).replace("spec: {gatewayClassName", "spec: {controllerName: a, gatewayClassName")
    authenticator, metadata = authenticator_with(tmp_path, objects)
    with pytest.raises(Unauthenticated):
        trio.run(authenticator.authenticate, metadata)


def test_a_waypoint_may_have_its_own_identity_and_no_other():
    async def test():
        authorizer = NodeAuthorizer("cluster.local", Pods(("n1", "shop", "waypoint"), ("n1", "shop", "web")))
        caller = Caller("n1", "shop", "waypoint", "waypoint")
        own = "spiffe://cluster.local/ns/shop/sa/waypoint"
        assert str(await authorizer.authorize(caller, own)) == own
        with pytest.raises(IdentityRefused, match="its own identity alone"):
            await authorizer.authorize(caller, "spiffe://cluster.local/ns/shop/sa/web")

    run(test)


def test_a_node_may_have_the_identities_of_its_pods():
    async def test():
        authorizer = NodeAuthorizer("cluster.local", Pods(("n1", "app", "alice")))
        assert await authorizer.authorize(CALLER, "spiffe://cluster.local/ns/app/sa/alice") == SpiffeId("cluster.local", "app", "alice")

    run(test)


@pytest.mark.parametrize(
    ("requested", "reason"),
    [
        ("spiffe://cluster.local/ns/app/sa/bob", "no pod of app/bob runs on node n1"),
        ("spiffe://cluster.local/ns/other/sa/alice", "no pod of other/alice"),
        ("spiffe://example.org/ns/app/sa/alice", "trust domain 'example.org' is not ours"),
        ("spiffe://cluster.local/ns/app/sa/", "invalid spiffe identity"),
        ("", "invalid spiffe identity"),
    ],
)
def test_other_identities_are_refused_with_the_reason(requested, reason):
    async def test():
        authorizer = NodeAuthorizer("cluster.local", Pods(("n1", "app", "alice"), ("n2", "app", "bob")))
        with pytest.raises(IdentityRefused, match=reason):
            await authorizer.authorize(CALLER, requested)

    run(test)


def test_a_pod_that_appears_within_the_wait_is_waited_for_and_one_that_comes_too_late_is_not():
    async def test():
        pods = Pods()
        authorizer = NodeAuthorizer("cluster.local", pods)

        async def appear(after):
            await trio.sleep(after)
            pods.add("n1", "app", "other")
            await trio.sleep(0.1)
            pods.add("n1", "app", "alice")

        for after, allowed in ((APPEARANCE_TIMEOUT - 1, True), (APPEARANCE_TIMEOUT + 1, False)):
            pods.running.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(appear, after)
                if allowed:
                    await authorizer.authorize(CALLER, "spiffe://cluster.local/ns/app/sa/alice")
                else:
                    with pytest.raises(IdentityRefused):
                        await authorizer.authorize(CALLER, "spiffe://cluster.local/ns/app/sa/alice")

    run(test)
