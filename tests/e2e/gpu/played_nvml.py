"""`sllm_invoker.containers.nvml` of a machine with two GPUs."""

from __future__ import annotations

from sllm_invoker.containers.gpus import Gpu, Probe

GB = 1 << 30


class NoGpus:
    def gpus(self) -> tuple[Gpu, ...]:
        return ()

    def free(self, _uuid: str) -> int:
        return 0


class Two:
    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(Gpu(f"GPU-{number}", "played", 80 * GB) for number in range(2))

    def free(self, _uuid: str) -> int:
        return 80 * GB


def probe() -> Probe:
    return Two()
