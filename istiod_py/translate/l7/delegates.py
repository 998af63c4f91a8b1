"""Delegation: what a VirtualService's rule becomes that leaves the details to another VirtualService.

The delegate's rules stand in for the root's, each narrowed to what the root matches. Where the two contradict each other the delegate's
rule is left out: a delegate can't reach beyond what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from istiod_py.translate.l7.sources import Delegates, Note, RouteDefaults, Sourced, expand, is_exported
from mesh.kube.objects import KubeObject
from mesh.kube.virtualservice import HttpMatch, HttpRule, VirtualService
from mesh.model.l7.matching import Exact, Prefix, Regex, TextMatch

MOST_MERGED: Final = 4096
"""Matches that delegation makes for one VirtualService. Each of the root's meets each of the delegate's: two objects of some kilobytes
would become one of gigabytes, here and at the waypoint."""


@dataclass(frozen=True, slots=True)
class PlacedRule:
    """A rule, and where it stands: ``index`` in ``http`` of ``obj``. Hosts in it are in full."""

    obj: KubeObject
    index: int
    rule: HttpRule


@dataclass(slots=True)
class _Merged:
    """``room``: matches that delegation may still make."""

    rules: list[PlacedRule] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    room: int = MOST_MERGED


def settle_rules(root: Sourced[VirtualService], delegates: Delegates, defaults: RouteDefaults) -> tuple[list[PlacedRule], list[Note]]:
    """The rules of a VirtualService with delegates put in place of what they stand for."""
    merged = _Merged()
    for index, rule in enumerate(root.value.http):
        placed = PlacedRule(root.obj, index, _expand(rule, root.value.namespace, defaults))
        if rule.delegate is None:
            merged.rules.append(placed)
        else:
            _delegate(placed, root.value, delegates, defaults, merged)
    return merged.rules, merged.notes


def _delegate(placed: PlacedRule, root: VirtualService, delegates: Delegates, defaults: RouteDefaults, merged: _Merged) -> None:
    assert placed.rule.delegate is not None
    namespace, name = placed.rule.delegate.namespace or root.namespace, placed.rule.delegate.name
    found = delegates.get((namespace, name))
    path = ("spec", "http", placed.index, "delegate")
    if found is None:
        merged.notes.append(Note(placed.obj.key, path, f"there is no delegate VirtualService {namespace}/{name}: the rule is left out"))
        return
    if not is_exported(found.value, root.namespace, defaults):
        message = f"VirtualService {namespace}/{name} is not exported to {root.namespace}: the rule is left out"
        merged.notes.append(Note(placed.obj.key, path, message))
        return
    for index, rule in enumerate(found.value.http):
        merged.room -= max(1, len(placed.rule.matches)) * max(1, len(rule.matches))
        if merged.room < 0:
            message = f"with VirtualService {namespace}/{name} it makes more than {MOST_MERGED} matches: the rest of it is left out"
            merged.notes.append(Note(placed.obj.key, path, message))
            return
        both = merge_rules(placed.rule, _expand(rule, namespace, defaults))
        if both is None:
            message = f"matches nothing of what VirtualService {root.namespace}/{root.name} delegates: left out there"
            merged.notes.append(Note(found.obj.key, ("spec", "http", index, "match"), message))
        else:
            merged.rules.append(PlacedRule(found.obj, index, both))


def _expand(rule: HttpRule, namespace: str, defaults: RouteDefaults) -> HttpRule:
    """Before rules of different namespaces are merged, in which short names mean different hosts."""
    return replace(
        rule,
        targets=tuple(
            replace(each, target=replace(each.target, host=expand(each.target.host, namespace, defaults))) for each in rule.targets
        ),
        mirror=None if rule.mirror is None else replace(rule.mirror, host=expand(rule.mirror.host, namespace, defaults)),
        mirrors=tuple(
            replace(each, target=replace(each.target, host=expand(each.target.host, namespace, defaults))) for each in rule.mirrors
        ),
    )


def merge_rules(root: HttpRule, delegate: HttpRule) -> HttpRule | None:
    """What the delegate does, for what both match; what it leaves open is the root's. None: they contradict each other."""
    matches = merge_matches(root.matches, delegate.matches)
    if matches is None:
        return None
    return replace(
        delegate,
        name=_join(root.name, delegate.name),
        matches=matches,
        delegate=None,
        direct_response=delegate.direct_response or root.direct_response,
        rewrite=delegate.rewrite or root.rewrite,
        timeout=root.timeout if delegate.timeout is None else delegate.timeout,
        retry=delegate.retry or root.retry,
        fault=delegate.fault or root.fault,
        mirror=delegate.mirror or root.mirror,
        mirror_percent=root.mirror_percent if delegate.mirror_percent is None else delegate.mirror_percent,
        mirrors=delegate.mirrors or root.mirrors,
        cors=delegate.cors or root.cors,
        headers=delegate.headers or root.headers,
    )


