"""Which of a node's agents looks after its pods, and how a younger one takes that over without a connection refused.

During a roll-out a node has two agents, in pods of their own, that share the run directory. The one that holds the lock (`charge.lock`,
opened by the supervisor, so that a brain's death does not give it up) is *in charge*: it alone writes rules and annotations. Each agent
listens on `RUN_DIR/POD_NAME/handover.sock`. A younger one that is ready to serve asks the others to let it:

    successor                          older agent
    Take ------------------------------> stops acting, unlocks
    <---- Holding (sockets)... Certificate... Yielded
    locks; its movers accept too
    Serving ---------------------------> its movers stop accepting, their peers get GOAWAY; what lives goes on
    <--> ReleasePod, KeepPod, DropPod, PodConnections: as to a mover, for as long as both live

At every moment somebody accepts, and the sockets are open in both. Whoever is not in charge goes on trying for the lock: when its holder
has died, the older agent resumes where it was. An older agent never takes from a younger one, but from one that is itself told to end.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Final, Generic, TypeVar

import trio

from mesh.linux.unix_sockets import unix_address
from mesh.telemetry.log import get_logger
from mesh.tls.bundle import CertificateBundle, InvalidBundle
from mesh.tls.rotation import CertificateManager
from ztunnel_py import messages
from ztunnel_py.brain.movers import Holding
from ztunnel_py.brain.pods import PodKeeper
from ztunnel_py.channel import Channel, ChannelClosed, close_all, listen_at
from ztunnel_py.config import AgentConfig
from ztunnel_py.supervisor import CHARGE

LOOK_SECONDS: Final = 0.1
"""How often the lock is tried by who does not hold it: so long new connections may wait after its holder's death."""
ASK_SECONDS: Final = 1.0
"""How often the others are asked again."""
ANSWER_SECONDS: Final = 10.0
"""How long an older agent may take to finish what it is doing to a pod, and to hand over."""
YIELD_SECONDS: Final = 2.0
"""How long after yielding we leave the lock alone, while the successor lives."""
_SOCKET: Final = "handover.sock"

_log = get_logger("charge")

M = TypeVar("M", bound=messages.Message)


def must_not_yield(*, asker: int, own: int, ending: bool) -> str | None:
    """Why the agent in charge does not let another look after the pods, or None: it does. ``asker`` and ``own``: when each was born."""
    if ending or asker > own:
        return None
    return "the agent in charge is younger"


class _Link(Generic[M]):
    """The connection with another agent. What is posted goes out in order; nobody waits for it."""

    def __init__(self, name: str, channel: Channel[M]) -> None:
        self.name = name
        self.channel = channel
        self.gone = trio.Event()
        self._queue, self._posted = trio.open_memory_channel[messages.Message](inf)

    def post(self, message: messages.Message) -> None:
        """Also what makes a link with an older agent an `ztunnel_py.brain.pods.Elder`."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._queue.send_nowait(message)

    async def follow(self, on_message: Callable[[M], None]) -> None:
        """Until the other has gone."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_posted)
                while True:
                    message, descriptors = await self.channel.receive()
                    close_all(descriptors)
                    on_message(message)
        except* ChannelClosed:
            pass
        finally:
            self.close()

    async def _send_posted(self) -> None:
        async for message in self._posted:
            await self.channel.send(message)

    def close(self) -> None:
        self._queue.close()
        self.channel.close()
        self.gone.set()


