"""Tokens of the lab: one random secret per Node, in a file that the node's agent reads; a Node that goes takes its token with it.

On Kubernetes the kubelet gives the agent a service account token and TokenReview judges it; without Kubernetes this is the smallest
thing that ties a caller to a node.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from istiod_py.files import SECRET_MODE, UnsafeFile, make_private_directory, read_secret, write_atomically
from mesh.telemetry.log import get_logger

_SUFFIX: Final = ".token"
_LEAST_LENGTH: Final = 32
_NODE_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", re.ASCII)
"""A DNS subdomain (Kubernetes names nodes so): it becomes a file name."""

_log = get_logger("tokens")


class TokenStore:
    """The tokens of all Nodes. Only their hashes stay in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._nodes: dict[bytes, str] = {}

    def reconcile(self, nodes: Iterable[str]) -> None:
        """Have a token for each of these Nodes and for no other; existing ones stay. Raises OSError if the directory can't be written."""
        make_private_directory(self._directory)
        wanted = {node for node in nodes if _NODE_NAME.fullmatch(node)}
        for file in self._directory.glob(f"*{_SUFFIX}"):
            if file.name.removesuffix(_SUFFIX) not in wanted:
                file.unlink(missing_ok=True)
                _log.info("revoked", node=file.name.removesuffix(_SUFFIX))
        self._nodes = {_digest(self._load_or_issue(node)): node for node in sorted(wanted)}

    def find_node(self, token: str) -> str | None:
        """The Node whose token this is. How long it takes tells nothing of any token: all are compared, each in constant time."""
        given, found = _digest(token.encode("utf-8", "replace")), None
        for digest, node in self._nodes.items():
            if hmac.compare_digest(digest, given):
                found = node
        return found

    def _load_or_issue(self, node: str) -> bytes:
        path = self._directory / f"{node}{_SUFFIX}"
        try:
            token = read_secret(path)
            if len(token) >= _LEAST_LENGTH:
                return token
            _log.warning("replaced", node=node, reason="the file held no whole token")
        except FileNotFoundError:
            _log.info("issued", node=node)
        except (OSError, UnsafeFile) as exc:
            _log.warning("replaced", node=node, reason=str(exc))
        # No newline at the end: the node proxy sends the file's bytes as they are.
        token = secrets.token_urlsafe(32).encode()
        write_atomically(path, token, SECRET_MODE)
        return token


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
