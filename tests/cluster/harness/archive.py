"""Images as archives of the ``docker save`` format: a tar of one layer, a configuration and a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def write_program_image(archive: Path, name: str, program: Path) -> None:
    """An image of one static binary, which it runs."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        entry = tarfile.TarInfo(program.name)
        entry.mode, entry.size = 0o755, program.stat().st_size
        with program.open("rb") as file:
            tar.addfile(entry, file)
    _write(archive, name, layer, {"Entrypoint": [f"/{program.name}"], "Env": [_PATH]})


def write_tree_image(archive: Path, name: str, tree: Path) -> None:
    """An image of a whole root file system. Held in memory: some 130 MB for a small Debian."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tree, ".")
    _write(archive, name, layer, {"Cmd": ["/bin/sh"], "Env": [_PATH]})


def _write(archive: Path, name: str, layer: io.BytesIO, config: Mapping[str, list[str]]) -> None:
    content = layer.getbuffer()
    digest = hashlib.sha256(content).hexdigest()
    architecture = _ARCHITECTURES.get(platform.machine(), platform.machine())
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    # buildah counts layers in the history and refuses to add to an image that has fewer there.
    history = [{"created": "1970-01-01T00:00:00Z", "created_by": f"tests/cluster: {name}"}]
    image = json.dumps({"architecture": architecture, "os": "linux", "config": config, "rootfs": rootfs, "history": history}).encode()
    image_name = f"{hashlib.sha256(image).hexdigest()}.json"
    manifest = json.dumps([{"Config": image_name, "RepoTags": [name], "Layers": [f"{digest}.tar"]}]).encode()
    layer.seek(0)
    with tarfile.open(archive, "w") as tar:
        for path, size, data in (
            (f"{digest}.tar", len(content), layer),
            (image_name, len(image), io.BytesIO(image)),
            ("manifest.json", len(manifest), io.BytesIO(manifest)),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = size
            tar.addfile(entry, data)
