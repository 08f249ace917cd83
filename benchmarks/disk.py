"""The disk's limit, and a page cache with or without given files in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from sllm_invoker.checkpoints.page_cache import resident


def drop(files: Iterable[Path]) -> None:
    """Nothing of them in the page cache."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        if (left := resident(path)) > 0.02:
            raise SystemExit(f"{path} cannot be dropped from the page cache: {left:.0%} is left")


def fill(path: Path) -> None:
    """All of it in the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass


FIO = {
    "one large call": ("--ioengine=psync", "--bs=64M"),
    "several in flight": ("--ioengine=libaio", "--iodepth=4", "--bs=16M"),
}


def fio(path: Path) -> dict[str, float]:
    """GB/s by way of reading, O_DIRECT, memory faulted beforehand."""
    if not shutil.which("fio"):
        raise SystemExit("fio is needed (Debian: apt-get install fio)")
    found = {}
    for name, engine in FIO.items():
        common = ["--name=read", f"--filename={path}", "--rw=read", "--direct=1", "--readonly", "--output-format=json"]
        done = subprocess.run(["fio", *common, *engine], capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"] / 1e9
    return found


def limit(rounds: Sequence[dict[str, float]]) -> float:
    """GB/s that the disk gives: the median of the better way. The better of each round would be luck, not a limit."""
    return max(statistics.median(each[name] for each in rounds) for name in FIO)
