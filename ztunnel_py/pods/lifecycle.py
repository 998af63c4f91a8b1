"""From the pods that should be in the mesh, and what has been done about each, to what is to be done next. Pure.

Goal-directed: a record holds what is known to be true of a pod, `_next_step` compares it with what is wanted and names the one step that
comes next. Events only change what is known. So every change of mind, at any moment, in any order, leads by safe steps to the goal:

    enrolled      open listeners -> admit probes -> capture -> verify -> announce
    un-enrolled   begin release -> refuse probes -> withdraw -> drain -> finish release -> close listeners
    deleted       refuse probes -> finish release -> close listeners -> withdraw

Listeners come before rules and rules before the announcement; the kubelet is let in before rules could refuse it; while a pod drains
its listeners stay, so that peers who do not know yet get in, and an enrolment meanwhile turns back without closing anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, TypeAlias, assert_never

from mesh.model.address import IpAddress
from mesh.model.enrolment import Enrolment
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.vocabulary import (
    Action,
    AdmitProbes,
    Adopted,
    Annotate,
    Annotated,
    AnnotationLost,
    Answer,
    BeginRelease,
    Capture,
    Captured,
    CloseListeners,
    Connections,
    Drifted,
    Event,
    Failed,
    FinishRelease,
    LingerOver,
    ListenersClosed,
    ListenersOpened,
    NetnsReplaced,
    OpenListeners,
    PodsChanged,
    ProbesAdmitted,
    ProbesRefused,
    Redirection,
    RefuseProbes,
    ReleaseBegun,
    ReleaseFinished,
    Report,
    RetryAfter,
    RetryDue,
    StartDraining,
    StopDraining,
    Verified,
    Verify,
    VerifyDue,
)

LINGER_SECONDS: Final = 5.0
"""How long a released pod serves the HBONE port at least once the control plane has withdrawn it: other agents may hear of it later than
ours, and their connections must find the port open until then."""
FIRST_RETRY_SECONDS: Final = 0.1
LONGEST_RETRY_SECONDS: Final = 15.0
"""As ztunnel's for its own connections: long enough to cost nothing, short enough that nobody restarts the agent by hand."""


class Wish(Enum):
    CAPTURED = "captured"
    RELEASED = "released"
    GONE = "gone"
    """The pod, or the namespace it had, exists no more. There is no way back: a pod that is there again starts anew."""


class Rules(Enum):
    """What is known of the rules in the pod's namespace."""

    ABSENT = "absent"
    UNKNOWN = "unknown"
    IN_PLACE = "in place"
    RELEASING = "releasing"


@dataclass(frozen=True, slots=True)
class PodRecord:
    """What is known of one pod. ``annotation`` None: unknown. ``probes``: the addresses at which the kubelet is let in, None: unknown.
    ``doing``: the action under way. ``because``: the last failure."""

    pod: PodFacts
    wish: Wish
    listeners: bool = False
    probes: frozenset[IpAddress] | None = frozenset()
    rules: Rules = Rules.ABSENT
    verified: bool = False
    annotation: Redirection | None = Redirection.ABSENT
    round: int = 0
    draining: bool = False
    lingered: bool = False
    living: int | None = None
    doing: Action | None = None
    failures: int = 0
    resting: bool = False
    because: str = ""


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """All pods of the node. ``pods`` is None until the source was read once; ``adopted`` waits for that."""

    pods: Mapping[str, PodFacts] | None = None
    records: Mapping[str, PodRecord] = field(default_factory=dict)
    adopted: Mapping[str, Adopted] = field(default_factory=dict)


class Phase(Enum):
    """A pod's state for people."""

    WAITING = "waiting"
    CAPTURING = "capturing"
    CAPTURED = "captured"
    PENDING = "pending"
    RELEASING = "releasing"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class PodStatus:
    phase: Phase
    because: str


Step: TypeAlias = tuple[Lifecycle, tuple[Action, ...]]


def advance(state: Lifecycle, event: Event) -> Step:
    """Take an event in; the new state and what to do now. Events about pods that are not known (any more) change nothing."""
    match event:
        case PodsChanged():
            return _settle(_take_pods(state, event.pods))
        case Adopted():
            return _settle(_adopt(state, event))
    record = state.records.get(event.uid)
    if record is None:
        return state, ()
    changed = _learn(record, event)
    return _settle_one(state, changed) if changed is not record else (state, ())