class Charge:
    """This agent's part in it. `run` acts whenever this agent is in charge; `serve` answers the others."""

    def __init__(self, config: AgentConfig, pods: PodKeeper, certificates: CertificateManager) -> None:
        self._config = config
        self._pods = pods
        self._certificates = certificates
        self._lock = -1
        self._born = 0
        self._in_charge = False
        self._ending = False
        self._asking = trio.Lock()
        self._acting: trio.CancelScope | None = None
        self._acts = trio.Event()
        self._stopped = trio.Event()
        self._older: dict[str, _Link[messages.ToSuccessor]] = {}
        self._younger: list[_Link[messages.FromSuccessor]] = []
        self._handed_over = trio.Event()
        self._nursery: trio.Nursery
        pods.on_count = self._count
        pods.find_elders = self._gather

    @property
    def in_charge(self) -> bool:
        return self._in_charge

    @property
    def has_successor(self) -> bool:
        """Whether a living agent of the node has taken over from this one."""
        return bool(self._younger) and not self._in_charge

    def end(self) -> None:
        """This agent was told to end: whoever asks may take over, and it tries for nothing any more."""
        self._ending = True

    async def wait_acting(self) -> None:
        """Until it looks after the pods."""
        await self._acts.wait()

    async def wait_handed_over(self) -> None:
        """Until a successor accepts on everything."""
        await self._handed_over.wait()

    # Taking over

    async def run(self, act: Callable[[], Awaitable[None]], waiting: Callable[[str], None]) -> None:
        """Look after the pods (``act``, which goes on until cancelled) whenever this agent is in charge; while it is not, ``waiting`` is
        told what for. To be called once our movers are ready to serve."""
        async with trio.open_nursery() as self._nursery:
            while True:
                await self._take(waiting)
                await self._act(act)
                with trio.move_on_after(YIELD_SECONDS):
                    if self._younger:
                        await self._younger[-1].gone.wait()

    async def _act(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            with trio.CancelScope() as self._acting:
                self._acts.set()
                await act()
        finally:
            self._acting, self._acts = None, trio.Event()
            self._in_charge = False
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._stopped.set()

    async def _take(self, waiting: Callable[[str], None]) -> None:
        """Until the lock is ours, and our movers accept on all that others hold."""
        asked = -inf
        because = "another agent of this node is in charge"
        while not self._try_lock():
            if trio.current_time() - asked >= ASK_SECONDS and not self._ending:
                asked = trio.current_time()
                because = await self._ask_all() or because
                continue
            waiting(because)
            await trio.sleep(LOOK_SECONDS)
        self._in_charge = True
        self._stopped = trio.Event()
        for younger in self._younger:  # they took over once, and are not in charge any more
            younger.close()
        self._pods.resume()
        self._handed_over = trio.Event()
        await self._gather()
        served = await self._pods.wait_served() if self._older else True
        _log.info("in_charge", older=len(self._older), pods=len(self._pods.holdings()), served=served)

    def _try_lock(self) -> bool:
        if self._ending:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    async def _gather(self) -> None:
        """While in charge: have everybody else hand over what they hold, and tell them once we serve it."""
        before = set(self._older)
        await self._ask_all()
        for name in self._older.keys() - before if self._acting is not None else self._older.keys():
            self._nursery.start_soon(self._tell_when_served, self._older[name])

    async def _tell_when_served(self, older: _Link[messages.ToSuccessor]) -> None:
        while not await self._pods.wait_served():
            _log.warning("movers.slow", because=f"they do not accept on all listeners yet: {older.name} goes on accepting")
        if self._in_charge:
            older.post(messages.Serving())

    async def _ask_all(self) -> str | None:
        """Ask every other agent of the node; what one said that would not."""
        because = None
        async with self._asking:
            for path in self._others():
                if path.parent.name not in self._older:
                    because = await self._ask(path) or because
        return because

    def _others(self) -> Iterator[Path]:
        for path in sorted(self._config.run_dir.glob(f"*/{_SOCKET}")):
            if path.parent != self._config.own_dir:
                yield path

    async def _ask(self, path: Path) -> str | None:
        """None: it handed over, or is not there. Else why not."""
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        older: _Link[messages.ToSuccessor] = _Link(path.parent.name, Channel(sock, messages.ToSuccessor))
        holding: list[Holding] = []
        try:
            with trio.fail_after(ANSWER_SECONDS):
                with unix_address(path) as address:
                    await sock.connect(address)
                await older.channel.send(messages.Take(self._born, self._in_charge))
                certificates = await self._receive_all(older.channel, holding)
            if isinstance(certificates, str):
                return certificates
            self._pods.elder_joined(older, holding)
            holding = []
            for certificate in certificates:
                self._keep_certificate(certificate)
            self._older[older.name] = older
            self._nursery.start_soon(self._follow_older, older)
            _log.info("taken_over", agent=older.name)
        except (OSError, ChannelClosed):
            return None  # it has ended, or is about to
        except trio.TooSlowError:
            return f"{older.name} does not answer"
        finally:
            for held in holding:
                close_all(held.descriptors)
            if older.name not in self._older:
                older.close()
        return None

    async def _receive_all(self, channel: Channel[messages.ToSuccessor], holding: list[Holding]) -> list[messages.Certificate] | str:
        """All that another agent hands over, or why it does not."""
        certificates: list[messages.Certificate] = []
        while True:
            message, descriptors = await channel.receive()
            match message:
                case messages.Holding() if len(descriptors) >= 4:
                    holding.append(Holding(message.pod, tuple(descriptors)))
                    continue
                case messages.Certificate():
                    certificates.append(message)
                case messages.Refused():
                    return message.because
                case messages.Yielded():
                    return certificates
            close_all(descriptors)

    def _keep_certificate(self, message: messages.Certificate) -> None:
        with suppress(InvalidBundle):
            self._certificates.adopt(
                CertificateBundle.parse(key_pem=message.key_pem, chain_pem=message.chain_pem, roots_pem=message.roots_pem)
            )

    async def _follow_older(self, older: _Link[messages.ToSuccessor]) -> None:
        def said(message: messages.ToSuccessor) -> None:
            if isinstance(message, messages.PodConnections):
                self._pods.elder_counted(older, message.uid, message.living)

        try:
            await older.follow(said)
        finally:
            _log.info("gone", agent=older.name)
            del self._older[older.name]
            self._pods.elder_left(older)

    # Being taken over from

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer other agents of the node, until cancelled. To be called once our movers are there."""
        self._lock = int(os.environ[CHARGE])
        self._born = _read_born(self._config.own_dir / "born")
        listener = listen_at(self._config.own_dir / _SOCKET)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    stream = await listener.accept()
                except OSError as exc:  # no descriptors are left; the other asks again
                    _log.error("accept.failed", error=str(exc))
                    await trio.sleep(LOOK_SECONDS)
                    continue
                nursery.start_soon(self._serve_younger, stream.socket)

    async def _serve_younger(self, sock: trio.socket.SocketType) -> None:
        younger: _Link[messages.FromSuccessor] = _Link("successor", Channel(sock, messages.FromSuccessor))
        try:
            if await self._hand_over(younger):
                await younger.follow(self._obey)
        except ChannelClosed:
            pass
        finally:
            younger.close()
            if younger in self._younger:
                self._younger.remove(younger)

    async def _hand_over(self, younger: _Link[messages.FromSuccessor]) -> bool:
        channel = younger.channel
        take: messages.FromSuccessor | None = None
        with trio.move_on_after(ANSWER_SECONDS):
            take, descriptors = await channel.receive()
            close_all(descriptors)
        if not isinstance(take, messages.Take):
            raise ChannelClosed("expected Take")
        self._younger.append(younger)  # before we yield: `run` leaves the lock alone while there is one
        because = await self._yield_to(take)
        if because is not None:
            await channel.send(messages.Refused(because))
            return False
        for held in self._pods.holdings():
            await channel.send(messages.Holding(held.pod), held.descriptors)
        for state in self._certificates.states():
            if state.bundle is not None:
                await channel.send(certificate_message(state.bundle))
        await channel.send(messages.Yielded())
        _log.info("handed_over")
        return True

    async def _yield_to(self, take: messages.Take) -> str | None:
        """Finish what is being done to pods, begin nothing more, and give up the lock; or say why not."""
        if take.in_charge:
            return None
        if not self._in_charge:
            return "an agent that is not in charge was asked"
        because = must_not_yield(asker=take.born, own=self._born, ending=self._ending)
        if because is None:
            await self._acts.wait()
            if self._acting is not None:
                self._acting.cancel()
            await self._stopped.wait()
        return because

    def _obey(self, message: messages.FromSuccessor) -> None:
        match message:
            case messages.Serving():
                self._pods.retire()
                self._handed_over.set()
            case messages.ReleasePod() | messages.KeepPod() | messages.DropPod():
                self._pods.obey(message)

    def _count(self, uid: str, living: int) -> None:
        for younger in self._younger:
            younger.post(messages.PodConnections(uid, living))


def certificate_message(bundle: CertificateBundle) -> messages.Certificate:
    """As movers and successors take it."""
    return messages.Certificate(str(bundle.identity), bundle.key_pem, list(bundle.chain_pem), bundle.roots_pem)


def _read_born(path: Path) -> int:
    """When this agent's pod first started here: the same for all lives of its container."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        born = time.time_ns()
        path.write_text(str(born))
        return born
