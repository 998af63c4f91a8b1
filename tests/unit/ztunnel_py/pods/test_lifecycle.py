"""The lifecycle step by step. Any order of events: tests/property/test_pod_lifecycle.py."""

from __future__ import annotations

from dataclasses import replace

from mesh.model.address import parse_ip
from mesh.model.enrolment import Enrolment
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.lifecycle import FIRST_RETRY_SECONDS, LINGER_SECONDS, LONGEST_RETRY_SECONDS, Lifecycle, Phase, advance, status_of
from ztunnel_py.pods.vocabulary import (
    Action,
    AdmitProbes,
    Adopted,
    Annotate,
    Annotated,
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

IN = PodFacts("u", "web", "shop", "web", Enrolment(True, "namespace label"), netns_path="/netns/web")
OUT = replace(IN, enrolment=Enrolment(False, "not labelled"))


class Conversation:
    """Tells events one after the other; each call gives the actions that they led to."""

    def __init__(self) -> None:
        self.state = Lifecycle()

    def tell(self, *events: Event) -> tuple[Action, ...]:
        actions: tuple[Action, ...] = ()
        for event in events:
            self.state, actions = advance(self.state, event)
        return actions

    def pods(self, *pods: PodFacts) -> tuple[Action, ...]:
        return self.tell(PodsChanged({pod.uid: pod for pod in pods}))

    def phase(self) -> Phase:
        return status_of(self.state.records["u"]).phase

    def because(self) -> str:
        return status_of(self.state.records["u"]).because


def captured() -> Conversation:
    talk = Conversation()
    talk.pods(IN)
    talk.tell(ListenersOpened("u"), Captured("u"), Verified("u"), Annotated("u"))
    assert (talk.phase(), talk.because()) == (Phase.CAPTURED, "namespace label")
    return talk


def test_an_enrolled_pod_gets_listeners_then_rules_then_proof_then_the_announcement() -> None:
    talk = Conversation()
    assert talk.pods(IN) == (OpenListeners("u", IN),)
    assert talk.tell(ListenersOpened("u")) == (Capture("u", IN),)
    assert talk.tell(Captured("u")) == (Verify("u", IN),)
    assert talk.tell(Verified("u")) == (Annotate("u", IN, Redirection.ENABLED),)
    assert talk.phase() is Phase.CAPTURING
    assert talk.tell(Annotated("u")) == ()
    assert talk.phase() is Phase.CAPTURED


def test_an_unenrolled_pod_is_released_withdrawn_drained_and_let_go() -> None:
    talk = captured()
    assert talk.pods(OUT) == (BeginRelease("u", OUT),)
    assert talk.tell(ReleaseBegun("u")) == (Annotate("u", OUT, Redirection.ABSENT),)
    assert talk.tell(Annotated("u")) == (StartDraining("u", 1, LINGER_SECONDS),)
    assert talk.tell(Connections("u", 2)) == ()
    assert (talk.phase(), talk.because()) == (Phase.DRAINING, "2 connections")
    assert talk.tell(LingerOver("u", 1)) == ()
    assert talk.tell(Connections("u", 0)) == (FinishRelease("u", OUT),)
    assert talk.tell(ReleaseFinished("u")) == (CloseListeners("u"),)
    assert talk.tell(ListenersClosed("u")) == ()
    assert talk.state.records == {}


def test_a_pod_without_connections_still_lingers_for_peers_that_do_not_know_yet() -> None:
    talk = captured()
    talk.pods(OUT)
    talk.tell(ReleaseBegun("u"), Annotated("u"))
    assert talk.tell(Connections("u", 0)) == ()
    assert talk.tell(LingerOver("u", 1)) == (FinishRelease("u", OUT),)


def test_enrolling_again_while_draining_turns_back_without_closing_anything() -> None:
    talk = captured()
    talk.pods(OUT)
    talk.tell(ReleaseBegun("u"), Annotated("u"), Connections("u", 1))
    assert talk.pods(IN) == (StopDraining("u"), Capture("u", IN))
    assert talk.tell(Captured("u")) == (Verify("u", IN),)
    assert talk.tell(Verified("u")) == (Annotate("u", IN, Redirection.ENABLED),)
    talk.tell(Annotated("u"))
    assert talk.phase() is Phase.CAPTURED


def test_the_end_of_an_earlier_linger_does_not_count() -> None:
    talk = captured()
    for label in (OUT, IN):
        talk.pods(label)
        talk.tell(ReleaseBegun("u"), Annotated("u"), Captured("u"), Verified("u"), Annotated("u"))
    talk.pods(OUT)
    assert talk.tell(ReleaseBegun("u"), Annotated("u")) == (StartDraining("u", 2, LINGER_SECONDS),)
    talk.tell(Connections("u", 0))
    assert talk.tell(LingerOver("u", 1)) == ()
    assert talk.tell(LingerOver("u", 2)) == (FinishRelease("u", OUT),)


def test_a_change_of_mind_waits_for_the_step_under_way() -> None:
    talk = Conversation()
    talk.pods(IN)
    assert talk.pods(OUT) == ()
    assert talk.tell(ListenersOpened("u")) == (CloseListeners("u"),)


def test_a_pod_that_is_not_ready_waits_with_its_reason() -> None:
    talk = Conversation()
    assert talk.pods(replace(IN, waiting_for="the pod has no IP address yet")) == ()
    assert (talk.phase(), talk.because()) == (Phase.WAITING, "the pod has no IP address yet")
    assert talk.pods(IN) == (OpenListeners("u", IN),)


def test_a_pod_that_vanishes_is_freed_before_its_listeners_close() -> None:
    talk = captured()
    assert talk.pods() == (FinishRelease("u", IN),)
    assert talk.tell(ReleaseFinished("u")) == (CloseListeners("u"),)
    assert talk.tell(ListenersClosed("u")) == (Annotate("u", IN, Redirection.ABSENT),)
    assert talk.tell(Annotated("u")) == ()
    assert talk.state.records == {}


def test_rules_that_cannot_be_removed_do_not_keep_a_vanished_pods_descriptors_open() -> None:
    talk = captured()
    talk.pods()
    assert talk.tell(Failed("u", "no such namespace")) == (RetryAfter("u", FIRST_RETRY_SECONDS),)
    assert talk.tell(RetryDue("u")) == (CloseListeners("u"),)


def test_another_namespace_under_the_same_uid_starts_anew() -> None:
    talk = captured()
    moved = replace(IN, netns_path="/netns/other", redirection="enabled")
    assert talk.pods(moved) == (FinishRelease("u", IN),)
    talk.tell(ReleaseFinished("u"), ListenersClosed("u"))
    assert talk.tell(Annotated("u")) == (RetryAfter("u", FIRST_RETRY_SECONDS),)
    assert talk.tell(RetryDue("u")) == (OpenListeners("u", moved),)


def test_a_namespace_replaced_under_its_path_starts_anew() -> None:
    talk = captured()
    assert talk.tell(NetnsReplaced("u")) == (FinishRelease("u", IN),)


def test_failures_are_retried_for_ever_ever_more_slowly_and_shown() -> None:
    talk = Conversation()
    talk.pods(IN)
    pauses: list[float] = []
    for _ in range(12):
        (retry,) = talk.tell(Failed("u", "listen on port 15008: Address already in use"))
        assert isinstance(retry, RetryAfter)
        pauses.append(retry.seconds)
        (action,) = talk.tell(RetryDue("u"))
        if isinstance(action, Annotate):
            assert action.redirection is Redirection.PENDING
            (action,) = talk.tell(Annotated("u"))
        assert isinstance(action, OpenListeners)
    assert pauses[:3] == [0.1, 0.2, 0.4]
    assert pauses[-1] == LONGEST_RETRY_SECONDS
    assert (talk.phase(), talk.because()) == (Phase.PENDING, "listen on port 15008: Address already in use")
    talk.tell(ListenersOpened("u"), Captured("u"), Verified("u"), Annotated("u"))
    assert talk.phase() is Phase.CAPTURED


def test_the_pause_after_success_is_short_again() -> None:
    talk = Conversation()
    talk.pods(IN)
    talk.tell(Failed("u", "first"), RetryDue("u"), ListenersOpened("u"), Captured("u"), Verified("u"), Annotated("u"))
    talk.tell(VerifyDue("u"))
    assert talk.tell(Failed("u", "later")) == (RetryAfter("u", FIRST_RETRY_SECONDS),)


def test_a_new_wish_does_not_wait_for_the_pause_to_end() -> None:
    talk = Conversation()
    talk.pods(IN)
    talk.tell(ListenersOpened("u"), Failed("u", "refused"))
    assert talk.pods(OUT) == (BeginRelease("u", OUT),)


def test_rules_that_went_missing_are_written_again_without_withdrawing() -> None:
    talk = captured()
    assert talk.tell(VerifyDue("u")) == (Verify("u", IN),)
    assert talk.tell(Drifted("u", ("table istio-ambient-nat is missing",))) == (AdmitProbes("u", IN),)
    assert talk.tell(ProbesAdmitted("u")) == (Capture("u", IN),)
    assert talk.tell(Captured("u")) == (Verify("u", IN),)
    assert talk.tell(Verified("u")) == ()
    assert talk.phase() is Phase.CAPTURED


def test_rules_that_do_not_stay_make_the_pod_pending() -> None:
    talk = captured()
    talk.tell(VerifyDue("u"), Drifted("u", ("gone",)), ProbesAdmitted("u"), Captured("u"))
    assert talk.tell(Drifted("u", ("gone",))) == (RetryAfter("u", 0.2),)
    assert talk.because() == "rules are not in place: gone"
    assert talk.tell(RetryDue("u")) == (Annotate("u", IN, Redirection.PENDING),)
    assert talk.tell(Annotated("u")) == (AdmitProbes("u", IN),)


def test_a_changed_bypass_annotation_changes_the_rules() -> None:
    talk = captured()
    bypassing = replace(IN, bypass_inbound=True)
    assert talk.pods(bypassing) == (Capture("u", bypassing),)


def test_a_changed_dns_annotation_changes_the_rules() -> None:
    talk = captured()
    without = replace(IN, dns=False)
    assert talk.pods(without) == (Capture("u", without),)
    with_again = replace(IN, dns=True)
    talk.pods(with_again)
    assert talk.tell(Captured("u")) == (Capture("u", with_again),), "what was written is not what is wanted by now"


def test_nothing_is_undone_before_the_source_was_read() -> None:
    talk = Conversation()
    assert talk.tell(Adopted("u", "web", "shop", "web")) == ()


def test_an_adopted_pod_that_is_enrolled_is_proved_and_announced_again_but_not_opened() -> None:
    talk = Conversation()
    talk.tell(Adopted("u", "web", "shop", "web"))
    pod = replace(IN, redirection="enabled")
    assert talk.pods(pod) == (AdmitProbes("u", pod),)
    assert talk.tell(ProbesAdmitted("u")) == (Capture("u", pod),)


def test_an_adopted_pod_that_was_unenrolled_meanwhile_is_released() -> None:
    talk = Conversation()
    talk.tell(Adopted("u", "web", "shop", "web"))
    assert talk.pods(OUT) == (BeginRelease("u", OUT),)


def test_an_adopted_pod_that_is_gone_is_dropped() -> None:
    talk = Conversation()
    talk.tell(Adopted("u", "web", "shop", "web"))
    assert talk.pods() == (RefuseProbes("u"),)
    (action,) = talk.tell(ProbesRefused("u"))
    assert isinstance(action, FinishRelease)
    assert (action.pod.namespace, action.pod.name) == ("shop", "web")


def test_a_mover_that_is_met_late_brings_the_listeners_that_could_not_be_opened() -> None:
    talk = Conversation()
    talk.pods(IN)
    talk.tell(Failed("u", "listen on port 15001: Address already in use"))
    assert talk.tell(Adopted("u", "web", "shop", "web")) == (AdmitProbes("u", IN),)


def test_an_annotation_left_by_an_agent_that_ended_is_cleaned_up_with_its_rules() -> None:
    talk = Conversation()
    left = replace(OUT, redirection="enabled")
    assert talk.pods(left) == (BeginRelease("u", left),)
    assert talk.tell(ReleaseBegun("u")) == (RefuseProbes("u"),)
    assert talk.tell(ProbesRefused("u")) == (Annotate("u", left, Redirection.ABSENT),)
    assert talk.tell(Annotated("u")) == (FinishRelease("u", left),)
    assert talk.tell(ReleaseFinished("u")) == ()
    assert talk.state.records == {}


def test_the_kubelet_is_let_in_at_the_pods_addresses_before_rules_could_refuse_it() -> None:
    talk = Conversation()
    first, second = replace(IN, ips=(parse_ip("10.0.0.1"),)), replace(IN, ips=(parse_ip("10.0.0.1"), parse_ip("fd00::1")))
    talk.pods(first)
    assert talk.tell(ListenersOpened("u")) == (AdmitProbes("u", first),)
    assert talk.tell(ProbesAdmitted("u")) == (Capture("u", first),)
    talk.tell(Captured("u"), Verified("u"), Annotated("u"))
    assert talk.pods(second) == (AdmitProbes("u", second),)
    assert talk.tell(Failed("u", "no")) == (RetryAfter("u", FIRST_RETRY_SECONDS),)
    assert (talk.phase(), talk.because()) == (Phase.PENDING, "no")
    assert talk.tell(RetryDue("u")) == (AdmitProbes("u", second),)
    assert talk.tell(ProbesAdmitted("u")) == ()
    assert talk.pods(replace(second, enrolment=OUT.enrolment)) == (BeginRelease("u", replace(second, enrolment=OUT.enrolment)),)
    assert talk.tell(ReleaseBegun("u")) == (RefuseProbes("u"),)


def test_a_deleted_pods_address_is_forgotten_first_and_again_until_it_is() -> None:
    talk = Conversation()
    talk.pods(replace(IN, ips=(parse_ip("10.0.0.1"),)))
    talk.tell(ListenersOpened("u"), ProbesAdmitted("u"), Captured("u"), Verified("u"), Annotated("u"))
    assert talk.pods() == (RefuseProbes("u"),)
    talk.tell(Failed("u", "no"))
    assert talk.tell(RetryDue("u")) == (CloseListeners("u"),), "nothing stays open for it"
    (withdraw,) = talk.tell(ListenersClosed("u"))
    assert isinstance(withdraw, Annotate)
    assert talk.tell(Annotated("u")) == (RefuseProbes("u"),)
    talk.tell(Failed("u", "no"), RetryDue("u"), ProbesRefused("u"))
    assert talk.state.records == {}


def test_pods_that_do_not_take_part_are_left_alone() -> None:
    talk = Conversation()
    assert talk.pods(OUT) == ()
    assert talk.state.records == {}


def test_late_answers_and_events_of_unknown_pods_change_nothing() -> None:
    talk = captured()
    before = talk.state
    for event in (Captured("u"), ReleaseFinished("u"), ListenersClosed("u"), Failed("u", "late"), Connections("u", 0), LingerOver("u", 1)):
        assert talk.tell(event) == ()
    assert talk.tell(VerifyDue("nobody"), RetryDue("nobody")) == ()
    assert talk.state == before


def test_pods_do_not_wait_for_each_other() -> None:
    talk = Conversation()
    other = replace(IN, uid="v", name="db")
    assert talk.pods(IN, other) == (OpenListeners("u", IN), OpenListeners("v", other))
    assert talk.tell(ListenersOpened("v")) == (Capture("v", other),)
