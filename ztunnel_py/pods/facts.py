"""What the agent knows about a pod of its node before it does anything about it."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.model.address import IpAddress
from mesh.model.enrolment import Enrolment


@dataclass(frozen=True, slots=True)
class PodFacts:
    """A pod as the source describes it. ``waiting_for`` says why it cannot be captured yet (``""``: it can); ``redirection`` is
    the annotation that is on it now, perhaps from an earlier life of the agent: ``enabled``, ``pending`` or ``""``."""

    uid: str
    name: str
    namespace: str
    service_account: str
    enrolment: Enrolment
    ips: tuple[IpAddress, ...] = ()
    netns_path: str = ""
    bypass_inbound: bool = False
    waiting_for: str = ""
    redirection: str = ""
