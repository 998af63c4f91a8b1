"""Tokens of the lab: one random secret per Node, in a file that the node's agent reads, and one per waypoint's pod; what goes takes its
token with it.

On Kubernetes the kubelet gives a pod a service account token and TokenReview judges it; without Kubernetes this is the smallest thing that
ties a caller to a node or a pod.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from istiod_py.files import SECRET_MODE, UnsafeFile, make_private_directory, read_secret, write_atomically
from mesh.telemetry.log import get_logger

_SUFFIX: Final = ".token"
_LEAST_LENGTH: Final = 32
_NODE_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", re.ASCII)
"""A DNS subdomain (Kubernetes names nodes so): it becomes a file name."""

_log = get_logger("tokens")


class PodName(NamedTuple):
    namespace: str
    name: str


Holder: TypeAlias = str | PodName
"""The name of a Node, or a pod."""


def token_file(holder: Holder) -> str:
    """The file's name in the directory. ``_`` occurs in no name of Kubernetes, so no two holders share one."""
    return f"{holder if isinstance(holder, str) else f'pod_{holder.namespace}_{holder.name}'}{_SUFFIX}"


class TokenStore:
    """The tokens of all Nodes and of some pods. Only their hashes stay in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._holders: dict[bytes, Holder] = {}

    def reconcile(self, nodes: Iterable[str], pods: Iterable[PodName] = ()) -> None:
        """Have a token for each of these and for no other; existing ones stay. Raises OSError if the directory can't be written."""
        make_private_directory(self._directory)
        wanted: dict[str, Holder] = {token_file(node): node for node in nodes if _NODE_NAME.fullmatch(node)}
        wanted |= {token_file(pod): pod for pod in pods if all(map(_NODE_NAME.fullmatch, pod))}
        for file in self._directory.glob(f"*{_SUFFIX}"):
            if file.name not in wanted:
                file.unlink(missing_ok=True)
                _log.info("revoked", holder=file.name.removesuffix(_SUFFIX))
        self._holders = {_digest(self._load_or_issue(name)): holder for name, holder in sorted(wanted.items())}

    def find_holder(self, token: str) -> Holder | None:
        """Whose token this is. How long it takes tells nothing of any token: all are compared, each in constant time."""
        given, found = _digest(token.encode("utf-8", "replace")), None
        for digest, holder in self._holders.items():
            if hmac.compare_digest(digest, given):
                found = holder
        return found

    def _load_or_issue(self, name: str) -> bytes:
        path, holder = self._directory / name, name.removesuffix(_SUFFIX)
        try:
            token = read_secret(path)
            if len(token) >= _LEAST_LENGTH:
                return token
            _log.warning("replaced", holder=holder, reason="the file held no whole token")
        except FileNotFoundError:
            _log.info("issued", holder=holder)
        except (OSError, UnsafeFile) as exc:
            _log.warning("replaced", holder=holder, reason=str(exc))
        # No newline at the end: the node proxy sends the file's bytes as they are.
        token = secrets.token_urlsafe(32).encode()
        write_atomically(path, token, SECRET_MODE)
        return token


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
