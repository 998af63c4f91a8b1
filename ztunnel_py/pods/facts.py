"""What the agent knows about a pod of its node before it does anything about it."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.model.address import IpAddress
from mesh.model.enrolment import Enrolment


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod as the source describes it. ``waiting_for`` says why it cannot be captured yet (``""``: it can); ``redirection`` is
    the annotation that is on it now, perhaps from an earlier life of the agent: ``enabled``, ``pending`` or ``""``. ``dns``: whether it
    wants its look-ups captured; None leaves it to the agent."""

    uid: str
    name: str
    namespace: str
    service_account: str
    enrolment: Enrolment
    ips: tuple[IpAddress, ...] = ()
    netns_path: str = ""
    bypass_inbound: bool = False
    dns: bool | None = None
    waiting_for: str = ""
    redirection: str = ""
    unsupported: str = ""
    """Why a pod that is labelled for the mesh can never be in it; ``""`` for all others."""

    @property
    def capture_options(self) -> tuple[bool, bool | None]:
        """What its rules depend on and may change while it lives."""
        return self.bypass_inbound, self.dns
