"""What the lifecycle asks for and what it is told. Reading this file teaches the conversation.

The executor (the brain) carries out each action and answers with exactly one event, unless noted; at most one action that wants an
answer is under way per pod. Any of them may be answered by `Failed`. Actions must be idempotent: they are repeated after a failure, and
after a restart of the brain that forgot how far it had come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from ztunnel_py.pods.facts import PodFacts


class Redirection(Enum):
    """Values of annotation ``ambient.istio.io/redirection``; ABSENT removes it."""

    ENABLED = "enabled"
    PENDING = "pending"
    ABSENT = ""


# Actions


@dataclass(frozen=True, slots=True)
class OpenListeners:
    """Open the pod's namespace and its listeners, hand them to all movers and wait until these accept: `ListenersOpened`. On
    `Failed` nothing may be left open."""

    uid: str
    pod: PodFacts


@dataclass(frozen=True, slots=True)
class AdmitProbes:
    """Let the node's kubelet reach the pod at its addresses, and at no others (`admit_probes`): `ProbesAdmitted`."""

    uid: str
    pod: PodFacts


@dataclass(frozen=True, slots=True)
class RefuseProbes:
    """Forget the pod's addresses on the node (`refuse_probes`): `ProbesRefused`."""

    uid: str


@dataclass(frozen=True, slots=True)
class Capture:
    """Write the rules (`apply_capture`): `Captured`."""

    uid: str
    pod: PodFacts


@dataclass(frozen=True, slots=True)
class Verify:
    """Read the rules back, the pod's and what the node has of it (`verify_capture`, `find_probe_differences`): `Verified`, or `Drifted`
    with the differences."""

    uid: str
    pod: PodFacts


@dataclass(frozen=True, slots=True)
class Annotate:
    """Write the annotation: `Annotated`. A pod that is gone has none: that is success, also where another pod has its name by now,
    whose annotation must stay. From ENABLED on the control plane tells peers to use the tunnel."""

    uid: str
    pod: PodFacts
    redirection: Redirection


@dataclass(frozen=True, slots=True)
class BeginRelease:
    """Let new connections go free (`begin_release`): `ReleaseBegun`. With listeners closed since a restart, open the namespace anew;
    a namespace that is gone, or was never known, counts as released."""

    uid: str
    pod: PodFacts


@dataclass(frozen=True, slots=True)
class StartDraining:
    """No answer. Have the movers go on serving but report how many connections live: `Connections`, the sum over movers, at once and
    on every change; and say `LingerOver` with this round so many seconds after the control plane has stopped telling peers to use the
    tunnel."""

    uid: str
    round: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StopDraining:
    """No answer. The movers need not report any more."""

    uid: str


@dataclass(frozen=True, slots=True)
class FinishRelease:
    """Remove all rules (`finish_release`): `ReleaseFinished`. A namespace that is gone, or was
    never known, counts as finished."""

    uid: str
    pod: PodFacts


@dataclass(frozen=True, slots=True)
class CloseListeners:
    """Have the movers drop the pod, close listeners and namespace: `ListenersClosed`. Cannot fail."""

    uid: str


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Say `RetryDue` after so many seconds; a timer of the same pod that is still running is replaced."""

    uid: str
    seconds: float


Action: TypeAlias = (
    OpenListeners
    | AdmitProbes
    | RefuseProbes
    | Capture
    | Verify
    | Annotate
    | BeginRelease
    | StartDraining
    | StopDraining
    | FinishRelease
    | CloseListeners
    | RetryAfter
)


# Events


@dataclass(frozen=True, slots=True)
class PodsChanged:
    """All pods of this node that exist now, enrolled or not, by uid. Until the first one nothing is undone."""

    pods: Mapping[str, PodFacts]


@dataclass(frozen=True, slots=True)
class Adopted:
    """Movers that outlived the last brain serve this pod, and its descriptors are back in the brain's hands."""

    uid: str
    name: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class ListenersOpened:
    uid: str


@dataclass(frozen=True, slots=True)
class ProbesAdmitted:
    uid: str


@dataclass(frozen=True, slots=True)
class ProbesRefused:
    uid: str


@dataclass(frozen=True, slots=True)
class Captured:
    uid: str


@dataclass(frozen=True, slots=True)
class Verified:
    uid: str


@dataclass(frozen=True, slots=True)
class Drifted:
    uid: str
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Annotated:
    uid: str


@dataclass(frozen=True, slots=True)
class ReleaseBegun:
    uid: str


@dataclass(frozen=True, slots=True)
class Connections:
    """How many connections of a draining pod live, over all movers."""

    uid: str
    living: int


@dataclass(frozen=True, slots=True)
class LingerOver:
    uid: str
    round: int


@dataclass(frozen=True, slots=True)
class ReleaseFinished:
    uid: str


@dataclass(frozen=True, slots=True)
class ListenersClosed:
    uid: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The action under way could not be done; it will be asked for again."""

    uid: str
    because: str


@dataclass(frozen=True, slots=True)
class RetryDue:
    uid: str


@dataclass(frozen=True, slots=True)
class VerifyDue:
    """Time to look whether the rules of a captured pod are still in place."""

    uid: str


@dataclass(frozen=True, slots=True)
class AnnotationLost:
    """The annotation of a captured pod is not there, though it was written: somebody removed it."""

    uid: str


@dataclass(frozen=True, slots=True)
class NetnsReplaced:
    """The pod's namespace is another one than the one that was opened, or gone: what was done there is worth nothing."""

    uid: str


Report: TypeAlias = (
    ListenersOpened
    | ProbesAdmitted
    | ProbesRefused
    | Captured
    | Verified
    | Drifted
    | Annotated
    | ReleaseBegun
    | ReleaseFinished
    | ListenersClosed
)
"""What came of an action that could be done."""
Answer: TypeAlias = Report | Failed
Event: TypeAlias = PodsChanged | Adopted | Answer | Connections | LingerOver | RetryDue | VerifyDue | AnnotationLost | NetnsReplaced
