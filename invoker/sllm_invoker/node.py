"""What there is on this machine for the node: memory, cores, disk. Read from /proc and statvfs, nothing decided."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from sllm_faas.wire.messages import NodeStats

GRAIN_MB = 64
"""Statistics change in steps of this many MiB, so that an idle node is silent."""


def cores() -> float:
    return float(len(os.sched_getaffinity(0)))


def memory_available_mb() -> int:
    """MiB the machine could still hand out."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0


def host() -> str:
    """Names this machine: the same for every node on it, containers or not, another after a reboot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def stats(
    directory: Path,
    limit_mb: int,
    instances: int,
    resident: tuple[str, ...] = (),
    pinned: dict[str, int] | None = None,
    layers: tuple[str, ...] = (),
    dram_mb: int | None = None,
    on_gpu: tuple[str, ...] = (),
    bandwidth: Mapping[str, float] | None = None,
    checkpoints: tuple[str, ...] | None = None,
) -> NodeStats:
    """`limit_mb`: the memory this node may hand out in all; `resident`: digests of what is in its DRAM tier, `pinned`:
    MiB of what has to stay there, `dram_mb`: what it may hold; `layers`: keys of the warmth layers it has;
    `on_gpu`: digests of what is on its free GPUs; `bandwidth`: bytes per second by tier, as far as it was measured;
    `checkpoints`: digests of what is on its disk."""
    disk = os.statvfs(directory)
    free = _step(min(limit_mb, memory_available_mb()))
    free_disk = _step(disk.f_bavail * disk.f_frsize // 2**20)
    measured = dict(bandwidth or {})
    return NodeStats(free, free_disk, instances, resident, layers, pinned or {}, dram_mb, on_gpu, measured, checkpoints)


def address_towards(endpoint: str) -> str:
    """This machine's address as the host of `endpoint` (tcp://HOST:PORT) sees it. Sends nothing."""
    parts = urlsplit(endpoint)
    family, kind, _, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _step(value: int) -> int:
    return value // GRAIN_MB * GRAIN_MB
