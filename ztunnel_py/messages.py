"""What brain and movers say to each other. Reading this file teaches the protocol; `channel` carries it.

A mover is a small client of the brain: it connects, says `Hello`, is told the state, the certificates and the pods, and from then on
follows changes. When the brain dies the mover keeps all it has and goes on serving; it connects again to the next brain, which learns
from `Hello` and `Holding` what the mover serves, and takes the pods' listening sockets back from it. Every message that carries file
descriptors says which; a descriptor sent is duplicated by the kernel, both sides own theirs.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from mesh.runtime.inspection import LivingConnection


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages: frozen, tagged with the class name."""


class PodInfo(msgspec.Struct, frozen=True):
    """A captured pod as both sides name it."""

    uid: str
    name: str
    namespace: str
    service_account: str


# Mover to brain.


class Hello(Message, frozen=True):
    """First message of a mover. ``pods`` lists what it serves already (after a restart of the brain): so many `Holding` follow."""

    mover: str
    pid: int
    pods: int


class Holding(Message, frozen=True):
    """The mover serves this pod. Descriptors: network namespace, the listeners for 15001, 15006, 15008, then the sockets for 15053."""

    pod: PodInfo


class PodServing(Message, frozen=True):
    """Answer to `ServePod`: the mover accepts on the pod's listeners."""

    uid: str


class PodConnections(Message, frozen=True):
    """Sent for a releasing pod whenever the number of its living connections and look-ups changes, at once after `ReleasePod`."""

    uid: str
    living: int


class CertificateWanted(Message, frozen=True):
    """A connection waits for this identity's certificate."""

    identity: str


class Pong(Message, frozen=True):
    """Answer to `Ping`: the mover reads what it is told, and its loop turns."""

    number: int


class Scraped(Message, frozen=True):
    """Answer to `Scrape`: the mover's metrics; if it was asked, its living connections, and how many more there are than it tells."""

    request: int
    metrics: bytes
    connections: list[LivingConnection] = []
    omitted: int = 0


class Ending(Message, frozen=True):
    """A mover that runs apart was told to end (SIGTERM). It goes on until the brain has it drain, or is gone."""


class Drained(Message, frozen=True):
    """Answer to `Drain`: no connection is left, or the deadline ended them; the mover exits after it."""


# Brain to mover.


class Resources(Message, frozen=True):
    """A DeltaDiscoveryResponse, as it came over xDS or as the brain made it for a mover that joins.

    ``whole``: it names all there is of its type; what the mover holds beyond it goes, in one step.
    """

    whole: bool
    payload: bytes


class Certificate(Message, frozen=True):
    """A certificate to use from now on. All fields as in `mesh.tls.bundle.CertificateBundle`."""

    identity: str
    key_pem: bytes
    chain_pem: list[bytes]
    roots_pem: bytes


class CertificateUnavailable(Message, frozen=True):
    """No certificate for this identity now: connections that wait for it end with ``because``."""

    identity: str
    because: str


class ServePod(Message, frozen=True):
    """Accept on this pod's listeners. Descriptors: network namespace, the listeners for 15001, 15006, 15008, then the sockets for 15053:
    up to four, UDP and TCP on either loopback address, none where the agent answers no look-ups."""

    pod: PodInfo


class ReleasePod(Message, frozen=True):
    """The pod leaves the mesh: go on serving, also new connections from peers that do not know yet, and report `PodConnections`."""

    uid: str


class KeepPod(Message, frozen=True):
    """Undo `ReleasePod`: the pod is enrolled again."""

    uid: str


class DropPod(Message, frozen=True):
    """Stop serving: close the listeners and whatever is left."""

    uid: str


class StopAccepting(Message, frozen=True):
    """Another agent accepts on the same listeners: keep them, but take no new connection, and tell peers to open their next tunnel
    elsewhere. What lives goes on. `ServePod` undoes it."""


class LookAgain(Message, frozen=True):
    """Another mover has died, perhaps after the kernel had woken it for a connection and before it took it: see whether one waits."""


class Ping(Message, frozen=True):
    """Answer `Pong` with this number. A mover that does not is stuck, and is replaced."""

    number: int


class Scrape(Message, frozen=True):
    """Report metrics, and at most so many connections, with this request's number."""

    request: int
    connections: int = 0


class Drain(Message, frozen=True):
    """Close all listeners, tell peers to go away, let living connections end for so many seconds, then answer `Drained`."""

    seconds: float


class SetLogLevels(Message, frozen=True):
    """Log at these levels from now on (`mesh.telemetry.log.LogLevels`)."""

    levels: str


# Between the agents of one node: a younger one, the successor, asks an older one. The connection stays for as long as both live.


class Take(Message, frozen=True):
    """Successor's first message. ``born``: when this agent's pod first started here, in nanoseconds. ``in_charge``: nobody else is, and
    it asks for what others hold; else it asks to be let."""

    born: int
    in_charge: bool


class Refused(Message, frozen=True):
    """Answer to `Take`: go on waiting."""

    because: str


class Yielded(Message, frozen=True):
    """Answer to `Take`, after a `Holding` for each pod and a `Certificate` for each identity: this agent is not in charge any more. It
    changes nothing about pods, and accepts until it hears `Serving`."""


class Serving(Message, frozen=True):
    """The successor's movers accept on all listeners it was given. It may say `ReleasePod`, `KeepPod` and `DropPod` afterwards, and is
    answered with `PodConnections`, as by a mover."""


FromMover: TypeAlias = Hello | Holding | PodServing | PodConnections | CertificateWanted | Pong | Scraped | Ending | Drained
ToMover: TypeAlias = (
    Resources
    | Certificate
    | CertificateUnavailable
    | ServePod
    | ReleasePod
    | KeepPod
    | DropPod
    | StopAccepting
    | LookAgain
    | Ping
    | Scrape
    | Drain
    | SetLogLevels
)
FromSuccessor: TypeAlias = Take | Serving | ReleasePod | KeepPod | DropPod
ToSuccessor: TypeAlias = Refused | Holding | Certificate | Yielded | PodConnections
