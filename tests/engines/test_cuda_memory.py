"""Memory that processes hand to each other, before a driver of memfds: who holds what, and that nothing is left."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from sllm_invoker.runner import cuda_memory
from sllm_invoker.runner.cuda_memory import SharedMemory

from sllm_faas.errors import PlatformError

GRAIN = 2 << 20


class Status(int):
    name = "CUDA_ERROR_PLAYED"


class Driver:
    """cuda.bindings.driver, as far as it is used. `refuses`: a function, and the status it returns."""

    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED=1)
    CUresult = SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2)

    def __init__(self, **refuses):
        self.refuses = refuses
        self.handles = set()
        self.mapped = {}
        self.reserved = {}

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if not name.startswith("cu"):
            return found
        status = self.refuses.get(name, 0)
        return (lambda *_: (Status(status),)) if status else lambda *given: (Status(0), *found(*given))

    @staticmethod
    def CUmemAllocationProp():
        return SimpleNamespace(location=SimpleNamespace())

    @staticmethod
    def CUmemAccessDesc():
        return SimpleNamespace()

    def cuMemGetAllocationGranularity(self, asked, _option):
        assert (asked.type, asked.requestedHandleTypes, asked.location.type, asked.location.id) == (1, 1, 1, 0)
        return (GRAIN,)

    def cuMemCreate(self, size, _asked, flags):
        assert (size % GRAIN, flags) == (0, 0)
        handle = os.memfd_create("device")
        os.truncate(handle, size)
        self.handles.add(handle)
        return (handle,)

    def cuMemExportToShareableHandle(self, handle, kind, _flags):
        assert kind == 1
        return (os.dup(handle),)

    def cuMemImportFromShareableHandle(self, descriptor, kind):
        assert kind == 1
        handle = os.dup(descriptor)
        self.handles.add(handle)
        return (handle,)

    def cuMemRelease(self, handle):
        self.handles.remove(handle)
        os.close(handle)
        return ()

    def cuMemAddressReserve(self, size, _alignment, _address, _flags):
        address = (len(self.reserved) + 1) << 40
        self.reserved[address] = size
        return (address,)

    def cuMemMap(self, address, size, offset, handle, _flags):
        assert (self.reserved[address], offset) == (size, 0)
        self.mapped[address] = mmap.mmap(handle, size)
        return ()

    def cuMemSetAccess(self, address, size, access, count):
        assert (self.reserved[address], count, access[0].flags) == (size, 1, 3)
        return ()

    def cuMemUnmap(self, address, size):
        assert self.reserved[address] == size
        del self.mapped[address]
        return ()

    def cuMemAddressFree(self, address, size):
        assert self.reserved.pop(address) == size
        return ()


@pytest.fixture(autouse=True)
def torch_reads_played_addresses(monkeypatch):
    def as_tensor(mapping, device):
        told = mapping.__cuda_array_interface__
        assert (device.type, told["typestr"], told["data"][1]) == ("cuda", "|u1", False)
        view = (ctypes.c_ubyte * told["shape"][0]).from_buffer(mapping._driver.mapped[told["data"][0]])
        view.owner = mapping
        return torch.frombuffer(view, dtype=torch.uint8)

    monkeypatch.setattr(cuda_memory.torch, "as_tensor", as_tensor)
    monkeypatch.setattr(cuda_memory.torch.cuda, "synchronize", lambda: None)


def test_what_one_process_wrote_another_reads_and_the_last_view_frees_it():
    one, other = Driver(), Driver()
    shared = SharedMemory(one, 0).create(3 * GRAIN - 5)
    shared.memory.fill_(7)
    seen = SharedMemory(other, 0).open(shared.descriptor, 3 * GRAIN - 5)
    os.close(shared.descriptor)
    assert (one.handles, other.handles) == (set(), set()), "maps keep memory, handles need not"
    del shared
    assert (one.mapped, one.reserved) == ({}, {})
    assert int(seen.long().sum()) == 7 * (3 * GRAIN - 5)
    part = seen[100:200].view(torch.int32)
    del seen
    assert len(other.mapped) == 1
    del part
    assert (other.mapped, other.reserved) == ({}, {})


@pytest.mark.parametrize(
    "function", ["cuMemExportToShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]
)
def test_a_call_that_fails_is_named_and_leaves_nothing(function):
    driver = Driver(**{function: 800})
    with pytest.raises(PlatformError, match=f"{function} failed with CUDA error 800"):
        SharedMemory(driver, 0).create(GRAIN)
    assert (driver.handles, driver.mapped, driver.reserved) == (set(), {}, {})


def test_a_device_that_is_full_says_so():
    with pytest.raises(MemoryError):
        SharedMemory(Driver(cuMemCreate=2), 0).create(GRAIN)


def test_without_the_bindings_nothing_is_shared(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert SharedMemory.of_device(0) is None
