"""What a waypoint does with its records: counts them, writes them, makes spans of them. The one `Observer` of the program."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from mesh.model.l7.waypoint import WaypointSettings
from mesh.telemetry.log import get_logger, wants
from waypoint_py.observer import ConnectionRecord, RefusalRecord, RequestRecord
from waypoint_py.telemetry.access_log import AccessLog
from waypoint_py.telemetry.context import decide
from waypoint_py.telemetry.metrics import WaypointMetrics

_SCOPE = "policy"
_log = get_logger(_SCOPE)


class Spans(Protocol):
    """Where spans go (`waypoint_py.telemetry.export`)."""

    def put(self, record: RequestRecord) -> None: ...


class Telemetry:
    """An `waypoint_py.observer.Observer`."""

    def __init__(
        self, settings: Callable[[], WaypointSettings], metrics: WaypointMetrics, access_log: AccessLog, spans: Spans, rng: random.Random
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._access_log = access_log
        self._spans = spans
        self._rng = rng

    def request_began(self, record: RequestRecord) -> None:
        """Where traces are recorded, it gets its place in one. Elsewhere what the client says of traces passes as it is."""
        tracing = self._settings().tracing
        request = record.request
        if not tracing.endpoint or request is None:
            return
        decision = decide(request.headers, tracing.percent, self._rng)
        record.span = decision.span
        if decision.trace_id:
            record.trace = f"{decision.trace_id:032x}"
        if decision.headers is not None:
            request.headers = decision.headers

    def request_ended(self, record: RequestRecord) -> None:
        self._metrics.request(record)
        self._access_log.write(record)
        if record.span is not None:
            self._spans.put(record)
        if record.dry_run or record.audited:
            _tell_of_policies(record)

    def connection_opened(self, record: ConnectionRecord) -> None:
        self._metrics.opened(record)

    def connection_closed(self, record: ConnectionRecord) -> None:
        self._metrics.closed(record)
        self._access_log.write(record)
        if record.dry_run or record.audited:
            _tell_of_policies(record)

    def refused(self, record: RefusalRecord) -> None:
        self._metrics.refused(record)
        self._access_log.write(record)


def _tell_of_policies(record: RequestRecord | ConnectionRecord) -> None:
    """What no line of Envoy's access log has a place for. What would be refused is worth a line more than what would not."""
    for verdict in record.dry_run:
        level = "info" if verdict.denies else "debug"
        if wants(_SCOPE, level):
            (_log.info if verdict.denies else _log.debug)("dry_run", because=verdict.because, **_who(record))
    if record.audited and wants(_SCOPE, "info"):
        _log.info("audit", policy=",".join(record.audited), **_who(record))


def _who(record: RequestRecord | ConnectionRecord) -> dict[str, object]:
    connection = record.connection
    who: dict[str, object] = {"peer": connection.peer, "service": connection.service_key or connection.destination}
    if isinstance(record, RequestRecord):
        who |= {"method": record.method.decode("latin-1"), "path": record.path.decode("latin-1")}
        if (request_id := record.request_header(b"x-request-id")) is not None:
            who["request_id"] = request_id.decode("latin-1")
    return who
