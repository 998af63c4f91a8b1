"""The images of a test cluster: made into archives, the project's own by buildah from its Containerfile, unpacked once for all nodes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.harness.archive import write_program_image, write_tree_image
from tests.cluster.harness.build import Parts, digest_of
from tests.cluster.harness.home import ClusterError, building, cache_directory
from tests.cluster.harness.progress import tell
from tests.cluster.harness.rootfs import Machine

PAUSE: Final = "localhost/pause:1"
COREDNS: Final = "localhost/coredns:1"
PYTHON: Final = "localhost/python:3.11"
"""A small Debian with Python: the base of the project's image, and enough for example applications."""
PROJECT: Final = "localhost/ambient-mesh:test"

_REPOSITORY: Final = Path(__file__).resolve().parents[3]
_CONTEXT: Final = (
    *("pyproject.toml", "setup.py", "constraints.txt", "README.md", "LICENSE", "deploy"),
    *("mesh", "ztunnel_py", "waypoint_py", "istiod_py", "meshctl_py"),
)
_KEPT_FOR: Final = 24 * 3600.0
"""Seconds after which images of older code are dropped from the cache."""
_PYTHON_VERSION: Final = "3.11"
_LIBC: Final = (2, 36)
"""Of the base, Debian 12."""
_ARCHIVE: Final = "image.tar"
_PLUGIN: Final = "ambient-mesh-cni"

_BUILD: Final = """
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >/run/policy.json
echo 'unqualified-search-registries = []' >/run/registries.conf
export CONTAINERS_REGISTRIES_CONF=/run/registries.conf STORAGE_DRIVER=overlay
buildah inspect --type image "$1" >/dev/null 2>&1 || buildah pull --signature-policy /run/policy.json docker-archive:/base/image.tar
for stage in "--target build -t $2-build" "-t $2"; do  # the first has a name too, or pruning would take what the next build reuses
    buildah bud --isolation chroot --layers --pull-never --signature-policy /run/policy.json \
        --build-arg BASE="$1" --build-arg COMPILER="$1" --build-arg GO="$1" \
        --build-arg RUST="$1" --build-arg TLS="$3" $stage -f /context/deploy/images/Containerfile /context
done
buildah push --signature-policy /run/policy.json "$2" docker-archive:/result/image.tar:"$2"
buildah rmi --prune >/dev/null 2>&1 || true  # what another build uses at this moment goes next time
"""
_UNPACK: Final = """
echo 'version = 2' >/run/seed.toml
echo 'disabled_plugins = ["io.containerd.grpc.v1.cri"]' >>/run/seed.toml
containerd --config /run/seed.toml --log-level warn & daemon=$!
for attempt in $(seq 300); do ctr version >/dev/null 2>&1 && break; sleep 0.1; done
for archive; do ctr --namespace k8s.io images import "$archive"; done
kill $daemon
wait $daemon
"""


@dataclass(frozen=True, slots=True)
class Seed:
    """``path``: containerd's directory with all images unpacked, to be copied by `plant`. ``project``: the project's image, an archive."""

    path: Path
    project: Path | None


def prepare_images(parts: Parts, *, project: bool = True) -> Seed:
    """All images, the project's of the code as it is now, or without that one. Raises ClusterError."""
    pause = _archive("pause", parts.programs, lambda path: write_program_image(path, PAUSE, parts.programs / "pause"))
    coredns = _archive("coredns", parts.programs, lambda path: write_program_image(path, COREDNS, parts.programs / "coredns"))
    fixed = (pause, coredns, _base(parts))
    common = _seed(parts, "common", None, fixed)
    if not project:
        return Seed(common, None)
    archive = build_project_image(parts)
    seed = _seed(parts, "seed", common, (archive,))
    for kind, latest in (("seed", seed), ("project", archive.parent)):
        _drop_old(kind, latest)
    return Seed(seed, archive)


