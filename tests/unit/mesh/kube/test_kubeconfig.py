"""Every way to reach an API server that is supported works; every other says which field is in the way."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path

import pytest

from mesh.kube.kubeconfig import KubeconfigError, find_access, in_cluster, load_kubeconfig
from mesh.testing.ca import FakeCa
from mesh.testing.serving import write_serving_certificate

CONFIG = """\
apiVersion: v1
kind: Config
current-context: here
contexts:
- name: here
  context: {cluster: c, user: u, namespace: shop}
- name: there
  context: {cluster: d, user: v}
clusters:
- name: c
  cluster: {server: "https://10.0.0.1:6443", CLUSTER}
- name: d
  cluster: {server: "http://[::1]:8001/prefix/"}
users:
- name: u
  user: {USER}
- name: v
  user: {token: other}
"""


def write(path: Path, cluster: str = "insecure-skip-tls-verify: true", user: str = "token: secret") -> Path:
    file = path / "config"
    file.write_text(CONFIG.replace("CLUSTER", cluster).replace("USER", user))
    return file


def test_the_current_context_says_where_and_as_whom(tmp_path: Path) -> None:
    access = find_access(str(write(tmp_path)), {})
    assert (access.host, access.port, access.tls, access.namespace, access.read_token()) == ("10.0.0.1", 6443, True, "shop", "secret")
    context = access.make_context()
    assert context is not None
    assert context.verify_mode == ssl.CERT_NONE
    assert "secret" not in repr(access)


def test_another_context_can_be_asked_for(tmp_path: Path) -> None:
    access = load_kubeconfig(write(tmp_path), "there")
    assert (access.host, access.port, access.tls, access.prefix, access.read_token()) == ("::1", 8001, False, "/prefix", "other")
    assert access.make_context() is None


def test_certificates_come_from_data_or_from_files_beside_the_kubeconfig(tmp_path: Path) -> None:
    serving = write_serving_certificate(tmp_path, "10.0.0.1")
    (tmp_path / "root.pem").write_text(serving.root_pem)
    data = base64.b64encode(serving.key.read_bytes()).decode()
    file = write(tmp_path, "certificate-authority: root.pem", f"client-certificate: {serving.chain.name}, client-key-data: {data}")
    context = load_kubeconfig(file).make_context()
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(context.get_ca_certs()) == 1


def test_a_token_file_is_read_at_each_use(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("one\n")
    access = load_kubeconfig(write(tmp_path, user="tokenFile: token, token: shadowed"))
    assert access.read_token() == "one"
    (tmp_path / "token").write_text("two\n")
    assert access.read_token() == "two"


@pytest.mark.parametrize(
    ("cluster", "user", "message"),
    [
        ("a: b", "exec: {command: aws}", r"users\[u\].exec: not supported; give a token"),
        ("a: b", "auth-provider: {name: gcp}", r"users\[u\].auth-provider: not supported"),
        ("a: b", "username: a, password: b", r"users\[u\].username: not supported"),
        ("proxy-url: x", "token: a", r"clusters\[c\].proxy-url: not supported"),
        ("certificate-authority-data: '%%'", "token: a", "certificate-authority-data: not base64"),
        ("certificate-authority-data: aGVsbG8=", "token: a", "no certificates in PEM"),
        ("certificate-authority: none.pem", "token: a", "none.pem: No such file"),
        ("a: b", "client-certificate-data: aGVsbG8=", "client-certificate and client-key go together"),
        ("a: b", "client-certificate-data: aGVsbG8=, client-key-data: aGVsbG8=", "client certificate and key do not work"),
        ("a: b", "token: 7", r"users\[u\].token: expected a string"),
        ("a: b", "tokenFile: absent", "absent: No such file"),
    ],
)
def test_what_cannot_be_used_is_named_by_its_field(tmp_path: Path, cluster: str, user: str, message: str) -> None:
    with pytest.raises(KubeconfigError, match=message):
        load_kubeconfig(write(tmp_path, cluster, user))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not YAML"),
        ("a", "expected one mapping"),
        ("{}", "current-context: not set"),
        ("current-context: x", "contexts: there is no 'x'"),
        ("{current-context: x, contexts: [{name: x, context: {cluster: c}}]}", "clusters: there is no 'c'"),
        (
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}], clusters: [{name: c, cluster: {server: ftp://h}}]}",
            r"clusters\[c\].server: expected https://HOST:PORT, found 'ftp://h'",
        ),
    ],
)
def test_a_file_that_is_no_kubeconfig_says_what_is_missing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(KubeconfigError, match=message):
        load_kubeconfig(tmp_path / "config")


def test_a_pod_uses_its_own_service_account(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("mine")
    (tmp_path / "namespace").write_text("istio-system")
    (tmp_path / "ca.crt").write_bytes(FakeCa().root_pem)
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, tmp_path)
    assert (access.host, access.port, access.namespace, access.read_token()) == ("fd00::1", 6443, "istio-system", "mine")


def test_outside_of_a_pod_there_is_no_service_account(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match="KUBERNETES_SERVICE_HOST is not set"):
        find_access("in-cluster", {})
    with pytest.raises(KubeconfigError, match="KUBERNETES_SERVICE_PORT=http is no port"):
        in_cluster({"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "http"}, tmp_path)
