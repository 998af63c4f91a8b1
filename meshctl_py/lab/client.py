"""`meshctl`'s side of a lab: start one, ask it, run commands in it, end it. Synchronous; the demo and tests use it too."""

from __future__ import annotations

import array
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import msgspec

from mesh.linux.unix_sockets import unix_address
from meshctl_py.lab.enter import Entry
from meshctl_py.lab.home import LabError, LabHome, claim_lab, remove_remains
from meshctl_py.lab.init import LabConfig
from meshctl_py.lab.messages import (
    MAX_DESCRIPTORS,
    AskDown,
    AskEntry,
    AskRestart,
    AskSignal,
    AskStatus,
    Done,
    EntryReply,
    Event,
    Failed,
    Ready,
    Refused,
    Reply,
    Request,
    StatusReply,
)
from meshctl_py.lab.status import LabStatus
from meshctl_py.logs import tail

_REPLY_WITHIN: Final = 10.0
_DOWN_WITHIN: Final = 10.0
_EVENTS: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)
_REPLIES: Final[msgspec.json.Decoder[Reply]] = msgspec.json.Decoder(Reply)


class StartingLab:
    """A lab on its way up: iterate for its events.

    The context's end ends the lab and waits until nothing is left, unless the lab became ready and is not tied to its starter.
    """

    def __init__(self, home: LabHome, events: socket.socket, launcher: subprocess.Popen[bytes], *, tied: bool) -> None:
        self.home = home
        self._tied = tied
        self._events = events
        self._launcher = launcher
        self._ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._events.close()  # what the keeper notices
        self._launcher.wait()
        if self._tied or not self._ready:
            _end(self.home)

    def __iter__(self) -> Iterator[Event]:
        """Events up to `Ready` or `Failed`, which always comes."""
        buffer = b""
        while True:
            data = self._events.recv(65536)
            if not data:
                last = "\n  ".join(tail(self.home.logs / "keeper.log", 15))
                yield Failed(f"the lab ended unexpectedly; its last words:\n  {last}")
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                event = _EVENTS.decode(line)
                self._ready = self._ready or isinstance(event, Ready)
                yield event
                if isinstance(event, Ready | Failed):
                    return

    def wait_gone(self) -> None:
        """Until a lab that is tied to this has been ended by somebody else."""
        while self._events.recv(65536):
            pass

    def leave_running(self) -> None:
        """The lab shall stay although it did not become ready."""
        self._ready = True


@dataclass(frozen=True, slots=True)
class UpOptions:
    """See `LabConfig`. ``patience`` in seconds; ``movers`` None: the agent's own choice.

    ``copy``: the lab follows a copy of the directory, which goes with it. ``agents``: more of their environment. ``istiod``: more
    options of its command line.
    """

    patience: float = 60.0
    keep: bool = False
    movers: int | None = None
    agents: Mapping[str, str] = field(default_factory=dict)
    istiod: tuple[str, ...] = ()
    with_mesh: bool = True
    tied: bool = False
    copy: bool = False


