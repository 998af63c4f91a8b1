"""The mover: a data plane process. Wires the reactor to the brain's messages; the only file of the mover that does.

It keeps serving with all it has when the brain is gone, and ends only when told, or when the supervisor has died (the lifeline).
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import socket
from collections.abc import Awaitable
from functools import partial

import trio
from OpenSSL import SSL

from mesh.authz.evaluate import AppliedPolicies
from mesh.linux.netns import open_own_netns
from mesh.linux.unix_sockets import unix_address
from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor, Timer
from mesh.reactor.pool import PoolLimits
from mesh.runtime.garbage import collect_seldom
from mesh.runtime.hugepages import keep_in_huge_pages
from mesh.state.names import Naming
from mesh.state.store import Changes, MeshState
from mesh.telemetry import log
from mesh.telemetry.access import SCOPE, AccessLog
from mesh.telemetry.metrics import DnsMetrics, Registry, TcpMetrics, encode_snapshot
from mesh.telemetry.output import LogOutput
from mesh.tls.bundle import CertificateBundle, InvalidBundle
from mesh.xds.client import Tidying, decode, is_large
from mesh.xds.decode import DecodedResponse, decode_response
from mesh.xds.names import ADDRESS, AUTHORIZATION
from ztunnel_py import messages
from ztunnel_py.channel import Channel, ChannelClosed, close_all
from ztunnel_py.config import SPARE, AgentConfig, read_config
from ztunnel_py.messages import PodInfo
from ztunnel_py.mover.brainlink import BrainLink
from ztunnel_py.mover.credentials import CredentialStore
from ztunnel_py.mover.dns import NameServer, NameService
from ztunnel_py.mover.inbound import InboundHbone, InboundPlaintext
from ztunnel_py.mover.ledger import DRAINED, Failure, Ledger
from ztunnel_py.mover.nameservers import ResolvConf
from ztunnel_py.mover.outbound import Outbound
from ztunnel_py.mover.plane import POLICY_GRACE_SECONDS, Plane
from ztunnel_py.mover.pod import Pod, PodSockets
from ztunnel_py.mover.report import describe_living
from ztunnel_py.mover.shares import Shares, join_shares
from ztunnel_py.mover.waiting import WaitingRoom
from ztunnel_py.supervisor import LIFELINE

RECONNECT_SECONDS = 0.05
"""How often a mover looks for a new brain: a restart of the brain is noticed at once, and the look costs one system call."""
LONGEST_RECONNECT_SECONDS = 2.0
"""At most so long between tries when the brain is there but every talk breaks off (no descriptors): each begins with all state."""
STEADY_SECONDS = 1.0
_LAST_WORDS = 0.05
_LOG_AGAIN = 0.2
"""Seconds until a reader of the log that stood still is tried again."""
HANG_SECONDS = 30.0
"""A mover that runs apart and whose loop has stood still for so long ends itself: no brain could end it."""
OUTGOING = 4096
"""Messages to the brain that may wait; beyond that the brain is not reading, and what it would be told it asks again."""

_log = log.get_logger("mover")


def run_mover(name: str) -> int:
    """Process entry: serve until told to stop. Returns the exit status."""
    output = LogOutput()
    log.configure_from(stream=output)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the brain decides what it means
    config = read_config()
    reactor = Reactor(
        on_error=lambda error, where: _log.error("callback.failed", where=where, exc_info=error),
        on_exhausted=lambda error: _log.error("accept.failed", error=str(error), because="new connections wait until others end"),
    )
    output.when_blocked = lambda: reactor.call_later(_LOG_AGAIN, output.try_again)
    collect_seldom()
    return reactor.run(Mover(name, config, reactor, output).run)


class Mover:
    """Follows the brain: state, certificates and pods come as messages, connections are served in callbacks."""

    def __init__(self, name: str, config: AgentConfig, reactor: Reactor, output: LogOutput) -> None:
        self._name = name
        self._config = config
        self._reactor = reactor
        self._registry = Registry()
        self._to_brain: trio.MemorySendChannel[tuple[messages.Message, tuple[int, ...]]] | None = None
        self._access = AccessLog(reactor.call_soon, output, wanted=partial(log.wants, SCOPE), as_json=log.writes_json())
        self._plane = Plane(
            reactor=reactor,
            state=MeshState(config.node_name),
            credentials=CredentialStore(reactor, self._ask_certificate),
            ledger=Ledger(TcpMetrics(self._registry), self._access, reactor.now),
            workloads_wanted=WaitingRoom(reactor),
            policies_awaited=WaitingRoom(reactor),
            synced=False,
            trust_domain=config.trust_domain,
            home=open_own_netns(),
            rng=random.Random(),
            pool=PoolLimits(config.pool_max_streams, config.pool_unused_release),
        )
        self._plane.ledger.on_count = self._count_changed
        self._names = NameService(
            Naming(config.cluster_domain, config.preferred_namespace or "", config.ipv6),
            DnsMetrics(self._registry),
            ResolvConf(),
            self._lookups_changed,
        )
        self._pods: dict[str, Pod] = {}
        self._received: set[str] = set()
        self._recheck: Timer | None = None
        self._ending = False
        self._stopping = trio.Event()
        self._nursery: trio.Nursery
        self._tidying: Tidying

    async def run(self) -> int:
        """Meet one brain after the other until stopped."""
        async with trio.open_nursery() as self._nursery:
            nursery = self._nursery
            self._tidying = Tidying(nursery)
            nursery.start_soon(self._watch_lifeline)
            nursery.start_soon(self._watch_term)
            nursery.start_soon(self._follow_brains)
            nursery.start_soon(keep_in_huge_pages)
            if self._name == SPARE:
                nursery.start_soon(self._watch_self)
            await self._stopping.wait()
            nursery.cancel_scope.cancel()
        return 0

    # The brain's side

    async def _follow_brains(self) -> None:
        pause = RECONNECT_SECONDS
        while True:
            began = trio.current_time()
            met = False
            try:
                met = await self._follow_brain()
            except (OSError, ChannelClosed):
                pass  # no brain there, or no more: go on serving and look again
            brief = met and trio.current_time() - began < STEADY_SECONDS
            pause = min(2 * pause, LONGEST_RECONNECT_SECONDS) if brief else RECONNECT_SECONDS
            await trio.sleep(pause)

    async def _follow_brain(self) -> bool:
        """Until the brain has gone; True if there was one that answered."""
        met = False
        link: BrainLink | None = None
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with sock:
            with unix_address(self._config.socket_path) as address:
                await sock.connect(address)
            if self._plane.shares is None and not self._pods:
                # Not before: the brain makes the directory, and the mover that runs apart may be there first.
                self._plane.shares = _join_shares(self._name, self._config)
            channel: Channel[messages.ToMover] = Channel(sock, messages.ToMover)
            send, receive = trio.open_memory_channel[tuple[messages.Message, tuple[int, ...]]](OUTGOING)
            try:
                await self._introduce(channel)
                self._to_brain = send
                if self._ending:
                    self._tell(messages.Ending())
                for identity in self._plane.credentials.wanted():
                    self._ask_certificate(identity)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._send_outgoing, channel, receive)
                    link = BrainLink(self._reactor, channel, self._handle, nursery)
                    await link.run()
            except* ChannelClosed:
                pass
            finally:
                met = link is not None and link.met
                self._to_brain = None
                channel.close()
                if met:
                    self._look_again()  # movers may have died with the brain
        return met

    async def _introduce(self, channel: Channel[messages.ToMover]) -> None:
        pods = list(self._pods.values())
        await channel.send(messages.Hello(self._name, os.getpid(), len(pods)))
        for pod in pods:
            await channel.send(messages.Holding(pod.info), pod.sockets.all())

    async def _send_outgoing(
        self, channel: Channel[messages.ToMover], receive: trio.MemoryReceiveChannel[tuple[messages.Message, tuple[int, ...]]]
    ) -> None:
        async for message, descriptors in receive:
            await channel.send(message, descriptors)

    def _tell(self, message: messages.Message) -> None:
        """Tell the brain, if there is one that listens. What it misses it learns from `Hello` or asks again."""
        if self._to_brain is not None:
            try:
                self._to_brain.send_nowait((message, ()))
            except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                _log.debug("brain.not_reading", dropped=type(message).__name__)

    def _ask_certificate(self, identity: SpiffeId) -> None:
        self._tell(messages.CertificateWanted(str(identity)))

    def _count_changed(self, pod: str, living: int) -> None:
        if self._plane.shares is not None:
            self._plane.shares.connections.set(self._plane.ledger.total)
        served = self._pods.get(pod)
        if served is not None and served.releasing:
            self._tell(messages.PodConnections(pod, living + served.lookups))

    def _lookups_changed(self, pod: str) -> None:
        self._count_changed(pod, self._plane.ledger.count(pod))

    # Messages

    def _handle(self, message: messages.ToMover, descriptors: list[int]) -> Awaitable[None] | None:
        """Do what a message says; if it takes long, return what does it: the next message is for afterwards."""
        match message:
            case messages.Resources():
                if is_large(message.payload):
                    return self._take_large(message)
                self._take_resources(message, decode_response(message.payload))
            case messages.Certificate():
                self._take_certificate(message)
            case messages.CertificateUnavailable():
                self._lose_certificate(SpiffeId.parse(message.identity), message.because)
            case messages.ServePod():
                self._serve_pod(message.pod, descriptors)
            case messages.ReleasePod():
                self._set_releasing(message.uid, True)
            case messages.KeepPod():
                self._set_releasing(message.uid, False)
            case messages.DropPod():
                self._drop_pod(message.uid)
            case messages.StopAccepting():
                for pod in self._pods.values():
                    pod.drain()
            case messages.LookAgain():
                self._look_again()
            case messages.Ping():
                self._tell(messages.Pong(message.number))
            case messages.Scrape():
                self._report(message)
            case messages.Drain():
                self._nursery.start_soon(self._drain, message.seconds)
            case messages.SetLogLevels():
                log.set_levels(log.LogLevels.parse(message.levels))
        return None

    async def _take_large(self, message: messages.Resources) -> None:
        self._take_resources(message, await decode(message.payload, first=not self._plane.synced))
        self._tidying.soon()

    def _take_resources(self, message: messages.Resources, decoded: DecodedResponse) -> None:
        state = self._plane.state
        if message.whole:
            addresses, policies = decoded.type_url == ADDRESS, decoded.type_url == AUTHORIZATION
            changes = state.replace(decoded.delta, addresses=addresses, policies=policies)
            self._received.add(decoded.type_url)
            if not self._plane.synced and self._received >= {ADDRESS, AUTHORIZATION}:
                self._plane.synced = True
                # What has come is here to stay: full collections need not walk it (0.15-0.3 s each at 100 000 workloads).
                gc.freeze()
            self._changed(changes)
        else:
            self._changed(state.apply(decoded.delta))

    def _changed(self, changes: Changes) -> None:
        """After every change of state: who waited for it goes on, and who is no longer allowed ends."""
        for uid in self._plane.workloads_wanted.waited_for():
            self._plane.workloads_wanted.settle(uid)
        self._plane.policies_awaited.settle(None)
        self._reauthorize(final=False)

    def _reauthorize(self, *, final: bool) -> None:
        outcome = self._plane.ledger.reauthorize(self._policies_for, final=final)
        if outcome.ended:
            _log.info("policy.ended_connections", connections=outcome.ended)
        if outcome.undecided and self._recheck is None:
            self._recheck = self._reactor.call_later(POLICY_GRACE_SECONDS, self._recheck_now)

    def _recheck_now(self) -> None:
        self._recheck = None
        self._reauthorize(final=True)

    def _policies_for(self, uid: str) -> AppliedPolicies | None:
        pod = self._pods.get(uid)
        workload = pod.find_workload() if pod is not None else None
        return self._plane.state.policies_for(workload) if workload is not None else None

    def _take_certificate(self, message: messages.Certificate) -> None:
        try:
            self._plane.credentials.put(
                CertificateBundle.parse(key_pem=message.key_pem, chain_pem=message.chain_pem, roots_pem=message.roots_pem)
            )
        except (InvalidBundle, SSL.Error) as exc:
            # OpenSSL refuses what parses, such as an intermediate with a weak key. The brain has it and won't send another soon.
            _log.error("certificate.unusable", identity=message.identity, error=str(exc))
            self._plane.credentials.refuse(SpiffeId.parse(message.identity), f"the certificate is unusable: {exc}")

    def _lose_certificate(self, identity: SpiffeId, because: str) -> None:
        self._plane.credentials.refuse(identity, because)
        if all(pod.identity() != identity for pod in self._pods.values()):
            self._plane.credentials.forget(identity)

    # Pods

    def _serve_pod(self, info: PodInfo, descriptors: list[int]) -> None:
        known = self._pods.get(info.uid)
        if known is not None:
            close_all(descriptors)
            known.releasing = False
        pod = known or Pod(self._plane, info, PodSockets.of(descriptors))
        if not pod.accepts:
            try:
                pod.listen(outbound=Outbound, inbound_plaintext=InboundPlaintext, inbound_hbone=InboundHbone, dns=self._serve_names)
            except OSError as exc:  # no descriptors are left; the brain hears nothing and gives it again
                _log.error("pod.not_served", pod=f"{info.namespace}/{info.name}", uid=info.uid, error=str(exc))
                if known is None:
                    pod.close()
                else:
                    pod.stop_listening()
                return
            self._pods[info.uid] = pod
            _log.info("pod.serving", pod=f"{info.namespace}/{info.name}", uid=info.uid)
        self._tell(messages.PodServing(info.uid))

    def _serve_names(self, pod: Pod) -> NameServer:
        return NameServer(pod, self._names)

    def _set_releasing(self, uid: str, releasing: bool) -> None:
        pod = self._pods.get(uid)
        if pod is not None:
            pod.releasing = releasing
        if releasing:
            lookups = pod.lookups if pod is not None else 0
            self._tell(messages.PodConnections(uid, self._plane.ledger.count(uid) + lookups))

    def _drop_pod(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is None:
            return
        pod.stop_listening()
        self._plane.ledger.end_all(uid, Failure(DRAINED, "-"))
        pod.close()
        _log.info("pod.dropped", pod=f"{pod.info.namespace}/{pod.info.name}", uid=uid)

    # Reports

    def _report(self, message: messages.Scrape) -> None:
        self._plane.ledger.count_live_bytes()
        told, omitted = describe_living(self._plane.ledger.living(), self._reactor.now(), message.connections)
        self._tell(messages.Scraped(message.request, encode_snapshot(self._registry.snapshot()), told, omitted))

    # The end

    async def _drain(self, seconds: float) -> None:
        """Take nothing new, let what lives end by itself for a while, then end it, and stop."""
        for pod in self._pods.values():
            pod.drain()
        with trio.move_on_after(seconds):
            await self._plane.ledger.empty().wait()
            await self._names.idle().wait()
        self._plane.ledger.end_all(None, Failure(DRAINED, "-"))
        for uid in list(self._pods):
            self._drop_pod(uid)
        self._access.flush()
        self._tell(messages.Drained())
        await trio.sleep(_LAST_WORDS)  # lets the last records and frames out
        self._stopping.set()

    async def _watch_lifeline(self) -> None:
        """The supervisor has died when the lifeline reads as closed: nobody could start a brain any more, so drain and end."""
        number = os.environ.get(LIFELINE)
        if number is not None:
            await trio.lowlevel.wait_readable(int(number))
            _log.warning("supervisor.gone", seconds=self._config.drain)
            await self._drain(self._config.drain)

    async def _watch_term(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                if self._name == SPARE:
                    await self._end_with_brain()
                else:
                    await self._drain(self._config.drain)

    async def _end_with_brain(self) -> None:
        """The whole pod is to end, and the brain knows better when: it may have pods to release or to hand over first."""
        deadline = trio.current_time() + self._config.drain
        self._ending = True
        self._tell(messages.Ending())
        while self._to_brain is not None and trio.current_time() < deadline:  # noqa: ASYNC110 - one look at a field, while ending
            await trio.sleep(RECONNECT_SECONDS)
        await self._drain(max(0.0, deadline - trio.current_time()))

    async def _watch_self(self) -> None:
        """A thread of the standard library ends this process unless the loop turns to say that it lives."""
        try:
            while True:
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
                await trio.sleep(HANG_SECONDS / 6)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look_again(self) -> None:
        for pod in self._pods.values():
            pod.look_again()


def _join_shares(name: str, config: AgentConfig) -> Shares | None:
    """With the other movers of the agent, if it has any. Without the file each takes what it can."""
    names = config.mover_names
    if len(names) < 2 or name not in names:
        return None
    try:
        return join_shares(config.own_dir / "shares", len(names), names.index(name))
    except OSError as exc:
        _log.warning("shares.not_joined", error=str(exc), because="connections are not divided evenly among movers")
        return None
