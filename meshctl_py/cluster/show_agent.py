"""What an agent tells, as tables for people. Columns are istioctl's where it has such a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from rich.text import Text

from mesh.runtime.inspection import (
    AllRulesPage,
    CertificatesPage,
    ConnectionsPage,
    LivingConnection,
    NamedConnection,
    ObjectsPage,
    Page,
    PodsPage,
    RulesPage,
)
from meshctl_py.table import OUT, Table, as_duration, as_size, as_time, colour_state

CONNECTION_HEADINGS: Final = ("POD", "DIRECTION", "PEER", "SERVICE", "PEER IDENTITY", "SENT", "RECEIVED", "AGE", "BECAUSE")


def show_page(page: Page, what: str, node: str, pod: str = "") -> None:
    """A whole page of ``meshctl node``. ``pod``: of this one alone."""
    omitted, empty = getattr(page, "omitted", 0), not getattr(page, "items", ())
    if empty:
        OUT.print(f"no {what}{f' of pod {pod}' if pod else ''} on node {node}", markup=False)
    elif isinstance(page, PodsPage):
        _show_pods(page)
    elif isinstance(page, ConnectionsPage):
        connection_table(page.items).print()
    elif isinstance(page, CertificatesPage):
        _show_certificates(page)
    elif isinstance(page, AllRulesPage):
        for number, rules in enumerate(page.items):
            _show_rules(rules, first=number == 0)
    elif isinstance(page, ObjectsPage):
        _OBJECTS[what](page.items)
    if omitted:
        OUT.print(f"... and {omitted} more: --limit shows more of them, --pod and -n choose", markup=False, style="yellow")


def _show_pods(page: PodsPage) -> None:
    table = Table("NAMESPACE", "POD", "PHASE", "IDENTITY", "IN", "OUT", "ADDRESSES", "BECAUSE")
    for pod in page.items:
        phase = colour_state(pod.phase, pod.phase == "captured")
        table.add_row(
            *(pod.namespace, pod.name, phase, pod.identity, str(pod.inbound), str(pod.outbound), ",".join(pod.addresses), pod.because)
        )
    table.print()


def connection_table(items: Sequence[NamedConnection], event: str = "") -> Table:
    """``event``: what has become of them, as a column in front."""
    table = Table(*(("EVENT",) if event else ()), *CONNECTION_HEADINGS)
    for item in items:
        table.add_row(*((event,) if event else ()), *_connection_row(item))
    return table


def _connection_row(item: NamedConnection) -> tuple[str | Text, ...]:
    living = item.connection
    identity = living.source_identity if living.direction == "inbound" else living.destination_identity
    return (
        f"{item.namespace}/{item.name}",
        living.direction,
        _peer(living),
        living.service,
        identity if identity else colour_state("none", False),
        as_size(living.sent),
        as_size(living.received),
        as_duration(living.age),
        ("opening: " if living.opening else "") + living.because,
    )


def _peer(living: LivingConnection) -> str:
    inbound = living.direction == "inbound"
    name = living.source_workload if inbound else living.destination_workload
    address = living.source if inbound else living.destination
    return f"{name} ({address})" if name else address


def _show_certificates(page: CertificatesPage) -> None:
    now = time.time()
    table = Table("CERTIFICATE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE", "BECAUSE")
    for certificate in page.items:
        state = colour_state(certificate.state, certificate.state == "Available")
        if not certificate.chain:
            table.add_row(certificate.identity, "NA", state, colour_state("false", False), "NA", "NA", "NA", certificate.because)
        for part in certificate.chain:
            valid = part.not_before <= now < part.not_after
            because = certificate.because if part.type == "Leaf" else ""
            if part.type == "Leaf" and not because and certificate.renewal is not None:
                because = f"renewal at {as_time(certificate.renewal)}"
            row = (certificate.identity, part.type, state, colour_state(str(valid).lower(), valid), part.serial)
            table.add_row(*row, as_time(part.not_after), as_time(part.not_before), because)
    table.print()


def _show_rules(page: RulesPage, *, first: bool) -> None:
    if not first:
        OUT.print()
    title = Text(f"{page.namespace}/{page.name} ({page.phase}): ", style="bold")
    if page.error:
        OUT.print(title + colour_state(f"not read: {page.error}", False))
        return
    OUT.print(title + (Text("as they should be", style="green") if not page.differences else colour_state("not as they should be", False)))
    for difference in page.differences:
        OUT.print(colour_state(f"  {difference}", False))
    for chain in page.chains:
        OUT.print(f"  table {chain.table} chain {chain.chain}", markup=False)
        for rule in chain.rules:
            counted = f"    {rule.packets} packets {as_size(rule.bytes or 0)}" if rule.packets is not None else ""
            text = Text(f"    {rule.text}") if rule.expected else colour_state(f"    not ours: {rule.text}", False)
            OUT.print(text + Text(counted, style="dim"))
    if page.foreign_tables:
        OUT.print(f"  tables of others: {', '.join(page.foreign_tables)}", markup=False)


Item = Mapping[str, object]


def _show_policies(items: Sequence[Item]) -> None:
    table = Table("NAMESPACE", "POLICY NAME", "ACTION", "SCOPE", "RULES", "BECAUSE")
    for item in items:
        unreadable = item.get("unreadable")
        because = f"denies: unreadable: {unreadable}" if unreadable else "dry-run: decides nothing" if item.get("dryRun") else ""
        rules = item.get("rules")
        table.add_row(
            *(_text(item, "namespace"), _text(item, "name"), _text(item, "action"), _text(item, "scope")),
            str(len(rules) if isinstance(rules, list) else 0),
            colour_state(because, not unreadable),
        )
    table.print()


def _show_workloads(items: Sequence[Item]) -> None:
    table = Table("NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL")
    for item in items:
        addresses = item.get("workloadIps")
        address = ",".join(map(str, addresses)) if isinstance(addresses, list) and addresses else _text(item, "hostname")
        names = (_text(item, "namespace"), _text(item, "name"), address, _text(item, "node"))
        table.add_row(*names, _waypoint(item), _text(item, "protocol"))
    table.print()


def _show_services(items: Sequence[Item]) -> None:
    table = Table("NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS")
    for item in items:
        vips, endpoints = item.get("vips"), item.get("endpoints")
        addresses = ",".join(str(vip).rpartition("/")[2] for vip in vips) if isinstance(vips, list) else ""
        states = [endpoint.get("status") for endpoint in endpoints.values()] if isinstance(endpoints, dict) else []
        table.add_row(
            *(_text(item, "namespace"), _text(item, "name"), addresses, _waypoint(item)), f"{states.count('Healthy')}/{len(states)}"
        )
    table.print()


def _text(item: Item, key: str) -> str:
    return str(item.get(key, ""))


def _waypoint(item: Item) -> str:
    waypoint = item.get("waypoint")
    return str(waypoint.get("destination", "NA")) if isinstance(waypoint, dict) else "None"


_OBJECTS: Final[Mapping[str, Callable[[Sequence[Item]], None]]] = {
    "policies": _show_policies,
    "workloads": _show_workloads,
    "services": _show_services,
}
