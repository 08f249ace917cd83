"""One rank of tensor-parallel models, as a process: `rank_process.py RANK RANKS STORE OUT OBJECT SOURCE …`.

Of each model it attaches its part of OBJECT and lets transformers' own hooks compute with it, over gloo; beside that it
loads SOURCE as transformers does for a rank. OUT gets a list of the logits of both and the names of parameters that
differ.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from sllm_invoker.runner.attach import attach, prepare, tensor_places
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

IDS = torch.tensor([[5, 9, 3, 7, 1, 8, 4, 2, 6, 11, 13]])


def attached(directory: Path, rank: int, ranks: int) -> Any:
    """The model of one rank, hooks around it and its slices in it."""
    skeleton = prepare(directory, rank=rank)
    model = skeleton.model
    modules = dict(model.named_modules())
    for alias in skeleton.checkpoint.manifest.ties:  # transformers marks parameters before it ties them
        owner, _, leaf = alias.rpartition(".")
        untied = torch.empty_like(modules[owner]._parameters[leaf])
        modules[owner]._parameters[leaf] = torch.nn.Parameter(untied)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    plan = model._resolve_parallel_plans(DistributedConfig(tp_size=ranks))[0]
    apply_tensor_parallelism(model, mesh, plan)
    marked = {name: tensor for name, _, tensor, _ in tensor_places(model) if isinstance(tensor, DTensor)}
    attach(skeleton)
    made: dict[int, Any] = {}
    for name, _, tensor, holder in list(tensor_places(model)):
        if name in marked:
            like = marked[name]
            if id(tensor) not in made:
                whole = DTensor.from_local(
                    tensor.detach(), like.device_mesh, like.placements, run_check=False, shape=like.shape,
                    stride=like.stride(),
                )  # fmt: skip
                made[id(tensor)] = torch.nn.Parameter(whole)
            holder[name.rpartition(".")[2]] = made[id(tensor)]
    return model


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compared(directory: str, source: str, rank: int, ranks: int) -> dict[str, Any]:
    ours = attached(Path(directory), rank, ranks)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, distributed_config=DistributedConfig(tp_size=ranks)
    ).eval()
    found, wanted = dict(ours.named_parameters()), dict(theirs.named_parameters())
    different = [name for name in wanted if not torch.equal(local(found[name]), local(wanted[name]))]
    with torch.inference_mode():
        logits = [model(IDS, use_cache=False).logits for model in (ours, theirs)]
    return {"ours": logits[0], "theirs": logits[1], "different": different}


def main(rank: str, ranks: str, store: str, out: str, *models: str) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, int(ranks)), rank=int(rank), world_size=int(ranks))
    try:
        pairs = zip(models[::2], models[1::2], strict=True)
        found = [compared(directory, source, int(rank), int(ranks)) for directory, source in pairs]
    finally:
        dist.destroy_process_group()
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
