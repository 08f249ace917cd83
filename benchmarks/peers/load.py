"""One loader, in a process of its own: `python load.py NAME PATH CONTROL`.

CONTROL is a SOCK_SEQPACKET descriptor. Says "ready" when everything is imported (and, for ours, the template is
built) and what was loaded before is let go of; loads PATH each time it is told to, touches every page by a checksum
over every tensor and says what it found: `{"bytes", "checksum", "stages"}`. The clock is the other end's. Each
loader gives the tensors of PATH as its documentation shows it; what it returns lazily is paid for by the checksum.
"""

from __future__ import annotations

import array
import gc
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

Tensors = Iterator[torch.Tensor]
Load = Callable[[int, dict[str, float]], Tensors]


def safetensors(path: Path) -> Load:
    from safetensors.torch import load_file

    return lambda _fd, _stages: iter(load_file(path / "model.safetensors").values())


def torch_load(path: Path) -> Load:
    return lambda _fd, _stages: iter(torch.load(path / "model.pt", weights_only=True).values())


def transformers(path: Path) -> Load:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401 - imported before the clock starts

    return lambda _fd, _stages: iter(AutoModelForCausalLM.from_pretrained(path, dtype="auto").parameters())


def runai(path: Path) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load(_fd: int, _stages: dict[str, float]) -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(path / "model.safetensors"))
            for _name, tensor in streamer.get_tensors():
                yield tensor.clone()  # its buffer is used again

    return load


def fastsafetensors(path: Path) -> Load:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    def load(_fd: int, _stages: dict[str, float]) -> Tensors:
        loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
        loader.add_filenames({0: [str(path / "model.safetensors")]})
        buffer = loader.copy_files_to_device()
        yield from (buffer.get_tensor(name) for name in buffer.key_to_rank_lidx)

    return load


def tensorizer(path: Path) -> Load:
    from tensorizer import TensorDeserializer

    return lambda _fd, _stages: iter(TensorDeserializer(str(path / "model.tensors"), device="cpu").values())


def sllm(path: Path) -> Load:
    from sllm_invoker.runner import attach

    skeleton = attach.prepare(path)

    def load(fd: int, stages: dict[str, float]) -> Tensors:
        skeleton.channel = fd
        report = attach.attach(skeleton)
        stages.update(report.stages)
        weights = skeleton.weights
        assert weights is not None
        began = time.perf_counter()
        weights.wait()
        stages["wait"] = time.perf_counter() - began
        began = time.perf_counter()
        memory = torch.frombuffer(weights.buffer, dtype=torch.uint8)
        if not populate(memory.data_ptr(), memory.numel()):
            stages["populate_refused"] = 1.0
        stages["populate"] = time.perf_counter() - began
        return (tensor for _, _, tensor in attach.model_tensors(skeleton.model))

    return load


def populate(address: int, length: int) -> bool:
    from sllm_invoker.checkpoints.mapping import MADV_POPULATE_READ, advise

    first = address // 4096 * 4096
    return advise(first, address + length - first, MADV_POPULATE_READ)


LOADERS = {
    "sllm": sllm,
    "safetensors": safetensors,
    "torch.load": torch_load,
    "transformers": transformers,
    "runai-model-streamer": runai,
    "fastsafetensors": fastsafetensors,
    "tensorizer": tensorizer,
}


def checksum(tensors: Tensors) -> tuple[int, int]:
    """Every weight (they are bf16; what else a module holds is left out): bytes, and 64-bit words summed."""
    size = total = 0
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16:
            continue
        size += tensor.nbytes
        total += int(tensor.detach().contiguous().view(-1).view(torch.int64).sum())
    return size, total % 2**64


def main() -> None:
    torch.set_num_threads(1)
    name, path, control = sys.argv[1], Path(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))
    load = LOADERS[name](path)
    while True:
        gc.collect()
        control.send(b"ready")
        told, ancillary, _, _ = control.recvmsg(64, socket.CMSG_SPACE(4))
        if not told:
            return
        fd = array.array("i", ancillary[0][2])[0] if ancillary else -1
        stages: dict[str, float] = {}
        began = time.perf_counter()
        size, total = checksum(load(fd, stages))
        stages["whole"] = time.perf_counter() - began
        control.send(json.dumps({"bytes": size, "checksum": total, "stages": stages}).encode())


if __name__ == "__main__":
    main()
