"""Key sets over restarts: the last that was had from each source, written down for the control plane that comes next.

Without it one that starts while an identity provider is away would have waypoints refuse every token of that provider: a set that we do not
have yet takes the place of the one that they hold. Who can write the archive decides what tokens pass, as who holds the authority's key
does. So it lies beside that key: a file for its owner alone, or a Secret of the root namespace.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import msgspec
import trio

from istiod_py.files import SECRET_MODE, UnsafeFile, read_secret, write_atomically
from istiod_py.secret import write_secret
from istiod_py.translate.l7.authentication import KeySource
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import mapping_at
from mesh.kube.requestauthentication import find_key_set_mistake
from mesh.kube.resources import SECRETS
from mesh.telemetry.log import get_logger

KEPT: Final = 7 * 24 * 3600.0
"""Seconds after which a set that nobody wants, or that could not be fetched since, is no longer to be found here."""
GRAIN: Final = 6 * 3600.0
"""Seconds by which a set must have been fetched later for that alone to be written down."""
MAX_ARCHIVE: Final = 512 * 1024
"""Bytes of the whole: a Secret may hold a mebibyte."""
FILE: Final = "key-sets.json"
SECRET: Final = "istiod-py-key-sets"
_ATTEMPTS: Final = 5

_log = get_logger("jwks")


class KeptSet(msgspec.Struct, frozen=True):
    """A key set as JSON, and when it was fetched (Unix time)."""

    keys: str
    fetched: float


KeptSets: TypeAlias = Mapping[KeySource, KeptSet]


class ArchiveFailed(Exception):
    """It cannot be read or written at the moment; the text says why."""


Change: TypeAlias = Callable[[bytes | None], bytes | None]
"""From what is there (None: nothing, or nothing that may be believed) to what shall be; None: that is well as it is."""


class Archive(Protocol):
    """Where the bytes are."""

    async def read(self) -> bytes | None:
        """None: nothing is there yet. Raises ArchiveFailed."""

    async def update(self, change: Change) -> None:
        """Read and write with nobody in between. Raises ArchiveFailed."""


# --- what is written


class _Record(msgspec.Struct, frozen=True):
    uri: str
    issuer: str
    keys: str
    fetched: float


class InvalidArchive(ValueError):
    """Nobody of ours has written this."""


def decode(content: bytes, now: float) -> dict[KeySource, KeptSet]:
    """The sets that are young enough. Raises InvalidArchive."""
    try:
        records = msgspec.json.decode(content, type=list[_Record])
    except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
        raise InvalidArchive(str(exc)) from exc
    found: dict[KeySource, KeptSet] = {}
    for record in records:
        mistake = find_key_set_mistake(record.keys)
        if mistake is not None:
            raise InvalidArchive(f"key set of {record.uri or record.issuer}: {mistake}")
        # By a clock that was wrong: no reason to go before what is fetched by the right one.
        fetched = record.fetched if record.fetched <= now else now - GRAIN
        if fetched > now - KEPT:
            found[KeySource(record.uri, record.issuer)] = KeptSet(record.keys, fetched)
    return found


def find_sets(content: bytes | None, now: float) -> dict[KeySource, KeptSet]:
    """`decode`, but what cannot be read is told, and as good as not there."""
    try:
        return decode(content, now) if content is not None else {}
    except InvalidArchive as exc:
        _log.error("key_sets.unreadable", because=str(exc))
        return {}


def encode(sets: KeptSets) -> bytes:
    """In order of the sources; if all is too much, those that were fetched last."""
    records: list[_Record] = []
    room = MAX_ARCHIVE
    for source, kept in sorted(sets.items(), key=lambda item: -item[1].fetched):
        record = _Record(source.uri, source.issuer, kept.keys, kept.fetched)
        room -= len(msgspec.json.encode(record)) + 1
        if room < 2:
            _log.warning("key_sets.not_archived", sets=len(sets) - len(records), most=MAX_ARCHIVE)
            break
        records.append(record)
    return msgspec.json.encode(sorted(records, key=lambda record: (record.uri, record.issuer)))


def merge(ours: KeptSets, content: bytes | None, now: float) -> bytes | None:
    """A `Change`: what other replicas wrote stays unless we fetched it later."""
    before = find_sets(content, now)
    young = {source: kept for source, kept in ours.items() if kept.fetched > now - KEPT}
    newer = {source: kept for source, kept in young.items() if _says_more(kept, before.get(source))}
    if not newer:
        return None
    return encode({**before, **newer})


def _says_more(ours: KeptSet, before: KeptSet | None) -> bool:
    if before is None or ours.fetched > before.fetched + GRAIN:
        return True
    return ours.fetched >= before.fetched and ours.keys != before.keys


# --- where it is


class FileArchive:
    """In the state directory. A file that others could write is not believed, and replaced."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE

    async def read(self) -> bytes | None:
        return await trio.to_thread.run_sync(self._read)

    async def update(self, change: Change) -> None:
        content = change(await self.read())
        if content is not None:
            await trio.to_thread.run_sync(self._write, content)

    def _read(self) -> bytes | None:
        try:
            return read_secret(self._path)
        except FileNotFoundError:
            return None
        except UnsafeFile as exc:
            _log.error("key_sets.unreadable", because=str(exc))
            return None
        except OSError as exc:
            raise ArchiveFailed(str(exc)) from exc

    def _write(self, content: bytes) -> None:
        try:
            write_atomically(self._path, content, SECRET_MODE)
        except OSError as exc:
            raise ArchiveFailed(str(exc)) from exc


class SecretArchive:
    """In the root namespace. Of replicas that write at once one wins, and the others look at what it wrote."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._where = f"Secret {namespace}/{SECRET}"

    async def read(self) -> bytes | None:
        return self._content(await self._find())

    async def update(self, change: Change) -> None:
        for _ in range(_ATTEMPTS):
            before = await self._find()
            content = change(self._content(before))
            if content is None or await self._write(before, content):
                return
        raise ArchiveFailed(f"{self._where}: others write it all the time")

    async def _find(self) -> Mapping[str, object] | None:
        try:
            return await self._client.find(SECRETS.path(self._namespace, SECRET))
        except (ApiError, ApiUnavailable) as exc:
            raise ArchiveFailed(f"{self._where}: {exc}") from exc

    def _content(self, secret: Mapping[str, object] | None) -> bytes | None:
        if secret is None:
            return None
        try:
            return base64.b64decode(str(mapping_at(secret, "data")[FILE]), validate=True)
        except (KeyError, ValueError) as exc:
            _log.error("key_sets.unreadable", because=f"{self._where} has no {FILE}: {exc}")
            return None

    async def _write(self, before: Mapping[str, object] | None, content: bytes) -> bool:
        """False: somebody else was faster."""
        try:
            return await write_secret(self._client, self._namespace, SECRET, before, {FILE: base64.b64encode(content).decode()})
        except (ApiError, ApiUnavailable) as exc:
            raise ArchiveFailed(f"{self._where}: {exc}") from exc