def status_of(record: PodRecord) -> PodStatus:
    """Where a pod stands, and why."""
    if record.wish is Wish.CAPTURED:
        if record.because:
            return PodStatus(Phase.PENDING, record.because)
        if record.pod.waiting_for and not record.listeners:
            return PodStatus(Phase.WAITING, record.pod.waiting_for)
        if record.rules is Rules.IN_PLACE and record.annotation is Redirection.ENABLED:  # also while it is verified again
            return PodStatus(Phase.CAPTURED, record.pod.enrolment.because)
        return PodStatus(Phase.CAPTURING, record.pod.enrolment.because)
    if record.because:
        return PodStatus(Phase.RELEASING, record.because)
    if record.draining:
        return PodStatus(Phase.DRAINING, "unknown number of connections" if record.living is None else f"{record.living} connections")
    return PodStatus(Phase.RELEASING, "the pod is gone" if record.wish is Wish.GONE else record.pod.enrolment.because)


def is_safe(record: PodRecord) -> bool:
    """Whether the pod's containers may start: whatever they say and hear now goes through the agent. That it was announced to peers, which
    takes the API server, is not waited for."""
    return record.wish is Wish.CAPTURED and record.listeners and record.rules is Rules.IN_PLACE and record.verified


# What is wanted


def _take_pods(state: Lifecycle, pods: Mapping[str, PodFacts]) -> Lifecycle:
    records = {uid: _wish_anew(record, pods.get(uid)) for uid, record in state.records.items()}
    for uid, adopted in state.adopted.items():
        records[uid] = _wish_anew(_adopted_record(adopted), pods.get(uid))
    for uid, pod in pods.items():
        if uid not in records:
            created = _new_record(pod)
            if created is not None:
                records[uid] = created
    return Lifecycle(pods, records, {})


def _new_record(pod: PodFacts) -> PodRecord | None:
    """A record for a pod that has none; None where there is nothing to do."""
    if pod.enrolment.enrolled:
        return _record_left(pod, Wish.CAPTURED)
    if pod.redirection:
        return _record_left(pod, Wish.RELEASED)
    return None


def _record_left(pod: PodFacts, wish: Wish) -> PodRecord:
    """An annotated pod may have rules of an agent that ended. Writing or removing them again is harmless, believing in them is not."""
    if pod.redirection:
        return PodRecord(pod, wish, probes=None, rules=Rules.UNKNOWN, annotation=None)
    return PodRecord(pod, wish)


def _adopt(state: Lifecycle, adopted: Adopted) -> Lifecycle:
    if state.pods is None:
        return replace(state, adopted={**state.adopted, adopted.uid: adopted})
    record = state.records.get(adopted.uid)
    if record is not None:
        rules = Rules.UNKNOWN if record.rules is Rules.ABSENT else record.rules
        return _with(state, replace(record, listeners=True, probes=None, rules=rules, resting=False))
    return _with(state, _wish_anew(_adopted_record(adopted), state.pods.get(adopted.uid)))


def _adopted_record(adopted: Adopted) -> PodRecord:
    unread = PodFacts(adopted.uid, adopted.name, adopted.namespace, adopted.service_account, Enrolment(False, "not read yet"))
    return PodRecord(unread, Wish.RELEASED, listeners=True, probes=None, rules=Rules.UNKNOWN, annotation=None)


def _wish_anew(record: PodRecord, pod: PodFacts | None) -> PodRecord:
    """The record with what is wanted of it now. A changed wish does not wait for the pause after a failure."""
    if record.wish is Wish.GONE:
        return record
    if pod is None:
        return _gone(record)
    wish = Wish.CAPTURED if pod.enrolment.enrolled else Wish.RELEASED
    old = record.pod
    if old.netns_path not in ("", pod.netns_path):
        if record.listeners or record.doing is not None:
            return _gone(record)
        if record.rules is not Rules.ABSENT:
            record = replace(record, rules=Rules.UNKNOWN, verified=False)
    if old.capture_options != pod.capture_options and record.rules is Rules.IN_PLACE:
        record = replace(record, rules=Rules.UNKNOWN, verified=False)
    if wish is not record.wish:
        record = replace(record, wish=wish, resting=False, failures=0, because="")
    return replace(record, pod=pod)


