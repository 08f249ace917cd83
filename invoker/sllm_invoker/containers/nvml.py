"""The node's GPUs by the driver's management library (NVML), through ctypes: no CUDA context, no torch.

Where there is no driver there are no GPUs. Not here: MIG instances; a GPU that is partitioned counts as one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

from sllm_faas.errors import PlatformError
from sllm_invoker.containers.gpus import Gpu, Probe

_TEXT = 96


class _MemoryInfo(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class NoGpus:
    """See `gpus.Probe`."""

    def gpus(self) -> tuple[Gpu, ...]:
        return ()

    def free(self, uuid: str) -> int:
        raise PlatformError(f"there is no GPU {uuid}.")


class Nvml:
    """See `gpus.Probe`. `library` is NVML, initialised. Raises PlatformError where it fails."""

    def __init__(self, library: Any, visible: str | None = None) -> None:
        self._library = library
        self._visible = visible
        self._handles: dict[str, ctypes.c_void_p] = {}

    def gpus(self) -> tuple[Gpu, ...]:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
            uuid, name = self._text("nvmlDeviceGetUUID", handle), self._text("nvmlDeviceGetName", handle)
            self._handles[uuid] = handle
            found.append(Gpu(uuid, name, self._memory(uuid).total))
        chosen = allowed([gpu.uuid for gpu in found], self._visible)
        return tuple(gpu for gpu in found if gpu.uuid in chosen)

    def free(self, uuid: str) -> int:
        return int(self._memory(uuid).free)

    def _memory(self, uuid: str) -> _MemoryInfo:
        info = _MemoryInfo()
        self._call("nvmlDeviceGetMemoryInfo", self._handles[uuid], ctypes.byref(info))
        return info

    def _text(self, function: str, handle: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(_TEXT)
        self._call(function, handle, buffer, ctypes.c_uint(_TEXT))
        return buffer.value.decode()

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise PlatformError(f"{function} failed with NVML error {status}.")


def allowed(uuids: Sequence[str], visible: str | None) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES leaves of a machine's GPUs: numbers in the order of NVML, or beginnings of UUIDs; None
    leaves all. As in CUDA, what follows a word that names none is ignored."""
    if visible is None:
        return tuple(uuids)
    found: list[str] = []
    for word in filter(None, (part.strip() for part in visible.split(","))):
        if word.isdecimal():
            named = list(uuids[int(word) : int(word) + 1])
        else:
            named = [uuid for uuid in uuids if uuid.startswith(word)]
        if len(named) != 1:
            break
        found += named
    return tuple(found)


def probe() -> Probe:
    """The GPUs this process may use; none where there is no driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        if library.nvmlInit_v2():
            return NoGpus()
    except (OSError, AttributeError):
        return NoGpus()
    return Nvml(library, os.environ.get("CUDA_VISIBLE_DEVICES"))
