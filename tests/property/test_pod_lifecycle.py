"""Any order of events: the lifecycle never redirects to nobody, never announces what is not proved, never cuts, never leaks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.model.address import IpAddress, parse_ip
from mesh.model.enrolment import Enrolment
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.lifecycle import Lifecycle, Phase, Wish, advance, status_of
from ztunnel_py.pods.vocabulary import (
    Action,
    AdmitProbes,
    Adopted,
    Annotate,
    Annotated,
    AnnotationLost,
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
    RetryAfter,
    RetryDue,
    StartDraining,
    StopDraining,
    Verified,
    Verify,
    VerifyDue,
)

UIDS = st.sampled_from(["a", "b"])


@dataclass
class RealPod:
    """What is really so, in the kernel, in the movers, in the overlay directory. A pod may get another namespace at any time; what is
    held open, and what is under way, stays in the one where it began."""

    namespace: int = 0
    held: int | None = None
    """The namespace in which the listeners are."""
    rules_in: dict[int, str] = field(default_factory=dict)
    probes: frozenset[IpAddress] = frozenset()
    """Where the kubelet is let in."""
    proved: bool = False
    annotation: str = ""
    draining: bool = False
    lingered: bool = False
    connections: int = 0
    pending: list[Action] = field(default_factory=list)
    acts_on: int = 0
    """The namespace of the action under way."""

    @property
    def listeners(self) -> bool:
        return self.held is not None

    @property
    def rules(self) -> str:
        """In the namespace where the listeners are, else in the one that the pod has."""
        return self.rules_in.get(self.namespace if self.held is None else self.held, "absent")

    def set_rules(self, namespace: int, rules: str) -> None:
        self.rules_in[namespace] = rules
        self.proved = False


class Executor(RuleBasedStateMachine):
    """Carries actions out on a model of the world, answers when and how hypothesis likes, and checks every step."""

    def __init__(self) -> None:
        super().__init__()
        self.state = Lifecycle()
        self.world: dict[str, RealPod] = {}
        self.pods: dict[str, PodFacts] = {}
        self.read = False
        self.timers: list[Event] = []

    def real(self, uid: str) -> RealPod:
        return self.world.setdefault(uid, RealPod())

    def tell(self, event: Event) -> None:
        self.state, actions = advance(self.state, event)
        for action in actions:
            self.take(action)

    def take(self, action: Action) -> None:
        real = self.real(action.uid)
        match action:
            case RetryAfter():
                assert 0 < action.seconds <= 15
                self.timers = [t for t in self.timers if t != RetryDue(action.uid)] + [RetryDue(action.uid)]
            case StartDraining():
                assert real.listeners
                assert real.rules == "releasing"
                real.draining, real.lingered = True, False
                self.timers.append(LingerOver(action.uid, action.round))
                self.tell_later_connections(action.uid)
            case StopDraining():
                real.draining = False
            case _:
                assert not real.pending, "one action at a time"
                real.pending.append(action)
                real.acts_on = real.namespace if real.held is None else real.held
                self.check_may_begin(action, real)

    def tell_later_connections(self, uid: str) -> None:
        self.timers.append(Connections(uid, self.real(uid).connections))

    def check_may_begin(self, action: Action, real: RealPod) -> None:
        match action:
            case OpenListeners():
                assert not self.pods[action.uid].waiting_for
            case Capture():
                assert real.listeners, "redirected to nobody"
                assert real.probes == frozenset(action.pod.ips), "probes would be refused"
            case Annotate(redirection=Redirection.ENABLED):
                assert real.listeners
                assert real.proved, "announced without proof"
            case FinishRelease() if self.state.records[action.uid].wish is Wish.RELEASED:
                assert real.rules != "in place", "connections still being redirected would be cut"
                assert not real.listeners or (real.connections == 0 and real.lingered), "living connections cut"
                assert real.annotation == ""
            case CloseListeners() if action.uid in self.pods and self.state.records[action.uid].wish is Wish.RELEASED:
                assert real.rules == "absent", "redirected to nobody"

    def carry_out(self, action: Action, real: RealPod) -> Event:
        match action:
            case OpenListeners():
                real.held = real.acts_on
                return ListenersOpened(action.uid)
            case AdmitProbes():
                real.probes = frozenset(action.pod.ips)
                return ProbesAdmitted(action.uid)
            case RefuseProbes():
                real.probes = frozenset()
                return ProbesRefused(action.uid)
            case Capture():
                real.set_rules(real.acts_on, "in place")
                return Captured(action.uid)
            case Verify():
                real.proved = real.rules == "in place"
                return Verified(action.uid) if real.proved else Drifted(action.uid, ("something",))
            case Annotate():
                real.annotation = action.redirection.value
                return Annotated(action.uid)
            case BeginRelease():
                real.set_rules(real.acts_on, "releasing")
                return ReleaseBegun(action.uid)
            case FinishRelease():
                real.set_rules(real.acts_on, "absent")
                return ReleaseFinished(action.uid)
            case CloseListeners():
                real.held, real.draining, real.connections = None, False, 0
                return ListenersClosed(action.uid)
        raise AssertionError(action)

    # What may happen, at any time

    @precondition(lambda self: self.pods)
    @rule(uid=UIDS)
    def the_label_changes(self, uid: str) -> None:
        if uid in self.pods:
            pod = self.pods[uid]
            self.pods[uid] = replace(pod, enrolment=Enrolment(not pod.enrolment.enrolled, "because"), waiting_for="")
            self.publish()

    @rule(
        uid=UIDS,
        enrolled=st.booleans(),
        ready=st.booleans(),
        ips=st.sets(st.sampled_from([parse_ip("10.0.0.1"), parse_ip("fd00::1")])),
        netns=st.sampled_from(["/n/1", "/n/1", "/n/2"]),
        stale=st.sampled_from(["", "", "enabled"]),
    )
    def pod_appears_or_changes(self, uid: str, enrolled: bool, ready: bool, ips: set[IpAddress], netns: str, stale: str) -> None:
        known = self.pods.get(uid)
        if known is not None and known.netns_path != netns:
            self.replace_netns(uid)
        if known is None:
            real = self.real(uid)
            if not real.pending and not real.listeners and uid not in self.state.records:
                self.world[uid] = RealPod(
                    annotation=stale, rules_in={0: "unknown"} if stale else {}, probes=frozenset(ips) if stale else frozenset()
                )
        waiting = "" if ready or (known is not None and not known.waiting_for) else "no address yet"
        redirection = self.real(uid).annotation
        self.pods[uid] = PodFacts(
            uid,
            uid,
            "ns",
            "sa",
            Enrolment(enrolled, "because"),
            tuple(ips),
            netns_path=netns,
            waiting_for=waiting,
            redirection=redirection,
        )
        self.publish()

    @precondition(lambda self: self.pods)
    @rule(uid=UIDS)
    def pod_disappears(self, uid: str) -> None:
        if self.pods.pop(uid, None) is not None:
            self.replace_netns(uid)
            self.publish()

    @precondition(lambda self: self.pods)
    @rule(uid=UIDS)
    def ingress_mode_changes(self, uid: str) -> None:
        if uid in self.pods:
            self.pods[uid] = replace(self.pods[uid], bypass_inbound=not self.pods[uid].bypass_inbound)
            self.publish()

    @rule(uid=UIDS, dns=st.sampled_from((None, True, False)))
    def dns_annotation_changes(self, uid: str, dns: bool | None) -> None:
        if uid in self.pods:
            self.pods[uid] = replace(self.pods[uid], dns=dns)
            self.publish()

    def replace_netns(self, uid: str) -> None:
        real = self.real(uid)
        real.namespace += 1
        real.connections = 0

    def publish(self) -> None:
        self.read = True
        self.tell(PodsChanged(dict(self.pods)))

    @precondition(lambda self: not self.read)
    @rule(uid=UIDS)
    def a_mover_of_the_last_brain_holds_a_pod(self, uid: str) -> None:
        self.world[uid] = RealPod(held=0, rules_in={0: "in place"}, annotation="enabled", connections=1)
        self.tell(Adopted(uid, uid, "ns", "sa"))

    @initialize(story=st.sampled_from(["nothing", "captured", "draining"]), connections=st.integers(0, 2))
    def something_has_happened(self, story: str, connections: int) -> None:
        """Most of what can go wrong is far from an empty node."""
        if story == "nothing":
            return
        self.pods["a"] = PodFacts("a", "a", "ns", "sa", Enrolment(True, "because"), netns_path="/n/1")
        self.publish()
        self.things_work_for_a_while(uid="a", steps=4)
        self.real("a").connections = connections
        if story == "draining":
            self.the_label_changes(uid="a")
            self.things_work_for_a_while(uid="a", steps=3)

    @precondition(lambda self: any(real.pending for real in self.world.values()))
    @rule(uid=UIDS, steps=st.integers(1, 6))
    def things_work_for_a_while(self, uid: str, steps: int) -> None:
        real = self.real(uid)
        for _ in range(steps):
            if real.pending:
                self.finish(uid, real)

    @precondition(lambda self: any(real.pending for real in self.world.values()))
    @rule(uid=UIDS, partly=st.booleans())
    def the_action_under_way_fails(self, uid: str, partly: bool) -> None:
        real = self.real(uid)
        if not real.pending:
            return
        if isinstance(real.pending[0], CloseListeners):
            self.finish(uid, real)
            return
        action = real.pending.pop()
        if partly and not isinstance(action, OpenListeners):
            self.carry_out(action, real)
        if isinstance(action, Capture | BeginRelease | FinishRelease):
            real.set_rules(real.acts_on, "unknown")
        self.tell(Failed(uid, "it did not work"))

    @precondition(lambda self: self.timers)
    @rule(data=st.data())
    def a_timer_rings(self, data: st.DataObject) -> None:
        event = self.timers.pop(data.draw(st.integers(0, len(self.timers) - 1)))
        if isinstance(event, LingerOver):
            record = self.state.records.get(event.uid)
            if record is not None and record.round == event.round:
                self.real(event.uid).lingered = True
        self.ring(event)

    def ring(self, event: Event) -> None:
        if isinstance(event, Connections):
            event = Connections(event.uid, self.real(event.uid).connections)
        self.tell(event)

    @precondition(lambda self: any(real.listeners for real in self.world.values()))
    @rule(uid=UIDS, number=st.integers(0, 2))
    def connections_come_and_go(self, uid: str, number: int) -> None:
        real = self.real(uid)
        busy_finishing = any(isinstance(action, FinishRelease) for action in real.pending)
        if real.listeners and real.rules in ("in place", "releasing") and not busy_finishing:
            real.connections = number
            if real.draining:
                self.tell(Connections(uid, number))

    @precondition(lambda self: any(real.rules == "in place" for real in self.world.values()))
    @rule(uid=UIDS)
    def somebody_changes_the_rules(self, uid: str) -> None:
        real = self.real(uid)
        if real.rules == "in place":
            real.set_rules(real.namespace if real.held is None else real.held, "unknown")
            self.tell(VerifyDue(uid))

    @precondition(lambda self: any(real.annotation for real in self.world.values()))
    @rule(uid=UIDS)
    def somebody_removes_the_annotation(self, uid: str) -> None:
        real = self.real(uid)
        if real.annotation:
            real.annotation = ""
            self.tell(AnnotationLost(uid))

    @precondition(lambda self: self.state.records)
    @rule(uid=UIDS)
    def the_namespace_is_replaced_under_its_path(self, uid: str) -> None:
        if uid in self.state.records:
            self.replace_netns(uid)
            self.tell(NetnsReplaced(uid))

    # What must always be so

    @invariant()
    def nothing_is_undone_before_the_source_was_read(self) -> None:
        if not self.read:
            assert not any(real.pending for real in self.world.values())

    @invariant()
    def every_pod_that_holds_something_is_known(self) -> None:
        if self.read:
            for uid, real in self.world.items():
                assert not real.listeners or uid in self.state.records, "listeners leaked"

    def teardown(self) -> None:
        """Left alone, with everything working, the world comes to be as it is wanted."""
        if not self.read:
            self.publish()
        for _ in range(200):
            for uid, real in list(self.world.items()):
                if real.draining and real.connections:
                    real.connections = 0
                    self.tell(Connections(uid, 0))
                if real.pending:
                    self.finish(uid, real)
            timers, self.timers = self.timers, []
            for event in timers:
                if isinstance(event, LingerOver):
                    self.real(event.uid).lingered = True
                self.ring(event)
        for uid, real in self.world.items():
            assert not real.pending
            pod = self.pods.get(uid)
            if pod is not None and pod.enrolment.enrolled and not pod.waiting_for:
                assert (real.listeners, real.rules, real.annotation) == (True, "in place", "enabled")
                assert real.probes == frozenset(pod.ips)
                assert status_of(self.state.records[uid]).phase is Phase.CAPTURED
            elif pod is None or not pod.enrolment.enrolled:
                assert uid not in self.state.records
                assert (real.listeners, real.annotation) == (False, "")
                assert pod is None or (real.rules, real.probes) == ("absent", frozenset())

    def finish(self, uid: str, real: RealPod) -> None:
        self.tell(self.carry_out(real.pending.pop(), real))


Executor.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestPodLifecycle = Executor.TestCase