def _gone(record: PodRecord) -> PodRecord:
    return replace(record, wish=Wish.GONE, resting=False, failures=0, because="")


# What is known


def _learn(
    record: PodRecord, event: Answer | Connections | LingerOver | RetryDue | VerifyDue | AnnotationLost | NetnsReplaced
) -> PodRecord:
    match event:
        case Connections():
            return replace(record, living=event.living) if record.draining else record
        case LingerOver():
            return replace(record, lingered=True) if record.draining and event.round == record.round else record
        case RetryDue():
            return replace(record, resting=False)
        case VerifyDue():
            return replace(record, verified=False)
        case AnnotationLost():
            return replace(record, annotation=None) if record.annotation is Redirection.ENABLED else record
        case NetnsReplaced():
            return _gone(record)
        case Failed():
            return _learn_failure(record, event.because)
        case _:
            return _learn_success(record, event)


def _learn_success(record: PodRecord, answer: Report) -> PodRecord:
    """Answers that fit nothing under way are late and say nothing about now."""
    done = replace(record, doing=None)
    match record.doing, answer:
        case OpenListeners(), ListenersOpened():
            return replace(done, listeners=True)
        case AdmitProbes(), ProbesAdmitted():
            return replace(done, probes=frozenset(record.doing.pod.ips))
        case RefuseProbes(), ProbesRefused():
            return replace(done, probes=frozenset())
        case Capture(), Captured():
            # What was written is what was asked for; the facts may have changed since.
            current = record.doing.pod.capture_options == record.pod.capture_options
            return replace(done, rules=Rules.IN_PLACE if current else Rules.UNKNOWN, verified=False)
        case Verify(), Verified():
            return replace(done, verified=True)
        case Verify(), Drifted():
            # The first time rules are found missing they are simply written again; when that does not help it is a failure.
            because = f"rules are not in place: {'; '.join(answer.differences)}"
            return replace(
                done,
                probes=None,
                rules=Rules.UNKNOWN,
                verified=False,
                failures=record.failures + 1,
                resting=record.failures > 0,
                because=because,
            )
        case Annotate(redirection=redirection), Annotated():
            return replace(done, annotation=redirection)
        case BeginRelease(), ReleaseBegun():
            return replace(done, rules=Rules.RELEASING)
        case FinishRelease(), ReleaseFinished():
            return replace(done, rules=Rules.ABSENT)
        case CloseListeners(), ListenersClosed():
            return replace(done, listeners=False, draining=False)
    return record


def _learn_failure(record: PodRecord, because: str) -> PodRecord:
    if record.doing is None:
        return record
    failed = replace(record, doing=None, failures=record.failures + 1, resting=True, because=because)
    match record.doing:
        case AdmitProbes() | RefuseProbes():
            return replace(failed, probes=None)
        case Capture() | BeginRelease() | FinishRelease():
            return replace(failed, rules=Rules.UNKNOWN, verified=False)
    return failed


# What to do


def _settle(state: Lifecycle) -> Step:
    actions: list[Action] = []
    for record in list(state.records.values()):
        state, more = _settle_one(state, record)
        actions += more
    return state, tuple(actions)


def _settle_one(state: Lifecycle, record: PodRecord) -> Step:
    """Take the steps that can be taken now, and put the record in its place in the state."""
    before = state.records.get(record.pod.uid)
    actions: list[Action] = []
    if record.resting and record.doing is None and not (before is not None and before.resting):
        actions.append(RetryAfter(record.pod.uid, _pause(record.failures)))
    while record.doing is None and not record.resting:
        step = _next_step(record)
        if step is None:
            break
        actions.append(step)
        record = _take_step(record, step)
    if _is_finished(record):
        return _replace_finished(state, record, tuple(actions))
    if _has_arrived(record):
        record = replace(record, failures=0, because="")
    return _with(state, record), tuple(actions)


def _take_step(record: PodRecord, step: Action) -> PodRecord:
    match step:
        case StartDraining():
            return replace(record, draining=True, round=step.round, lingered=False, living=None)
        case StopDraining():
            return replace(record, draining=False)
        case Annotate():
            return replace(record, doing=step, annotation=None)
    return replace(record, doing=step)


