"""Binding a checkpoint to a model without copying it.

Two halves, because a process forks between them:

    prepare(object)   in the template process, single-threaded: config, skeleton on the meta device, tokenizer
    attach(skeleton)  in the instance, after the fork: map the weights, assign them

The weights are mapped private copy-on-write, from the part file or from the checkpoint store's slabs (`weights`):
reads see memory that all instances share, a stray write stays in this process. Tensors are views of the map at the
manifest's offsets. Nothing is initialised, converted or, on a CPU, copied; on a GPU they are views of its memory, into
which the bytes are copied while the model is bound (`device_weights`). A rank of a tensor-parallel model has its slices
for parameters; what makes the ranks compute together is put around them by transformers, and not here.

Invariant: after `attach` no parameter, buffer or tensor attribute is on the meta device: `prepare` raises
CheckpointIncomplete naming the first one that would be. It is not for anything that is not an object of the store.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete
from sllm_invoker.checkpoints.object import CheckpointObject, Part, TensorKind, first_line, open_object, verify_files
from sllm_invoker.runner import quantized
from sllm_invoker.runner.adapters import Adapters
from sllm_invoker.runner.adapters import load as load_adapters
from sllm_invoker.runner.engines.base import AttachReport
from sllm_invoker.runner.tokens import TextCodec
from sllm_invoker.runner.weights import Weights, from_file, from_files, from_store, joined

if TYPE_CHECKING:
    from sllm_invoker.runner.device_weights import Stage

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor, and everywhere in the model it belongs: (holder, name); a holder is a module's dict of
    parameters, of buffers or of attributes. Several of one tensor are ties, and stay so."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool
    at: tuple[tuple[dict[str, Any], str], ...]


@dataclass(slots=True)
class Skeleton:
    """A model without weights, what belongs where in it, and what else can be made before the fork. `weights` is set
    by `attach`: to what was `begun`, else it asks the checkpoint store for them where there is a `channel` to it, and
    copies them to the device behind `stage` where there is one. `part` is what it has of the object: what `rank` reads,
    all for None."""

    checkpoint: CheckpointObject
    part: Part
    model: Any
    places: tuple[Place, ...]
    codec: TextCodec | None
    eos: frozenset[int]
    packed: tuple[quantized.Packed, ...] = ()
    replaced: tuple[Any, ...] = ()
    """What `attach` puts tensors in place of. Kept: to free them would write to pages that are shared with the
    template, and each would be copied."""
    adapters: Adapters | None = None
    rank: int | None = None
    channel: int = -1
    stage: Stage | None = None
    begun: Weights | None = None
    weights: Weights | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.stage.device.place if self.stage is not None else torch.device("cpu")


def prepare(
    checkpoint: CheckpointObject | Path, adapters: Mapping[str, Path] | None = None, rank: int | None = None
) -> Skeleton:
    """Build everything that needs no weights of the model; adapters, by name, are small and loaded here. `rank`: of a
    tensor-parallel checkpoint, the one that this process is.

    Runs torch on one thread: forking after an OpenMP region with several would deadlock the child in its first one. The
    files it reads are checked against the manifest here: what the store checks as it reads are the weights alone.

    Raises CheckpointCorrupt or BadSpec when config or tokenizer are not usable, the tensors not the model's, or the
    rank not one of the checkpoint's; CheckpointIncomplete when a tensor would stay on meta.
    """
    torch.set_num_threads(1)
    if isinstance(checkpoint, Path):
        checkpoint = open_object(checkpoint)
    part = joined(checkpoint.parts_of(rank))
    verify_files(checkpoint)
    directory, manifest = checkpoint.directory, checkpoint.manifest
    model = build_skeleton(load_config(directory), manifest.architecture)
    model.eval()
    packed = quantized.modules(model)
    places = _places(model, checkpoint, part, packed)
    codec = TextCodec.load(directory) if (directory / "tokenizer_config.json").exists() else None
    objects = {name: open_object(path) for name, path in (adapters or {}).items()}
    return Skeleton(
        checkpoint=checkpoint,
        part=part,
        model=model,
        places=places,
        packed=packed,
        replaced=tuple(holder.get(name) for place in places for holder, name in place.at),
        adapters=load_adapters(model, objects, checkpoint.digest) if objects else None,
        codec=codec,
        rank=rank,
        eos=end_tokens(directory),
    )


def attach(skeleton: Skeleton, directory: Path | None = None) -> AttachReport:
    """Map the weights and assign them. `directory`: where this process sees the object, if elsewhere.

    The bytes may still be on their way (but those of quantised models, which are unpacked here): compute under
    `arriving`, or wait for `skeleton.weights`. Raises CheckpointUnavailable when the object has gone since `prepare`,
    CheckpointCorrupt when the file is not what the manifest says (its content is checked by the store), BadSpec for a
    quantised model on a GPU, NoCapacity when that has too little memory.
    """
    started = time.perf_counter()
    checkpoint = skeleton.checkpoint
    if directory is not None and directory != checkpoint.directory:
        checkpoint = open_object(directory)
        if checkpoint.digest != skeleton.checkpoint.digest:
            raise BadSpec(
                f"{directory} holds checkpoint {checkpoint.digest}, the skeleton is of {skeleton.checkpoint.digest}."
            )
    part = skeleton.part
    if skeleton.stage is not None:
        _suit_device(skeleton)
    weights = skeleton.begun or begin(checkpoint, skeleton.channel, skeleton.stage, skeleton.rank)
    skeleton.channel, skeleton.begun = -1, None
    mapped = time.perf_counter()
    _assign(skeleton.places, weights, skeleton.device)
    skeleton.checkpoint, skeleton.weights = checkpoint, weights
    if skeleton.packed:
        weights.wait()
    for each in skeleton.packed:
        each.unpack()
    done = time.perf_counter()
    return AttachReport(
        bytes=part.bytes,
        tensors=len(part.tensors),
        seconds=done - started,
        stages={"map": mapped - started, "assign": done - mapped},
    )


def begin(checkpoint: CheckpointObject, channel: int, stage: Stage | None, rank: int | None = None) -> Weights:
    """The weights alone, mapped and, where there is a `stage`, on their way to its device: the skeleton may be built
    beside that. What a rank reads comes from files: the store has whole objects. Raises as `attach` does, and BadSpec
    for a rank that the checkpoint has not got."""
    parts, path = checkpoint.parts_of(rank), checkpoint.part_path()
    if len(parts) > 1:
        weights = from_files(checkpoint.directory, parts)
    else:
        weights = from_store(channel, path, parts[0]) if channel >= 0 else from_file(path, parts[0])
    if stage is None:
        return weights
    from sllm_invoker.runner.device_weights import DeviceWeights

    return DeviceWeights(weights, stage)


# -- pieces, shared with ingest ------------------------------------------------------------------------------


def load_config(directory: Path) -> Any:
    """The transformers config object of a directory; runs no code from it.

    Raises CheckpointCorrupt when config.json is not JSON, BadSpec when it describes no known model."""
    from transformers import AutoConfig

    path = directory / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadSpec(f"{directory} has no config.json.", hint="A model directory needs one.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{path} is not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise CheckpointCorrupt(f"{path} is not a JSON object.")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its validation meets
        code = " It asks for code of its own, which is refused." if "auto_map" in raw else ""
        raise BadSpec(
            f"{path} does not describe a model that transformers knows: {first_line(error)}.{code}"
        ) from error


def model_class(architecture: str) -> Any:
    """The transformers class of that name. Raises BadSpec."""
    import transformers

    cls = getattr(transformers, architecture, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise BadSpec(
            f"architecture {architecture!r} is not one that transformers {transformers.__version__} has.",
            hint="Code shipped with a model is never run.",
        )
    return cls


def build_skeleton(config: Any, architecture: str) -> Any:
    """The module tree with every tensor on the meta device; no initialisation runs."""
    from transformers.initialization import no_init_weights

    cls = model_class(architecture)
    try:
        with torch.device("meta"), no_init_weights():
            model = cls._from_config(config)
    except Exception as error:  # a config that validates may still be impossible to build
        raise BadSpec(f"{architecture} cannot be built from its config.json: {first_line(error)}.") from error
    if quantized.method(config):
        quantized.build(model, config)
    return model


def with_layers(config: Any, count: int) -> Any:
    """A copy of a model's config with its first `count` layers: whatever has an entry for each is cut."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    for name, value in layer_lists(text).items():
        setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return shorter


