"""What a VirtualService's HTTP route may do to a request, checked as Istio's webhook checks it."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from mesh.kube.durations import read_duration
from mesh.kube.fields import Fields, Text
from mesh.kube.headeredits import NO_EDITS, HeaderEdits, find_control_mistake, is_token, read_header_edits
from mesh.kube.hostnames import HOSTNAME_PATTERN, MAX_LENGTH, is_hostname, is_wildcard
from mesh.kube.textmatch import REGEX, find_substitution_mistake, read_text_match
from mesh.model.l7.matching import Exact, Present
from mesh.model.l7.routing import Cors, DirectResponse, Fault, Redirect, Retry, Rewrite

MAX_BODY: Final = 1 << 20
"""Bytes of a direct response."""
GRPC_STATUSES: Final = {
    name: number
    for number, name in enumerate((
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
        "UNAUTHENTICATED",
    ))
}  # fmt: skip
RETRY_CONDITIONS: Final = frozenset({
    "5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited", "retriable-4xx", "refused-stream",
    "retriable-status-codes", "retriable-headers", "http3-post-connect-failure", "cancelled", "deadline-exceeded", "internal",
    "resource-exhausted", "unavailable",
})  # fmt: skip
CORS_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*")
_BACKOFF_FACTOR: Final = 10
"""Between the first and the longest pause, as Envoy has it."""
_STATUSES: Final = frozenset(status.value for status in HTTPStatus)
_SUBSET: Final = re.compile("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Target:
    """A destination as it is written: ``host`` may be a short name. ``port`` 0: none given."""

    host: str
    subset: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class WeightedTarget:
    target: Target
    weight: int = 0
    headers: HeaderEdits = NO_EDITS


@dataclass(frozen=True, slots=True)
class MirrorTarget:
    target: Target
    percent: float = 100.0


def read_target(fields: Fields) -> Target:
    fields.refuse_unknown("host", "subset", "port")
    host = fields.string("host", required=True, text=_HOST)
    subset = fields.string("subset", text=_SUBSET_NAME)
    port = fields.mapping("port")
    if port is None:
        return Target(host, subset)
    port.refuse_unknown("number")
    return Target(host, subset, port.integer("number", required=True, low=1, high=65535))


def read_http_targets(rule: Fields) -> tuple[WeightedTarget, ...]:
    """``route`` of an HTTP route."""
    found = rule.mappings("route")
    targets = tuple(_read_http_target(fields) for fields in found)
    _check_weights(rule, found, targets)
    return targets


def read_l4_targets(rule: Fields) -> tuple[WeightedTarget, ...]:
    """``route`` of a TLS or TCP route."""
    found = rule.mappings("route", required=True, empty="a route needs a destination")
    targets: list[WeightedTarget] = []
    for fields in found:
        fields.refuse_unknown("destination", "weight")
        targets.append(WeightedTarget(_read_destination(fields), fields.integer("weight", low=0, high=MAX_WEIGHT)))
    _check_weights(rule, found, tuple(targets))
    return tuple(targets)


MAX_WEIGHT: Final = 2**31 - 1


def _read_http_target(fields: Fields) -> WeightedTarget:
    fields.refuse_unknown("destination", "weight", "headers")
    destination, weight = _read_destination(fields), fields.integer("weight", low=0, high=MAX_WEIGHT)
    headers = fields.mapping("headers")
    return WeightedTarget(destination, weight, read_header_edits(headers) if headers else NO_EDITS)


def _read_destination(fields: Fields) -> Target:
    destination = fields.mapping("destination", required=True)
    return read_target(destination) if destination else Target("")


def _check_weights(rule: Fields, found: tuple[Fields, ...], targets: tuple[WeightedTarget, ...]) -> None:
    if len(found) > 1 and not any(target.weight for target in targets):
        rule.complain("route", "no destination has a weight")


def read_redirect(fields: Fields) -> Redirect:
    fields.refuse_unknown("uri", "prefixRewrite", "authority", "scheme", "port", "derivePort", "redirectCode")
    uri, prefix, authority = (fields.string(key, text=_IN_HEADER) for key in ("uri", "prefixRewrite", "authority"))
    scheme = fields.string("scheme", choices=("http", "https"))
    port = fields.integer("port", low=1, high=65535)
    derived = fields.string("derivePort", choices=("FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"))
    code = fields.integer("redirectCode", 301, low=300, high=399)
    if uri and prefix:
        fields.complain("prefixRewrite", "beside 'uri': give one of them")
    if port and derived:
        fields.complain("derivePort", "beside 'port': give one of them")
    if not (uri or prefix or authority or scheme or port or derived):
        fields.complain(None, "a redirect needs a uri, an authority, a scheme or a port")
    return Redirect(
        status=code or 301,
        scheme=scheme or None,
        authority=authority or None,
        port=None if port == default_port(scheme) else port or None,
        request_port=derived == "FROM_REQUEST_PORT",
        path=uri or None,
        prefix=prefix or None,
    )


def default_port(scheme: str) -> int:
    """The port that a URL of the scheme (``""``: plaintext's) does not have to name."""
    return 443 if scheme == "https" else 80


def read_direct_response(fields: Fields) -> DirectResponse:
    fields.refuse_unknown("status", "body")
    status = fields.integer("status", 500, required=True, low=200, high=599)
    body = fields.mapping("body")
    return DirectResponse(status, _read_body(body) if body else b"")


def _read_body(fields: Fields) -> bytes:
    fields.refuse_unknown("string", "bytes")
    text, encoded = fields.string("string"), fields.string("bytes", text=_BASE64)
    if "string" in fields and "bytes" in fields:
        fields.complain("bytes", "beside 'string': give one of them")
    body = text.encode("utf-8", "replace") if "string" in fields else _decode(encoded) or b""
    if len(body) > MAX_BODY:
        fields.complain(None, f"has {len(body)} bytes, of at most {MAX_BODY}")
        return b""
    return body


def read_rewrite(fields: Fields) -> Rewrite:
    fields.refuse_unknown("uri", "authority", "uriRegexRewrite")
    uri, authority = (fields.string(key, text=_IN_TARGET) for key in ("uri", "authority"))
    by_regex = fields.mapping("uriRegexRewrite")
    regex, substitution = _read_regex_rewrite(by_regex) if by_regex else ("", "")
    if uri and by_regex is not None:
        fields.complain("uriRegexRewrite", "beside 'uri': give one of them")
    if not (uri or authority or by_regex is not None):
        fields.complain(None, "a rewrite needs a uri, a uriRegexRewrite or an authority")
    return Rewrite(prefix=uri or None, regex=regex or None, substitution=substitution, authority=authority or None)


def _read_regex_rewrite(fields: Fields) -> tuple[str, str]:
    fields.refuse_unknown("match", "rewrite")
    found = len(fields.problems)
    pattern = fields.string("match", required=True, text=REGEX)
    substitution = fields.string("rewrite", required=True)
    if len(fields.problems) == found and pattern:
        mistake = find_substitution_mistake(pattern, substitution) if substitution else "an empty rewrite"
        if mistake:
            fields.complain("rewrite", mistake)
    return pattern, substitution


def read_retry(fields: Fields) -> Retry:
    """``attempts`` 0: none. Also that of the mesh's default."""
    known = ("attempts", "perTryTimeout", "retryOn", "retryRemoteLocalities", "retryIgnorePreviousHosts", "backoff")
    fields.refuse_unknown(*known)
    attempts = fields.integer("attempts", low=0, high=MAX_WEIGHT)
    per_try, backoff = read_duration(fields, "perTryTimeout"), read_duration(fields, "backoff")
    conditions = fields.string("retryOn", text=_RETRY_ON)
    remote, ignore_previous = fields.boolean("retryRemoteLocalities"), fields.boolean("retryIgnorePreviousHosts", True)
    if not attempts:
        for key in ("perTryTimeout", "retryOn", "retryRemoteLocalities"):
            if key in fields:
                fields.complain(key, "without attempts nothing is retried")
    base = Retry() if backoff is None else Retry(backoff_base=backoff, backoff_max=_BACKOFF_FACTOR * backoff)
    on, statuses = split_conditions(conditions) if conditions else (base.on, ())
    return Retry(
        attempts=attempts,
        on=on,
        statuses=statuses,
        per_try_timeout=per_try,
        backoff_base=base.backoff_base,
        backoff_max=base.backoff_max,
        previous_hosts=not ignore_previous,
        remote_localities=remote,
    )


def split_conditions(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Of ``retryOn``: conditions, and status codes, which are one more condition."""
    parts = [part for part in (part.strip() for part in text.split(",")) if part]
    statuses = tuple(int(part) for part in parts if _is_status(part))
    names = [part for part in parts if not _is_status(part)]
    if statuses:
        names.append("retriable-status-codes")
    return tuple(dict.fromkeys(names)), statuses


def read_fault(fields: Fields) -> Fault:
    fields.refuse_unknown("delay", "abort")
    delay, abort = fields.mapping("delay"), fields.mapping("abort")
    if delay is None and abort is None:
        fields.complain(None, "a fault needs a delay or an abort")
    seconds, delay_percent = _read_delay(delay) if delay else (0.0, 0.0)
    status, grpc_status, abort_percent = _read_abort(abort) if abort else (None, None, 0.0)
    return Fault(seconds, delay_percent, status, grpc_status, abort_percent)


def _read_delay(fields: Fields) -> tuple[float, float]:
    known = ("fixedDelay", "percentage", "percent", "exponentialDelay")
    fields.refuse_unknown(*known)
    delay = read_duration(fields, "fixedDelay")
    old = fields.integer("percent", low=0, high=100)
    percent = read_percentage(fields, "percentage")
    fields.string("exponentialDelay", text=_UNSUPPORTED)
    return delay or 0.0, float(old) if percent is None else percent


def _read_abort(fields: Fields) -> tuple[int | None, int | None, float]:
    fields.refuse_unknown("httpStatus", "grpcStatus", "percentage", "http2Error")
    status = fields.integer("httpStatus", low=200, high=599)
    name = fields.string("grpcStatus", text=_GRPC_STATUS)
    percent = read_percentage(fields, "percentage")
    fields.string("http2Error", text=_UNSUPPORTED)
    if "httpStatus" in fields and "grpcStatus" in fields:
        fields.complain("grpcStatus", "beside 'httpStatus': give one of them")
    grpc_status = GRPC_STATUSES.get(name) if "grpcStatus" in fields else None
    return status or None, grpc_status, percent or 0.0


def read_percentage(fields: Fields, key: str) -> float | None:
    """Istio's Percent; None where there is none."""
    percentage = fields.mapping(key)
    if percentage is None:
        return None
    percentage.refuse_unknown("value")
    value = percentage.number("value", low=0, high=100)
    if 0 < value < _SMALLEST:
        percentage.complain("value", f"a share is nothing, or at least {_SMALLEST} percent")
    return value


_SMALLEST: Final = 0.0001


def read_mirrors(rule: Fields) -> tuple[Target | None, float | None, tuple[MirrorTarget, ...]]:
    """``mirror``, the share of it (None: all), and ``mirrors``."""
    one = rule.mapping("mirror")
    percent = read_percentage(rule, "mirrorPercentage")
    olds = {key: rule.integer(key, low=0, high=100) for key in ("mirrorPercent", "mirror_percent")}
    several = tuple(_read_mirror(fields) for fields in rule.mappings("mirrors"))
    if one is not None and several:
        rule.complain("mirrors", "beside 'mirror': give one of them")
    if percent is None:
        percent = next((float(old) for key, old in olds.items() if key in rule), None)
    return read_target(one) if one else None, percent, several


def _read_mirror(fields: Fields) -> MirrorTarget:
    fields.refuse_unknown("destination", "percentage")
    destination = _read_destination(fields)
    percent = read_percentage(fields, "percentage")
    return MirrorTarget(destination, 100.0 if percent is None else percent)


def read_cors(fields: Fields) -> Cors:
    fields.refuse_unknown(
        "allowOrigins", "allowOrigin", "allowMethods", "allowHeaders", "exposeHeaders", "maxAge", "allowCredentials", "unmatchedPreflights"
    )
    found = fields.mappings("allowOrigins")
    origins = tuple(read_text_match(origin) for origin in found)
    for index, origin in enumerate(origins):
        if origin in (Present(), Exact("")):
            fields.complain("allowOrigins", "an origin that is empty", index)
    exact = tuple(Exact(origin) for origin in fields.strings("allowOrigin"))
    max_age = read_duration(fields, "maxAge")
    if max_age is not None and max_age != int(max_age):
        fields.complain("maxAge", "is counted in whole seconds")
    return Cors(
        origins=origins or exact,
        methods=fields.strings("allowMethods", text=_METHOD),
        headers=fields.strings("allowHeaders", text=_CORS_HEADER),
        expose=fields.strings("exposeHeaders", text=_CORS_HEADER),
        max_age=None if max_age is None else int(max_age),
        credentials=fields.boolean("allowCredentials"),
        forward_unmatched=fields.string("unmatchedPreflights", choices=("UNSPECIFIED", "FORWARD", "IGNORE")) != "IGNORE",
    )


def _is_status(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text[:4]) in _STATUSES


def _find_host_mistake(host: str) -> str | None:
    return None if is_hostname(host) or is_wildcard(host) else f"expected a hostname or the name of a service, found '{host[:80]}'"


def _find_subset_mistake(name: str) -> str | None:
    return None if not name or _SUBSET.fullmatch(name) else f"'{name[:80]}' can't be the name of a subset"


def _find_condition_mistake(text: str) -> str | None:
    for part in text.split(","):
        name = part.strip()
        if name and name not in RETRY_CONDITIONS and not _is_status(name):
            return f"'{name[:80]}' is no condition for a retry (known: {', '.join(sorted(RETRY_CONDITIONS))}, and status codes)"
    return None


def _find_grpc_mistake(name: str) -> str | None:
    return None if name in GRPC_STATUSES else f"'{name[:80]}' is no status of gRPC (known: {', '.join(GRPC_STATUSES)})"


def _find_method_mistake(method: str) -> str | None:
    return None if method in CORS_METHODS else f"expected one of {', '.join(CORS_METHODS)}, found '{method[:80]}'"


def _find_cors_header_mistake(name: str) -> str | None:
    return None if is_token(name) else f"'{name[:80]}' is no name of a header"


def _decode(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _find_target_mistake(text: str) -> str | None:
    return "has a blank, which no request line can carry" if " " in text else find_control_mistake(text)


_HOST: Final = Text(_find_host_mistake, {"pattern": rf"^(\*\.)?{HOSTNAME_PATTERN}$", "maxLength": MAX_LENGTH + len("*.")})
_IN_HEADER: Final = Text(find_control_mistake)
_IN_TARGET: Final = Text(_find_target_mistake)
_SUBSET_NAME: Final = Text(_find_subset_mistake, {"pattern": f"^({_SUBSET.pattern})?$"})
_RETRY_ON: Final = Text(_find_condition_mistake)
_GRPC_STATUS: Final = Text(_find_grpc_mistake, {"enum": list(GRPC_STATUSES)})
_METHOD: Final = Text(_find_method_mistake, {"enum": list(CORS_METHODS)})
_CORS_HEADER: Final = Text(_find_cors_header_mistake, {"minLength": 1})
_BASE64: Final = Text(lambda text: None if _decode(text) is not None else "expected bytes in base64", {"format": "byte"})
_UNSUPPORTED: Final = Text(lambda text: "is not supported")
