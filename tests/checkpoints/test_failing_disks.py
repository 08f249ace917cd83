"""Real disks that are full, fail or rot, where this machine lets us make some: a small tmpfs, an ext4 on a loop device
whose backing file is cut off or changed behind it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.reader import Reader
from sllm_invoker.checkpoints.store import CheckpointStore

from sllm_faas.errors import CheckpointCorrupt, CheckpointError, StorageFull
from tests.checkpoints.faults import SLABS, node
from tests.checkpoints.forks import Forks
from tests.checkpoints.objects import checksum, make_object

MIB = 1 << 20
pytestmark = pytest.mark.e2e


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()[:100]}")
    return done.stdout


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts what is asked for under a directory of the test; skips where that is not allowed."""
    if os.geteuid() or not all(map(shutil.which, ("mount", "umount", "mkfs.ext4", "filefrag"))):
        pytest.skip("needs root, mount and e2fsprogs")
    mounted: list[Path] = []

    def make(*options: str) -> Path:
        where = tmp_path / f"mounted-{len(mounted)}"
        where.mkdir()
        _run("mount", *options, str(where))
        mounted.append(where)
        return where

    yield make
    for where in mounted:
        subprocess.run(["umount", "--lazy", str(where)], check=False)


class Disk:
    """An ext4 on a loop device: its mount point, and its backing file to do harm to."""

    def __init__(self, image: Path, root: Path) -> None:
        self.image = image
        self.root = root

    def place(self, path: Path) -> int:
        """Byte of the image where the last extent of `path` begins."""
        extents = re.findall(r"^ *\d+: +\d+\.\. +\d+: +(\d+)\.\.", _run("filefrag", "-e", str(path)), re.MULTILINE)
        return int(extents[-1]) * 4096

    def forget(self, path: Path) -> None:
        """Have the page cache drop it, here and below."""
        for each in (path, self.image):
            fd = os.open(each, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@pytest.fixture
def disk(tmp_path: Path, mount: Callable[..., Path]) -> Disk:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(96 * MIB)
    _run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", str(image))
    return Disk(image, mount("-o", "loop", str(image)))


def _objects(disk: Disk) -> tuple[CheckpointObject, CheckpointObject]:
    """Two checkpoints; of the one that lies further back on the disk first."""
    made = [make_object(disk.root, seed, 20 * MIB) for seed in (1, 2)]
    os.sync()
    first, second = sorted(made, key=lambda each: disk.place(each.part_path()))
    return second, first


def _read(checkpoint: CheckpointObject) -> None:
    reader = Reader()
    try:
        part = checkpoint.manifest.parts[0]
        reader.read(checkpoint.part_path(), part, None).done.result(30)
    finally:
        reader.close()


def test_a_full_disk_stops_an_ingest_with_a_clear_error_and_leaves_room(mount, source, tmp_path):
    small = CheckpointStore(mount("-t", "tmpfs", "-o", "size=96k", "none"))
    with pytest.raises(StorageFull, match="no space left"):
        ingest(small, str(source), "tiny")
    assert [list((small.root / name).iterdir()) for name in ("objects", "refs", "tmp")] == [[], [], []]
    assert ingest(CheckpointStore(tmp_path / "roomy"), str(source), "tiny").digest


async def test_a_disk_that_fails_under_a_read_is_an_error_and_others_are_served(disk, tmp_path):
    bad, good = _objects(disk)
    expected = checksum(good)
    forks = Forks(models=False)
    try:
        async with node(tmp_path / "node", forks, 64, SLABS) as here:
            for each in (bad, good):
                disk.forget(each.part_path())
            os.truncate(disk.image, disk.place(bad.part_path()) + MIB)  # what lies behind fails with EIO
            fork = await here.start("attach", bad)
            assert "cannot be read: Input/output error" in (await fork.hear() or "")
            other = await here.start("attach", good)
            assert await other.hear() == "slabs"
            assert await other.ask("sum") == expected
            assert bad.digest not in await here.residents()
            assert await here.leases_left() == 0
    finally:
        forks.close()


def test_a_disk_that_fails_is_an_error_through_the_page_cache_too(disk):
    bad, good = _objects(disk)
    disk.forget(bad.part_path())
    os.truncate(disk.image, disk.place(bad.part_path()) + MIB)
    with pytest.raises(CheckpointError, match="Input/output error"):
        _read(bad)
    _read(good)


def test_a_bit_that_rotted_on_the_disk_is_found_by_the_next_read(disk):
    rotten, sound = _objects(disk)
    _read(rotten)
    before = rotten.part_path().stat()
    disk.forget(rotten.part_path())
    with disk.image.open("r+b") as file:
        file.seek(disk.place(rotten.part_path()) + 4321)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 8]))
    disk.forget(rotten.part_path())
    with pytest.raises(CheckpointCorrupt, match="has changed"):
        _read(rotten)
    assert rotten.part_path().stat() == before, "nothing but the bytes tells"
    _read(sound)