def layer_lists(text: Any) -> dict[str, list[Any]]:
    """What of a text config has an entry for each layer, by name."""
    count = text.num_hidden_layers
    return {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == count > 1}


def end_tokens(directory: Path) -> frozenset[int]:
    """End-of-sequence ids: generation_config.json's, else config.json's; an id or a list of them."""
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads((directory / name).read_bytes()).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise CheckpointCorrupt(f"{directory / name} is not a JSON object: {error}.") from error
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int for i in ids):
                raise CheckpointCorrupt(f"{directory / name}: eos_token_id {value!r} is neither an id nor a list.")
            return frozenset(ids)
    return frozenset()


def tensor_places(model: Any) -> Iterator[tuple[str, TensorKind, torch.Tensor, dict[str, Any]]]:
    """Every tensor a module tree holds, aliases included, and what holds it under the last part of its name:
    parameters, buffers of either sort, attributes. Other tensors may be put in their place meanwhile."""
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        holders: tuple[tuple[TensorKind, dict[str, Any]], ...] = (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        )
        for kind, holder in holders:
            for name, tensor in holder.items():
                if isinstance(tensor, torch.Tensor):
                    yield dot + name, kind, tensor, holder


def model_tensors(model: Any) -> Iterator[tuple[str, TensorKind, torch.Tensor]]:
    """Those without their holders."""
    return ((name, kind, tensor) for name, kind, tensor, _ in tensor_places(model))


