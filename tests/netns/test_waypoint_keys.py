"""Key sets that the control plane fetches from a pod of the lab: rotated, away, and served by somebody who means ill."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from mesh.testing.lab import Lab, wait_until
from mesh.testing.waypoints import ask, objects, problems_of, running_shop, service

pytestmark = pytest.mark.netns

REFRESH = 2
OLD, NEW, FOREIGN = (rsa.generate_private_key(65537, 2048) for _ in range(3))
PROVIDER = """\
apiVersion: v1
kind: Pod
metadata: {name: provider, namespace: shop, labels: {app: provider}}
spec:
  nodeName: n2
  serviceAccountName: server
  containers:
    - name: web
      command: [python3, apps/key_server.py, "8080", keys.json]
      readinessProbe: {tcpSocket: {port: 8080}}
""" + service("provider", "app: provider")
TOKENS = """\
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  jwtRules:
"""
ISSUER = "http://provider.shop.svc.cluster.local"
BY_ISSUER = f'issuer: "{ISSUER}"'
BY_URI = f'{BY_ISSUER}, jwksUri: "{ISSUER}/keys"'


def tokens(*rules: str) -> str:
    """A RequestAuthentication with these rules."""
    return TOKENS + "".join(f"    - {{{rule}}}\n" for rule in rules)


def publish(lab: Lab, **keys: rsa.RSAPrivateKey) -> None:
    """What the provider serves from now on."""
    found = [{**RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "alg": "RS256", "use": "sig"} for kid, key in keys.items()]
    (lab.source / "keys.json").write_text(json.dumps({"keys": found}))


def bearer(kid: str, key: rsa.RSAPrivateKey, issuer: str = ISSUER) -> tuple[str, str]:
    """Options of curl that present a token."""
    claims = {"iss": issuer, "sub": "ann", "exp": int(time.time()) + 600}
    return "-H", f"authorization: Bearer {jwt.encode(claims, key, 'RS256', headers={'kid': kid})}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("waypointkeys")
    with running_shop(directory, f"--istiod-arg=--jwks-refresh={REFRESH}", programs=("key_server.py",), provider=PROVIDER) as lab:
        yield lab


def test_a_key_set_that_a_pod_serves_verifies_tokens_and_is_rotated(lab: Lab) -> None:
    publish(lab, old=OLD)
    began = lab.log("shop/waypoint-0").count("\tserving\t")
    with objects(lab, tokens(BY_URI)):
        wait_until(lambda: ask(lab, "http://web/", *bearer("old", OLD)).status == 200, "the key set is there")
        assert ask(lab, "http://web/", *bearer("old", FOREIGN)).status == 401
        publish(lab, old=OLD, new=NEW)
        wait_until(lambda: ask(lab, "http://web/", *bearer("new", NEW)).status == 200, "tokens of the new key pass")
        assert ask(lab, "http://web/", *bearer("old", OLD)).status == 200, "as long as the old key is served, its tokens pass"
        publish(lab, new=NEW)
        wait_until(lambda: ask(lab, "http://web/", *bearer("old", OLD)).status == 401, "tokens of the old key are refused")
        assert ask(lab, "http://web/", *bearer("new", NEW)).status == 200
    assert lab.log("shop/waypoint-0").count("\tserving\t") == began


def test_without_a_uri_the_issuer_says_where_its_keys_are(lab: Lab) -> None:
    publish(lab, old=OLD)
    with objects(lab, tokens(BY_ISSUER)):
        wait_until(lambda: ask(lab, "http://web/", *bearer("old", OLD)).status == 200, "the key set is there")
        assert ask(lab, "http://web/", *bearer("old", FOREIGN)).status == 401


def test_the_last_keys_serve_while_the_provider_is_away_and_status_says_so(lab: Lab) -> None:
    publish(lab, old=OLD)
    with objects(lab, tokens(BY_URI)):
        wait_until(lambda: ask(lab, "http://web/", *bearer("old", OLD)).status == 200, "the key set is there")
        lab.remove("provider.yaml")
        try:
            wait_until(lambda: problems_of(lab, "tested.yaml"), "the lab's status says that the provider is away")
            assert ask(lab, "http://web/", *bearer("old", OLD)).status == 200
            assert ask(lab, "http://web/", *bearer("old", FOREIGN)).status == 401
            connected = lab.log("istiod").count("xds.connected")
            lab.meshctl("lab", "kill", "--name", lab.name, "istiod")
            wait_until(lambda: lab.log("istiod").count("xds.connected") >= connected + 3, "agents and waypoint are connected again")
            wait_until(
                lambda: "stay in use" in str(problems_of(lab, "tested.yaml")), "the new control plane knows that the provider is away"
            )
            assert ask(lab, "http://web/", *bearer("old", OLD)).status == 200, "it has the keys that the one before had"
            assert ask(lab, "http://web/", *bearer("old", FOREIGN)).status == 401
        finally:
            lab.write("provider.yaml", PROVIDER)
        wait_until(lambda: not problems_of(lab, "tested.yaml"), "the provider is back")


HOSTILE = {
    f"{ISSUER}/huge": "the answer is larger than 1048576 bytes",
    f"{ISSUER}/slow": "no whole answer within 1 s",
    f"{ISSUER}/moved?http://localhost:15014/debug/config_dump": "answered with 302 (redirects are not followed)",
    "http://localhost:15014/debug/config_dump": "a loopback address",
    "http://169.254.169.254/latest/meta-data": "a link-local address",
    "http://[::ffff:127.0.0.1]:15014/debug/config_dump": "a loopback address",
}


def test_a_provider_that_means_ill_gets_nothing_and_gives_nothing(lab: Lab) -> None:
    publish(lab, old=OLD)
    hostile = [f'issuer: "https://{number}.test", jwksUri: "{url}", timeout: 1s' for number, url in enumerate(HOSTILE)]
    with objects(lab, tokens(BY_URI, *hostile), mistaken=None):  # as soon as they have been fetched
        wait_until(lambda: len(problems_of(lab, "tested.yaml")) == len(HOSTILE), "the lab's status says what is wrong")
        for number, ((url, message), problem) in enumerate(zip(HOSTILE.items(), problems_of(lab, "tested.yaml"), strict=True), 1):
            assert problem.startswith(f"spec.jwtRules[{number}].jwksUri: key set {url}: ")
            assert message in problem
        wait_until(lambda: ask(lab, "http://web/", *bearer("old", OLD)).status == 200, "the tokens of a good provider pass")
        for number, _ in enumerate(HOSTILE):
            assert ask(lab, "http://web/", *bearer("old", OLD, f"https://{number}.test")).status == 401, "there is no key that proves it"
        assert ask(lab).status == 200, "who has no token passes"
