"""Carry out a redirect plan in a pod's network namespace, prove it by reading back, and take it out again in two steps.

Every function enters the namespace in a thread of its own and blocks for some milliseconds: call it from a worker thread, not from
trio's or the reactor's. All are idempotent and get on with whatever an interrupted run left behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from mesh.linux.netns import ipv6_enabled, run_in_netns
from mesh.linux.nft import Table
from mesh.linux.nft_apply import InstalledTable, NftRefused, delete_tables, find_differences, list_tables, read_tables, replace_tables
from ztunnel_py.redirect.plan import OUR_TABLES, PodCapture, RedirectPlan
from ztunnel_py.redirect.routing import add_routing, find_routing_differences, remove_routing

_T = TypeVar("_T")


class CaptureFailed(Exception):
    """A pod's namespace refused what was asked; the text says what and why. Trying again later is right."""


def observe_pod(netns_fd: int, *, bypass_inbound: bool, dns: bool = False, ipv6: bool = True) -> PodCapture:
    """The facts to plan with, as the pod's namespace is now. ``ipv6`` False: the listeners are IPv4 only, so IPv6 is left alone even
    where the pod has it. Raises CaptureFailed."""
    return PodCapture(ipv6=ipv6 and attempt(netns_fd, "look for IPv6", ipv6_enabled), bypass_inbound=bypass_inbound, dns=dns)


def apply_capture(netns_fd: int, plan: RedirectPlan) -> bool:
    """Redirect the pod's new connections; False if all was in place already, then nothing is touched. Raises CaptureFailed.

    Listeners must be accepting before. The way back for replies comes first, the nft tables in one transaction after it: at no
    moment is a connection redirected that could not work.
    """
    return _change(netns_fd, plan.tables, plan.families)


def verify_capture(netns_fd: int, plan: RedirectPlan) -> list[str]:
    """What in the namespace differs from the plan, one sentence each; empty when the capture is complete. Raises CaptureFailed."""

    return attempt(netns_fd, "read the rules back", lambda: _find_all_differences(plan.tables, plan.families))


@dataclass(frozen=True, slots=True)
class CaptureReading:
    """What a namespace holds: ``differences`` from what it should, the tables of ours with their counters, the names of others' tables."""

    differences: tuple[str, ...]
    tables: tuple[InstalledTable, ...]
    foreign: tuple[str, ...]


def read_capture(netns_fd: int, plan: RedirectPlan, *, releasing: bool) -> CaptureReading:
    """The rules as they are, beside those that should be: of a captured pod, or of one that is being released. Raises CaptureFailed."""
    expected = plan.releasing if releasing else plan.tables

    def inside() -> CaptureReading:
        differences = tuple(_find_all_differences(expected, plan.families))
        # Told by the rules of a capture also while it is released: what is left over of one has a name.
        return CaptureReading(differences, tuple(read_tables(plan.tables)), tuple(sorted(set(list_tables()) - set(OUR_TABLES))))

    return attempt(netns_fd, "read the rules", inside)


def begin_release(netns_fd: int, plan: RedirectPlan) -> bool:
    """Let new connections go free while redirected ones go on; False if it was so already. Raises CaptureFailed.

    The nat chains stay, empty: without any nat chain the kernel stops translating the packets of living connections. The way back
    for replies stays too, so that peers who do not know yet are served through the HBONE port.
    """
    return _change(netns_fd, plan.releasing, plan.families)


def finish_release(netns_fd: int) -> None:
    """Remove everything, as if the pod had never been captured. Connections that are still redirected break. Raises CaptureFailed."""

    def inside() -> None:
        delete_tables(OUR_TABLES)
        remove_routing()

    attempt(netns_fd, "remove the rules", inside)


def _change(netns_fd: int, tables: tuple[Table, ...], families: tuple[int, ...]) -> bool:
    def inside() -> bool:
        routed = add_routing(families)
        absent = _absent(tables)
        if not find_differences(tables, absent=absent):
            return routed
        replace_tables(tables, absent=absent)
        return True

    return attempt(netns_fd, "write the rules", inside)


def _find_all_differences(tables: tuple[Table, ...], families: tuple[int, ...]) -> list[str]:
    return [*find_routing_differences(families), *find_differences(tables, absent=_absent(tables))]


def _absent(tables: tuple[Table, ...]) -> tuple[str, ...]:
    present = {table.name for table in tables}
    return tuple(name for name in OUR_TABLES if name not in present)


def attempt(netns_fd: int, what: str, inside: Callable[[], _T]) -> _T:
    """The result of a function inside a network namespace. Raises CaptureFailed saying that it cannot do ``what``."""
    try:
        return run_in_netns(netns_fd, inside)
    except NftRefused as exc:
        raise CaptureFailed(f"cannot {what}: {exc}") from exc
    except OSError as exc:
        raise CaptureFailed(f"cannot {what}: {exc.strerror or os.strerror(exc.errno or 0)}") from exc
