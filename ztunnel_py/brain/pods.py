"""Carries out what the pods' lifecycle asks for: namespaces, listeners, rules, annotations, and the movers that serve them.

`ztunnel_py.pods.lifecycle` decides, this executes; nothing here knows what comes next. Blocking work (netlink, setns, files) happens in
threads, one action per pod at a time.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeAlias

import trio

from mesh.kube.api import ApiClient
from mesh.linux.netns import NetnsIdentity, NotANetworkNamespace, netns_identity, open_netns, open_own_netns, run_in_netns
from mesh.linux.nft import Table
from mesh.linux.sockets import loopback_listeners, transparent_listener
from mesh.model.address import IpAddress
from mesh.model.enrolment import Enrolment
from mesh.model.identity import SpiffeId
from mesh.model.ports import DNS, INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND, PROXY_MARK
from mesh.telemetry.log import get_logger
from mesh.telemetry.metrics import WorkloadManagerMetrics
from mesh.tls.rotation import CertificateManager, Priority
from ztunnel_py import messages
from ztunnel_py.brain.movers import Holding, Mover, Movers
from ztunnel_py.channel import close_all
from ztunnel_py.cni.request import PodAdded
from ztunnel_py.config import AgentConfig
from ztunnel_py.pods import vocabulary as pods
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.lifecycle import Lifecycle, Phase, PodStatus, Wish, advance, is_safe, status_of
from ztunnel_py.pods.place import ClusterPlace, DirectoryPlace, NodePaths, Place
from ztunnel_py.redirect.apply import (
    CaptureFailed,
    CaptureReading,
    apply_capture,
    begin_release,
    finish_release,
    observe_pod,
    read_capture,
    verify_capture,
)
from ztunnel_py.redirect.host import admit_probes, find_kubelet_user, find_probe_differences, keep_probes, plan_host, refuse_probes
from ztunnel_py.redirect.plan import RedirectPlan, plan_capture

SERVING_SECONDS = 5.0
"""How long movers may take to accept on a pod's listeners; one that does not is stuck, and the pod is tried again."""
VERIFY_SECONDS = 10.0
"""How often the rules of a captured pod are read back: whoever flushes them is found out and mended."""

KNOWN_SECONDS = 5.0
"""How long the API may take to tell of a pod whose network is made already."""
CAPTURE_SECONDS = 20.0
"""How long a pod that starts waits for its capture before its container runtime is told to try again."""

_log = get_logger("pods")


def open_place(config: AgentConfig) -> Place:
    """Where this agent learns of its pods."""
    if config.cluster is not None:
        paths = NodePaths(config.proc, config.netns_dir, config.probe_netns)
        return ClusterPlace(config.node_name, ApiClient(config.cluster), paths, agent=(config.pod_namespace, config.pod_name))
    assert config.status_dir is not None, "read_config sees to it"
    return DirectoryPlace(config.node_name, config.sources, config.status_dir)


_TCP_DESCRIPTORS = 4


class CannotServe(Exception):
    """An action could not be done; the text is the reason people see."""


class NotYet(Exception):
    """Whether a pod that starts is one of the mesh can't be said now; the text says why."""


class Elder(Protocol):
    """An older agent of this node as its successor sees it: like a mover, it serves connections, but is given no pod."""

    def post(self, message: messages.Message) -> None: ...


FromElder: TypeAlias = messages.ReleasePod | messages.KeepPod | messages.DropPod
"""What a successor says about pods that an older agent still has connections of."""


@dataclass(slots=True)
class _Held:
    """A pod whose namespace and listeners are open: descriptors, and which movers accept on them."""

    info: messages.PodInfo
    descriptors: tuple[int, ...]
    """Network namespace, the listeners for 15001, 15006, 15008, then the sockets for 15053, if there are any."""
    identity: NetnsIdentity
    serving: set[Mover] = field(default_factory=set)
    elders: set[Elder] = field(default_factory=set)
    """Older agents that hold it too, and may have connections of it."""
    changed: trio.Event = field(default_factory=trio.Event)
    draining: bool = False
    living: dict[Mover | Elder, int] = field(default_factory=dict)

    @property
    def netns(self) -> int:
        return self.descriptors[0]

    @property
    def answers_lookups(self) -> bool:
        return len(self.descriptors) > _TCP_DESCRIPTORS


