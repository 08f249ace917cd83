"""Memory of a CUDA device that processes hand to each other by descriptors (the driver's virtual memory management).

    create(size) ── cuMemCreate, export, reserve, map ──► tensor + descriptor
    open(descriptor, size) ── import, reserve, map ──► tensor of the same bytes

Not the older handles (cudaIpcGetMemHandle, and torch's sharing, which is built on them): those need the process that
allocated to live, and to free nothing that another has open, which a process that is killed cannot promise; they name
whole blocks of the allocator, so that one group would bring its neighbours along; they cannot be opened where they
were made, nor be made of expandable segments. The memory made here is freed, by cuMemRelease's document, "when all
outstanding mappings to the memory are unmapped and when all outstanding references to the handle (including its
shareable counterparts) are also released": whoever dies, and in which order, takes nothing from the others.

Every process maps it for writing: a model that wrote to its weights would leave that to the next instance. None does
(the tests compare every byte after computing), and no user's code runs there.

What is copied into it is seen by other processes once an event after the copy was waited for on the host; there are no
events between processes. Sizes are rounded up to the driver's granularity (2 MiB), and the rest is never read.

Not measured, and not run: how long creating and mapping a group take; whether the driver frees a group within the
close of its last descriptor or shortly after (`device_weights` waits a moment); whether every kernel runs as fast on it
as on memory of torch's allocator. Calls go through cuda.bindings, which torch with CUDA brings; without it, or where
the driver lacks such memory (some virtual machines), `of_device` is None and nothing is shared.
"""

from __future__ import annotations

from typing import Any

import torch

from sllm_faas.errors import PlatformError
from sllm_invoker.runner.device import Shared


class _Mapping:
    """A range of device addresses as torch takes memory of others; unmapped when no tensor has it any more."""

    def __init__(self, driver: Any, address: int, length: int, size: int) -> None:
        self._driver = driver
        self._address = address
        self._length = length
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        torch.cuda.synchronize()  # what was launched may still read it
        self._driver.cuMemUnmap(self._address, self._length)
        self._driver.cuMemAddressFree(self._address, self._length)


class SharedMemory:
    """`driver` is cuda.bindings.driver, with a context current. Memory of the device numbered `ordinal`."""

    def __init__(self, driver: Any, ordinal: int) -> None:
        self._driver = driver
        self._place = torch.device("cuda", ordinal)
        self._handle_type = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._asked = driver.CUmemAllocationProp()
        self._asked.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._asked.requestedHandleTypes = self._handle_type
        self._asked.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._asked.location.id = ordinal
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._asked.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self._grain = int(self._call("cuMemGetAllocationGranularity", self._asked, least))

    @classmethod
    def of_device(cls, ordinal: int) -> SharedMemory | None:
        """None where there is no such memory."""
        try:
            from cuda.bindings import driver
        except ImportError:
            return None
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        status, supported = driver.cuDeviceGetAttribute(attribute, ordinal)
        if int(status) or not supported:
            return None
        try:
            return cls(driver, ordinal)
        except PlatformError:
            return None

    def create(self, size: int) -> Shared:
        """Raises MemoryError, PlatformError."""
        handle = self._call("cuMemCreate", self._length(size), self._asked, 0)
        try:
            memory = self._map(handle, size)
            return Shared(memory, int(self._call("cuMemExportToShareableHandle", handle, self._handle_type, 0)))
        finally:
            self._driver.cuMemRelease(handle)  # the map and the descriptor keep it

    def open(self, descriptor: int, size: int) -> torch.Tensor:
        """Raises PlatformError."""
        handle = self._call("cuMemImportFromShareableHandle", descriptor, self._handle_type)
        try:
            return self._map(handle, size)
        finally:
            self._driver.cuMemRelease(handle)

    def _map(self, handle: Any, size: int) -> torch.Tensor:
        length = self._length(size)
        address = int(self._call("cuMemAddressReserve", length, self._grain, 0, 0))
        try:
            self._call("cuMemMap", address, length, 0, handle, 0)
            try:
                self._call("cuMemSetAccess", address, length, [self._access], 1)
            except BaseException:
                self._driver.cuMemUnmap(address, length)
                raise
        except BaseException:
            self._driver.cuMemAddressFree(address, length)
            raise
        return torch.as_tensor(_Mapping(self._driver, address, length, size), device=self._place)

    def _length(self, size: int) -> int:
        return -(-size // self._grain) * self._grain

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *found = getattr(self._driver, function)(*arguments)
        if int(status) == int(self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
            raise MemoryError(function)
        if int(status):
            raise PlatformError(f"{function} failed with CUDA error {int(status)} ({status.name}).")
        return found[0] if found else None
