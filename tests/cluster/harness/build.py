"""What a cluster needs and what takes minutes to make, made once into the cache: Kubernetes, CoreDNS, Debian trees."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.harness.home import ClusterError, building, cache_directory
from tests.cluster.harness.progress import begin, run_long

_MODULE: Final = Path(__file__).resolve().parents[1] / "kubernetes"
_PROGRAMS: Final = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")
_GO_VERSION: Final = (1, 24)
_HELM: Final = "v3.19.0"
_SUITE: Final = "bookworm"
"""Debian 12: its containerd 1.6 and Python 3.11 are what the tests are written for, whatever the machine runs itself."""
_NODE_PACKAGES: Final = (
    "buildah",
    "containerd",
    "containernetworking-plugins",
    "etcd-server",
    "iproute2",
    "libfaketime",
    "nftables",
    "procps",
    "runc",
)
_IMAGE_PACKAGES: Final = ("python3", "python3-venv", "python3-dev", "gcc")
_DROPPED: Final = ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "debootstrap")


@dataclass(frozen=True, slots=True)
class Parts:
    """``programs``: a directory of Kubernetes', CoreDNS' and pause's binaries. ``node``: the root file system of a node, which has no
    Python, as no node needs to. ``base``: that of the image others are built on. ``version``: of Kubernetes."""

    version: str
    programs: Path
    node: Path
    base: Path

    @property
    def kubectl(self) -> Path:
        return self.programs / "kubectl"


def build_parts() -> Parts:
    """All of it, from the cache where it is there. Raises ClusterError."""
    if os.geteuid() != 0:
        raise ClusterError("a cluster needs root: namespaces, mounts and control groups are made")
    version = kubernetes_version()
    # One waits for the network and the disk where the other computes.
    trees = begin(lambda: (_build_tree("node", _NODE_PACKAGES), _build_tree("base", _IMAGE_PACKAGES)))
    return Parts(version, _build_programs(version), *trees())


def kubernetes_version() -> str:
    """As the module file requires it: ``v1.34.4``."""
    found = re.search(r"^\s*(?:require )?k8s\.io/kubernetes (v\S+)", (_MODULE / "go.mod").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def why_not() -> str | None:
    """What this machine lacks for a cluster, in words; None if nothing."""
    if os.geteuid() != 0:
        return "it needs root"
    programs = cache_directory() / _programs_name(kubernetes_version())
    if not programs.exists() and (go := _go_version()) < _GO_VERSION:
        wanted = ".".join(map(str, _GO_VERSION))
        return f"it needs Go {wanted} or newer to build Kubernetes" + (f", this is {'.'.join(map(str, go))}" if go else ", there is none")
    return None


def why_not_at_once() -> str | None:
    """What has to be built first, in words; None if nothing that takes long."""
    version = kubernetes_version()
    if (cache_directory() / _programs_name(version)).exists():
        return None
    return f"Kubernetes {version} is not built here yet, which takes ten minutes: python -m tests.cluster.harness prepare"


def build_helm() -> Path:
    """Helm's program, for the tests of the chart. Raises ClusterError."""
    target = cache_directory() / f"helm-{_HELM}"
    with building(target) as directory:
        if directory is not None:
            command = ["go", "install", "-v", "-trimpath", "-ldflags=-s -w", f"helm.sh/helm/v3/cmd/helm@{_HELM}"]
            environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOBIN": str(directory)}
            what = f"Helm {_HELM} from its Go module (once, about a minute)"
            log = cache_directory() / "build-helm.log"
            run_long(what, command, log=log, describe=lambda count, line: f"{count} packages: {line}", environment=environment)
    return target / "helm"


def _programs_name(version: str) -> str:
    sources = sorted(path for path in _MODULE.rglob("*") if path.is_file())
    return f"kubernetes-{version}-{digest_of(path.read_bytes() for path in sources)}"


def digest_of(parts: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits that change when any part does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:12]


def _build_programs(version: str) -> Path:
    target = cache_directory() / _programs_name(version)
    with building(target) as directory:
        if directory is not None:
            reason = why_not()
            if reason is not None:
                raise ClusterError(f"no cluster here: {reason}")
            _go_build(directory, version)
            for name in _PROGRAMS:
                (directory / name).symlink_to("kubernetes")
    return target


def _go_version() -> tuple[int, ...]:
    try:
        text = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _go_build(directory: Path, version: str) -> None:
    """All programs at once: what several are made of is compiled once."""
    environment = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    listing = ["go", "list", "-deps", "./..."]
    listed = subprocess.run(listing, cwd=_MODULE, env={**os.environ, **environment}, capture_output=True, text=True)
    total = len(listed.stdout.split())
    major, minor = version.removeprefix("v").split(".")[:2]
    named = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    stamps = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in named.items())
    command = ["go", "build", "-v", "-trimpath", "-buildvcs=false", f"-ldflags=-s -w {stamps}", "-o", f"{directory}/", "./..."]

    def describe(count: int, line: str) -> str:
        return f"{count} packages of at most {total}: {line}"

    what = f"Kubernetes {version} and CoreDNS from their Go modules (once, 6 minutes on 2 idle CPUs)"
    run_long(what, command, log=cache_directory() / "build-kubernetes.log", describe=describe, environment=environment, directory=_MODULE)


def _build_tree(name: str, packages: tuple[str, ...]) -> Path:
    target = cache_directory() / f"debian-{_SUITE}-{name}-{digest_of(map(str.encode, packages))}"
    with building(target) as directory:
        if directory is not None:
            _need_debootstrap()
            archives = cache_directory() / "debian-archives"
            archives.mkdir(exist_ok=True)
            include = f"--include={','.join(packages)}"
            # debootstrap installs with a start-stop-daemon that does nothing, so no service of these packages starts.
            command = ["debootstrap", "--variant=minbase", f"--cache-dir={archives}", include, _SUITE, str(directory)]
            run_long(
                f"Debian {_SUITE} for the {name} image (once, about a minute)",
                command,
                log=cache_directory() / f"build-{name}.log",
                describe=lambda _count, line: line.removeprefix("I: "),
            )
            for path in _DROPPED:
                shutil.rmtree(directory / path, ignore_errors=True)
            directory.chmod(0o755)
    return target


def _need_debootstrap() -> None:
    if shutil.which("debootstrap") is not None:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError("debootstrap is needed, and there is no apt-get to install it with")
    commands = (["apt-get", "update", "-qq"], ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "debootstrap"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
