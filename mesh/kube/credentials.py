"""What proves us to an API server, and the credential plugins (``exec`` of a kubeconfig) that hand it out.

Plugins speak client.authentication.k8s.io: the API's version, whether there is a terminal, and on request the cluster go in by the
variable KUBERNETES_EXEC_INFO, an ExecCredential comes out as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec

PLUGIN_VERSIONS: Final = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
INTERACTIVE_MODES: Final = ("Never", "IfAvailable", "Always")
PLUGIN_TIMEOUT: Final = 600.0
"""Seconds: a plugin may send its user to a browser to log in."""
_MAX_OUTPUT: Final = 1 << 20
_EARLY: Final = timedelta(seconds=10)
"""What expires within the length of a request is asked for anew before it."""


class KubeconfigError(Exception):
    """There is no usable way to an API server; the text names file and field. The operator must act."""


class NoKubeconfigError(KubeconfigError):
    """There is none."""


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """PEM, the chain with the leaf first."""

    chain: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credential:
    """What a plugin gave: a bearer token, a client certificate, or both; good until ``expires``, or as long as they are taken."""

    token: str = field(default="", repr=False)
    certificate: ClientCertificate | None = None
    expires: datetime | None = None


class _Status(msgspec.Struct):
    token: str = ""
    clientCertificateData: str = ""
    clientKeyData: str = ""
    expirationTimestamp: datetime | None = None


class _Credential(msgspec.Struct):
    apiVersion: str
    kind: str
    status: _Status | None = None


@dataclass(frozen=True, slots=True)
class PluginCommand:
    """The ``exec`` section of a user. ``where`` names file and field in errors. ``cluster`` is told to the plugin where it asked for it."""

    where: str
    command: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    api_version: str = PLUGIN_VERSIONS[0]
    interactive_mode: str = "IfAvailable"
    install_hint: str = ""
    cluster: Mapping[str, object] | None = None


class ExecPlugin:
    """Asks the plugin when something is needed, and keeps the answer until it expires or the server refuses it."""

    def __init__(self, command: PluginCommand, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._command = command
        self._now = now
        self._held: Credential | None = None

    def current(self) -> Credential:
        """Blocks while the plugin runs, and leaves it the terminal. Raises KubeconfigError."""
        held = self._held
        if held is None or (held.expires is not None and held.expires - _EARLY <= self._now()):
            held = self._held = self._parse(self._run())
        return held

    def forget(self) -> None:
        """The server refused what the plugin gave."""
        self._held = None

    def _run(self) -> bytes:
        command = self._command
        program = command.command if "/" in command.command else shutil.which(command.command)
        interactive = command.interactive_mode != "Never" and sys.stdin is not None and sys.stdin.isatty()
        if command.interactive_mode == "Always" and not interactive:
            raise KubeconfigError(f"{command.where}: the plugin {command.command} needs a terminal, and there is none")
        spec: dict[str, object] = {"interactive": interactive}
        if command.cluster is not None:
            spec["cluster"] = command.cluster
        info = {"apiVersion": command.api_version, "kind": "ExecCredential", "spec": spec}
        environment = os.environ | dict(command.env) | {"KUBERNETES_EXEC_INFO": json.dumps(info)}
        try:
            if program is None or not Path(program).exists():
                hint = f"\n{command.install_hint}" if command.install_hint else ""
                raise KubeconfigError(f"{command.where}.command: there is no program {command.command}{hint}")
            done = subprocess.run(
                [program, *command.args],
                env=environment,
                stdin=None if interactive else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=PLUGIN_TIMEOUT,
            )
        except OSError as exc:
            raise KubeconfigError(f"{command.where}.command: {command.command}: {exc.strerror}") from exc
        except subprocess.TimeoutExpired as exc:
            raise KubeconfigError(f"{command.where}: {command.command} did not end within {PLUGIN_TIMEOUT:g} s") from exc
        if done.returncode != 0:
            raise KubeconfigError(f"{command.where}: {command.command} ended with status {done.returncode}; what it said stands above")
        return done.stdout[:_MAX_OUTPUT]

    def _parse(self, output: bytes) -> Credential:
        command = self._command
        try:
            found = msgspec.json.decode(output, type=_Credential)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise self._wrong(f"printed no ExecCredential: {exc}") from exc
        if found.kind != "ExecCredential" or found.apiVersion != command.api_version:
            raise self._wrong(f"printed a {found.kind} of {found.apiVersion}, expected an ExecCredential of {command.api_version}")
        status = found.status or _Status()
        if bool(status.clientCertificateData) != bool(status.clientKeyData):
            raise self._wrong("gave only one of clientCertificateData and clientKeyData")
        if not status.token and not status.clientCertificateData:
            raise self._wrong("gave neither a token nor a client certificate")
        certificate = ClientCertificate(status.clientCertificateData.encode(), status.clientKeyData.encode())
        expires = status.expirationTimestamp
        if expires is not None and expires.tzinfo is None:
            raise self._wrong("gave an expirationTimestamp without a time zone")
        return Credential(status.token, certificate if status.clientCertificateData else None, expires)

    def _wrong(self, what: str) -> KubeconfigError:
        return KubeconfigError(f"{self._command.where}: the plugin {self._command.command} {what}")
