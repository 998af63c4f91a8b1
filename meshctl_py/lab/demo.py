"""``make demo``: the claims of an ambient mesh, each shown on real traffic between the two nodes of a lab."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Final, NoReturn

from mesh.model.labels import DATAPLANE_MODE
from mesh.model.ports import INBOUND_HBONE
from meshctl_py.lab.client import Lab, UpOptions, start_lab
from meshctl_py.lab.home import LabError
from meshctl_py.lab.messages import Failed
from meshctl_py.lab.stage import EXAMPLES, HELD, Held, Report, Stage, Tap, Unmet
from meshctl_py.lab.wiretap import Segment, is_tls, is_tls_1_3, join_segments

_NODES: Final = ("n1", "n2")
_AT_ONCE: Final = 1000
"""Milliseconds. A proxy that waits for the client to speak first waits for seconds, or for ever."""
_REFUSED: Final = "ConnectionResetError"
_WHILE_THE_BRAIN_IS_DEAD: Final = 4
"""New requests made right after the kill."""


def main() -> None:
    """Run the demo; exits with 0 when every claim held."""
    signal.signal(signal.SIGTERM, _interrupt)
    report = Report()
    try:
        with ExitStack() as clean_up:
            _run(report, clean_up)
    except KeyboardInterrupt:
        print("\ninterrupted; everything is removed", file=sys.stderr)
        sys.exit(130)
    except LabError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _run(report: Report, clean_up: ExitStack) -> None:
    """Bring up a copy of the example and try all claims. Raises LabError when there is no lab to try them in."""
    report.step("meshctl lab up --copy examples/two-nodes")
    options = UpOptions(tied=True, copy=True, patience=40.0)
    starting = clean_up.enter_context(start_lab(EXAMPLES / "two-nodes", f"demo-{os.getpid()}", options))
    *_, outcome = starting
    if isinstance(outcome, Failed):
        logs = "".join(f"\n  {item.what}: {item.because}\n    " + "\n    ".join(item.tail) for item in outcome.pending)
        raise LabError(f"the lab did not come up: {outcome.because}{logs}")
    report.step("two nodes, a router between them, five pods, a control plane, an agent on each node")
    tap = Tap(Lab(starting.home), "n2")
    clean_up.callback(tap.close)
    demo = Demo(Stage(Lab(starting.home), starting.home.copy, report), tap, clean_up)
    try:
        demo.run()
    finally:
        if report.failed:
            kept = tempfile.mkdtemp(prefix="ambient-mesh-demo-logs-")
            shutil.copytree(starting.home.logs, kept, dirs_exist_ok=True)
            print(f"the logs of this run are kept in {kept}", flush=True)


class Demo:
    """The claims, in the order in which a user would come upon them."""

    def __init__(self, stage: Stage, tap: Tap, clean_up: ExitStack) -> None:
        self._stage = stage
        self._tap = tap
        self._clean_up = clean_up

    def run(self) -> None:
        if self._stage.is_labelled(DATAPLANE_MODE):  # whoever tried the example by hand may have left it so
            self._stage.label(f"{DATAPLANE_MODE}-")
        self._both("before the label a request is readable on the link", self._readable)
        self._tap.hear()
        self._stage.label(f"{DATAPLANE_MODE}=ambient")
        self._stage.wait_captured()
        self._both("after the label it works as before, and the link carries only TLS 1.3 to port 15008", self._encrypted)
        self._both("the server sees the client's own address", self._own_address)
        self._both("a server that speaks first is heard at once", self._server_first)
        with self._stage.policy("allow-client"):
            self._stage.settle(lambda: _REFUSED in self._stage.get("stranger", "/", "4"))
            self._both("an AuthorizationPolicy that names the client's principal lets the client in", self._client_allowed)
            self._both("and refuses another service account with a reset, the reason in the access log", self._stranger_refused)
        self._stage.settle(lambda: "200" in self._stage.get("stranger", "/", "4"))
        with self._stage.policy("strict"):
            self._stage.settle(lambda: _REFUSED in self._stage.get("caller", "/", "4", namespace="outside"))
            self._both("STRICT refuses the caller outside the mesh", self._outside_refused)
        with self._stage.policy("permissive"):
            self._stage.settle(lambda: "200" in self._stage.get("caller", "/", "4", namespace="outside"))
            self._both("PERMISSIVE lets it in", self._outside_allowed)
        self._living_connections()

    def _living_connections(self) -> None:
        """What Istio resets: connections through the agent when it dies or when pods leave the mesh."""
        meshed = self._hold()
        self._stage.report.claim("killing the brain of both agents interrupts nothing", lambda: self._brain_killed(meshed))
        self._stage.label(f"{DATAPLANE_MODE}-")
        self._both("un-labelling restores plain traffic", self._readable)
        plain = self._hold()
        for label in (f"{DATAPLANE_MODE}=ambient", f"{DATAPLANE_MODE}-", f"{DATAPLANE_MODE}=ambient"):
            self._stage.label(label)
            self._wait_effect(through_mesh="=" in label)
        text = f"labelled, un-labelled, labelled again: {HELD} held connections live on"
        self._stage.report.claim(f"{text}, opened outside the mesh", plain.check)
        self._stage.report.claim(f"{text}, opened in the mesh", meshed.check)

    def _both(self, text: str, check: Callable[[str], str]) -> None:
        for family in ("4", "6"):
            self._stage.report.claim(f"{text}, IPv{family}", partial(check, family))

    def _hold(self) -> Held:
        held = Held(self._stage.lab)
        self._clean_up.callback(held.close)
        return held

    # --- what travels on the wire

    def _readable(self, family: str) -> str:
        """A new request is plain text between the pods. Tried again while an older label may still have effect."""
        text = f"/order-espresso-{family}"
        heard: list[Segment] = []

        def seen() -> bool:
            answer = self._stage.get("client", text, family)
            heard[:] = self._tap.hear()
            return answer.startswith("200") and any(text.encode() in segment.payload for segment in heard)

        if not self._stage.settle(seen):
            raise Unmet(f"{text!r} is not on the link, but {_describe(heard)}")
        segment = next(segment for segment in heard if text.encode() in segment.payload)
        first_line = segment.payload.splitlines()[0].decode()
        return f'"{first_line}" from {segment.source} to {segment.destination}'

    def _encrypted(self, family: str) -> str:
        """Requests that only wait for the mesh say nothing worth hiding; the one that follows must not be heard."""
        before: list[Segment] = []
        if not self._settle_through_mesh(family, before):
            raise Unmet(f"requests do not take the tunnel: {_describe(before)}")
        secret = f"/secret-recipe-{family}"
        answer = self._stage.get("client", secret, family)
        heard = self._tap.hear()
        if not answer.startswith("200") or secret not in answer:
            raise Unmet(f"the request does not work any more: {answer}")
        if any(b"recipe" in segment.payload for segment in heard):
            raise Unmet("the request is still readable on the link")
        if not heard or not all(_is_tunnel(segment) for segment in heard):
            raise Unmet(f"other traffic than to port {INBOUND_HBONE} is on the link: {_describe(heard)}")
        tunnels = join_segments(filter(_is_tunnel, before + heard))
        from_server = [stream for stream in tunnels if stream.source.port == INBOUND_HBONE]
        if not from_server or not all(map(is_tls_1_3, from_server)) or not all(map(is_tls, tunnels)):
            raise Unmet(f"the tunnels are not all TLS 1.3: {_describe(heard)}")
        size = sum(len(segment.payload) for segment in heard)
        return f'answered "{answer[:9]}"; {size} bytes in {len(heard)} segments to and from {from_server[-1].source}, the text in none'

    def _settle_through_mesh(self, family: str, heard: list[Segment]) -> bool:
        def seen() -> bool:
            answer = self._stage.get("client", "/warm-up", family)
            fresh = self._tap.hear()
            heard.extend(fresh)
            return answer.startswith("200") and bool(fresh) and all(map(_is_tunnel, fresh))

        return self._stage.settle(seen)

    def _wait_effect(self, *, through_mesh: bool) -> None:
        """Until a new request takes the way that the label says; held connections go on the way they took."""

        def seen() -> bool:
            text = "/which-way"
            self._tap.hear()
            answer = self._stage.get("client", text, "4")
            return answer.startswith("200") and through_mesh != any(text.encode() in segment.payload for segment in self._tap.hear())

        if not self._stage.settle(seen):
            self._stage.report.step("the label has no effect on new requests")

    # --- who may talk to whom

    def _own_address(self, family: str) -> str:
        answer, own = self._stage.get("client", "/", family), self._stage.address("client", family)
        if not answer.startswith(f"200 hello {own},"):
            raise Unmet(f"the client is {own}, the server says {answer!r}")
        return f'"{answer[4:]}"'

    def _server_first(self, family: str) -> str:
        answer = self._stage.run("client", "python3", "apps/greet.py", "database.shop", "3306", family)
        waited, _, words = answer.partition(" ")
        if not waited.isdecimal() or int(waited) > _AT_ONCE:
            raise Unmet(f"the database's greeting: {answer}")
        return f'"{words.split(" /")[0]}" after {waited} ms'

    def _client_allowed(self, family: str) -> str:
        return _expect("200 hello", self._stage.get("client", "/", family))

    def _stranger_refused(self, family: str) -> str:
        seen = len(self._stage.log_lines("n2"))
        answer = _expect(_REFUSED, self._stage.get("stranger", "/", family))
        return f"{answer}; {self._find_reason('n2', seen, 'sa/stranger')}"

    def _outside_refused(self, family: str) -> str:
        seen = len(self._stage.log_lines("n2"))
        answer = _expect(_REFUSED, self._stage.get("caller", "/", family, namespace="outside"))
        reason = self._find_reason("n2", seen, self._stage.address("caller", family))
        _expect("200 hello", self._stage.get("client", "/", family))
        return f"{answer}; {reason}; the client is served"

    def _outside_allowed(self, family: str) -> str:
        return _expect("200 hello", self._stage.get("caller", "/", family, namespace="outside"))

    def _find_reason(self, node: str, seen: int, who: str) -> str:
        """The error that the access log gives for a connection of ``who``, among lines after the first ``seen``."""
        found: list[str] = []

        def look() -> bool:
            lines = [line for line in self._stage.log_lines(node)[seen:] if "\taccess\t" in line and who in line]
            found[:] = [match[0] for line in lines if (match := re.search(r'error="[^"]*"', line))]
            return bool(found)

        if not self._stage.settle(look):
            raise Unmet(f"the access log of {node} gives no reason for {who}")
        return f"log of {node}: {found[-1]}"

    # --- what lives on

    def _brain_killed(self, held: Held) -> str:
        joined = {node: _movers(self._stage.log_lines(node)) for node in _NODES}
        lines = {node: len(self._stage.log_lines(node)) for node in _NODES}
        for node in _NODES:
            self._stage.lab.signal(f"ztunnel-{node}", signal.SIGKILL, "brain")
        answers = [self._stage.get("client", "/", family) for family in ("4", "6") * (_WHILE_THE_BRAIN_IS_DEAD // 2)]
        for answer in answers:
            _expect("200 hello", answer)
        for node in _NODES:
            if not self._stage.settle(partial(self._have_joined, node, lines[node], joined[node])):
                raise Unmet(f"the movers of {node} ({_numbers(joined[node])}) did not meet a new brain")
        text = f"{len(answers)} new requests answered meanwhile; data plane processes {_numbers(joined['n1'])} of n1 met the new brain"
        return f"{held.check()}; {text}"

    def _have_joined(self, node: str, seen: int, movers: set[str]) -> bool:
        return _movers(self._stage.log_lines(node)[seen:]) >= movers


def _expect(beginning: str, answer: str) -> str:
    if not answer.startswith(beginning):
        raise Unmet(f"expected {beginning!r}, got {answer!r}")
    return f'"{answer}"'


def _movers(lines: list[str]) -> set[str]:
    return {match[1] for line in lines if "mover.joined" in line and (match := re.search(r"pid=(\d+)", line))}


def _numbers(pids: set[str]) -> str:
    return " and ".join(sorted(pids))


def _is_tunnel(segment: Segment) -> bool:
    return INBOUND_HBONE in (segment.source.port, segment.destination.port)


def _describe(segments: list[Segment]) -> str:
    ways = dict.fromkeys(f"{segment.source.ip} -> {segment.destination}" for segment in segments)
    return ", ".join(list(ways)[:4]) or "nothing is heard"


if __name__ == "__main__":
    main()
