"""People's commands find their cluster where kubectl finds it, and with its credential plugins."""

from __future__ import annotations

import base64
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from mesh.kube.api import ApiClient
from mesh.kube.credentials import ExecPlugin, PluginCommand
from mesh.kube.kubeconfig import ClusterAccess, KubeconfigError, Overrides, choose_access
from mesh.testing.kube import FakeApiServer

V1 = "client.authentication.k8s.io/v1"
PLUGIN = """\
#!{python}
import json, os, sys
with open(sys.argv[0] + ".log", "a") as log:
    log.write(json.dumps([sys.argv[1:], os.environ.get("REGION"), json.loads(os.environ["KUBERNETES_EXEC_INFO"])]) + "\\n")
print(open(sys.argv[0] + ".out").read())
"""


def one(path: Path, name: str, text: str) -> Path:
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def config(name: str, *, current: str = "", server: str = "https://h", user: str = "token: secret") -> str:
    return f"""\
current-context: "{current}"
contexts:
- name: {name}
  context: {{cluster: {name}, user: {name}, namespace: ns-{name}}}
clusters:
- name: {name}
  cluster: {{server: "{server}"}}
users:
- name: {name}
  user: {{{user}}}
"""


def test_files_of_the_variable_count_as_one_and_the_first_word_counts(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of a")
    a = one(tmp_path, "a", config("a", server="https://a", user="tokenFile: token"))
    b = one(tmp_path / "deep", "b", config("b", current="b", server="https://b", user="tokenFile: token"))
    c = one(tmp_path, "c", config("b", current="a", server="https://shadowed"))
    (tmp_path / "deep/token").write_text("of b")
    environ = {"KUBECONFIG": os.pathsep.join(["", str(tmp_path / "missing"), *map(str, (a, b, c))])}
    access = choose_access(environ=environ)
    assert (access.host, access.namespace, access.read_token()) == ("b", "ns-b", "of b")
    assert access.origin == f"contexts[b] of {b}"
    access = choose_access(None, Overrides(context="a"), environ)
    assert (access.host, access.namespace, access.read_token()) == ("a", "ns-a", "of a")
    access = choose_access(None, Overrides(cluster="a", user="a", namespace="x"), environ)
    assert (access.host, access.namespace, access.read_token()) == ("a", "x", "of a")


def test_an_explicit_file_wins_and_the_home_directory_comes_last(tmp_path: Path) -> None:
    explicit = one(tmp_path, "explicit", config("e", current="e", server="https://explicit"))
    listed = one(tmp_path, "listed", config("l", current="l", server="https://listed"))
    one(tmp_path / ".kube", "config", config("h", current="h", server="https://home"))
    environ = {"KUBECONFIG": str(listed)}
    assert choose_access(explicit, None, environ, tmp_path).host == "explicit"
    assert choose_access(None, None, environ, tmp_path).host == "listed"
    assert choose_access(None, None, {}, tmp_path).host == "home"


def test_without_any_file_a_pod_is_itself_and_elsewhere_it_is_said_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match=r"there is no kubeconfig \(.*\.kube/config\): give one with --kubeconfig or KUBECONFIG"):
        choose_access(environ={}, home=tmp_path)
    with pytest.raises(KubeconfigError, match="serviceaccount"):  # there is no token here, but that is where it looked
        choose_access(environ={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, home=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (Overrides(context="z"), r"/a: contexts: there is no 'z' \(there are: a\)"),
        (Overrides(cluster="z"), r"/a: clusters: there is no 'z'"),
        (Overrides(user="z"), r"/a: users: there is no 'z'"),
    ],
)
def test_a_name_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, overrides: Overrides, message: str) -> None:
    one(tmp_path, "a", config("a", current="a"))
    with pytest.raises(KubeconfigError, match=message):
        choose_access(tmp_path / "a", overrides, {})


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("exec: aws", r"users\[a\].exec: expected a mapping"),
        (f"exec: {{apiVersion: {V1}}}", r"users\[a\].exec.command: missing"),
        ("exec: {command: aws, apiVersion: v1}", r"users\[a\].exec.apiVersion: expected client.authentication.k8s.io/v1 or"),
        (f"exec: {{command: aws, apiVersion: {V1}, interactiveMode: Maybe}}", r"exec.interactiveMode: expected Never"),
        (f"exec: {{command: aws, apiVersion: {V1}, args: no}}", r"exec.args: expected a list of strings"),
        ("auth-provider: {name: gcp}", r"users\[a\].auth-provider: not supported"),
    ],
)
def test_a_mistake_in_a_user_names_file_and_field(tmp_path: Path, user: str, message: str) -> None:
    file = one(tmp_path, "a", config("a", current="a", user=user))
    with pytest.raises(KubeconfigError, match=message) as caught:
        choose_access(file)
    assert str(file) in str(caught.value)


