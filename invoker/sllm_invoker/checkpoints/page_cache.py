"""What of a file is in the page cache: the DRAM tier's other half, where the kernel keeps the bytes."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from sllm_invoker.checkpoints.mapping import map_file

_libc = ctypes.CDLL(None, use_errno=True)


def resident(path: Path) -> float:
    """The fraction of the file that is there, 0..1; 0 where it cannot be told."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            if not length:
                return 1.0
            mapped = map_file(file.fileno(), length)
    except OSError:
        return 0.0
    pages = -(-length // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    failed = _libc.mincore(ctypes.c_void_p(mapped.address), ctypes.c_size_t(length), vector)
    mapped.unmap()
    return 0.0 if failed else bytes(vector).count(1) / pages
