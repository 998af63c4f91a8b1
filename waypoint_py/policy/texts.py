"""Values of a policy's fields prepared for look-ups: texts, paths and templates. A field names thousands as quickly as two.

Expressions are RE2's and see bytes: whatever a client puts into a path, valid UTF-8 or not, is matched by ``.`` and by ``[^/]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Generic, TypeAlias, TypeVar

import re2

from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix, Present, Regex, Suffix, TextMatch

T = TypeVar("T", str, bytes)
_Full: TypeAlias = Callable[[bytes], bool]


class BadPattern(ValueError):
    """A regular expression that RE2 does not take, or a template with an operator inside a segment."""


class Texts(Generic[T]):
    """Any of several matches of one attribute, which is there."""

    __slots__ = ("_exact", "_folded", "_non_empty", "_prefixes", "_present", "_regexes", "_suffixes")

    def __init__(self, matches: Iterable[TextMatch], convert: Callable[[str], T], *, ignore_case: bool = False) -> None:
        """``convert`` makes a value of what the attribute is. ``ignore_case``: for all of them; the attribute is compared in lower case
        (ASCII). Raises BadPattern."""
        self._folded: Texts[T] | None = None
        exact: set[T] = set()
        prefixes: list[T] = []
        suffixes: list[T] = []
        regexes: list[_Full] = []
        folded: list[TextMatch] = []
        present = non_empty = False
        for match in matches:
            match match:
                case Present():
                    non_empty |= match.non_empty
                    present |= not match.non_empty
                case Regex():
                    regexes.append(_compile(f"(?i:{match.value})" if ignore_case else match.value))
                case Exact() | Prefix() | Suffix() if match.ignore_case and not ignore_case:
                    folded.append(match)
                case Exact():
                    exact.add(_lower(convert(match.value)) if ignore_case else convert(match.value))
                case Prefix():
                    prefixes.append(_lower(convert(match.value)) if ignore_case else convert(match.value))
                case Suffix():
                    suffixes.append(_lower(convert(match.value)) if ignore_case else convert(match.value))
        self._present, self._non_empty = present, non_empty
        self._exact: frozenset[T] = frozenset(exact)
        self._prefixes: tuple[T, ...] = tuple(prefixes)
        self._suffixes: tuple[T, ...] = tuple(suffixes)
        self._regexes = tuple(regexes)
        if folded:
            self._folded = Texts(folded, convert, ignore_case=True)

    def hit(self, value: T) -> bool:
        """``value`` in lower case if this was made to ignore case."""
        if (
            value in self._exact
            or self._present
            or (self._non_empty and len(value) > 0)
            or value.startswith(self._prefixes)
            or value.endswith(self._suffixes)
        ):
            return True
        for matches in self._regexes:
            if matches(value if isinstance(value, bytes) else _as_bytes(value)):
                return True
        return self._folded is not None and self._folded.hit(_lower(value))


class Paths:
    """Any of several matches of a path without its query."""

    __slots__ = ("_exact", "_exact_folded", "_prefixes", "_prefixes_folded", "_regexes")

    def __init__(self, matches: Iterable[PathMatch], *, generous: bool) -> None:
        """``generous``: template operators match every byte, else those that RFC 3986 allows in a segment. Raises BadPattern."""
        exact: dict[bool, set[bytes]] = {False: set(), True: set()}
        prefixes: dict[bool, list[bytes]] = {False: [], True: []}
        regexes: list[_Full] = []
        for match in matches:
            fold = match.ignore_case
            value = match.value.encode().lower() if fold else match.value.encode()
            match match.kind:
                case PathKind.EXACT:
                    exact[fold].add(value)
                case PathKind.PREFIX:
                    prefixes[fold].append(value)
                case PathKind.SEGMENTS:
                    bare = value.rstrip(b"/")
                    exact[fold].add(bare)
                    prefixes[fold].append(bare + b"/")
                case PathKind.REGEX:
                    regexes.append(_compile(f"(?i:{match.value})" if fold else match.value))
                case PathKind.TEMPLATE:
                    regexes.append(_compile(template_regex(match.value, generous=generous)))
        self._exact, self._exact_folded = frozenset(exact[False]), frozenset(exact[True])
        self._prefixes, self._prefixes_folded = tuple(prefixes[False]), tuple(prefixes[True])
        self._regexes = tuple(regexes)

    def hit(self, path: bytes) -> bool:
        if path in self._exact or path.startswith(self._prefixes):
            return True
        for matches in self._regexes:
            if matches(path):
                return True
        if self._exact_folded or self._prefixes_folded:
            folded = path.lower()
            return folded in self._exact_folded or folded.startswith(self._prefixes_folded)
        return False


_PCHAR = r"[A-Za-z0-9\-._~%!$&'()*+,;:@=]"


def template_regex(template: str, *, generous: bool) -> str:
    """A path template of AuthorizationPolicy as an RE2 expression for the whole path: ``{*}`` is one segment of one or more characters,
    ``{**}`` is zero or more characters, ``/`` too. Raises BadPattern."""
    one, many = ("[^/]+", ".*") if generous else (f"{_PCHAR}+", f"(?:{_PCHAR}|/)*")
    parts: list[str] = []
    for segment in template.split("/"):
        if segment == "{*}":
            parts.append(one)
        elif segment == "{**}":
            parts.append(many)
        elif "{" in segment or "}" in segment:
            raise BadPattern(f"{template!r}: {{*}} and {{**}} fill a segment")
        else:
            parts.append(re2.escape(segment))
    return "/".join(parts)


def template_prefix(template: str) -> str:
    """The literal text that every path of a template begins with."""
    return template.partition("{")[0]


def _lower(value: T) -> T:
    return value.lower()


def _as_bytes(text: str) -> bytes:
    # Claims are JSON of strangers; a lone surrogate must not become an exception.
    return text.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=1024)
def _compile(expression: str) -> _Full:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.dot_nl = True
    options.log_errors = False
    try:
        fullmatch = re2.compile(expression.encode(), options).fullmatch
    except (re2.error, UnicodeEncodeError) as exc:
        raise BadPattern(f"no regular expression of RE2: {expression!r}: {exc}") from exc
    return lambda value: fullmatch(value) is not None
