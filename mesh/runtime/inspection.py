"""What agents and the control plane tell of themselves on their pages below ``/debug/``: written by them, read by ``meshctl``.

Fields are camelCase in JSON; what is added later must have a default, so that old and new understand each other. Times are Unix seconds.
"""

from __future__ import annotations

from typing import Final

import msgspec

ADMIN_SOCKET: Final = "admin.sock"
"""The agent's admin pages on its node, in its run directory."""
DEFAULT_LIMIT: Final = 1000
"""Items of one answer unless the request asks otherwise by ``limit``."""
MAX_LIMIT: Final = 100_000


class Page(msgspec.Struct, frozen=True, rename="camel"):
    """Base of what is told."""


class LivingConnection(Page, frozen=True):
    """One connection of a captured pod. ``sent`` and ``received`` are bytes as the pod sees them; ``age`` seconds.

    ``destination`` is the next hop (outbound) or the pod's own address (inbound), ``authority`` the target of a tunnel where there is one.
    Identities are set where mutual TLS proved them. ``policy`` let it in (empty: none applies), ``because`` says why.
    """

    pod: str
    direction: str
    protocol: str
    source: str
    destination: str
    service: str = ""
    authority: str = ""
    source_workload: str = ""
    destination_workload: str = ""
    source_identity: str = ""
    destination_identity: str = ""
    sent: int = 0
    received: int = 0
    age: float = 0.0
    opening: bool = False
    policy: str = ""
    rule: int | None = None
    because: str = ""


class NamedConnection(Page, frozen=True):
    """A connection and the pod it is of."""

    namespace: str
    name: str
    connection: LivingConnection


class PodPage(Page, frozen=True):
    """A pod that something is or was to be done about. ``phase`` as in the agent's log."""

    uid: str
    namespace: str
    name: str
    identity: str
    phase: str
    because: str
    addresses: list[str] = []
    netns: str = ""
    inbound: int = 0
    outbound: int = 0


class CertificatePart(Page, frozen=True):
    """``type`` is Leaf, Intermediate or Root; ``serial`` lower-case hex."""

    type: str
    subject: str
    issuer: str
    serial: str
    not_before: float
    not_after: float
    uris: list[str] = []


class CertificatePage(Page, frozen=True):
    """``state`` is Initializing, Available or Unavailable; ``because`` the last failure, also while an older certificate serves.

    ``renewal`` None: not planned, since none is held or one is being fetched.
    """

    identity: str
    state: str
    because: str = ""
    renewal: float | None = None
    chain: list[CertificatePart] = []


class RulePage(Page, frozen=True):
    text: str
    expected: bool
    packets: int | None = None
    bytes: int | None = None


class ChainPage(Page, frozen=True):
    table: str
    chain: str
    rules: list[RulePage] = []


class RulesPage(Page, frozen=True):
    """The rules in a pod's network namespace as the kernel told them just now. ``error``: they can't be read."""

    uid: str
    namespace: str
    name: str
    phase: str
    differences: list[str] = []
    chains: list[ChainPage] = []
    foreign_tables: list[str] = []
    error: str = ""


class PendingTask(Page, frozen=True):
    name: str
    because: str = ""


class StatusPage(Page, frozen=True):
    """The agent in short. ``troubled``: pods that should be captured or released and can't be, at most so many as `MAX_TROUBLED`."""

    node: str
    version: str
    pod: str
    pod_namespace: str
    ready: bool
    pending: list[PendingTask] = []
    movers: int = 0
    control_plane: str = ""
    """Its address."""
    connected: bool = False
    synced: bool = False
    configuration: str = ""
    """Where the agent stands with its configuration, in words."""
    workloads: int = 0
    services: int = 0
    policies: int = 0
    pods: dict[str, int] = {}
    """How many, by phase."""
    troubled: list[PodPage] = []
    certificates: int = 0
    unavailable: int = 0
    next_expiry: float | None = None
    certificate_problem: str = ""


MAX_TROUBLED: Final = 20


class PodsPage(Page, frozen=True):
    items: list[PodPage]
    omitted: int = 0


class ConnectionsPage(Page, frozen=True):
    items: list[NamedConnection]
    omitted: int = 0


class CertificatesPage(Page, frozen=True):
    items: list[CertificatePage]
    omitted: int = 0


class AllRulesPage(Page, frozen=True):
    items: list[RulesPage]
    omitted: int = 0


class ObjectsPage(Page, frozen=True):
    """Workloads, services or policies in the form of ``/config_dump``."""

    items: list[dict[str, object]]
    omitted: int = 0


class ConnectedAgent(Page, frozen=True):
    """An agent as the control plane sees it. ``stale``: what it was sent and has not taken yet, or has refused, by type, in words."""

    pod: str
    namespace: str
    address: str
    stale: dict[str, str] = {}


class ControlPlanePage(Page, frozen=True):
    """A replica of the control plane in short. ``problems``: how many mistakes are in the configuration; ``mistakes``: the first of them,
    with object and field; ``authority_expires``: its root."""

    version: str
    ready: bool
    pending: list[str] = []
    workloads: int = 0
    services: int = 0
    policies: int = 0
    problems: int = 0
    mistakes: list[str] = []
    authority_expires: float | None = None
    agents: list[ConnectedAgent] = []
    waypoints: list[ConnectedAgent] = []
