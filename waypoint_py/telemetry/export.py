"""Sends spans to a collector: OTLP over HTTP, in batches, from a queue that has an end. Nothing that a collector does holds up a request.

A span is its request's record until it is sent; what does not fit into the queue is counted and forgotten.
"""

from __future__ import annotations

import random
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import h11
import trio

from mesh.model.l7.waypoint import Tracing
from mesh.runtime.outbound import Answer, Dial, HttpConnection, OutboundError, Target
from mesh.telemetry.log import get_logger
from mesh.telemetry.metrics import Registry
from waypoint_py.observer import RequestRecord
from waypoint_py.telemetry.spans import make_request, make_span

MAX_WAITING: Final = 2048
"""Spans (OpenTelemetry's default for its batches' queue)."""
BATCH: Final = 512
INTERVAL: Final = 1.0
"""Seconds that a span waits for others."""
WITHIN: Final = 10.0
"""Seconds for one try (OTLP's default)."""
TRIES: Final = 4
BACK_OFF: Final = 1.0
"""Seconds before the second try; twice as long before each further one, and up to a fifth more."""
_ANSWER: Final = 64 << 10
_AT_A_TIME: Final = 32
"""Spans that are made before the loop may look at something else."""
_AGAIN: Final = frozenset((429, 502, 503, 504))
"""Answers that OTLP says to try again after; after any other, the spans are lost."""

_log = get_logger("tracing")


class SpanExporter:
    """`put` may be called from the reactor; `run` must be running for anything to be sent."""

    def __init__(
        self,
        settings: Callable[[], Tracing],
        dial: Dial,
        registry: Registry,
        *,
        resource: Iterable[tuple[str, str]],
        version: str,
        rng: random.Random,
    ) -> None:
        self._settings = settings
        self._dial = dial
        self._resource = dict(resource)
        self._version = version
        self._rng = rng
        self._queue: deque[RequestRecord] = deque()
        self._some = trio.Event()
        self._full = trio.Event()
        self._sending = 0
        self._kept: tuple[tuple[bool, str, int], HttpConnection] | None = None
        self._failing = False
        spans = registry.counter("waypoint_spans", "Spans by what became of them", ("result",))
        self._sent, self._dropped, self._failed = (spans.labelled(result) for result in ("sent", "dropped", "failed"))

    def put(self, record: RequestRecord) -> None:
        """A span to send. Of a full queue the newest is lost: its beginning may be wanted most."""
        queue = self._queue
        if len(queue) >= MAX_WAITING:
            self._dropped.value += 1
            return
        queue.append(record)
        if len(queue) == 1:
            self._some.set()
        elif len(queue) == BATCH:
            self._full.set()

    @property
    def waiting(self) -> int:
        """Spans that are neither sent nor given up."""
        return len(self._queue) + self._sending

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever."""
        task_status.started()
        try:
            while True:
                await self._some.wait()
                with trio.move_on_after(INTERVAL):
                    await self._full.wait()
                batch = self._take()
                try:
                    await self._send(batch)
                except Exception as exc:  # supervises: a span that cannot be made costs its batch, never the waypoint
                    _log.error("spans.defect", exc_info=exc)
                    self._note_failed(len(batch), "a defect")
        finally:
            with trio.CancelScope(shield=True):
                await self._hang_up()

    def hurry(self) -> None:
        """Do not wait for more."""
        self._full.set()

    def _take(self) -> list[RequestRecord]:
        queue = self._queue
        batch = [queue.popleft() for _ in range(min(BATCH, len(queue)))]
        if not queue:
            self._some = trio.Event()
        if len(queue) < BATCH:
            self._full = trio.Event()
        self._sending = len(batch)
        return batch

    async def _send(self, batch: Sequence[RequestRecord]) -> None:
        reason = "tracing is off"
        body: bytes | None = None
        for tried in range(TRIES):
            settings = self._settings()
            if not settings.endpoint:
                break
            if tried:
                await trio.sleep(BACK_OFF * 2 ** (tried - 1) * (1 + 0.2 * self._rng.random()))
            if body is None:
                body = await self._encode(batch, settings)
            try:
                answer = await self._post(settings.endpoint, body)
            except OutboundError as exc:
                reason = str(exc)
                continue
            if 200 <= answer.status < 300:
                self._note_sent(len(batch))
                return
            reason = f"answered with {answer.status}"
            if answer.status not in _AGAIN:
                break
        self._note_failed(len(batch), reason)

    async def _encode(self, batch: Sequence[RequestRecord], settings: Tracing) -> bytes:
        spans = []
        for number, record in enumerate(batch, 1):
            if record.span is not None:
                spans.append(make_span(record, record.span, settings.tags))
            if number % _AT_A_TIME == 0:
                await trio.lowlevel.checkpoint()
        return make_request(spans, self._resource, self._version).SerializeToString()

    async def _post(self, endpoint: str, body: bytes) -> Answer:
        """Raises OutboundError."""
        target = Target.parse(endpoint)
        headers = [
            (b"host", target.authority.encode()),
            (b"user-agent", f"ambient-mesh/{self._version}".encode()),
            (b"content-type", b"application/x-protobuf"),
            (b"content-length", b"%d" % len(body)),
        ]
        try:
            with trio.fail_after(WITHIN):
                return await self._exchange(target, headers, body)
        except trio.TooSlowError as exc:
            raise OutboundError(f"no whole answer within {WITHIN:g} s") from exc
        except h11.ProtocolError as exc:
            raise OutboundError(f"no HTTP: {exc}") from exc
        except ssl.SSLError as exc:
            raise OutboundError(f"TLS: {exc}") from exc
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
            raise OutboundError(f"the connection broke: {exc.__cause__ or exc}") from exc

    async def _exchange(self, target: Target, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Answer:
        place = (target.secure, target.host, target.port)
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept[0] == place:
                try:
                    return await self._exchange_on(kept[1], place, target, headers, body)
                except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                    pass  # a server may close an idle connection just as we use it
            else:
                await kept[1].discard()
        return await self._exchange_on(HttpConnection(await self._dial(target)), place, target, headers, body)

    async def _exchange_on(
        self,
        connection: HttpConnection,
        place: tuple[bool, str, int],
        target: Target,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes,
    ) -> Answer:
        try:
            answer = await connection.exchange(b"POST", target.path.encode(), headers, body, _ANSWER)
        except BaseException:
            with trio.CancelScope(shield=True):
                await connection.discard()
            raise
        if connection.reuse():
            self._kept = (place, connection)
        else:
            await connection.discard()
        return answer

    async def _hang_up(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            await kept[1].discard()

    def _note_sent(self, spans: int) -> None:
        self._sending = 0
        self._sent.value += spans
        if self._failing:
            self._failing = False
            _log.info("spans.sent_again", endpoint=self._settings().endpoint)

    def _note_failed(self, spans: int, reason: str) -> None:
        self._sending = 0
        self._failed.value += spans
        if not self._failing:  # once: a collector may be away for long
            self._failing = True
            _log.warning("spans.failed", endpoint=self._settings().endpoint, reason=reason, spans=spans)
