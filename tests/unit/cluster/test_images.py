"""What nodes get of unpacked images, and the archives images are loaded from."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

from tests.cluster.harness.archive import write_program_image
from tests.cluster.harness.images import plant


def test_a_node_shares_layers_with_the_cache_but_never_its_databases(tmp_path: Path) -> None:
    seed = tmp_path / "seed"
    (seed / "io.containerd.metadata.v1.bolt").mkdir(parents=True)
    (seed / "blobs").mkdir()
    (seed / "io.containerd.metadata.v1.bolt/meta.db").write_bytes(b"names")
    (seed / "blobs/layer").write_bytes(b"layer")
    plant(seed, tmp_path / "node/containerd")
    planted = tmp_path / "node/containerd"
    assert (planted / "blobs/layer").samefile(seed / "blobs/layer")
    (planted / "io.containerd.metadata.v1.bolt/meta.db").write_bytes(b"other names")
    assert (seed / "io.containerd.metadata.v1.bolt/meta.db").read_bytes() == b"names"


def test_an_archive_names_its_image_and_the_digests_of_what_is_in_it(tmp_path: Path) -> None:
    program = tmp_path / "pause"
    program.write_bytes(b"\x7fELF")
    write_program_image(tmp_path / "image.tar", "localhost/pause:1", program)
    with tarfile.open(tmp_path / "image.tar") as tar:
        contents = {entry.name: file.read() for entry in tar if (file := tar.extractfile(entry)) is not None}
    (manifest,) = json.loads(contents["manifest.json"])
    assert manifest["RepoTags"] == ["localhost/pause:1"]
    image = json.loads(contents[manifest["Config"]])
    assert image["config"]["Entrypoint"] == ["/pause"]
    assert image["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(contents[layer]).hexdigest()}" for layer in manifest["Layers"]]
    assert len(image["history"]) == len(manifest["Layers"])