async def _find_nobody() -> None:
    await trio.lowlevel.checkpoint()


class PodKeeper:
    """All pods of this node. `run` follows the source, while this agent is in charge; what it holds it holds before and after, too.
    Movers are told through `mover_joined`, `mover_said`, `mover_left`, older agents through `elder_joined` and so on."""

    def __init__(
        self,
        config: AgentConfig,
        movers: Movers,
        certificates: CertificateManager,
        metrics: WorkloadManagerMetrics,
        is_announced: Callable[[messages.PodInfo], bool],
    ) -> None:
        """``is_announced``: whether peers are told to reach the pod through the tunnel, as far as we have heard; see `mesh_changed`."""
        self._config = config
        self._place = open_place(config)
        self._is_announced = is_announced
        self._mesh_changed = trio.lowlevel.ParkingLot()
        self._annotating = trio.Lock()
        self._movers = movers
        self._certificates = certificates
        self._metrics = metrics
        self._state = Lifecycle()
        self._held: dict[str, _Held] = {}
        self._nursery: trio.Nursery | None = None
        """While in charge."""
        self._retired = False
        self._found: Mapping[str, PodFacts] = {}
        self._leaving = ""
        self._told = trio.Event()
        self.on_count: Callable[[str, int], None] = lambda uid, living: None
        """While not in charge: told how many connections of a pod live that a successor has us release."""
        self.find_elders: Callable[[], Awaitable[None]] = _find_nobody
        """Have older agents hand over what they hold."""
        self._timers: dict[str, trio.CancelScope] = {}
        self._reported: dict[str, PodStatus] = {}
        self._on_change: Callable[[Sequence[str]], None] = lambda pending: None
        self._host = NodeProbes(config.probe_netns, config.proc) if config.probe_netns is not None else None
        self.began = trio.Event()
        """Set while `run` goes on: pods that start are in good hands here. `yielded` is set when that has ended."""
        self.yielded = trio.Event()
        self._starting: dict[str, trio.Event] = {}
        """Pods that wait for their capture before they start."""
        self._sources_changed = trio.Event()
        self._unsupported: frozenset[str] = frozenset()

    async def run(self, on_change: Callable[[Sequence[str]], None]) -> None:
        """Follow the pods of this node until cancelled. ``on_change`` is told, whenever it changes, which can't be captured and why.

        It may be run again: of what is held it then knows no more than after a restart, since somebody else was in charge meanwhile.
        """
        self._on_change = on_change
        self._state, self._reported, self._timers = Lifecycle(), {}, {}
        try:
            async with trio.open_nursery() as self._nursery:
                self.began.set()
                for pod in list(self._held.values()):
                    self._tell_adopted(pod.info)
                self._nursery.start_soon(self._verify_captured)
                self._nursery.start_soon(self._place.run)
                async with aclosing(self._place.watch()) as changes:
                    async for found in changes:
                        if self._state.pods is None and self._host is not None:
                            await self._forget_ended(self._host, found)
                        self._found = found
                        self._tell(pods.PodsChanged(self._wanted()))
                        self._on_change(self._pending())
                        self._report_unsupported(found)
                        self._sources_changed.set()
                        self._sources_changed = trio.Event()
        finally:
            self._nursery = None
            self.began, yielded, self.yielded = trio.Event(), self.yielded, trio.Event()
            yielded.set()
            for uid in self._held:
                self._stop_draining(uid)

    async def release_all(self, seconds: float, because: str) -> None:
        """Let every pod go, as if none was in the mesh; after so many seconds whatever connections they still have. Must be in charge."""
        self._leaving = because
        with trio.move_on_after(seconds):
            while self._state.pods is None:
                await self._told.wait()
            self._tell(pods.PodsChanged(self._wanted()))
            while self._state.records:
                await self._told.wait()
        left = {uid: record.pod for uid, record in self._state.records.items()}
        for uid, pod in self._held.items():
            info = pod.info
            left.setdefault(uid, PodFacts(uid, info.name, info.namespace, info.service_account, Enrolment(False, because)))
        for uid, facts in left.items():
            try:
                await self._release(uid, facts, _finish_release)
            except (CaptureFailed, OSError, NotANetworkNamespace) as exc:
                _log.error("pod.not_released", pod=f"{facts.namespace}/{facts.name}", error=str(exc))

    def _wanted(self) -> Mapping[str, PodFacts]:
        """The pods as the source has them; none is in the mesh any more when the agent leaves for good."""
        if not self._leaving:
            return self._found
        enrolment = Enrolment(False, self._leaving)
        return {uid: replace(facts, enrolment=enrolment) for uid, facts in self._found.items()}

    def statuses(self) -> dict[str, tuple[PodFacts, PodStatus]]:
        """Every pod that something is or was to be done about, by uid."""
        return {uid: (record.pod, status_of(record)) for uid, record in self._state.records.items()}

    async def read_rules(self, uid: str) -> CaptureReading:
        """The rules in a pod's namespace now, for people. Raises CannotServe, CaptureFailed."""
        record = self._state.records.get(uid)
        if record is None:
            raise CannotServe("the pod is not known")
        releasing = record.wish is not Wish.CAPTURED
        pod, lookups = self._held_pod(uid), self._wants_lookups(record.pod)
        how = (record.pod, pod.answers_lookups and lookups, self._config.ipv6)
        return await trio.to_thread.run_sync(_read, pod.netns, *how, releasing)

    async def hold(self, added: PodAdded) -> str:
        """Return, with the reason, once a pod whose containers wait may start: it is captured, or it does not belong to the mesh. Raises
        NotYet; CannotServe, with the reason why it is not captured."""
        facts = await self._find_added(added)
        if not facts.enrolment:
            return facts.enrolment.because
        path = self._place.learn(facts.uid, added.netns_path, added.ips)
        with trio.move_on_after(CAPTURE_SECONDS):
            while True:
                changed = self._starting.setdefault(facts.uid, trio.Event())
                now = (self._state.pods or {}).get(facts.uid)
                if now is None:
                    raise CannotServe("the pod was deleted meanwhile")
                if not now.enrolment:
                    return now.enrolment.because
                record = self._state.records.get(facts.uid)
                if record is not None and record.pod.netns_path == path and is_safe(record):
                    return f"captured: {now.enrolment.because}"
                await changed.wait()
        record = self._state.records.get(facts.uid)
        because = status_of(record).because if record is not None else "nothing has been done yet"
        raise CannotServe(f"the pod is not captured after {CAPTURE_SECONDS:g} s: {because}")

    async def _find_added(self, added: PodAdded) -> PodFacts:
        """The pod as the API shows it. Raises NotYet."""
        if not self.began.is_set():
            raise NotYet("the agent has no configuration of the mesh yet, or another agent is in charge of the node")
        with trio.move_on_after(KNOWN_SECONDS):
            while True:
                changed = self._sources_changed
                for facts in (self._state.pods or {}).values():
                    if (facts.namespace, facts.name) == (added.namespace, added.name) and added.uid in ("", facts.uid):
                        return facts
                await changed.wait()
        if self._state.pods is None:
            raise NotYet("the agent has not read the node's pods yet")
        raise NotYet("the API server has not told the agent of the pod")

    def mesh_changed(self) -> None:
        """What ``is_announced`` says may be different now."""
        self._mesh_changed.unpark_all()

    def identity_of(self, info: messages.PodInfo | PodFacts) -> SpiffeId:
        return SpiffeId(self._config.trust_domain, info.namespace, info.service_account)

    # Movers

    def mover_joined(self, mover: Mover, holding: Sequence[Holding], *, informed: bool) -> None:
        """Take over what it serves and give it to the others too, have it serve the rest. A mover that was not ``informed`` of the mesh
        would only refuse: while others serve a pod it is left to them, until `serve_everywhere`."""
        for held in holding:
            pod = self._adopt(held)
            if pod is not None:
                pod.serving.add(mover)
            else:
                mover.post(messages.DropPod(held.pod.uid))
        if self._retired:
            mover.post(messages.StopAccepting())
        for uid, pod in self._held.items():
            if informed or not pod.serving:
                self._give(pod)
            if pod.draining:
                mover.post(messages.ReleasePod(uid))

    def serve_everywhere(self) -> None:
        """All movers have been informed of the mesh now."""
        for pod in self._held.values():
            self._give(pod)

    def _give(self, pod: _Held) -> None:
        """Have every mover serve it that is not known to; not while a successor does."""
        if self._retired:
            return
        for mover in self._movers.living():
            if mover in pod.serving:
                continue
            try:
                mover.post(messages.ServePod(pod.info), pod.descriptors)
            except OSError as exc:  # no descriptors are left; the others go on serving the pod
                _log.error("pod.not_given", pod=f"{pod.info.namespace}/{pod.info.name}", mover=mover.name, error=str(exc))
            if pod.draining:  # a pod that is given counts as wanted again
                mover.post(messages.ReleasePod(pod.info.uid))

    def mover_said(self, mover: Mover, message: messages.FromMover) -> None:
        match message:
            case messages.PodServing():
                pod = self._held.get(message.uid)
                if pod is not None:
                    pod.serving.add(mover)
                    _notify(pod)
            case messages.PodConnections():
                pod = self._held.get(message.uid)
                if pod is not None and pod.draining:
                    pod.living[mover] = message.living
                    self._count(message.uid, pod)

    def mover_left(self, mover: Mover) -> None:
        for uid, pod in self._held.items():
            pod.serving.discard(mover)
            _notify(pod)
            if pod.living.pop(mover, None) is not None:
                self._count(uid, pod)

    def _adopt(self, holding: Holding) -> _Held | None:
        """None: it is of another network namespace than what we hold, so whoever has it must give it up."""
        known = self._held.get(holding.pod.uid)
        if known is not None:
            same = netns_identity(holding.descriptors[0]) == known.identity
            close_all(holding.descriptors)
            return known if same else None
        identity = netns_identity(holding.descriptors[0])
        held = self._held[holding.pod.uid] = _Held(holding.pod, holding.descriptors, identity)
        self._certificates.request(self.identity_of(holding.pod), Priority.WARMUP)
        self._tell_adopted(holding.pod)
        return held

    def _count(self, uid: str, pod: _Held) -> None:
        """Tell how many connections live, once everybody who may have some has reported."""
        if pod.draining and all(other in pod.living for other in (*self._movers.living(), *pod.elders)):
            living = sum(pod.living.values())
            if self._nursery is not None:
                self._tell(pods.Connections(uid, living))
            else:
                self.on_count(uid, living)

    # Older and younger agents of the node

    def holdings(self) -> list[Holding]:
        """What is held, for a successor. The descriptors stay ours."""
        return [Holding(pod.info, pod.descriptors) for pod in self._held.values()]

    def elder_joined(self, elder: Elder, holding: Sequence[Holding]) -> None:
        """Take over what an older agent holds, and have our movers accept there as well."""
        for held in holding:
            new = held.pod.uid not in self._held
            pod = self._adopt(held)
            if pod is None:
                elder.post(messages.DropPod(held.pod.uid))
                continue
            pod.elders.add(elder)
            if new:
                self._give(pod)
            if pod.draining:
                elder.post(messages.ReleasePod(held.pod.uid))

    def elder_counted(self, elder: Elder, uid: str, living: int) -> None:
        pod = self._held.get(uid)
        if pod is not None and pod.draining:
            pod.living[elder] = living
            self._count(uid, pod)

    def elder_left(self, elder: Elder) -> None:
        for uid, pod in self._held.items():
            pod.elders.discard(elder)
            pod.living.pop(elder, None)
            self._count(uid, pod)

    async def wait_served(self) -> bool:
        """Until every mover accepts on all that is held; False if one does not in time."""
        with trio.move_on_after(SERVING_SECONDS):
            for pod in list(self._held.values()):
                await self._wait_serving(pod)
            return True
        return False

    def retire(self) -> None:
        """A successor accepts on everything: leave new connections to it."""
        self._retired = True
        self._movers.post(messages.StopAccepting())
        for pod in self._held.values():
            pod.serving.clear()

    def resume(self) -> None:
        """There is no successor any more: accept again, if that had ended."""
        if self._retired:
            self._retired = False
            for pod in self._held.values():
                pod.serving.clear()  # a word of before, that came late, is worth nothing
            self.serve_everywhere()

    def obey(self, message: FromElder) -> None:
        """A successor releases or drops a pod that we have connections of."""
        if self._nursery is not None:
            return  # it was in charge once, and is no longer
        match message:
            case messages.ReleasePod():
                self._start_draining(message.uid)
            case messages.KeepPod():
                self._stop_draining(message.uid)
            case messages.DropPod():
                self._close(message.uid)

    # The lifecycle

    def _tell_adopted(self, info: messages.PodInfo) -> None:
        self._tell(pods.Adopted(info.uid, info.name, info.namespace, info.service_account))

    def _tell(self, event: pods.Event) -> None:
        """While not in charge nothing is done about anything."""
        if self._nursery is None:
            return
        self._state, actions = advance(self._state, event)
        for uid in self._starting.keys() if isinstance(event, pods.PodsChanged) else (event.uid,):
            if uid in self._starting:
                self._starting[uid].set()
        self._starting = {uid: event for uid, event in self._starting.items() if not event.is_set()}
        for action in actions:
            self._nursery.start_soon(self._do, action)
        self._report()
        self._told.set()
        self._told = trio.Event()

    async def _do(self, action: pods.Action) -> None:
        try:
            answer = await self._carry_out(action)
        except (CannotServe, CaptureFailed, OSError, NotANetworkNamespace) as exc:
            answer = pods.Failed(action.uid, str(exc))
        if answer is not None:
            self._tell(answer)

    async def _carry_out(self, action: pods.Action) -> pods.Event | None:
        match action:
            case pods.OpenListeners():
                await self._open(action.pod)
                return pods.ListenersOpened(action.uid)
            case pods.AdmitProbes():
                if self._host is not None:
                    await trio.to_thread.run_sync(self._host.admit, action.uid, action.pod.ips)
                return pods.ProbesAdmitted(action.uid)
            case pods.RefuseProbes():
                if self._host is not None:
                    await trio.to_thread.run_sync(self._host.refuse, action.uid)
                return pods.ProbesRefused(action.uid)
            case pods.Capture():
                await self._check_namespace(action)
                await trio.to_thread.run_sync(_capture, *self._how_captured(action))
                return pods.Captured(action.uid)
            case pods.Verify():
                differences = await trio.to_thread.run_sync(_verify, *self._how_captured(action))
                if self._host is not None:
                    differences += await trio.to_thread.run_sync(self._host.verify, action.uid, action.pod.ips)
                return pods.Drifted(action.uid, tuple(differences)) if differences else pods.Verified(action.uid)
            case pods.Annotate():
                async with self._annotating:  # two pods of one name, one after the other, have one file between them
                    if action.redirection is not pods.Redirection.ABSENT or not self._has_successor(action.pod):
                        shown = "" if action.redirection is pods.Redirection.ABSENT else action.redirection.value
                        await self._annotate(action.pod, shown)
                return pods.Annotated(action.uid)
            case pods.BeginRelease():
                await self._release(action.uid, action.pod, _begin_release)
                return pods.ReleaseBegun(action.uid)
            case pods.FinishRelease():
                await self._release(action.uid, action.pod, _finish_release)
                return pods.ReleaseFinished(action.uid)
            case pods.CloseListeners():
                self._close(action.uid)
                return pods.ListenersClosed(action.uid)
            case pods.StartDraining():
                self._start_draining(action.uid)
                await self._wait_withdrawn(action.uid)
                await trio.sleep(action.seconds)
                return pods.LingerOver(action.uid, action.round)
            case pods.StopDraining():
                self._stop_draining(action.uid)
                return None
            case pods.RetryAfter():
                return await self._sleep_until_retry(action)

    async def _annotate(self, facts: PodFacts, shown: str) -> None:
        try:
            await self._place.annotate(facts, shown)
        except PermissionError as exc:
            if not self._leaving:
                raise
            # Whoever takes the mesh down took our rights first. The rules matter more than a word on the pod.
            _log.warning("pod.annotation_stays", pod=f"{facts.namespace}/{facts.name}", error=str(exc))

    async def _open(self, facts: PodFacts) -> None:
        pod = self._held.get(facts.uid)
        if pod is None:
            try:
                pod = await trio.to_thread.run_sync(self._open_descriptors, facts)
            except (FileNotFoundError, NotANetworkNamespace):
                self._place.forget(facts.uid)
                raise
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                await self.find_elders()  # it may be the other agent of the node that has them
                if facts.uid not in self._held:
                    raise
                pod = self._held[facts.uid]
            else:
                self._held[facts.uid] = pod
                self._metrics.started.value += 1
                try:
                    self._movers.post(messages.ServePod(pod.info), pod.descriptors)
                except OSError:  # no descriptors are left
                    self._close(facts.uid)
                    raise
        self._certificates.request(self.identity_of(facts), Priority.WARMUP)
        with trio.move_on_after(SERVING_SECONDS) as limit:
            await self._wait_serving(pod)
        if limit.cancelled_caught:
            self._close(facts.uid)
            raise CannotServe(f"the movers did not serve the pod within {SERVING_SECONDS:g} s")

    async def _wait_serving(self, pod: _Held) -> None:
        """Until every mover accepts on the pod's listeners."""
        while not (self._movers.living() and all(mover in pod.serving for mover in self._movers.living())):
            await pod.changed.wait()

    def _open_descriptors(self, facts: PodFacts) -> _Held:
        """In a thread: the namespace, and the listeners inside it."""
        netns = open_netns(facts.netns_path)
        try:
            self._check_is_a_pods(netns)
            listeners = run_in_netns(netns, self._open_listeners)
        except BaseException:
            os.close(netns)
            raise
        info = messages.PodInfo(facts.uid, facts.name, facts.namespace, facts.service_account)
        return _Held(info, (netns, *listeners), netns_identity(netns))

    def _check_is_a_pods(self, netns: int) -> None:
        """Whatever we are told: the node's own traffic is never redirected. Raises CannotServe."""
        own = open_own_netns()
        try:
            taken = {netns_identity(own)}
        finally:
            os.close(own)
        if self._host is not None:
            taken.add(self._host.identity())
        if netns_identity(netns) in taken:
            raise CannotServe("the pod has the node's own network namespace")

    def _open_listeners(self) -> list[int]:
        opened: list[int] = []
        try:
            for port in (OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE):
                opened.append(transparent_listener(port, mark=PROXY_MARK, ipv6=self._config.ipv6).detach())
            if self._config.dns_proxy:
                opened += (sock.detach() for sock in loopback_listeners(DNS, ipv6=self._config.ipv6))
        except OSError:
            close_all(opened)
            raise
        return opened

    def _close(self, uid: str) -> None:
        pod = self._held.pop(uid, None)
        if pod is None:
            return
        self.mesh_changed()
        self._movers.post(messages.DropPod(uid))
        for elder in pod.elders:
            elder.post(messages.DropPod(uid))
        close_all(pod.descriptors)
        self._metrics.stopped.value += 1
        identity = self.identity_of(pod.info)
        if all(self.identity_of(other.info) != identity for other in self._held.values()):
            self._certificates.forget(identity)

    def _start_draining(self, uid: str) -> None:
        pod = self._held.get(uid)
        if pod is not None:
            pod.draining = True
            pod.living = {}
            self._movers.post(messages.ReleasePod(uid))
            for elder in pod.elders:
                elder.post(messages.ReleasePod(uid))

    async def _wait_withdrawn(self, uid: str) -> None:
        """Until peers are no longer told to use the tunnel, or the pod is not being released any more. While the control plane is away
        nobody is told anything, and everybody goes on using it."""
        pod = self._held.get(uid)
        while pod is not None and pod.draining and self._held.get(uid) is pod and self._is_announced(pod.info):
            await self._mesh_changed.park()

    def _stop_draining(self, uid: str) -> None:
        pod = self._held.get(uid)
        if pod is not None and pod.draining:
            pod.draining = False
            self.mesh_changed()
            self._movers.post(messages.KeepPod(uid))
            for elder in pod.elders:
                elder.post(messages.KeepPod(uid))

    async def _sleep_until_retry(self, action: pods.RetryAfter) -> pods.Event | None:
        previous = self._timers.pop(action.uid, None)
        if previous is not None:
            previous.cancel()
        with trio.CancelScope() as scope:
            self._timers[action.uid] = scope
            await trio.sleep(action.seconds)
        if self._timers.get(action.uid) is scope:
            del self._timers[action.uid]
        return None if scope.cancelled_caught else pods.RetryDue(action.uid)

    # Blocking work; runs in threads, so it takes what it needs as arguments

    async def _check_namespace(self, action: pods.Capture) -> None:
        """What movers and other agents hand over may be of a namespace that the pod no longer has: its network was made anew while nobody
        was in charge. Rules there would let it start uncaptured. Raises CannotServe."""
        pod = self._held_pod(action.uid)
        found = await trio.to_thread.run_sync(_identity_at, action.pod.netns_path)
        if found not in (None, pod.identity):
            self._tell(pods.NetnsReplaced(action.uid))
            raise CannotServe("what is held is not the network namespace that the pod has")

    def _how_captured(self, action: pods.Capture | pods.Verify) -> tuple[int, PodFacts, bool, bool]:
        """What `_capture` and `_verify` need. Look-ups are captured only where there is somebody to answer them."""
        pod = self._held_pod(action.uid)
        return pod.netns, action.pod, pod.answers_lookups and self._wants_lookups(action.pod), self._config.ipv6

    def _wants_lookups(self, facts: PodFacts) -> bool:
        return self._config.dns_proxy and (self._config.dns_capture if facts.dns is None else facts.dns)

    def _held_pod(self, uid: str) -> _Held:
        pod = self._held.get(uid)
        if pod is None:
            raise CannotServe("the pod's namespace is not open")
        return pod

    async def _release(self, uid: str, facts: PodFacts, release: Callable[[int, PodFacts, bool, bool], None]) -> None:
        """Do it in the pod's namespace, opened anew if it is not held; a namespace that is gone needs nothing."""
        pod = self._held.get(uid)
        dns = self._wants_lookups(facts)
        if pod is not None:
            await trio.to_thread.run_sync(release, pod.netns, facts, dns, self._config.ipv6)
            return
        try:
            netns = open_netns(facts.netns_path)
        except (FileNotFoundError, NotANetworkNamespace):
            return
        try:
            # A path by a process that has ended may lead to another pod by now, which is not to be let go.
            if netns_identity(netns) not in (pod.identity for pod in self._held.values()):
                await trio.to_thread.run_sync(release, netns, facts, dns, self._config.ipv6)
        finally:
            os.close(netns)

    def _has_successor(self, facts: PodFacts) -> bool:
        """Whether another pod has the name by now."""
        others = (record.pod for uid, record in self._state.records.items() if uid != facts.uid and record.wish is not Wish.GONE)
        return any((pod.namespace, pod.name) == (facts.namespace, facts.name) for pod in others)

    # Looking after captured pods

    async def _verify_captured(self) -> None:
        """Read every captured pod's rules back now and then; notice a namespace that was replaced, an annotation that was removed, and a
        mover that does not serve the pod."""
        while True:
            captured = [uid for uid, (_, status) in self.statuses().items() if status.phase is Phase.CAPTURED]
            for uid in captured:
                await trio.sleep(VERIFY_SECONDS / len(captured))
                pod, record = self._held.get(uid), self._state.records.get(uid)
                if pod is None or record is None:
                    continue
                found = await trio.to_thread.run_sync(_identity_at, record.pod.netns_path)
                if self._held.get(uid) is not pod:
                    continue  # closed meanwhile: the numbers of its descriptors may be another pod's
                if found != pod.identity:
                    self._place.forget(uid)
                    self._tell(pods.NetnsReplaced(uid))
                    continue
                self._give(pod)  # a mover may have had no descriptors left for it, or we none to send
                self._tell(pods.VerifyDue(uid))
                if not await self._place.is_annotated(record.pod):
                    self._tell(pods.AnnotationLost(uid))
            if not captured:
                await trio.sleep(VERIFY_SECONDS)

    def _report(self) -> None:
        """Log every pod whose state changed."""
        now = {uid: status_of(record) for uid, record in self._state.records.items()}
        for uid, status in now.items():
            before = self._reported.get(uid)
            if before is None or (before.phase, before.because) != (status.phase, status.because):
                pod = self._state.records[uid].pod
                write = _log.warning if status.phase is Phase.PENDING else _log.info
                if status.phase is Phase.PENDING:
                    self._place.note(pod, "NotCaptured", f"not in the mesh yet, will be tried again: {status.because}", warning=True)
                elif status.phase is Phase.CAPTURED and before is not None and before.phase is Phase.PENDING:
                    self._place.note(pod, "Captured", "in the mesh now", warning=False)
                if status.phase is not Phase.DRAINING or before is None or before.phase is not Phase.DRAINING:
                    write(f"pod.{status.phase.value}", pod=f"{pod.namespace}/{pod.name}", because=status.because)
        for uid in self._reported.keys() - now.keys():
            _log.info("pod.done", uid=uid)
        if now != self._reported:
            self._reported = now
            phases = [status.phase for status in now.values()]
            self._metrics.active.value = len(self._held)
            self._metrics.pending.value = phases.count(Phase.PENDING) + phases.count(Phase.CAPTURING)
            self._on_change(self._pending())

    def _report_unsupported(self, found: Mapping[str, PodFacts]) -> None:
        """Tell of pods that somebody labelled and that can never be captured, once each."""
        unsupported = {uid: facts for uid, facts in found.items() if facts.unsupported}
        for uid in unsupported.keys() - self._unsupported:
            facts = unsupported[uid]
            _log.warning("pod.unsupported", pod=f"{facts.namespace}/{facts.name}", because=facts.unsupported)
            self._place.note(facts, "NotCaptured", facts.unsupported, warning=True)
        self._unsupported = frozenset(unsupported)

    async def _forget_ended(self, host: NodeProbes, found: Mapping[str, PodFacts]) -> None:
        """Pods may have ended while no agent was there."""
        try:
            await trio.to_thread.run_sync(host.keep, frozenset(found))
        except (CaptureFailed, OSError, NotANetworkNamespace) as exc:
            _log.warning("probes.not_cleaned", error=str(exc))

    def _pending(self) -> list[str]:
        """The pods that should be captured and can't be, with the reason."""
        records = self._state.records
        return [
            f"{records[uid].pod.namespace}/{records[uid].pod.name}: {status.because}"
            for uid, status in self._reported.items()
            if status.phase is Phase.PENDING
        ]


