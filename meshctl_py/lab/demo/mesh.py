"""The first act: a namespace is labelled, and its connections become mutual TLS between workload identities."""

from __future__ import annotations

import re
import signal
from contextlib import ExitStack
from functools import partial
from typing import Final

from mesh.model.labels import DATAPLANE_MODE
from meshctl_py.lab.demo.loads import HELD, HOLD, Held
from meshctl_py.lab.demo.report import Unmet, expect
from meshctl_py.lab.demo.stage import Stage
from meshctl_py.lab.demo.wire import Wire

_NODES: Final = ("n1", "n2")
_AT_ONCE: Final = 1000
"""Milliseconds. A proxy that waits for the client to speak first waits for seconds, or for ever."""
_REFUSED: Final = "ConnectionResetError"
_WHILE_THE_BRAIN_IS_DEAD: Final = 4
"""New requests made right after the kill."""


class MeshAct:
    """The claims, in the order in which a user would come upon them."""

    def __init__(self, stage: Stage, wire: Wire) -> None:
        self._stage = stage
        self._wire = wire
        self._both = stage.report.claim_both

    def run(self) -> None:
        if self._stage.is_labelled(DATAPLANE_MODE):  # whoever tried the example by hand may have left it so
            self._stage.label(f"{DATAPLANE_MODE}-")
        self._both("before the label a request is readable on the link", self._wire.readable)
        self._wire.forget()
        self._stage.label(f"{DATAPLANE_MODE}=ambient")
        self._stage.wait_captured()
        self._both("after the label it works as before, and the link carries only TLS 1.3 to port 15008", self._wire.encrypted)
        self._both("the server sees the client's own address", self._stage.sees_own_address)
        self._both("a server that speaks first is heard at once", self._server_first)
        with self._stage.applied("two-nodes-policies/allow-client.yaml"):
            self._stage.settle(lambda: _REFUSED in self._stage.get("stranger", "/", "4"))
            self._both("an AuthorizationPolicy that names the client's principal lets the client in", self._client_allowed)
            self._both("and refuses another service account with a reset, the reason in the access log", self._stranger_refused)
        self._stage.settle(lambda: "200" in self._stage.get("stranger", "/", "4"))
        with self._stage.applied("two-nodes-policies/strict.yaml"):
            self._stage.settle(lambda: _REFUSED in self._stage.get("caller", "/", "4", namespace="outside"))
            self._both("STRICT refuses the caller outside the mesh", self._outside_refused)
        with self._stage.applied("two-nodes-policies/permissive.yaml"):
            self._stage.settle(lambda: "200" in self._stage.get("caller", "/", "4", namespace="outside"))
            self._both("PERMISSIVE lets it in", self._outside_allowed)
        with ExitStack() as clean_up:
            self._living_connections(clean_up)

    def _living_connections(self, clean_up: ExitStack) -> None:
        """What Istio resets: connections through the agent when it dies or when pods leave the mesh."""
        meshed = self._hold(clean_up)
        self._stage.report.claim("killing the brain of both agents interrupts nothing", lambda: self._brain_killed(meshed))
        self._stage.label(f"{DATAPLANE_MODE}-")
        self._both("un-labelling restores plain traffic", self._wire.readable)
        plain = self._hold(clean_up)
        for label in (f"{DATAPLANE_MODE}=ambient", f"{DATAPLANE_MODE}-", f"{DATAPLANE_MODE}=ambient"):
            self._stage.label(label)
            self._wire.wait_effect(through_mesh="=" in label)
        text = f"labelled, un-labelled, labelled again: {HELD} held connections live on"
        self._stage.report.claim(f"{text}, opened outside the mesh", plain.check)
        self._stage.report.claim(f"{text}, opened in the mesh", meshed.check)

    def _hold(self, clean_up: ExitStack) -> Held:
        held = Held(self._stage.start("client", *HOLD))
        clean_up.callback(held.close)
        return held

    # --- who may talk to whom

    def _server_first(self, family: str) -> str:
        answer = self._stage.run("client", "python3", "apps/greet.py", "database.shop", "3306", family)
        waited, _, words = answer.partition(" ")
        if not waited.isdecimal() or int(waited) > _AT_ONCE:
            raise Unmet(f"the database's greeting: {answer}")
        return f'"{words.split(" /")[0]}" after {waited} ms'

    def _client_allowed(self, family: str) -> str:
        return expect("200 hello", self._stage.get("client", "/", family))

    def _stranger_refused(self, family: str) -> str:
        seen = len(self._stage.log_lines("n2"))
        answer = expect(_REFUSED, self._stage.get("stranger", "/", family))
        return f"{answer}; {self._find_reason('n2', seen, 'sa/stranger')}"

    def _outside_refused(self, family: str) -> str:
        seen = len(self._stage.log_lines("n2"))
        answer = expect(_REFUSED, self._stage.get("caller", "/", family, namespace="outside"))
        reason = self._find_reason("n2", seen, self._stage.address("caller", family))
        expect("200 hello", self._stage.get("client", "/", family))
        return f"{answer}; {reason}; the client is served"

    def _outside_allowed(self, family: str) -> str:
        return expect("200 hello", self._stage.get("caller", "/", family, namespace="outside"))

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
            expect("200 hello", answer)
        for node in _NODES:
            if not self._stage.settle(partial(self._have_joined, node, lines[node], joined[node])):
                raise Unmet(f"the movers of {node} ({_numbers(joined[node])}) did not meet a new brain")
        text = f"{len(answers)} new requests answered meanwhile; data plane processes {_numbers(joined['n1'])} of n1 met the new brain"
        return f"{held.check()}; {text}"

    def _have_joined(self, node: str, seen: int, movers: set[str]) -> bool:
        return _movers(self._stage.log_lines(node)[seen:]) >= movers


def _movers(lines: list[str]) -> set[str]:
    return {match[1] for line in lines if "mover.joined" in line and (match := re.search(r"pid=(\d+)", line))}


def _numbers(pids: set[str]) -> str:
    return " and ".join(sorted(pids))
