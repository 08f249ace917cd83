"""LoRA adapters as objects of their own: two small matrices per adapted module, and the digest of their base.

An adapter holds nothing of its base. Its tensors are `<module>.lora_A` [rank, in] and `<module>.lora_B` [out, rank],
named as the base's modules are, in the base's execution order, in float32 as PEFT computes them; `adapter_config.json`
goes with them. What the plain update B·A·x·scale cannot express (DoRA, trained biases, replaced modules, embeddings) is
refused by name. Not here: computing with them (`runner.adapters`). Imports no torch until it reads weights.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sllm_faas.errors import BadSpec, CheckpointCorrupt
from sllm_invoker.checkpoints.object import (
    FORMAT_VERSION,
    CheckpointObject,
    FileEntry,
    Layout,
    Manifest,
    Progress,
    Source,
    file_digest,
    identity,
    part_names,
)
from sllm_invoker.checkpoints.part import write_part
from sllm_invoker.checkpoints.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Origin

if TYPE_CHECKING:
    import torch

    from sllm_invoker.checkpoints.store import CheckpointStore

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of PEFT's adapter_config.json decides the result. Fields are named as there."""

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] | None = None
    layer_replication: Any = None
    trainable_token_indices: Any = None
    alora_invocation_tokens: Any = None
    target_parameters: Any = None

    def scale(self, module: str, rank: int) -> float:
        """The factor of B·A·x: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA (arXiv:2312.03732)."""
        keys = (key for key in self.alpha_pattern if re.match(rf"(.*\.)?({key})$", module))
        alpha = self.alpha_pattern.get(next(keys, ""), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def refused(self) -> str:
        """What of it cannot be served, empty when all can."""
        settings = {
            "peft_type": self.peft_type.upper() != "LORA",
            "bias": self.bias != "none",
            **{
                name: bool(getattr(self, name))
                for name in (
                    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices",
                    "alora_invocation_tokens", "target_parameters",
                )
            },
        }  # fmt: skip
        return next((f"{name}={getattr(self, name)!r}" for name, bad in settings.items() if bad), "")


def read_config(path: Path) -> AdapterConfig:
    """Raises CheckpointCorrupt when it is not one, BadSpec when it asks for what is not supported."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=AdapterConfig)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointCorrupt(f"{path} is not the configuration of an adapter: {error}.") from error
    if what := config.refused():
        raise BadSpec(
            f"{path} has {what}, which is not supported; supported: plain LoRA of linear layers.",
            hint="Merge the adapter into its base and ingest that.",
        )
    return config


def write_adapter(
    store: CheckpointStore, origin: Origin, content: str, base: CheckpointObject, report: Progress
) -> str:
    """Make the object of an adapter of `base`; its digest. Raises BadSpec, CheckpointCorrupt."""
    if base.manifest.base:
        raise BadSpec(f"{base.manifest.source.name} is an adapter itself; an adapter adapts a model.", param="base")
    if base.manifest.layout.tensor_parallel != 1:
        raise BadSpec(
            f"{base.manifest.source.name} is in parts for {base.manifest.layout.tensor_parallel} ranks; the base of an "
            "adapter must be whole.",
            param="base",
        )
    report(0, 0, "load")
    config = read_config(origin.directory / ADAPTER_CONFIG)
    pairs = _pairs(origin, base)
    try:
        for module, pair in pairs.items():
            config.scale(module, pair["A"].shape[0])
    except (re.error, ZeroDivisionError) as error:
        raise CheckpointCorrupt(f"{origin.name}/{ADAPTER_CONFIG} gives no scale: {error}.") from error
    tensors = {f"{module}.lora_{side}": pair[side] for module, pair in pairs.items() for side in "AB"}
    facts = base.manifest
    with store.workspace() as work:
        path = work / ADAPTER_CONFIG
        path.write_bytes((origin.directory / ADAPTER_CONFIG).read_bytes())
        files = (FileEntry(path.name, path.stat().st_size, file_digest(path)),)
        order = {module: index for index, module in enumerate(_modules(base))}
        part = write_part(
            work / part_names(1)[0], {name: ("parameter", t) for name, t in tensors.items()}, order, report
        )
        layout = Layout(facts.layout.version, facts.layout.transformers, "float32")
        manifest = Manifest(
            format=FORMAT_VERSION,
            digest=identity(layout, (part,), files, base.digest),
            source=Source(name=origin.name, digest=content, revision=origin.revision),
            layout=layout,
            architecture=facts.architecture,
            parts=(part,),
            ties={},
            files=files,
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            total_bytes=part.bytes,
            kv_bytes_per_token=facts.kv_bytes_per_token,
            max_context=facts.max_context,
            vocabulary=facts.vocabulary,
            generates=facts.generates,
            batched=facts.batched,
            chat_template=facts.chat_template,
            base=base.digest,
        )
        report(part.bytes, part.bytes, "sync")
        store.finish(work, manifest)
    store.ensure_verified(manifest.digest)
    return manifest.digest


def _modules(base: CheckpointObject) -> dict[str, tuple[int, ...]]:
    """The base's modules that have a weight matrix, in execution order, with its shape."""
    manifest = base.manifest
    stored = {tensor.name: tensor.shape for part in manifest.parts for tensor in part.tensors}
    stored |= {alias: stored[name] for alias, name in manifest.ties.items()}
    return {name.removesuffix(".weight"): shape for name, shape in stored.items() if name.endswith(".weight")}


def _pairs(origin: Origin, base: CheckpointObject) -> dict[str, dict[str, torch.Tensor]]:
    """Module → its A and B, checked against each other and, where weights are not packed, against the base."""
    import torch
    from safetensors.torch import load_file

    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(origin.directory / ADAPTER_WEIGHTS).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BadSpec(f"{origin.name} has tensor {key}, which is not supported; supported: lora_A and lora_B.")
        pairs.setdefault(match[1], {})[match[2]] = tensor.to(torch.float32)
    if not pairs:
        raise CheckpointCorrupt(f"{origin.name} has no lora_A and lora_B.")
    modules = _modules(base)
    for module, pair in pairs.items():
        if module not in modules:
            raise BadSpec(
                f"{origin.name} adapts {module}, which {base.manifest.source.name} does not have.",
                hint="Is it an adapter of that model?",
                param="base",
            )
        if pair.keys() != {"A", "B"}:
            raise CheckpointCorrupt(f"{origin.name} has only lora_{next(iter(pair))} of {module}.")
        a, b, wanted = pair["A"], pair["B"], modules[module]
        fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
        if fits and not base.manifest.quantization:
            fits = sorted((b.shape[0], a.shape[1])) == sorted(wanted)
        if not fits:
            raise CheckpointCorrupt(
                f"{origin.name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} do not fit its weight "
                f"{list(wanted)}."
            )
    return pairs
