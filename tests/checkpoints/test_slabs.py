"""Slabs: memory that lies where huge pages can be, and what a reader maps of it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sllm_invoker.checkpoints.mapping import HUGE_PAGE, map_slabs
from sllm_invoker.checkpoints.slabs import Slab, SlabPool, enlarge

SLAB = 8 * 1024 * 1024


@pytest.fixture
def pool() -> Iterator[SlabPool]:
    made = SlabPool(2, slab_bytes=SLAB)
    yield made
    made.close()


def smaps(address: int) -> dict[str, int]:
    """KiB by name of the map that begins at `address`."""
    whole = Path("/proc/self/smaps").read_text()
    found = whole[whole.index(f"{address:x}-") :].partition("VmFlags")[0]
    return {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB$", found, re.MULTILINE)}


def created(pool: SlabPool) -> Slab:
    made = pool.create()
    assert made is not None
    assert made.map is not None
    return made


def test_what_is_written_to_slabs_is_what_a_reader_maps_in_order(pool):
    slabs = [created(pool), created(pool)]
    for number, slab in enumerate(slabs):
        slab.view[:] = bytes([number + 1]) * SLAB
    mapping = map_slabs([slab.fd for slab in slabs], SLAB, 2 * SLAB)
    try:
        assert bytes(memoryview(mapping.buffer).cast("B")) == b"\1" * SLAB + b"\2" * SLAB
    finally:
        mapping.unmap()


def test_a_slab_faulted_ahead_is_whole_in_memory_empty_and_in_huge_pages_or_none(pool):
    slab = created(pool)
    assert slab.map.address % HUGE_PAGE == 0
    enlarge(slab, SLAB)
    found = smaps(slab.map.address)
    assert found["Rss"] == SLAB // 1024
    assert found["ShmemPmdMapped"] in range(0, SLAB // 1024 + 1, HUGE_PAGE // 1024)
    assert not any(slab.view)


def test_a_filled_slab_under_a_reader_is_made_of_huge_pages_and_keeps_its_bytes(pool):
    slab = created(pool)
    slab.view[:] = (wanted := os.urandom(SLAB))
    pool.seal(slab.number)
    reader = map_slabs([slab.fd], SLAB, SLAB)
    view = memoryview(reader.buffer).cast("B")
    try:
        view[:4] = b"mine"  # a copy of the reader's own, which nobody takes from it
        enlarge(slab, SLAB)
        assert bytes(slab.view) == wanted
        assert bytes(view) == b"mine" + wanted[4:]
    finally:
        view.release()
        reader.unmap()


def test_a_slab_that_was_let_go_of_is_faulted_by_nobody(pool):
    slab = created(pool)
    pool.drop(slab.number)
    enlarge(slab, SLAB)
    assert not pool.slabs


def test_a_slab_can_be_written_to_by_another_until_it_is_sealed_and_has_one_size_for_ever(pool):
    slab = created(pool)
    with pytest.raises(PermissionError):
        os.ftruncate(slab.fd, SLAB // 2)
    assert pool.unsealed(slab.number)
    with mmap.mmap(slab.fd, SLAB) as another:
        another[:4] = b"mine"
    pool.seal(slab.number)
    assert bytes(slab.view[:4]) == b"mine"
    assert not pool.unsealed(slab.number)
    with pytest.raises(PermissionError):
        mmap.mmap(slab.fd, SLAB)
    slab.view[:4] = b"ours"
