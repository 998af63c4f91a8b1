"""What tests of a waypoint in a lab share: a shop with two versions of a web server behind it, and a client that asks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mesh.testing.lab import Lab, running_lab, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = Path(__file__).parents[2] / "tests" / "netns"
"""Where the servers are that only tests need."""
WAYPOINT = "spiffe://cluster.local/ns/shop/sa/waypoint"
CLIENT, STRANGER = "shop/client", "shop/stranger"


class Answer(NamedTuple):
    """What a client got. ``status`` 0: no answer; ``text`` says why then."""

    status: int
    text: str

    @property
    def told(self) -> dict[str, Any]:
        """What the server says of itself and the request."""
        found: dict[str, Any] = json.loads(self.text)
        return found


DENIED = Answer(403, "RBAC: access denied")


@contextmanager
def running_shop(directory: Path, *options: str, programs: tuple[str, ...] = (), **files: str) -> Iterator[Lab]:
    """A lab whose namespace ``shop`` is behind a waypoint, with a service ``web`` of two versions. ``files``: more YAML, by name;
    ``programs``: what of `PROGRAMS` runs in it."""
    with running_lab(EXAMPLES / "two-nodes", directory, *options) as lab:
        for program in programs:
            shutil.copy(PROGRAMS / program, lab.source / "apps")
        lab.write("web.yaml", (EXAMPLES / "two-nodes-waypoint" / "versions.yaml").read_text())
        for name, text in files.items():
            lab.write(f"{name}.yaml", text)
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: len(lab.pods_in_mesh()) >= 6 and lab.pods_in_mesh() == lab.pods_not_outside(), "the shop's pods are captured")
        told = lab.meshctl("waypoint", "apply", "-n", "shop", "--enroll-namespace", "--wait", "--lab", lab.name, timeout=120).stdout
        assert "✅ waypoint shop/waypoint is ready!" in told
        wait_until(lambda: passes(lab), "connections pass the waypoint")
        wait_until(lambda: all(pod["ready"] for pod in lab.status()["pods"]), "all pods are ready")
        yield lab


def ask(lab: Lab, url: str = "http://web/", *options: str, client: str = CLIENT) -> Answer:
    """One request of curl's."""
    done = lab.curl(client, url, "-w", "\n%{http_code}", *options)
    text, _, status = done.stdout.rpartition("\n")
    return Answer(int(status), text.strip() or done.stderr.strip())


def ask_often(lab: Lab, times: int, url: str = "http://web/", *options: str) -> list[Answer]:
    """One connection after the other."""
    separator = "\x1e"
    quoted = " ".join(f"'{option}'" for option in (*options, url))
    script = f"for i in $(seq {times}); do curl -sS -m 15 -w '\\n%{{http_code}}{separator}' {quoted}; done"
    done = lab.run(CLIENT, "sh", "-c", script, timeout=120)
    found = []
    for each in done.stdout.split(separator)[:-1]:
        text, _, status = each.rpartition("\n")
        found.append(Answer(int(status), text.strip()))
    return found


def passes(lab: Lab, url: str = "http://web/") -> bool:
    """Whether a request passes the waypoint: applications see no such header otherwise."""
    answer = ask(lab, url)
    return answer.status == 200 and "x-request-id" in answer.told["headers"]


def service(name: str, selector: str, port: int = 8080, protocol: str = "http", *, more: str = "") -> str:
    """YAML of a service of the shop that has port 80. ``more``: of its spec."""
    ports = f"ports: [{{name: {protocol}, port: 80, targetPort: {port}}}]"
    spec = f"selector: {{{selector}}}, {ports}" + (f", {more}" if more else "")
    return f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{{spec}}}\n"


def virtual_service(host: str, *rules: str) -> str:
    """YAML of a VirtualService for HTTP, of a service of the shop."""
    listed = "".join(f"    - {{{rule}}}\n" for rule in rules)
    head = "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\n"
    return f"{head}metadata: {{name: {host}, namespace: shop}}\nspec:\n  hosts: [{host}]\n  http:\n{listed}"


def denial(name: str, operation: str, *services: str) -> str:
    """YAML of a policy of the shop that denies requests for these services."""
    targets = ", ".join(f'{{group: "", kind: Service, name: {each}}}' for each in services)
    head = f"---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n"
    return f"{head}spec:\n  targetRefs: [{targets}]\n  action: DENY\n  rules: [{{to: [{{operation: {{{operation}}}}}]}}]\n"


@contextmanager
def objects(lab: Lab, text: str, *, mistaken: bool | None = False, waypoint: str = "shop/waypoint-0") -> Iterator[None]:
    """These are there, and gone afterwards, at the waypoint too. ``mistaken``: something is wrong with them, and must be told of;
    None: the test looks itself."""
    before = told_of(lab, waypoint)
    lab.write("tested.yaml", text)
    wait_until(lambda: (told := told_of(lab, waypoint)) != before and told == told_of(lab, waypoint), "the waypoint is told all of it")
    problems = problems_of(lab, "tested.yaml")
    assert mistaken in (None, bool(problems)), problems
    try:
        yield
    finally:
        lab.remove("tested.yaml")
        wait_until(lambda: told_of(lab, waypoint) == before, "the waypoint is told that it is gone")


def problems_of(lab: Lab, file: str) -> list[str]:
    """``FIELD: what is wrong with it``, of all mistakes in a file."""
    return [f"{problem['field']}: {problem['message']}" for problem in lab.status()["problems"] if problem["file"].endswith(file)]


def told_of(lab: Lab, waypoint: str = "shop/waypoint-0") -> object:
    """The waypoint's configuration as it is served."""
    return json.loads(page_of(lab, "config_dump", waypoint))["resources"]


def page_of(lab: Lab, page: str, waypoint: str = "shop/waypoint-0") -> str:
    """A page of the waypoint's own."""
    return lab.run(waypoint, "curl", "-sS", f"localhost:15000/{page}").stdout


def memory_of(lab: Lab, pod: str = "shop/waypoint-0", line: str = "VmRSS") -> int:
    """Bytes that its process holds, or another line of ``/proc/PID/status``: ``VmHWM``, the most that it ever held."""
    pid = next(each["pid"] for each in lab.status()["processes"] if each["name"].startswith(pod))
    status = lab.run(pod, "cat", f"/proc/{pid}/status").stdout
    return int(status.partition(f"{line}:")[2].split()[0]) << 10


def lines_of(lab: Lab, *words: str) -> list[str]:
    """Lines of the waypoint's access log that hold all the words."""
    return [line for line in access_lines(lab, "shop/waypoint-0") if all(word in line for word in words)]


def access_lines(lab: Lab, pod: str) -> list[str]:
    """Envoy's format begins with the time in brackets."""
    return [line for line in lab.log(pod).splitlines() if line.startswith("[2")]
