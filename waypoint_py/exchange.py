"""One HTTP request's life, from its head to its record: judged, routed, sent, tried again, answered; and exactly one record of it.

The steps until it goes out are in `_STEPS`, in their order. A step that needs to wait parks the exchange, and only that goes
into trio. From then on the exchange stands between two streams and moves what comes: the request's body through `RequestBody`, which
keeps it as long as another try may follow, the response's as it comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mesh.http.message import Headers, Message, Request, Response, Version
from mesh.http.path import BadPath, normalise
from mesh.model.l7.destination import TrafficPolicy
from mesh.model.l7.routing import Destination
from mesh.reactor.loop import Timer
from mesh.wire.errors import ErrorCode
from mesh.wire.grpc import Status
from waypoint_py import replies
from waypoint_py.attempt import Attempt, direct_endpoint, protocol_towards
from waypoint_py.body import RequestBody
from waypoint_py.grpc import MessageCounter
from waypoint_py.mirroring import MirrorCopy
from waypoint_py.observer import RequestRecord
from waypoint_py.plane import Load
from waypoint_py.policy.authorize import Judgement
from waypoint_py.policy.consult import ResponseHeaders
from waypoint_py.policy.facts import TokenFacts
from waypoint_py.preparation import date_of, finish_response, prepare
from waypoint_py.preview import BodyPreview
from waypoint_py.routing.actions import Chosen, answer, change_reply, change_response, changed_request, choose
from waypoint_py.routing.cors import allow_response, answer_preflight, find_allowed_origin
from waypoint_py.routing.fault import draw_fault
from waypoint_py.routing.grpc import find_status, http_from_status, reply_status
from waypoint_py.routing.match import Matched
from waypoint_py.routing.mirror import draw_mirrors, mirrored
from waypoint_py.routing.retry import UNBOUNDED, Again, Decision, Enough, RetryState, Room
from waypoint_py.routing.timeouts import CLIENTS_WORD, UNLIMITED, Timeouts, find_grpc_timeout, find_timeouts, told_upstream
from waypoint_py.store import PortRuntime
from waypoint_py.upstream.affinity import NO_AFFINITY
from waypoint_py.upstream.balancer import NoEndpoint, Wish
from waypoint_py.upstream.outlier import LocalOutcome
from waypoint_py.upstream.session import Cancel, Endpoint, FailureKind, UpstreamFailure, UpstreamProtocol
from waypoint_py.verdict import Flag, LocalReply, Park, Verdict

if TYPE_CHECKING:
    from waypoint_py.downstream import HttpConnection

WEBSOCKET: Final = b"websocket"
PREFLIGHT: Final = "cors_response"


_CONNECTED: Final = LocalOutcome.CONNECTED  # members of an enum are slower to find


class _Wait:
    """A step's word that it will go on by itself."""


_WAIT: Final = _Wait()