def start_lab(directory: Path, name: str, options: UpOptions) -> StartingLab:
    """Begin to build the lab of a directory. Raises LabError."""
    source = directory.resolve()
    if not source.is_dir():
        raise LabError(f"{directory} is no directory")
    if ":" in str(source):
        raise LabError(f"{source}: the agents take lists of directories separated by ':', so a lab's directory can't have one in its path")
    home, lock = claim_lab(name)
    if options.copy:
        source = shutil.copytree(source, home.copy)
    ours, theirs = socket.socketpair()
    with theirs, open(lock, "rb"), (home.logs / "keeper.log").open("ab") as log:
        config = LabConfig(
            name=home.name,
            source=str(source),
            state=str(home.path),
            lock=lock,
            events=theirs.fileno(),
            user_namespace=os.geteuid() != 0,
            with_mesh=options.with_mesh,
            movers=options.movers,
            agents=options.agents,
            istiod=options.istiod,
            patience=options.patience,
            keep=options.keep,
            tied=options.tied,
        )
        launcher = subprocess.Popen(
            [sys.executable, "-m", "meshctl_py.lab.init", config.dump()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(config.lock, config.events),
            start_new_session=True,
        )
    return StartingLab(home, ours, launcher, tied=options.tied)


class Lab:
    """A running lab."""

    def __init__(self, home: LabHome) -> None:
        self.home = home

    def status(self) -> LabStatus:
        """Everything it knows of itself. Raises LabError."""
        reply, _ = self._ask(AskStatus())
        assert isinstance(reply, StatusReply)
        return reply.status

    def signal(self, process: str, number: int = signal.SIGKILL, part: str | None = None) -> str:
        """Send a signal to a process, or a part of it; a sentence about it. Raises LabError."""
        reply, _ = self._ask(AskSignal(process, number, part))
        assert isinstance(reply, Done)
        return reply.text

    def restart(self, process: str) -> str:
        """End a process, so that it is started again; a sentence about it. Raises LabError."""
        reply, _ = self._ask(AskRestart(process))
        assert isinstance(reply, Done)
        return reply.text

    def open_command(
        self, target: str, argv: Sequence[str], *, namespace: str | None = None, container: str | None = None
    ) -> PreparedCommand:
        """A command in a pod, a node or the router, ready to be started. Raises LabError."""
        reply, descriptors = self._ask(AskEntry(target, tuple(argv), namespace, container))
        assert isinstance(reply, EntryReply)
        entry = replace(reply.entry, join=tuple(descriptors[int(index)] for index in reply.entry.join))
        return PreparedCommand(entry, reply.environment, tuple(descriptors))

    def down(self) -> None:
        """End the lab; returns when nothing of it is left. Raises LabError."""
        try:
            self._ask(AskDown())
        except LabError:
            self.home.kill()
        _end(self.home)

    def _ask(self, request: Request) -> tuple[Reply, list[int]]:
        try:
            with _connect(self.home) as sock:
                sock.sendall(msgspec.json.encode(request) + b"\n")
                data, descriptors = _receive(sock)
            reply = _REPLIES.decode(data)
        except (OSError, msgspec.DecodeError) as exc:
            raise LabError(f"lab {self.home.name} does not answer: {exc}") from exc
        if isinstance(reply, Refused):
            raise LabError(reply.because)
        return reply, descriptors


Popen: TypeAlias = subprocess.Popen[str]


@dataclass(frozen=True, slots=True)
class PreparedCommand:
    """Holds the descriptors of namespaces until it is run, once, in one of these ways."""

    entry: Entry
    environment: dict[str, str]
    descriptors: tuple[int, ...]

    def execute(self) -> None:
        """Become the command: terminal, standard streams, signals and exit status are its own. Does not return."""
        for descriptor in self.descriptors:
            os.set_inheritable(descriptor, True)
        terminal = {name: os.environ[name] for name in ("TERM", "COLUMNS", "LINES") if name in os.environ}
        command = self.entry.command()
        os.execve(command[0], command, self.environment | terminal)

    def start(self, **options: Any) -> Popen:
        """As a child process; ``options`` are subprocess.Popen's. It ends when this process does."""
        try:
            command = self.entry.command()
            return subprocess.Popen(command, env=self.environment, pass_fds=self.descriptors, text=True, **options)
        finally:
            for descriptor in self.descriptors:
                os.close(descriptor)


def _end(home: LabHome) -> None:
    """Wait for the end of a lab that was told to end, and remove what is left. Raises LabError."""
    if not home.wait_until_gone(_DOWN_WITHIN):
        home.kill()
    if not home.wait_until_gone(_DOWN_WITHIN):
        raise LabError(f"lab {home.name} does not end; its files stay in {home.path}")
    remove_remains(home)


def _connect(home: LabHome) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_REPLY_WITHIN)
        with unix_address(home.control) as address:
            sock.connect(address)
        return sock
    except OSError:
        sock.close()
        raise


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors = b"", array.array("i")
    while not data.endswith(b"\n"):
        part, ancillary, _, _ = sock.recvmsg(1 << 16, socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC)
        for level, kind, rights in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(rights[: len(rights) - len(rights) % descriptors.itemsize])
        if not part:
            raise ConnectionError("it closed the connection")
        data += part
    return data, list(descriptors)
