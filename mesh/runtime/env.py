"""Environment to typed configuration: declared once as a dataclass, every mistake reported at once.

    @dataclass(frozen=True, slots=True)
    class Config:
        node_name: str = variable("NODE_NAME", parse=text, doc="the Kubernetes node this agent runs on")
        drain: float = variable("CONNECTION_TERMINATION_DEADLINE", parse=duration, default="5s", doc="...")

    config = from_environment(Config, os.environ)

The default is written as a user would write it, so that documentation can print it; `describe` makes that documentation's rows. A field
declared `optional` is None when the variable is unset. Unset is not the same as empty: an empty value goes to the parser.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

T = TypeVar("T")

Parser = Callable[[str], T]
"""Text to value; raises ValueError whose text is what was expected (``a duration like 10s or 500ms``)."""

_KEY: Final = "environment variable"


@dataclass(frozen=True, slots=True)
class EnvProblem:
    """One mistake. ``value`` None: the variable is not set."""

    name: str
    value: str | None
    expected: str

    def __str__(self) -> str:
        if self.value is None:
            return f"missing env var {self.name} (expected {self.expected})"
        return f"invalid env var {self.name}={self.value} (expected {self.expected})"


class InvalidEnvironment(Exception):
    """The environment does not make a configuration; ``problems`` are all the mistakes. The operator must act."""

    def __init__(self, problems: tuple[EnvProblem, ...]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class VariableDoc:
    """A row of the documentation."""

    field: str
    names: tuple[str, ...]
    default: str | None
    required: bool
    doc: str


@dataclass(frozen=True, slots=True)
class _Variable:
    names: tuple[str, ...]
    parser: Callable[[str], Any]
    default: str | None
    required: bool
    secret: bool
    doc: str


def variable(*names: str, parse: Parser[T], default: str | None = None, secret: bool = False, doc: str) -> T:
    """A field read from the first of ``names`` that is set; without ``default`` it is required. A ``secret``'s value is never shown."""
    return cast(T, _field(_Variable(names, parse, default, default is None, secret, doc)))


def optional(*names: str, parse: Parser[T], secret: bool = False, doc: str) -> T | None:
    """A field that is None when no variable of ``names`` is set."""
    return cast(T, _field(_Variable(names, parse, None, False, secret, doc)))


def from_environment(config: type[T], environ: Mapping[str, str]) -> T:
    """An instance of the dataclass ``config``. Raises InvalidEnvironment with all mistakes."""
    values: dict[str, Any] = {}
    problems: list[EnvProblem] = []
    for name, declared in _declared(config):
        found = next((candidate for candidate in declared.names if candidate in environ), None)
        text = declared.default if found is None else environ[found]
        if text is None:
            if declared.required:
                problems.append(EnvProblem(declared.names[0], None, declared.doc or "a value"))
            values[name] = None
            continue
        try:
            values[name] = declared.parser(text)
        except ValueError as exc:
            problems.append(EnvProblem(found or declared.names[0], "<hidden>" if declared.secret else text, str(exc)))
    if problems:
        raise InvalidEnvironment(tuple(problems))
    return config(**values)


def describe(config: type[object]) -> list[VariableDoc]:
    """What the dataclass reads, in the order of its fields: the documentation is made from it, or tested against it."""
    return [VariableDoc(name, declared.names, declared.default, declared.required, declared.doc) for name, declared in _declared(config)]


def _field(declared: _Variable) -> object:
    return dataclasses.field(metadata={_KEY: declared})


def _declared(config: type[object]) -> list[tuple[str, _Variable]]:
    fields = dataclasses.fields(cast(Any, config))
    return [(field.name, field.metadata[_KEY]) for field in fields if _KEY in field.metadata]


# Parsers


def text(value: str) -> str:
    return value


def nonempty(value: str) -> str:
    if not value:
        raise ValueError("a value that is not empty")
    return value


def boolean(value: str) -> bool:
    """``true`` or ``false`` only, as Istio reads them."""
    if value not in ("true", "false"):
        raise ValueError("true or false")
    return value == "true"


_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)", re.ASCII)


def duration(value: str) -> float:
    """Seconds, from ``10s``, ``500ms``, ``1.5h``, ``1h30m`` or ``0``."""
    if value == "0":
        return 0.0
    end, total = 0, 0.0
    for match in _DURATION.finditer(value):
        if match.start() != end:
            break
        total += float(match[1]) * _UNITS[match[2]]
        end = match.end()
    if not value or end != len(value):
        raise ValueError("a duration such as 10s, 500ms, 5m or 24h")
    return total


def integer(least: int, most: int) -> Parser[int]:
    """A decimal number from ``least`` to ``most``."""

    def parse(value: str) -> int:
        if value.removeprefix("-").isdecimal() and value.isascii() and len(value) < 20 and least <= int(value) <= most:
            return int(value)
        raise ValueError(f"a whole number from {least} to {most}")

    return parse


port: Parser[int] = integer(1, 65535)


def path(value: str) -> Path:
    if not value or "\0" in value:
        raise ValueError("a path")
    return Path(value)


def paths(value: str) -> tuple[Path, ...]:
    """Paths separated by colons; empty parts are left out."""
    return tuple(Path(part) for part in value.split(":") if part)


def choice(*allowed: str) -> Parser[str]:
    """One of the given texts."""

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(" or ".join([", ".join(allowed[:-1]), allowed[-1]]) if len(allowed) > 1 else allowed[0])
        return value

    return parse


def host_and_port(value: str) -> tuple[str, int]:
    """``host:port``, an IPv6 host in brackets (given without them)."""
    host, colon, number = value.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        if not (colon and host) or (":" in host and not bracketed):
            raise ValueError
        return host[1:-1] if bracketed else host, port(number)
    except ValueError:
        raise ValueError("HOST:PORT, an IPv6 address in brackets") from None


def domain(value: str) -> str:
    """A DNS name, without the final dot, in lower case."""
    name = value.removesuffix(".").lower()
    if not re.fullmatch(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", name):
        raise ValueError("a domain such as cluster.local")
    return name


@dataclass(frozen=True, slots=True)
class ControlPlaneAddress:
    """Where a gRPC service of the control plane is reached, always over TLS."""

    host: str
    port: int


def control_plane(value: str) -> ControlPlaneAddress:
    """``https://host:port``; the scheme may be left out, as Istio allows."""
    parsed = urlsplit(value if "://" in value else f"https://{value}")
    try:
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host, port = None, None
    if parsed.scheme != "https" or not host or parsed.path not in ("", "/"):
        raise ValueError("https://HOST:PORT")
    return ControlPlaneAddress(host, port or 15012)
