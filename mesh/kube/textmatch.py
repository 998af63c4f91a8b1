"""Texts that are compared in one of several ways: Istio's StringMatch, and regular expressions wherever they stand."""

from __future__ import annotations

from typing import Final

import re2

from mesh.kube.fields import Fields, Text
from mesh.model.l7.matching import MAX_REGEX, Exact, Prefix, Present, Regex, TextMatch

_KINDS: Final = ("exact", "prefix", "regex")
_OPTIONS: Final = re2.Options()
_OPTIONS.log_errors = False


def find_regex_mistake(pattern: str) -> str | None:
    """Why RE2 would not take it, or Istio would not; None: nothing is wrong."""
    if not pattern:
        return "an empty regular expression"
    if len(pattern) > MAX_REGEX:
        return f"a regular expression of {len(pattern)} characters, of at most {MAX_REGEX}"
    try:
        re2.compile(pattern, _OPTIONS)
    except re2.error as exc:
        return f"not a regular expression of RE2: {_say(exc)}"
    return None


def find_substitution_mistake(pattern: str, substitution: str) -> str | None:
    """Why ``substitution`` (with ``\\1``, ``\\\\``) can't stand in for what ``pattern``, which is right, matched."""
    groups = re2.compile(pattern, _OPTIONS).groups
    characters = iter(substitution)
    for character in characters:
        if character != "\\":
            continue
        following = next(characters, "")
        if following.isascii() and following.isdigit():
            if int(following) > groups:
                return f"there is no group {following} in '{pattern}'"
        elif following != "\\":
            return "a backslash is written twice, or comes before the number of a group"
    return None


def matches_empty(match: TextMatch) -> bool:
    """Whether an empty text is one of those that match."""
    match match:
        case Exact(value=value) | Prefix(value=value):
            return not value
        case Regex(value=pattern):
            return re2.fullmatch(pattern, "", _OPTIONS) is not None
    return True


def matches_everything(pattern: str) -> bool:
    return pattern in (".*", "^.*$")


def read_text_match(fields: Fields, *, presence: bool = False, empty_prefix: bool = False) -> TextMatch:
    """A StringMatch. One that says nothing matches whatever is there. ``presence``: the regular expression ``*``, which is none, says the
    same; ``empty_prefix``: a prefix may be empty."""
    fields.refuse_unknown(*_KINDS)
    exact = fields.string("exact")
    prefix = fields.string("prefix")
    regex = fields.string("regex", text=_REGEX_OR_STAR if presence else REGEX)
    given = [kind for kind in _KINDS if kind in fields]
    if len(given) > 1:
        fields.complain(given[1], f"beside '{given[0]}': give one of {', '.join(_KINDS)}")
    if "exact" in fields:
        return Exact(exact)
    if "prefix" in fields:
        if not prefix and not empty_prefix:
            fields.complain("prefix", "an empty prefix")
        return Prefix(prefix)
    if "regex" in fields and not (presence and regex == "*"):
        return Regex(regex)
    return Present()


def _find_presence_mistake(pattern: str) -> str | None:
    return None if pattern == "*" else find_regex_mistake(pattern)


REGEX: Final = Text(find_regex_mistake, {"minLength": 1, "maxLength": MAX_REGEX})
_REGEX_OR_STAR: Final = Text(_find_presence_mistake, {"minLength": 1, "maxLength": MAX_REGEX})


def _say(exc: Exception) -> str:
    reason = exc.args[0] if exc.args else ""
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