def build_project_image(parts: Parts) -> Path:
    """The project's image of the code as it is now, an archive to load into a cluster. Raises ClusterError."""
    base = _base(parts)
    files = sorted(_context_files())
    contents = (f"{name}\0".encode() + _content(name) for name in files)
    tls = "aws-lc" if (aws_lc := _aws_lc()) is not None else "openssl"
    target = _images() / f"project-{digest_of([base.parent.name.encode(), tls.encode(), *contents])}"
    with building(target) as directory:
        if directory is not None:
            tell("the project's image, by buildah from deploy/images/Containerfile")
            context = directory / "context"
            _lay_out_context(context, files, aws_lc)
            storage = cache_directory() / f"buildah-{base.parent.name}"  # it takes a base that it has by name for the same
            storage.mkdir(exist_ok=True)
            binds = ((storage, "/var/lib/containers/storage"), (context, "/context"), (base.parent, "/base"), (directory, "/result"))
            _run(parts, directory, _BUILD, (PYTHON, PROJECT, tls), binds)
            shutil.rmtree(context)
    return target / _ARCHIVE


def plant(seed: Path, directory: Path) -> None:
    """A node's own containerd directory: its databases copied, all that never changes (blobs, layers) linked."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-al", str(seed), str(directory)], check=True)
    for database in directory.glob("*/*.db"):
        content = database.read_bytes()
        database.unlink()
        database.write_bytes(content)


def _images() -> Path:
    return cache_directory() / "images"


def _base(parts: Parts) -> Path:
    return _archive("python", parts.base, lambda path: write_tree_image(path, PYTHON, parts.base))


def _archive(name: str, origin: Path, write: Callable[[Path], None]) -> Path:
    target = _images() / f"{name}-{digest_of([origin.name.encode()])}"
    with building(target) as directory:
        if directory is not None:
            write(directory / _ARCHIVE)
    return target / _ARCHIVE


def _context_files() -> Iterator[Path]:
    """What the Containerfile copies, relative to the repository."""
    for name in _CONTEXT:
        path = _REPOSITORY / name
        found = path.rglob("*") if path.is_dir() else (path,)
        yield from (
            file.relative_to(_REPOSITORY)
            for file in found
            if (file.is_symlink() or file.is_file()) and file.suffix not in (".pyc", ".so", ".whl") and "__pycache__" not in file.parts
        )


def _content(name: Path) -> bytes:
    path = _REPOSITORY / name
    return os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()


def _lay_out_context(context: Path, files: Sequence[Path], aws_lc: Path | None) -> None:
    for name in files:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_REPOSITORY / name, context / name, follow_symlinks=False)
    for wheel in _wheels().glob("*.whl"):
        shutil.copy(wheel, context / "deploy/images/wheels" / wheel.name)
    for prebuilt in (_plugin(), *((aws_lc,) if aws_lc is not None else ())):
        shutil.copy(prebuilt, context / "deploy/images/prebuilt" / prebuilt.name)
    # buildah takes a step from its cache when what is copied is the same, times included.
    for path in (context, *context.rglob("*")):
        os.utime(path, (0, 0), follow_symlinks=False)


def _wheels() -> Path:
    """The project's dependencies for the image's Python: a build inside a chroot reaches no package index on many machines."""
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())
    wanted = [
        *project["project"]["dependencies"],
        *project["build-system"]["requires"],
        *project["project"]["optional-dependencies"]["compile"],
    ]
    constraints = _REPOSITORY / "constraints.txt"
    target = cache_directory() / f"wheels-{digest_of([*map(str.encode, wanted), constraints.read_bytes()])}"
    with building(target) as directory:
        if directory is not None:
            tell("wheels of the project's dependencies (once)")
            fixed = ["--only-binary=:all:", "--python-version", _PYTHON_VERSION, "--quiet", "--disable-pip-version-check"]
            pip = [sys.executable, "-m", "pip", "download", *fixed, "-c", str(constraints), "-d", str(directory), *wanted]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode != 0:
                raise ClusterError(f"pip download: {done.stderr.strip()}")
    return target


def _plugin() -> Path:
    """The CNI plugin, built by this machine's Go. Raises ClusterError."""
    source = _REPOSITORY / "deploy/cni"
    files = sorted((*source.glob("*.go"), source / "go.mod"))
    target = cache_directory() / f"cni-{digest_of(path.read_bytes() for path in files)}"
    with building(target) as directory:
        if directory is not None:
            command = ["go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", f"{directory}/{_PLUGIN}", "."]
            environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
            try:
                done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
            except FileNotFoundError as exc:
                raise ClusterError("Go is needed to build the CNI plugin") from exc
            if done.returncode != 0:
                raise ClusterError(f"go build of deploy/cni: {done.stderr.strip()}")
    return target / _PLUGIN


