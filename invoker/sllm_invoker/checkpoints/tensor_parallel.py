"""Which tensors the ranks of a tensor-parallel model share out, and how: as transformers' own plan for the model says.

There is no list of architectures or styles here. Each style of the plan marks the parameters that it splits, on a
skeleton without weights and a mesh without processes, and the marks are read: what transformers would hand to rank R is
what rank R's part has. Not here: the collectives that computing with parts needs, which are transformers' too.

Invariant: shares are equal. A plan that splits unequally, an attention head that would be cut, and tied weights that
would come apart are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sllm_faas.errors import BadSpec
from sllm_faas.spec import MAX_RANKS
from sllm_invoker.checkpoints.object import Split, first_line

if TYPE_CHECKING:
    import torch


def plan(config: Any, architecture: str, ranks: int) -> dict[str, Split]:
    """How `ranks` (at least 2) share out the parameters of a model, by name, aliases of tied ones included. Raises
    BadSpec when transformers has no plan for it, or one that cannot be carried out for so many."""
    import transformers

    from sllm_invoker.runner.attach import build_skeleton

    model = build_skeleton(config, architecture)
    if not model.tp_plan:
        raise BadSpec(
            f"transformers {transformers.__version__} has no tensor-parallel plan for {architecture}; tensor_parallel "
            "must be 1.",
            param="tensor_parallel",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    try:
        splits = _marked(model, ranks)
    except (ValueError, ImportError) as error:  # an unknown style; a transformers that has no such plans
        raise BadSpec(
            f"the tensor-parallel plan of {architecture} cannot be carried out: {first_line(error)}.",
            param="tensor_parallel",
        ) from error
    if why := _obstacle(model, shapes, splits, ranks):
        most = min([MAX_RANKS, *(shapes[name][split.dim] for name, split in splits.items())])
        allowed = [n for n in range(1, most + 1) if not _obstacle(model, shapes, splits, n)]
        raise BadSpec(
            f"{architecture} cannot be split for {ranks} ranks: {why}; allowed for this model: "
            f"{', '.join(map(str, allowed))}.",
            param="tensor_parallel",
        )
    return splits


def check_ties(ties: Mapping[str, str], splits: Mapping[str, Split]) -> None:
    """Raises BadSpec for tied tensors that the plan treats as two."""
    for alias, name in ties.items():
        if splits.get(alias) != splits.get(name):
            raise BadSpec(
                f"{alias} and {name} are one tensor, and the plan of transformers splits them in two ways; "
                "tensor_parallel must be 1.",
                param="tensor_parallel",
            )


def share(tensor: torch.Tensor, split: Split, rank: int, ranks: int) -> torch.Tensor:
    """What one rank has of a tensor; a view of it where there is one group."""
    before, size, after = tensor.shape[: split.dim], tensor.shape[split.dim], tensor.shape[split.dim + 1 :]
    blocks = tensor.reshape(*before, split.groups, ranks, size // (split.groups * ranks), *after)
    return blocks.select(split.dim + 1, rank).flatten(split.dim, split.dim + 1)


def _marked(model: Any, ranks: int) -> dict[str, Split]:
    """Raises ValueError for a style that transformers does not know, or that does not suit a parameter; ImportError
    for a transformers that marks nothing."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    mesh = DeviceMesh("cpu", torch.arange(ranks), mesh_dim_names=("tp",), _init_backend=False, _rank=0)
    modules = dict(model.named_modules())
    splits: dict[str, Split] = {}
    for name, style_name in model._resolve_parallel_plans(DistributedConfig(tp_size=ranks))[0].items():
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if module is None or leaf not in module._parameters:  # a module's: it computes otherwise, and holds the same
            continue
        style = ALL_PARALLEL_STYLES[style_name]
        style.validate_param(module, leaf, mesh, parameter_name=name)
        style.shard_param(module, leaf, mesh)
        marked = module._parameters[leaf]
        for placement in getattr(marked, "placements", ()):
            if isinstance(placement, Replicate):
                continue
            if not hasattr(placement, "dim"):
                raise ValueError(f"{name} would be {placement}")
            splits[name] = Split(placement.dim % marked.ndim, getattr(placement, "split_factor", 1))
    return splits


def _obstacle(model: Any, shapes: dict[str, tuple[int, ...]], splits: dict[str, Split], ranks: int) -> str:
    """Why so many ranks cannot have equal shares; empty: they can."""
    from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

    for name, split in splits.items():
        size = shapes[name][split.dim]
        if size % (split.groups * ranks):
            blocks = f"{split.groups} blocks of " if split.groups > 1 else ""
            return (
                f"tensor {name} of shape {list(shapes[name])} does not fall into {blocks}{ranks} equal shares along "
                f"dimension {split.dim}"
            )
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads % ranks:
        return f"it has {heads} attention heads"
    shared = getattr(text, "num_key_value_heads", None) or heads
    if shared and get_kv_heads_per_rank(model.tp_plan, shared, ranks) is None:
        return f"it has {shared} key-value heads"
    return ""