def _places(
    model: Any, checkpoint: CheckpointObject, part: Part, packed: tuple[quantized.Packed, ...]
) -> tuple[Place, ...]:
    """Where each stored tensor belongs. Raises CheckpointCorrupt when one belongs nowhere or has another shape there,
    CheckpointIncomplete when something would stay on the meta device."""
    ties, splits = checkpoint.manifest.ties, checkpoint.manifest.splits
    ranks = checkpoint.manifest.layout.tensor_parallel
    modules = dict(model.named_modules())
    entries = {entry.name: entry for entry in part.tensors}
    found: dict[str, list[tuple[dict[str, Any], str]]] = {name: [] for name in entries}
    held = {each.name: each for each in packed}
    for name, source in [*((n, n) for n in entries), *ties.items()]:
        owner, _, leaf = name.rpartition(".")
        module, entry = modules.get(owner), entries[source]
        if entry.kind == "companion" or (owner in held and leaf == "weight"):
            while owner not in held and owner:
                owner = owner.rpartition(".")[0]
            if owner not in held:
                raise CheckpointCorrupt(f"the checkpoint has tensor {name}, but the model is not quantised there.")
            found[source].append((held[owner].tensors, name.removeprefix(f"{owner}.")))
            continue
        if module is None:
            raise CheckpointCorrupt(f"the checkpoint has tensor {name}, but the model has no module {owner!r}.")
        if entry.kind == "attribute":
            holder: dict[str, Any] = module.__dict__
        else:
            holder = module._parameters if entry.kind == "parameter" else module._buffers
            split = splits.get(source)
            _fits(holder, leaf, split.whole(entry.shape, ranks) if split is not None else entry.shape, name)
        found[source].append((holder, leaf))
    filled = {*entries, *ties}
    if left := next((name for name, _, tensor in model_tensors(model) if tensor.is_meta and name not in filled), None):
        raise CheckpointIncomplete(
            f"checkpoint {checkpoint.digest[:12]} has no {left}, which {checkpoint.manifest.architecture} needs.",
            hint="Ingest the model again with the installed transformers version.",
        )
    return tuple(
        Place(
            part.data_start + entry.start,
            TORCH_DTYPES[entry.dtype],
            entry.shape,
            entry.kind == "parameter",
            tuple(found[entry.name]),
        )
        for entry in part.tensors
    )


def _suit_device(skeleton: Skeleton) -> None:
    if skeleton.packed:
        raise BadSpec("the checkpoint is quantised; on a GPU only unquantised ones are served so far.", param="gpu")
    if skeleton.adapters is not None:
        skeleton.adapters.move(skeleton.device)


def _assign(places: tuple[Place, ...], weights: Weights, device: torch.device) -> None:
    for place in places:
        count = prod(place.shape)
        if count:
            tensor = weights.view(place.dtype, count, place.offset).view(place.shape)
        else:
            tensor = torch.empty(place.shape, dtype=place.dtype, device=device)
        # As `from_pretrained` leaves them, though nobody trains here: for a weight that wants no gradient matmul takes
        # another path for inputs that are slices, and that path copies the whole weight (the head's, on every prefill).
        value = torch.nn.Parameter(tensor, requires_grad=place.dtype.is_floating_point) if place.parameter else tensor
        for holder, name in place.at:
            holder[name] = value


def _fits(slots: dict[str, Any], leaf: str, shape: tuple[int, ...], name: str) -> None:
    if leaf not in slots:
        raise CheckpointCorrupt(f"the checkpoint has tensor {name}, but the model has no such tensor.")
    wanted = slots[leaf]
    if wanted is not None and wanted.shape != shape:
        raise CheckpointCorrupt(
            f"tensor {name} has shape {list(shape)}, the model's config wants {list(wanted.shape)}."
        )