def merge_matches(root: tuple[HttpMatch, ...], delegate: tuple[HttpMatch, ...]) -> tuple[HttpMatch, ...] | None:
    """Every pair that can be met at once. None: some match of the delegate has no counterpart at all."""
    if not root or not delegate:
        return delegate or root
    result: list[HttpMatch] = []
    for leaf in delegate:
        pairs = [_merge_match(each, leaf) for each in root if not contradict(each, leaf)]
        if not pairs:
            return None
        result += pairs
    return tuple(result)


def _merge_match(root: HttpMatch, leaf: HttpMatch) -> HttpMatch:
    return HttpMatch(
        name=_join(root.name, leaf.name),
        uri=leaf.uri or root.uri,
        ignore_case=leaf.ignore_case,
        scheme=leaf.scheme or root.scheme,
        method=leaf.method or root.method,
        authority=leaf.authority or root.authority,
        headers={**root.headers, **leaf.headers},
        without_headers={**root.without_headers, **leaf.without_headers},
        query={**root.query, **leaf.query},
        port=leaf.port or root.port,
        source_labels={**root.source_labels, **leaf.source_labels},
        source_namespace=leaf.source_namespace or root.source_namespace,
        gateways=leaf.gateways or root.gateways,
    )


def _join(root: str, leaf: str) -> str:
    return "-".join(filter(None, (root, leaf)))


def contradict(root: HttpMatch, leaf: HttpMatch) -> bool:
    """Whether the leaf asks for something outside of what the root has."""
    if any(texts_contradict(first, second) for first, second in _shared_texts(root, leaf)):
        return True
    if root.ignore_case != leaf.ignore_case or (root.port and leaf.port and root.port != leaf.port):
        return True
    if root.source_namespace and leaf.source_namespace != root.source_namespace:
        return True
    if any(root.source_labels.get(key, value) != value for key, value in leaf.source_labels.items()):
        return True
    return bool(root.gateways and leaf.gateways and not set(leaf.gateways) <= set(root.gateways))


def _shared_texts(root: HttpMatch, leaf: HttpMatch) -> Iterator[tuple[TextMatch, TextMatch]]:
    pairs = ((root.uri, leaf.uri), (root.scheme, leaf.scheme), (root.method, leaf.method), (root.authority, leaf.authority))
    yield from ((first, second) for first, second in pairs if first is not None and second is not None)
    for ours, theirs in ((root.headers, leaf.headers), (root.without_headers, leaf.without_headers), (root.query, leaf.query)):
        yield from ((ours[key], theirs[key]) for key in ours.keys() & theirs.keys())


def texts_contradict(root: TextMatch, leaf: TextMatch) -> bool:
    """Whether the leaf matches texts that the root does not, as far as one can tell: a regular expression fits with nothing that says
    anything; what says nothing fits with nothing."""
    match root, leaf:
        case (Exact(value=outer), Exact(value=inner)):
            return outer != inner
        case (Prefix(value=outer), Prefix(value=inner) | Exact(value=inner)):
            return not inner.startswith(outer)
        case (Regex(), _) | (_, Regex()):
            return True
    return True
