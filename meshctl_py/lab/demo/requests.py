"""What a waypoint does with requests: routes, faults, policies, tokens, gRPC, and its own end.

The claims hold wherever the pods of examples/two-nodes and their versions of examples/two-nodes-waypoint run behind a waypoint: `Shop`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final, Protocol

import msgspec

from meshctl_py.lab.client import Popen
from meshctl_py.lab.demo.loads import VISIT, Visitors
from meshctl_py.lab.demo.report import Report, Unmet
from meshctl_py.lab.demo.tokens import Issuer

_WEB: Final = "http://web.shop/"
_SPLIT: Final = 300
"""Requests of which one in ten is expected at the second version: 30. Five standard deviations of 5.2 are 26."""
_FEWEST: Final = 4
_MOST: Final = 56
_OFTEN: Final = 20
_DELAY: Final = 1000
"""Milliseconds, as faults.yaml has it."""


class Shop(Protocol):
    """The namespace ``shop`` behind its waypoint."""

    def run(self, pod: str, *command: str) -> str:
        """The output of a command in a pod, whatever its exit status."""

    def start(self, pod: str, *command: str) -> Popen:
        """A command in a pod; its input and output are pipes."""

    def applied(self, file: str, **values: str) -> AbstractContextManager[None]:
        """A file of the examples is in force as long as the context lasts; see `read_example`."""

    def settle(self, seen: Callable[[], bool]) -> bool:
        """Try until something has come true; False if it has not in a time that is more than enough."""

    def waypoint_logs(self) -> Mapping[str, Sequence[str]]:
        """What each ready pod of the waypoint has logged, by its name."""

    def replace_waypoints(self) -> str:
        """Replace one pod of the waypoint after the other, each when the one before is ready again; how, for who reads."""


@contextmanager
def visiting(shop: Shop) -> Iterator[Visitors]:
    """Visitors of the shop as long as the context lasts. Raises Unmet."""
    visitors = Visitors(shop.start("client", *VISIT))
    try:
        yield visitors
    finally:
        visitors.close()


class _Told(msgspec.Struct, frozen=True):
    """What ``apps/versioned_web.py`` says of itself and of the request."""

    version: str
    headers: dict[str, str]


class Answer(msgspec.Struct, frozen=True):
    """What ``apps/ask.py`` prints of a request; ``status`` 0: no answer, and ``text`` says why."""

    status: int
    ms: int
    text: str

    @property
    def told(self) -> _Told:
        """Raises Unmet if it is no answer of the application."""
        try:
            return msgspec.json.decode(self.text, type=_Told)
        except msgspec.DecodeError as exc:
            raise Unmet(f"expected an answer of the application, got {self}") from exc

    def __str__(self) -> str:
        return f'{self.status} "{self.text}"'


_DENIED: Final = (403, "RBAC: access denied")


class RequestClaims:
    """The claims, in the order in which a user would come upon them."""

    def __init__(self, shop: Shop, report: Report) -> None:
        self._shop = shop
        self._claim = report.claim
        self._both = report.claim_both
        self._issuer = Issuer()

    def run(self) -> None:
        with self._shop.applied("two-nodes-waypoint/split.yaml"):
            self._shop.settle(lambda: self._versions(3, "-H", "x-version: v2") == {"v2": 3})
            self._both("a route with weights 90 and 10 shares requests out so", self._split)
            self._claim("and sends those with a header to one version", self._by_header)
        with self._shop.applied("two-nodes-waypoint/faults.yaml"):
            self._shop.settle(lambda: self._ask("-H", "x-fault: abort").status == 418)
            self._claim("a fault ends requests with a status of one's choice", self._aborted)
            self._claim("or delays them", self._delayed)
            self._claim("retries hide what the application fails at", self._retried)
        with self._shop.applied("two-nodes-waypoint/readers.yaml"):
            self._shop.settle(lambda: self._ask("-X", "POST").status == 403)
            self._both("a principal that may GET and nothing else is refused a POST, in words", self._reader)
            self._claim("and another principal may not even GET", self._stranger)
        self._tokens()
        with self._shop.applied("two-nodes-waypoint/methods.yaml"):
            self._shop.settle(lambda: "by v2" in self._call("Place", "4"))
            self._both("calls of gRPC are routed by their method", self._by_method)
        self._replaced()

    # --- routes

    def _split(self, family: str) -> str:
        seen = self._versions(_SPLIT, "-k", f"-{family}")
        if seen.keys() != {"v1", "v2"} or seen.total() != _SPLIT or not _FEWEST <= seen["v2"] <= _MOST:
            raise Unmet(f"of {_SPLIT} requests {_counts(seen)}")
        return f"of {_SPLIT} requests {_counts(seen)}"

    def _by_header(self) -> str:
        return f'with "x-version: v2" {self._all_at("v2", "-H", "x-version: v2")}'

    def _by_method(self, family: str) -> str:
        answers = (self._call("Place", family), self._call("List", family))
        if answers != ("Place by v2: espresso", "List by v1: espresso"):
            raise Unmet(f"got {answers}")
        return " and ".join(f'"{answer}"' for answer in answers)

    # --- faults

    def _aborted(self) -> str:
        return _expect(self._ask("-H", "x-fault: abort"), 418, "fault filter abort")

    def _delayed(self) -> str:
        delayed, usual = self._ask("-H", "x-fault: delay"), self._ask()
        if (delayed.status, usual.status) != (200, 200) or delayed.ms < _DELAY:
            raise Unmet(f"{delayed.status} after {delayed.ms} ms, without a fault {usual.status} after {usual.ms} ms")
        return f"200 after {delayed.ms} ms, without the fault after {usual.ms} ms"

    def _retried(self) -> str:
        """The application fails at every other request of this path."""
        bare, retried = (self._statuses("-n", str(_OFTEN), *options, f"{_WEB}flaky") for options in (("-H", "x-retry: none"), ()))
        if bare != {200: _OFTEN // 2, 503: _OFTEN // 2} or retried != {200: _OFTEN}:
            raise Unmet(f"without retries {_counts(bare)}, with retries {_counts(retried)}")
        return f"of {_OFTEN} requests without retries {_counts(bare)}, with retries {_counts(retried)}"

    # --- policies

    def _reader(self, family: str) -> str:
        got, posted = self._ask(f"-{family}"), self._ask(f"-{family}", "-X", "POST")
        if got.status != 200:
            raise Unmet(f"GET: {got}")
        return f"GET 200, POST {_expect(posted, *_DENIED)}"

    def _stranger(self) -> str:
        return _expect(self._ask(pod="stranger"), *_DENIED)

    def _tokens(self) -> None:
        with ExitStack() as applied:
            for file, values in (("tokens", {"JWKS": self._issuer.key_set}), ("signed-in", {}), ("by-claim", {})):
                applied.enter_context(self._shop.applied(f"two-nodes-waypoint/{file}.yaml", **values))
            self._shop.settle(self._tokens_hold)
            self._claim("where a token is required, who has none is refused", lambda: _expect(self._ask(), *_DENIED))
            self._claim("who has one passes, and the application is told what it says and not the token", self._signed_in)
            self._claim("a forged token is refused with the reason", self._forged)
            self._claim("an expired one too", self._expired)
            self._claim("and one for another audience", self._for_others)
            self._claim("a claim of the token chooses the version", self._by_claim)

    def _tokens_hold(self) -> bool:
        if self._ask().status != 403:
            return False
        answers = [self._ask(*self._bearer(group=group)) for group in ("buyers", "sellers")]
        return [answer.status == 200 and answer.told.version for answer in answers] == ["v2", "v1"]

    def _signed_in(self) -> str:
        answer = self._ask(*self._bearer())
        if answer.status != 200 or answer.told.headers.get("x-group") != "buyers" or "authorization" in answer.told.headers:
            raise Unmet(str(answer))
        return '200, the application gets "x-group: buyers"'

    def _forged(self) -> str:
        return _expect(self._ask(*_present(Issuer().sign())), 401, "Jwt verification fails")

    def _expired(self) -> str:
        return _expect(self._ask(*self._bearer(exp=int(time.time()) - 600)), 401, "Jwt is expired")

    def _for_others(self) -> str:
        return _expect(self._ask(*self._bearer(aud="bank")), 403, "Audiences in Jwt are not allowed")

    def _by_claim(self) -> str:
        """Nor does it help to set the header that is made from the claim."""
        buyers = self._all_at("v2", *self._bearer())
        sellers = self._all_at("v1", *self._bearer(group="sellers"), "-H", "x-group: buyers")
        return f'buyers: {buyers}; sellers, who set "x-group: buyers" themselves: {sellers}'

    def _bearer(self, **claims: object) -> tuple[str, str]:
        return _present(self._issuer.sign(**claims))

    # --- the waypoint's own end

    def _replaced(self) -> None:
        with self._shop.applied("two-nodes-waypoint/two-replicas.yaml"):
            self._shop.settle(lambda: len(self._shop.waypoint_logs()) == 2 and self._ask().status == 200)
            self._claim("two waypoints are replaced one after the other under load without a failed request", self._live_on)

    def _live_on(self) -> str:
        with visiting(self._shop) as visitors:
            if not self._shop.settle(lambda: len(self._visits()) == 2 and min(self._visits().values()) > 0):
                raise Unmet(f"requests do not pass two waypoints: {self._visits()}")
            how = self._shop.replace_waypoints()
            return f"{how}; {visitors.check()}"

    def _visits(self) -> dict[str, int]:
        return {pod: sum("/visit" in line for line in lines) for pod, lines in self._shop.waypoint_logs().items()}

    # --- requests

    def _ask(self, *options: str, pod: str = "client") -> Answer:
        (answer,) = self._ask_often(*options, _WEB, pod=pod)
        return answer

    def _ask_often(self, *arguments: str, pod: str = "client") -> list[Answer]:
        output = self._shop.run(pod, "python3", "apps/ask.py", *arguments)
        try:
            return [msgspec.json.decode(line, type=Answer) for line in output.splitlines()]
        except msgspec.DecodeError as exc:
            raise Unmet(f"ask.py: {output}") from exc

    def _statuses(self, *arguments: str) -> Counter[int]:
        return Counter(answer.status for answer in self._ask_often(*arguments))

    def _versions(self, times: int, *options: str) -> Counter[str]:
        """Which version answered how often; an answer of nobody's is under its own text."""
        answers = self._ask_often("-n", str(times), *options, _WEB)
        return Counter(answer.told.version if answer.status == 200 else str(answer) for answer in answers)

    def _all_at(self, version: str, *options: str) -> str:
        seen = self._versions(_OFTEN, *options)
        if seen != {version: _OFTEN}:
            raise Unmet(f"of {_OFTEN} requests {_counts(seen)}")
        return f"{_OFTEN} of {_OFTEN} at {version}"

    def _call(self, method: str, family: str) -> str:
        return self._shop.run("client", "python3", "apps/call.py", "web.shop", "9090", f"shop.Orders/{method}", "espresso", family)


def _present(token: str) -> tuple[str, str]:
    return "-H", f"authorization: Bearer {token}"


def _expect(answer: Answer, status: int, text: str) -> str:
    if (answer.status, answer.text) != (status, text):
        raise Unmet(f'expected {status} "{text}", got {answer}')
    return str(answer)


def _counts(seen: Counter[str] | Counter[int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(seen.items(), key=lambda item: str(item[0])))