class Exchange:
    """Driven by its client's connection, by its tries and by timers; each may be the one that ends it."""

    __slots__ = (
        "_additions", "_affinity", "_attempt", "_body", "_chosen", "_claims", "_conn", "_counter", "_destination", "_grpc_in",
        "_load", "_matched", "_mirrors", "_origin", "_out", "_over", "_parked", "_per_try", "_plane", "_policy", "_port", "_preview",
        "_response", "_response_complete", "_retry", "_retrying", "_settings", "_steps", "_stream", "_timeouts", "_timer", "_total",
        "_trailers", "_upgraded", "_upstream_request", "record", "request",
    )  # fmt: skip

    def __init__(self, conn: HttpConnection, stream: int, request: Request | None, *, ended: bool) -> None:
        plane = conn.plane
        self._conn = conn
        self._plane = plane
        self._stream = stream
        self.request = request if request is not None else Request(b"", b"http", b"", b"", [])
        now = plane.reactor.now()
        self.record = RequestRecord(conn.facts, plane.local, plane.wall(), now, request)
        self._settings = plane.store.settings
        self._body = RequestBody()
        if ended:
            self._body.finish([])
            self.record.request_complete = now
        self._grpc_in = MessageCounter() if self.record.is_grpc else None
        self._counter = MessageCounter() if self.record.is_grpc else None
        self._steps = iter(_STEPS)
        """Those that are left."""
        self._over = False
        self._parked: Cancel | None = None
        self._preview: BodyPreview | None = None  # of the body, for an authorizer
        self._additions: ResponseHeaders | None = None
        self._timer: Timer | None = None  # of a delay, or a back-off
        self._total: Timer | None = None
        self._per_try: Timer | None = None
        self._port: PortRuntime | None = None
        self._claims: TokenFacts | None = None
        self._matched: Matched | None = None
        self._chosen: Chosen | None = None
        self._origin: bytes | None = None
        self._destination: Destination | None = None
        self._policy = TrafficPolicy()
        self._load: Load | None = None
        self._affinity = NO_AFFINITY
        self._timeouts = UNLIMITED
        self._retry: RetryState  # from `_act` on
        self._retrying = False
        self._upstream_request = self.request
        self._mirrors: list[MirrorCopy] = []
        self._attempt: Attempt | None = None
        self._response: Response | None = None
        self._response_complete = False
        self._upgraded = False
        self._out: deque[bytes | memoryview] = deque()
        self._trailers: Headers = []
        plane.counts.exchanges += 1

    # --- the client's side

    def begin(self) -> None:
        """All that has come with the head is here."""
        self._go_on(None)

    def refuse(self, status: int, reason: str) -> None:
        """The codec did not let it through."""
        self.reply(replies.refused_head(status, reason, serial=self._conn.serial))

    def body(self, data: bytes | memoryview) -> None:
        record = self.record
        record.bytes_received += len(data)
        if self._over:
            self._conn.consumed(self._stream, len(data))
            return
        if self._grpc_in is not None:
            self._grpc_in.feed(data)
        for mirror in self._mirrors:
            mirror.push(data)
        self._body.push(data)
        if self._preview is not None:
            self._preview.came(len(data))
        if self._attempt is not None:
            self._pump_request()

    def body_ended(self, trailers: Headers) -> None:
        self.record.request_complete = self._plane.reactor.now()
        self._body.finish(trailers)
        if self._preview is not None:
            self._preview.came(0)
        for mirror in self._mirrors:
            mirror.finish(trailers)
        if not self._over:
            if self._timeouts.total is not None:
                self._start_clock()
            if self._attempt is not None:
                self._pump_request()

    def writable(self) -> None:
        """There may be room towards the client."""
        if not self._over:
            self._pump_response()

    def gone(self, details: str, reason: str, *, broken: bool = False) -> None:
        """The client gave it up, or its connection went. ``broken``: it broke the protocol."""
        if self._over:
            return
        record = self.record
        if self._response_complete and not self._out and record.response is not None:
            self._finish()  # it has its answer
            return
        record.add_flags(Flag.DOWNSTREAM_PROTOCOL_ERROR if broken else Flag.DOWNSTREAM_CONNECTION_TERMINATION)
        record.details = details
        record.because = f"the client went: {reason}"
        self._finish()

    def crashed(self, error: Exception) -> None:
        """A defect of ours: it ends as well as it can."""
        if self._over:
            return
        try:
            self.reply(replies.internal_error(f"internal error: {error!r}"))
        except Exception as exc:
            self._plane.reactor.report(exc, "an exchange that had failed")
            self._finish(reset=ErrorCode.INTERNAL_ERROR)

    # --- what a preview of the body does

    def ask_for_body(self) -> None:
        """Say that it is wanted, if the client waits for that."""
        if self.request.expect_continue and not self._body.complete:
            # The application, whose 100 it would be, is asked only when this is over; the client might wait for it as long as we for the
            # client (RFC 9110 section 10.1.1 lets a proxy say it).
            self.request.expect_continue = False
            self._conn.send_informational(self._stream, 100, [])

    def let_come(self, size: int) -> None:
        """Let the client send on though nothing has moved."""
        self._body.grant(size)
        self._conn.consumed(self._stream, size)

    # --- steps before the request goes out

    def _go_on(self, reply: LocalReply | None) -> None:
        """The next steps, until one answers or waits."""
        if reply is not None:
            self.reply(reply)
            return
        for step in self._steps:
            if self._over:
                return
            verdict = step(self)
            if verdict is None:
                continue
            if isinstance(verdict, Park):
                self._parked = self._plane.waits.wait(verdict.run, self._unparked, self.crashed)
            elif not isinstance(verdict, _Wait):
                self.reply(verdict)
            return

    def _unparked(self, reply: LocalReply | None) -> None:
        self._parked = None
        self._conn.guard(self, lambda: self._go_on(reply))

    def _prepare(self) -> LocalReply | None:
        """One spelling of the path, no headers that only a proxy may set, and those that every request has."""
        request, settings = self.request, self._settings
        upgrade = request.upgrade
        if request.method == b"CONNECT" and upgrade is None:
            return replies.upgrade_refused("CONNECT")
        if upgrade is not None and upgrade != WEBSOCKET:
            if request.version is Version.HTTP_2:
                return replies.upgrade_refused(f"the protocol {upgrade.decode('latin-1')[:32]!r}")
            request.upgrade = None  # the request as an ordinary one: RFC 9110 section 7.8 leaves that to the server
        path = normalise(request.path, settings.path_normalization)
        if isinstance(path, BadPath):
            return replies.bad_path(path.reason)
        request.path = self.record.path = path
        us = self._plane.local.identity
        prepare(request, peer=self._conn.facts.peer, us=us, include_identity=settings.include_client_identity, rng=self._plane.rng)
        self._plane.observer.request_began(self.record)
        return None

    def _find_port(self) -> LocalReply | None:
        """What is configured for the service now, whatever it was when the connection was made."""
        facts = self._conn.facts
        if facts.service is None:
            return None
        self._port = self._plane.store.find_port(facts.service_key, facts.destination.port)
        if self._port is None:
            return replies.no_configuration(f"nothing is configured for {facts.service_key} port {facts.destination.port}")
        return None

    def _consult(self) -> Verdict:
        """CUSTOM policies: an authorizer of the user's decides first."""
        facts = self._conn.facts
        found = self._plane.store.judge_of(facts.service_key).find_authorizer(self.request, facts)
        if found is None:
            return None
        if isinstance(found, Judgement):
            self.record.judged(found)
            return found.reply
        if not self._body.empty:
            self._preview = BodyPreview(self, self._body, self.record)
        return self._plane.ext_authz.ask(found, self.request, facts, self._preview, self._allowed)

    def _allowed(self, additions: ResponseHeaders) -> None:
        self._additions = additions

    def _authenticate(self) -> Verdict:
        """RequestAuthentication: a token that is there must be a good one."""
        checker = self._plane.store.checker_of(self._conn.facts.service_key)
        return self._plane.authenticator.check(checker, self.request, self._proved)

    def _proved(self, claims: TokenFacts | None) -> None:
        self._claims = claims

    def _authorize(self) -> LocalReply | None:
        """DENY, ALLOW, AUDIT."""
        facts = self._conn.facts
        self.record.path = self.request.path  # a token that stood in it is gone, and is nothing for logs and traces
        judgement = self._plane.store.judge_of(facts.service_key).judge(self.request, facts, self._claims)
        self.record.judged(judgement)
        return judgement.reply

    def _route(self) -> LocalReply | None:
        if self._port is None:
            return None
        matched = self._port.routes.find(self.request, self._port.config.port)
        if matched is None:
            return replies.no_route(f"no route of {self._conn.facts.service_key} port {self._port.config.port} matches")
        self._matched = matched
        self.record.route = matched.name
        self.record.route_because = matched.because
        return None

    def _inject(self) -> LocalReply | _Wait | None:
        matched = self._matched
        if matched is None or matched.route.route.fault is None:
            return None
        injection = draw_fault(matched.route.route.fault, self._plane.rng, matched.because)
        if injection is None:
            return None
        if injection.delay > 0:
            self.record.add_flags(Flag.DELAY_INJECTED)
            self._timer = self._plane.reactor.call_later(
                injection.delay, lambda: self._conn.guard(self, lambda: self._go_on(injection.reply))
            )
            return _WAIT
        return injection.reply

    def _share(self) -> LocalReply | None:
        """Cross-origin requests."""
        cors = self._matched.route.cors if self._matched is not None else None
        if cors is None or self._matched is None:
            return None
        preflight = answer_preflight(cors, self.request, self._matched.because)
        if preflight is None:
            self._origin = find_allowed_origin(cors, self.request)
        return preflight

    def _act(self) -> LocalReply | None:
        """Answer as the route says, or decide where the request goes and how it looks there."""
        matched, request = self._matched, self.request
        if matched is None:
            self._upstream_request = request
            granted = find_grpc_timeout(request) if self.record.is_grpc else None
            self._timeouts = UNLIMITED if granted is None else Timeouts(granted, None, CLIENTS_WORD)
            self._retry = RetryState(None, request)
            self._send()
            return None
        own = answer(matched.route, request, matched.path, self._conn.facts.destination.port)
        if own is not None:
            return own
        chosen = choose(matched.route, self._plane.rng)
        if isinstance(chosen, LocalReply):
            return chosen
        self._chosen = chosen
        route = matched.route.route
        destination = self._destination = self.record.destination = chosen.to.destination.at(self._conn.facts.destination.port)
        self._timeouts = find_timeouts(route, request, grpc=self.record.is_grpc)
        self._retry = RetryState(route.retry, request)
        self._body.replayable = self._retry.may_retry and request.upgrade is None
        if request.expect_continue:  # what the client waits for ends while the destination may still be asked again
            request = request.copy()
        outgoing = changed_request(request, matched.route, chosen.destination, matched.path, self.record)
        self._upstream_request = self.record.request = outgoing
        self._affinity = self._plane.balancer.find_affinity(destination, request, self._conn.facts.peer_address)
        self._load = self._plane.loads.enter(destination)
        self._mirror(outgoing, matched)
        self._send()
        return None

    def _mirror(self, outgoing: Request, matched: Matched) -> None:
        mirrors = matched.route.route.mirrors
        if not mirrors or outgoing.upgrade is not None:
            return
        for mirror in draw_mirrors(mirrors, self._plane.rng):
            to = mirror.destination.at(self._conn.facts.destination.port)
            copy = MirrorCopy(self._plane, to, mirrored(outgoing), self._conn.facts, ended=self._body.empty)
            for piece in self._body.pieces():
                copy.push(piece)
            if self._body.complete and not self._body.empty:
                copy.finish(self._body.trailers)
            self._mirrors.append(copy)

    # --- tries

    def _send(self) -> None:
        self._start_clock()
        self._try()

    def _try(self) -> None:
        """One try: choose an endpoint and send the request there."""
        plane, destination, facts = self._plane, self._destination, self._conn.facts
        now = plane.reactor.now()
        if destination is None:
            endpoint: Endpoint | NoEndpoint = direct_endpoint(facts)
        else:
            elsewhere = len(self._retry.avoided_priorities)
            wish = Wish(self._affinity, facts.destination.ip, self._retry.avoided, elsewhere)
            endpoint = plane.balancer.choose(destination, wish, now)
        if isinstance(endpoint, NoEndpoint):
            reply = replies.no_endpoint(endpoint.because) if endpoint.known else replies.no_destination(503, endpoint.because)
            self.reply(reply)
            return
        self._retry.began(endpoint.key, len(self._retry.tried) // 2)
        self._policy = endpoint.policy
        record = self.record
        record.attempts += 1
        record.upstream, record.upstream_local_address = endpoint, None
        record.upstream_began, record.response_began, record.request_sent = now, None, None
        kind = record.upstream_kind = self._protocol_towards(endpoint)
        request = self._upstream_request
        if request is not self.request or self._timeouts is not UNLIMITED:  # else there is nothing to say, and `_prepare` left nothing said
            request = told_upstream(request, self._timeouts, now - record.started)
        self._body.rewind()
        self._attempt = attempt = Attempt(self, plane, endpoint, ended=self._body.empty)
        attempt.begin(kind, request, facts)

    def _protocol_towards(self, endpoint: Endpoint) -> UpstreamProtocol:
        declared, grpc = None, self.record.is_grpc
        port, destination, service = self._port, self._destination, self._conn.facts.service
        if not grpc and port is not None and service is not None and destination is not None:
            config = port.config
            if destination.port == config.port and destination.hostname == service.hostname and destination.namespace == service.namespace:
                declared = config.protocol
        return protocol_towards(endpoint, declared, self.request, grpc=grpc)

    def opened(self, attempt: Attempt) -> None:
        """Its head has been written."""
        if attempt is self._attempt and not self._over:
            self.record.upstream_local_address = attempt.local_address
            self._plane.balancer.happened_here(attempt.endpoint, _CONNECTED, self._plane.reactor.now())
            if attempt.sent:
                self._request_sent()
            else:
                self._pump_request()

    def upstream_writable(self, attempt: Attempt) -> None:
        if attempt is self._attempt and not self._over:
            self._pump_request()

    def _pump_request(self) -> None:
        """Move what there is of the body, as far as upstream takes it."""
        attempt, body = self._attempt, self._body
        if attempt is None or attempt.sent:
            return
        stream = attempt.stream
        if stream is None:
            return
        while body.waiting and (room := stream.room()) > 0 and (piece := body.take(room)) is not None:
            stream.send_data(piece)
        fresh = body.credit()
        if fresh:
            self._conn.consumed(self._stream, fresh)
        if body.exhausted and not attempt.sent:
            attempt.send_end(body.trailers)
            self._request_sent()

    def _request_sent(self) -> None:
        self.record.request_sent = self._plane.reactor.now()
        if self._timeouts.per_try is not None and self._response is None:
            self._cancel(self._per_try)
            self._per_try = self._plane.reactor.call_later(self._timeouts.per_try, self._on_per_try_timeout)

    def _start_clock(self) -> None:
        """The exchange's time runs from when the client has said all."""
        total = self._timeouts.total
        if total is not None and self._total is None and self._body.complete and not self._upgraded:
            self._total = self._plane.reactor.call_later(total, self._on_timeout)

    def _on_timeout(self) -> None:
        if self._over:
            return
        reply = replies.response_timeout(f"not done within {self._timeouts.total:g} s ({self._timeouts.because})")
        self._failed_there()
        self._drop_attempt()
        self.reply(reply)

    def _on_per_try_timeout(self) -> None:
        self._per_try = None
        if self._over or self._response is not None or self._attempt is None:
            return
        self._failed_there()
        self._drop_attempt()
        decision = self._retry.after_per_try_timeout(self._plane.rng, self._room(), replayable=self._body.replayable)
        reply = replies.per_try_timeout(f"a try took more than {self._timeouts.per_try:g} s")
        self._again_or(decision, reply)

    def _failed_there(self) -> None:
        """A try that took too long counts against its endpoint."""
        if self._attempt is not None and self._response is None:
            self._plane.balancer.happened_here(self._attempt.endpoint, LocalOutcome.FAILED, self._plane.reactor.now())

    def _room(self) -> Room:
        return self._load.room(self._policy) if self._load is not None else UNBOUNDED

    def _again_or(self, decision: Again | Enough, reply: LocalReply) -> None:
        """Another try, or this answer."""
        if isinstance(decision, Enough):
            if decision.flag is not None:
                self.record.add_flags(decision.flag)
            self.reply(reply)
            return
        self._retry_later(decision)

    def _retry_later(self, decision: Again) -> None:
        if self._load is not None and not self._retrying:
            self._retrying = True
            self._load.retries += 1
        self._timer = self._plane.reactor.call_later(decision.delay, self._retry_now)

    def _retry_now(self) -> None:
        self._timer = None
        if not self._over:
            self._conn.guard(self, self._try)

    def failed(self, attempt: Attempt, failure: UpstreamFailure) -> None:
        """A try is over without, or within, its response."""
        if attempt is not self._attempt or self._over:
            return
        self._drop_attempt()
        record = self.record
        record.transport_failure = failure.transport
        if failure.kind is not FailureKind.OVERFLOW:
            self._plane.balancer.happened_here(attempt.endpoint, LocalOutcome.FAILED, self._plane.reactor.now())
        if self._response is not None:
            record.add_flags(replies.flag_of_failure(failure))
            record.details = f"upstream_reset_after_response_started{{{failure.kind.value.replace(' ', '_')}}}"
            record.because = failure.because
            self._break_off()
            return
        decision = self._retry.after_failure(
            failure, self._plane.rng, self._room(), request_sent=attempt.begun, replayable=self._body.replayable
        )
        self._again_or(decision, replies.upstream_failed(failure, retried=record.attempts > 1))

    # --- the response

    def informational(self, attempt: Attempt, status: int, headers: Headers) -> None:
        if attempt is not self._attempt or self._over or self._response is not None or status not in (100, 103):
            return
        if self._conn.is_crowded:
            # No window holds these back. A hint may be lost (RFC 8297 section 2), and of the word that a client waits for the headers.
            if status != 100 or not self.request.expect_continue:
                return
            headers = []
        if status == 100:
            self.request.expect_continue = False
        self._conn.send_informational(self._stream, status, headers)

    def responded(self, attempt: Attempt, response: Response, ended: bool) -> None:
        """The head of a response. From here on there is no other try, unless this is one to be tried again."""
        if attempt is not self._attempt or self._over:
            return
        plane, record = self._plane, self.record
        now = record.response_began = plane.reactor.now()
        decision: Decision | None = None
        if self._retry.wants_response(response) is not None:
            decision = self._retry.after_response(response, plane.rng, self._room(), replayable=self._body.replayable)
        if (not record.is_grpc or ended) and attempt.endpoint.policy.outlier is not None:
            self._tell_outcome(attempt, response.status, self._grpc_status(response))
        if isinstance(decision, Again):
            self._drop_attempt()
            self._retry_later(decision)
            return
        if decision is not None and decision.flag is not None:
            record.add_flags(decision.flag)
        if self._per_try is not None:
            self._per_try.cancel()
        self._body.give_up_replay()
        self._end_retrying()
        record.details = "via_upstream"
        began = record.upstream_began
        self._upgraded = response.status == 101
        self._change_response(response)
        finish_response(response, date_of(plane.wall()), now - began if began is not None else 0.0)
        if self._upgraded:
            # From now on the stream carries bytes, and no time is set for them.
            response.content_length = None
            for timer in (self._total, self._per_try):
                self._cancel(timer)
        record.response = response
        over = self._response_complete = ended and not self._upgraded
        if over:
            record.grpc_status = self._grpc_status(response)
        # Until it has been written it is no answer: what the client's version of HTTP cannot say becomes another one. Where it is the
        # connection's last, writing it ends the exchange.
        self._conn.send_response(self._stream, response, ended=over)
        if self._over:
            return
        self._response = response
        if over:
            self._answered()
        elif not attempt.sent:
            self._pump_request()

    def response_data(self, attempt: Attempt, data: bytes | memoryview) -> None:
        if attempt is not self._attempt or self._over:
            return
        if self._counter is not None:
            self._counter.feed(data)
        if self._out:
            self._out.append(bytes(data))
            return
        room = self._conn.room(self._stream)
        if room >= len(data):
            self._conn.send_data(self._stream, data)
            self.record.bytes_sent += len(data)
            attempt.consumed(len(data))
            return
        self._out.append(bytes(data))
        self._pump_response()

    def completed(self, attempt: Attempt, trailers: Headers) -> None:
        if attempt is not self._attempt or self._over:
            return
        record = self.record
        record.grpc_status = grpc = self._grpc_status(Message(trailers))
        if self._response is not None and record.is_grpc and attempt.endpoint.policy.outlier is not None:
            self._tell_outcome(attempt, self._response.status, grpc)
        self._response_complete = True
        self._trailers = record.response_trailers = trailers
        self._pump_response()

    def _pump_response(self) -> None:
        """Move what waits to the client, as far as it takes it."""
        out, conn, stream = self._out, self._conn, self._stream
        while out:
            room = conn.room(stream)
            if room <= 0:
                conn.wait_for_room(self)
                return
            piece = out.popleft()
            if len(piece) > room:
                piece = memoryview(piece)
                out.appendleft(piece[room:])
                piece = piece[:room]
            conn.send_data(stream, piece)
            if self._over:
                return
            self.record.bytes_sent += len(piece)
            if self._attempt is not None:
                self._attempt.consumed(len(piece))
        if self._response_complete and self._response is not None:
            conn.send_end(stream, self._trailers)
            self._answered()

    def _change_response(self, response: Response) -> None:
        """What the route, the destination, CORS and affinity want of it."""
        matched = self._matched
        if matched is not None:
            self.record.response = response
            change_response(response, matched.route, self._chosen.destination if self._chosen is not None else None, self.record)
            if self._origin is not None and matched.route.cors is not None:
                allow_response(response, matched.route.cors, self._origin)
        if self._additions is not None:
            self._additions.apply(response)
        if self._affinity.set_cookie is not None:
            response.append(b"set-cookie", self._affinity.set_cookie)

    def _grpc_status(self, message: Message) -> Status | None:
        """Of a gRPC call, if the message says it."""
        return find_status(message) if self.record.is_grpc else None

    def _tell_outcome(self, attempt: Attempt, status: int, grpc: Status | None) -> None:
        """How the application answered, of a gRPC call by its own status."""
        status = http_from_status(grpc) if grpc is not None else status
        self._plane.balancer.answered(attempt.endpoint, status, self._plane.reactor.now())

    # --- ends

    def reply(self, reply: LocalReply) -> None:
        """Answer it ourselves; where an answer has begun, break that off."""
        if self._over:
            return
        record = self.record
        record.add_flags(*reply.flags)
        record.details = reply.details
        record.because = reply.because or record.because
        record.policy = reply.policy or record.policy
        self._drop_attempt()
        if self._response is not None:
            self._break_off()
            return
        matched = self._matched
        if matched is not None and reply.details != PREFLIGHT:
            reply = change_reply(reply, matched.route, self._chosen.destination if self._chosen is not None else None, record)
        response, body = replies.render(reply, self.request if record.request is not None else None)
        if record.is_grpc:
            record.grpc_status = reply_status(reply)
        if self._origin is not None and matched is not None and matched.route.cors is not None:
            allow_response(response, matched.route.cors, self._origin)
        finish_response(response, date_of(self._plane.wall()), None)
        self._response = record.response = response
        self._response_complete = True
        self._body.clear()
        if reply.close:
            self._conn.last_answer()
        if not body or self.request.method == b"HEAD":
            self._conn.send_response(self._stream, response, ended=True)
            self._answered()
            return
        self._conn.send_response(self._stream, response, ended=False)
        self._out.append(body)
        self._pump_response()

    def _answered(self) -> None:
        """The client has been given all of the answer."""
        if self._over:
            return
        # What is left of the request is for nobody. HTTP/1.1's codec reads it for nothing if it is little, and closes otherwise; by HTTP/2
        # the client is told to stop, and that the answer holds (RFC 9113 section 8.1).
        if not self._body.complete and (self._upgraded or not self._conn.serial):
            self._finish(reset=ErrorCode.NO_ERROR)
        else:
            self._finish()

    def _break_off(self) -> None:
        """An answer that has begun cannot be completed, and the client must not take it for a whole one."""
        self._finish(reset=ErrorCode.INTERNAL_ERROR)

    def _drop_attempt(self) -> None:
        """Give the present try up, if there is one."""
        attempt, self._attempt = self._attempt, None
        if self._per_try is not None:
            self._per_try.cancel()
        if attempt is not None:
            attempt.drop()

    def _end_retrying(self) -> None:
        if self._retrying and self._load is not None:
            self._retrying = False
            self._load.retries -= 1

    @staticmethod
    def _cancel(timer: Timer | None) -> None:
        if timer is not None:
            timer.cancel()

    def _finish(self, *, reset: int | None = None) -> None:
        """The end, whatever led to it: once. ``reset``: the client's stream is given up with this code."""
        if self._over:
            return
        self._over = True
        if reset is not None:
            self._conn.reset(self._stream, reset)
        record = self.record
        self._drop_attempt()
        if self._timer is not None:
            self._timer.cancel()
        if self._total is not None:
            self._total.cancel()
        if self._parked is not None:
            self._parked.cancel()
        self._end_retrying()
        if self._load is not None and self._destination is not None:
            self._plane.loads.leave(self._destination, self._load)
        if not self._body.complete:
            for mirror in self._mirrors:
                mirror.cut_off()
        self._preview = None  # which knows us
        self._body.clear()
        self._out.clear()
        record.ended = self._plane.reactor.now()
        if self._grpc_in is not None and self._counter is not None:
            record.request_messages, record.response_messages = self._grpc_in.count, self._counter.count
        self._plane.counts.exchanges -= 1
        try:
            self._plane.observer.request_ended(record)
        except Exception as exc:  # who is told must not harm what is told of
            self._plane.reactor.report(exc, "the record of a request")
        self._conn.forget(self._stream)


_STEPS: Final[tuple[Callable[[Exchange], Verdict | _Wait], ...]] = (
    Exchange._prepare,
    Exchange._find_port,
    Exchange._consult,
    Exchange._authenticate,
    Exchange._authorize,
    Exchange._route,
    Exchange._inject,
    Exchange._share,
    Exchange._act,
)