class NodeProbes:
    """The node's own rules, by which its kubelet reaches captured pods. Methods block and raise CaptureFailed, OSError,
    NotANetworkNamespace."""

    def __init__(self, path: Path, proc: Path) -> None:
        self._path = path
        self._proc = proc
        self._lock = threading.Lock()
        """What is read and what is changed then must fit each other."""

    def admit(self, uid: str, ips: Collection[IpAddress]) -> None:
        with self._entered() as netns:
            admit_probes(netns, self._table, uid, ips)

    def refuse(self, uid: str) -> None:
        with self._entered() as netns:
            refuse_probes(netns, self._table, uid)

    def verify(self, uid: str, ips: Collection[IpAddress]) -> list[str]:
        with self._entered() as netns:
            return find_probe_differences(netns, self._table, uid, ips)

    def keep(self, uids: Collection[str]) -> None:
        """Forget the addresses of all other pods."""
        with self._entered() as netns:
            keep_probes(netns, self._table, lambda uid: uid in uids)

    def identity(self) -> NetnsIdentity:
        with self._entered() as netns:
            return netns_identity(netns)

    @cached_property
    def _table(self) -> Table:
        return plan_host(find_kubelet_user(self._proc))

    @contextmanager
    def _entered(self) -> Iterator[int]:
        with self._lock:
            netns = open_netns(self._path)
            try:
                yield netns
            finally:
                os.close(netns)