def plugin(tmp_path: Path, output: object) -> ClusterAccess:
    program = one(tmp_path, "login", PLUGIN.format(python=sys.executable))
    program.chmod(0o755)
    one(tmp_path, "login.out", output if isinstance(output, str) else json.dumps(output))
    section = f"command: ./login, apiVersion: {V1}, args: [get, token], env: [{{name: REGION, value: eu}}], provideClusterInfo: true"
    return choose_access(one(tmp_path, "config", config("a", current="a", user=f"exec: {{{section}}}")))


def credential(**status: object) -> dict[str, object]:
    return {"apiVersion": V1, "kind": "ExecCredential", "status": status}


def calls(tmp_path: Path) -> list[list[object]]:
    return [json.loads(line) for line in (tmp_path / "login.log").read_text().splitlines()]


def test_a_plugin_is_asked_once_and_told_what_it_wants_to_know(tmp_path: Path) -> None:
    access = plugin(tmp_path, credential(token="t1"))
    assert not (tmp_path / "login.log").exists()
    assert (access.read_token(), access.read_token()) == ("t1", "t1")
    spec = {"interactive": False, "cluster": {"server": "https://h"}}
    assert calls(tmp_path) == [[["get", "token"], "eu", {"apiVersion": V1, "kind": "ExecCredential", "spec": spec}]]


def test_a_plugin_is_asked_again_after_a_refusal(tmp_path: Path) -> None:
    access = plugin(tmp_path, credential(token="t1"))
    assert access.renewable
    assert access.read_token() == "t1"
    (tmp_path / "login.out").write_text(json.dumps(credential(token="t2")))
    assert access.read_token() == "t1"
    access.forget()
    assert access.read_token() == "t2"


def test_a_request_that_is_refused_is_made_again_with_what_the_plugin_says_then(tmp_path: Path) -> None:
    access = plugin(tmp_path, credential(token="t1"))
    assert access.read_token() == "t1"
    (tmp_path / "login.out").write_text(json.dumps(credential(token="t2")))

    async def check() -> None:
        server = FakeApiServer()
        server.put({"kind": "Namespace", "metadata": {"name": "shop"}})
        server.accepted_tokens = {"t2"}
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            assert await ApiClient(access, connect=server.connect).find("/api/v1/namespaces/shop") is not None
            assert [seen.headers["authorization"] for seen in server.requests] == ["Bearer t1", "Bearer t2"]
            nursery.cancel_scope.cancel()

    trio.run(check)


def test_what_expires_is_asked_for_anew(tmp_path: Path) -> None:
    soon = datetime(2026, 1, 1, tzinfo=UTC)
    plugin(tmp_path, credential(token="t1", expirationTimestamp=soon.isoformat()))
    now = [soon - timedelta(minutes=1)]
    asked = ExecPlugin(PluginCommand("here", str(tmp_path / "login")), now=lambda: now[0])
    for moment, count in ((soon - timedelta(minutes=1), 1), (soon - timedelta(seconds=20), 1), (soon - timedelta(seconds=5), 2)):
        now[0] = moment
        asked.current()
        assert len(calls(tmp_path)) == count


def test_a_plugin_may_give_a_certificate(tmp_path: Path) -> None:
    access = plugin(tmp_path, credential(clientCertificateData="chain", clientKeyData="key"))
    assert access.read_token() == ""
    assert access.plugin is not None
    found = access.plugin.current().certificate
    assert found is not None
    assert (found.chain, found.key) == (b"chain", b"key")
    assert base64.b64encode(b"key").decode() not in repr(found)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nonsense", "printed no ExecCredential"),
        ({"apiVersion": "v1", "kind": "Status"}, "printed a Status of v1, expected an ExecCredential"),
        (credential(), "gave neither a token nor a client certificate"),
        (credential(clientKeyData="k"), "gave only one of"),
        (credential(token="t", expirationTimestamp="2026-01-01T00:00:00"), "without a time zone"),
    ],
)
def test_what_a_plugin_says_wrongly_is_told_with_its_name(tmp_path: Path, output: object, message: str) -> None:
    with pytest.raises(KubeconfigError, match=message) as caught:
        plugin(tmp_path, output).read_token()
    assert "users[a].exec" in str(caught.value)


def test_a_plugin_that_fails_or_is_missing_says_so() -> None:
    with pytest.raises(KubeconfigError, match="false ended with status 1"):
        ExecPlugin(PluginCommand("f: users[a].exec", "false")).current()
    with pytest.raises(KubeconfigError, match=r"there is no program no-such-plugin\nget it at example.org"):
        ExecPlugin(PluginCommand("f: users[a].exec", "no-such-plugin", install_hint="get it at example.org")).current()
    with pytest.raises(KubeconfigError, match="needs a terminal"):
        ExecPlugin(PluginCommand("f: users[a].exec", "true", interactive_mode="Always")).current()
