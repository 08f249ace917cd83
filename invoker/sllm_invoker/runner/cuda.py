"""CUDA through torch: the `Device` of a process that sees one GPU.

    open_stage()     the device and its locked host memory; the first call makes the CUDA context
    warm()           the same, and whatever else the first forward pass would wait for

A process that has called either must not fork. Not here: which GPU it is; whoever makes the process lets it see one
(CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from sllm_faas.errors import NoCapacity, PlatformError, Unavailable
from sllm_invoker.runner import template
from sllm_invoker.runner.cuda_memory import SharedMemory
from sllm_invoker.runner.device import Event, Memory, Shared
from sllm_invoker.runner.device_weights import Stage

_PORTABLE, _READ_ONLY = 0x01, 0x08  # cudaHostRegister*


class CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def hold(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class Cuda:
    """See `device.Device`. Raises Unavailable where torch sees no CUDA device."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise Unavailable(
                f"the function asks for a GPU, and torch {torch.__version__} sees no CUDA device here.",
                hint="Install a torch with CUDA on the node, and look at nvidia-smi there.",
            )
        self.place = torch.device("cuda", 0)
        self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._side = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        self._shared = SharedMemory.of_device(0)

    def __repr__(self) -> str:
        memory = self.memory()
        return f"<{torch.cuda.get_device_name(self.place)}, {memory.free} of {memory.total} bytes free>"

    def memory(self) -> Memory:
        return Memory(*torch.cuda.mem_get_info(self.place))

    def allocate(self, size: int) -> torch.Tensor:
        try:
            found = torch.empty(size, dtype=torch.uint8, device=self.place)
        except torch.OutOfMemoryError as error:
            raise self._full(size) from error
        self._side.wait_stream(torch.cuda.current_stream())  # whoever had this memory before may still compute
        return found

    def share(self, size: int) -> Shared | None:
        if self._shared is None:
            return None
        try:
            return self._shared.create(size)
        except MemoryError as error:
            raise self._full(size) from error

    def open(self, descriptor: int, size: int) -> torch.Tensor:
        if self._shared is None:
            raise PlatformError("this driver has no memory that processes share.")
        return self._shared.open(descriptor, size)

    def _full(self, size: int) -> NoCapacity:
        memory = self.memory()
        return NoCapacity(f"{size} bytes of GPU memory are needed; {memory.free} of {memory.total} are free.")

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def register(self, address: int, length: int, *, read_only: bool = False) -> bool:
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        if not int(self._runtime.cudaHostRegister(address, length, flags)):
            return True
        with contextlib.suppress(RuntimeError):  # the runtime keeps the error for the next launch, which reports it
            torch.zeros(1, device=self.place)
        return False

    def unregister(self, address: int) -> None:
        self._runtime.cudaHostUnregister(address)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # whoever waits sleeps
        event.record(self._side)
        return CudaEvent(event)


@functools.cache
def open_stage() -> Stage:
    """The process's device, behind its locked memory; always the same. Raises Unavailable."""
    return Stage(Cuda())


def warm() -> None:
    """Have what a first forward pass needs beside the weights: libraries, context, locked memory, kernels.

    A tiny random Llama runs once: a kernel is loaded onto the device at its first launch. Raises Unavailable.
    """
    template.import_libs(("torch", "transformers"))
    import transformers

    place = open_stage().device.place
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device(place), torch.inference_mode():
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        cache = model(torch.arange(16)[None], use_cache=True).past_key_values
        model(torch.arange(1)[None], past_key_values=cache).logits.float().cpu()
    del model, cache
    torch.cuda.empty_cache()