def _identity_at(path: str) -> NetnsIdentity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return NetnsIdentity(found.st_ino, found.st_dev)


def _plan(netns: int, facts: PodFacts, dns: bool, ipv6: bool) -> RedirectPlan:
    return plan_capture(observe_pod(netns, bypass_inbound=facts.bypass_inbound, dns=dns, ipv6=ipv6))


def _capture(netns: int, facts: PodFacts, dns: bool, ipv6: bool) -> None:
    apply_capture(netns, _plan(netns, facts, dns, ipv6))


def _verify(netns: int, facts: PodFacts, dns: bool, ipv6: bool) -> list[str]:
    return verify_capture(netns, _plan(netns, facts, dns, ipv6))


def _read(netns: int, facts: PodFacts, dns: bool, ipv6: bool, releasing: bool) -> CaptureReading:
    return read_capture(netns, _plan(netns, facts, dns, ipv6), releasing=releasing)


def _begin_release(netns: int, facts: PodFacts, dns: bool, ipv6: bool) -> None:
    begin_release(netns, _plan(netns, facts, dns, ipv6))


def _finish_release(netns: int, facts: PodFacts, dns: bool, ipv6: bool) -> None:
    finish_release(netns)


def _notify(pod: _Held) -> None:
    pod.changed.set()
    pod.changed = trio.Event()
