"""`sllm doctor`: what the platform needs of this machine, each checked and, where it is not so, what to do.

Checks are independent and change nothing that lasts. `warning`: it works, slower or for less; `failed`: it will not.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import mmap
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from sllm_faas.cli import output
from sllm_faas.cli.common import load_config, state_option
from sllm_faas.config import Config, machine_memory_mb
from sllm_faas.errors import SllmError

SHM = "/dev/shm"  # noqa: S108 - looked at only
Result = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    result: Result
    found: str
    advice: str = ""


def _python(_config: Config) -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python", "ok" if good else "failed", sys.version.split()[0], "" if good else "Use Python 3.11 or newer."
    )


def _platform(_config: Config) -> Finding:
    good = sys.platform == "linux" and hasattr(os, "pidfd_open")
    advice = "" if good else "Linux 5.3 or newer is needed to run functions."
    return Finding("kernel", "ok" if good else "failed", f"{os.uname().sysname} {os.uname().release}", advice)


def _torch(_config: Config) -> Finding:
    try:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    except importlib.metadata.PackageNotFoundError as error:
        return Finding("torch", "warning", f"{error.name} is missing", "For models: pip install 'sllm-faas[invoker]'.")
    return Finding("torch", "ok", ", ".join(versions))


def _parts(_config: Config) -> Finding:
    missing = []
    for name in ("pyzmq", "msgspec", "uvicorn", "starlette", "sqlalchemy", "psutil"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("server parts", "failed", f"missing: {', '.join(missing)}", "pip install 'sllm-faas[all]'")
    return Finding("server parts", "ok", "installed")


def _memory(_config: Config) -> Finding:
    total = machine_memory_mb()
    good = total >= 1024
    return Finding(
        "memory", "ok" if good else "warning", output.size(total << 20), "" if good else "Little for models."
    )


def _shm(_config: Config) -> Finding:
    try:
        usage = shutil.disk_usage(SHM)
    except OSError as error:
        return Finding(SHM, "failed", str(error), "Mount a tmpfs there.")
    good = usage.free >= 256 << 20
    advice = "" if good else "In a container: give it more with --shm-size."
    return Finding(SHM, "ok" if good else "warning", f"{output.size(usage.free)} free", advice)


def _disk(config: Config) -> Finding:
    place = _existing(config.state_dir)
    free = shutil.disk_usage(place).free
    result: Result = "ok" if free >= 5 << 30 else "warning" if free >= 256 << 20 else "failed"
    advice = "" if result == "ok" else "Free some, or choose another --state-dir."
    return Finding("disk", result, f"{output.size(free)} free at {place}", advice)


def _direct(config: Config) -> Finding:
    place = _existing(config.state_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file, mmap.mmap(-1, 4096) as page:
            file.write(bytes(4096))
            file.flush()
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(descriptor, [page], 0)
            finally:
                os.close(descriptor)
    except PermissionError:
        return Finding("state directory", "failed", f"{place} cannot be written", "Choose another --state-dir.")
    except OSError as error:
        advice = "Loading goes through the page cache; a local disk is faster."
        return Finding("O_DIRECT", "warning", f"{place}: {error.strerror}", advice)
    return Finding("O_DIRECT", "ok", f"works at {place}")


def _files(_config: Config) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = hard >= 8192
    advice = "" if good else "Raise it: ulimit -n 65536 (limits.conf, LimitNOFILE=)."
    return Finding("open files", "ok" if good else "warning", f"{soft} of at most {hard}", advice)


def _processes(_config: Config) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    good = soft == resource.RLIM_INFINITY or soft >= 1024
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    return Finding("processes", "ok" if good else "warning", shown, "" if good else "Raise it: ulimit -u 4096.")


def _cgroups(_config: Config) -> Finding:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        kind = "v2"
    elif (root / "memory").is_dir():
        kind = "v1"
    else:
        return Finding(
            "control groups", "warning", "none", "Memory of single functions cannot be limited by the kernel."
        )
    writable = os.access(root, os.W_OK)
    advice = "" if writable else "Not ours to write: memory limits of functions are not enforced by the kernel."
    return Finding("control groups", "ok" if writable else "warning", kind, advice)


def _huge_pages(_config: Config) -> Finding:
    try:
        shared = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text(encoding="ascii")
    except OSError:
        return Finding("huge pages", "warning", "unknown", "Maps of shared weights use 4 KiB pages.")
    chosen = shared.partition("[")[2].partition("]")[0]
    good = chosen in ("advise", "always", "within_size")
    advice = "" if good else "Faster maps: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
    return Finding("huge pages", "ok" if good else "warning", f"shared memory: {chosen}", advice)


def _port(config: Config) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            found = f"{config.host}:{config.port}: {error.strerror}"
            return Finding("port", "warning", found, "A platform that runs here holds it; else use --port.")
    return Finding("port", "ok", f"{config.host}:{config.port} is free")


def _clock(_config: Config) -> Finding:
    class Timex(ctypes.Structure):
        _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_byte * 512))

    sane = time.time() > 1_700_000_000
    synchronised = ctypes.CDLL(ctypes.util.find_library("c")).adjtimex(ctypes.byref(Timex())) != 5  # TIME_ERROR
    result: Result = "ok" if sane and synchronised else "warning" if sane else "failed"
    advice = "" if result == "ok" else "Set up NTP: times in logs and expiry of tokens depend on it."
    return Finding(
        "clock", result, time.strftime("%Y-%m-%d %H:%M:%S %Z") + ("" if synchronised else ", not synchronised"), advice
    )


CHECKS: tuple[Callable[[Config], Finding], ...] = (
    _python, _platform, _parts, _torch, _memory, _shm, _disk, _direct, _files, _processes, _cgroups, _huge_pages,
    _port, _clock,
)  # fmt: skip


def findings(config: Config) -> Iterator[Finding]:
    """Each check's finding; one that breaks is itself a finding."""
    for check in CHECKS:
        try:
            yield check(config)
        except (OSError, SllmError, AttributeError) as error:
            yield Finding(check.__name__.strip("_").replace("_", " "), "warning", f"cannot be checked: {error}")


def _existing(path: Path) -> Path:
    while not path.is_dir():
        path = path.parent
    return path


@click.command()
@state_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(state_dir: Path | None, as_json: bool) -> int:
    """Check this machine for what the platform needs. Exits 1 when something failed."""
    found = list(findings(load_config({"state_dir": state_dir})))
    if as_json:
        output.emit_json([asdict(finding) for finding in found])
    else:
        colours = {"ok": "green", "warning": "yellow", "failed": "red"}
        for finding in found:
            mark = output.style(finding.result.ljust(8), fg=colours[finding.result])
            click.echo(f"{mark} {finding.check:<16} {finding.found}")
            if finding.advice:
                click.echo(f"{'':<26}{finding.advice}")
    return int(any(finding.result == "failed" for finding in found))