def _next_step(record: PodRecord) -> Action | None:
    match record.wish:
        case Wish.CAPTURED:
            return next(_steps_to_capture(record), None)
        case Wish.RELEASED:
            return next(_steps_to_release(record), None)
        case Wish.GONE:
            return next(_steps_to_drop(record), None)
        case other:
            assert_never(other)


def _steps_to_capture(record: PodRecord) -> Iterator[Action]:
    pod = record.pod
    if record.draining:
        yield StopDraining(pod.uid)
    if pod.waiting_for and not record.listeners:
        return
    if record.failures > 1 and record.annotation is not Redirection.PENDING and not (record.verified and record.rules is Rules.IN_PLACE):
        yield Annotate(pod.uid, pod, Redirection.PENDING)
    if not record.listeners:
        yield OpenListeners(pod.uid, pod)
    if record.probes != frozenset(pod.ips):
        yield AdmitProbes(pod.uid, pod)
    if record.rules is not Rules.IN_PLACE:
        yield Capture(pod.uid, pod)
    if not record.verified:
        yield Verify(pod.uid, pod)
    if record.annotation is not Redirection.ENABLED:
        yield Annotate(pod.uid, pod, Redirection.ENABLED)


def _steps_to_release(record: PodRecord) -> Iterator[Action]:
    pod = record.pod
    if record.rules in (Rules.IN_PLACE, Rules.UNKNOWN):
        yield BeginRelease(pod.uid, pod)
    if record.probes != frozenset():
        yield RefuseProbes(pod.uid)
    if record.annotation is not Redirection.ABSENT:
        yield Annotate(pod.uid, pod, Redirection.ABSENT)
    if record.rules is Rules.RELEASING:
        if record.listeners and not record.draining:
            yield StartDraining(pod.uid, record.round + 1, LINGER_SECONDS)
        if record.listeners and not (record.lingered and record.living == 0):
            return
        yield FinishRelease(pod.uid, pod)
    if record.listeners:
        yield CloseListeners(pod.uid)


def _steps_to_drop(record: PodRecord) -> Iterator[Action]:
    # A pod that is gone from the source alone, by a mistake in it, still runs: nothing may redirect it to listeners that are closed.
    # Tried once; descriptors must not stay open because rules cannot be removed or an annotation cannot be written.
    if record.probes != frozenset() and not record.failures:
        yield RefuseProbes(record.pod.uid)
    if record.listeners and record.rules is not Rules.ABSENT and not record.failures:
        yield FinishRelease(record.pod.uid, record.pod)
    if record.listeners:
        yield CloseListeners(record.pod.uid)
    if record.annotation is not Redirection.ABSENT:
        yield Annotate(record.pod.uid, record.pod, Redirection.ABSENT)
    if record.probes != frozenset():  # holds nothing open, and the address may be another's soon: tried until it is done
        yield RefuseProbes(record.pod.uid)


def _is_finished(record: PodRecord) -> bool:
    """Nothing is held, announced or under way any more, and nothing is wanted."""
    if record.wish is Wish.CAPTURED or record.doing is not None or record.listeners:
        return False
    if record.annotation is not Redirection.ABSENT or record.probes != frozenset():
        return False
    return record.wish is Wish.GONE or record.rules is Rules.ABSENT


def _has_arrived(record: PodRecord) -> bool:
    if record.wish is not Wish.CAPTURED or record.doing is not None:
        return False
    return record.verified and record.probes == frozenset(record.pod.ips) and record.annotation is Redirection.ENABLED


def _replace_finished(state: Lifecycle, record: PodRecord, actions: tuple[Action, ...]) -> Step:
    """Forget the pod. If it was gone and is there after all (its namespace was replaced, its file mended), begin anew after a pause."""
    uid = record.pod.uid
    records = {other: kept for other, kept in state.records.items() if other != uid}
    state = replace(state, records=records)
    pod = (state.pods or {}).get(uid)
    anew = _new_record(pod) if pod is not None and record.wish is Wish.GONE else None
    if anew is None:
        return state, actions
    return _with(state, replace(anew, resting=True)), (*actions, RetryAfter(uid, FIRST_RETRY_SECONDS))


def _pause(failures: int) -> float:
    return min(FIRST_RETRY_SECONDS * 2.0 ** min(max(failures - 1, 0), 20), LONGEST_RETRY_SECONDS)


def _with(state: Lifecycle, record: PodRecord) -> Lifecycle:
    return replace(state, records={**state.records, record.pod.uid: record})