def _aws_lc() -> Path | None:
    """The package cryptography with AWS-LC inside, built by this machine's Rust for the image's older or equal C library; None where that
    is not to be had. Raises ClusterError."""
    libc = tuple(map(int, re.findall(r"\d+", platform.libc_ver()[1])))
    if shutil.which("cargo") is None or not (0,) < libc <= _LIBC:
        tell("the image has the package index's OpenSSL: AWS-LC is built where there are Rust and a C library no newer than Debian 12's")
        return None
    build = _REPOSITORY / "deploy/images/aws-lc"
    files = (*sorted(build.iterdir()), _REPOSITORY / "constraints.txt")
    target = cache_directory() / f"aws-lc-{digest_of(path.read_bytes() for path in files)}"
    with building(target) as directory:
        if directory is not None:
            tell("AWS-LC (once, about three minutes)")
            command = ["sh", str(build / "build.sh"), str(directory)]
            done = subprocess.run(command, cwd=_REPOSITORY, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
            if done.returncode != 0:
                raise ClusterError(f"building AWS-LC: {done.stderr.strip()}")
    return next((target / "wheel").glob("*.whl"))


def _seed(parts: Parts, kind: str, start: Path | None, archives: Sequence[Path]) -> Path:
    names = [archive.parent.name.encode() for archive in archives]
    target = _images() / f"{kind}-{digest_of([start.name.encode() if start else b'', parts.node.name.encode(), *names])}"
    with building(target) as directory:
        if directory is not None:
            tell("unpacking images for the nodes")
            directory.rmdir()
            if start is None:
                directory.mkdir()
            else:
                plant(start, directory)
            inside = [(archive.parent, f"/images/{number}") for number, archive in enumerate(archives)]
            arguments = tuple(f"{place}/{_ARCHIVE}" for _, place in inside)
            _run(parts, directory, _UNPACK, arguments, (*inside, (directory, "/var/lib/containerd")))
    return target


def _run(parts: Parts, near: Path, script: str, arguments: tuple[str, ...], binds: Sequence[tuple[Path, str]]) -> None:
    """A script in a throw-away overlay of the node's tree. Raises ClusterError with all that it said."""
    scratch = near.parent / f"{near.name}.scratch"
    machine = Machine(
        tree=str(parts.node),
        upper=f"{scratch}/upper",
        work=f"{scratch}/work",
        root=f"{scratch}/root",
        argv=("/bin/sh", "-euc", script, "sh", *arguments),
        binds=tuple((str(source), place) for source, place in binds),
        tied=True,
    )
    try:
        done = subprocess.run(machine.command(), cwd=_REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if done.returncode != 0:
        raise ClusterError(f"making images failed with status {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def _drop_old(kind: str, latest: Path) -> None:
    for path in _images().glob(f"{kind}-*"):
        if path != latest and path.is_dir() and time.time() - path.stat().st_mtime > _KEPT_FOR:
            shutil.rmtree(path, ignore_errors=True)
