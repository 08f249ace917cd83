"""Quantised models: weights of a few bits, whose modules keep scales beside each weight.

    build(model, config)          modules of the quantisation library in place of the plain ones, on the meta device
    companions(module)            what such a module keeps beside its parameters, as tensors to store
    modules(model) -> [Packed]    the way back, without copying

bitsandbytes (`load_in_8bit`; `load_in_4bit`, nf4 and fp4) runs on CPU and CUDA. The layout is the one it serialises, so
the tensors of an object are those of a hub file. Not here: quantising (ingest takes quantised checkpoints as they are)
and the kernels, which are the library's own: on a CPU with AVX512-BF16 a 4-bit module repacks its weights at its first
call, which costs every instance a copy of its own. Only checkpoints that need the library import it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete
from sllm_invoker.checkpoints.object import first_line

if TYPE_CHECKING:
    import torch

METHODS = ("bitsandbytes",)
_NEEDED = ("bitsandbytes", "accelerate")


def method(config: Any) -> str:
    """The quantisation method of a transformers config; empty for none."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    name = settings.get("quant_method", "")
    return str(getattr(name, "value", name)) or "unnamed"


def check(config: Any, name: str) -> str:
    """The method of a source that may be ingested. Raises BadSpec for one that is not supported, or not installed."""
    found = method(config)
    if found and found not in METHODS:
        raise BadSpec(
            f"{name} is quantised by {found}, which is not supported; supported: {', '.join(METHODS)}.",
            hint="Use the unquantised model, or quantise it with bitsandbytes.",
        )
    if found and (missing := [each for each in _NEEDED if importlib.util.find_spec(each) is None]):
        raise BadSpec(
            f"{name} is quantised by {found}, which needs {' and '.join(missing)}.",
            hint="pip install 'sllm-faas[quantized]'",
        )
    return found


def build(model: Any, config: Any) -> None:
    """Turn a skeleton on the meta device into that of the quantised model. Raises BadSpec."""
    check(config, type(model).__name__)
    from transformers.quantizers import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.preprocess_model(model, device_map={"": "cpu"})
    except Exception as error:  # whatever its validation meets
        raise BadSpec(f"the model's quantization_config cannot be used: {first_line(error)}.") from error


def is_quantized(module: Any) -> bool:
    """Whether a module keeps quantised weights; imports nothing to tell."""
    return any(cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__)


def companions(module: Any) -> dict[str, torch.Tensor]:
    """Tensors that the module's state has beside its parameters, by name within the module."""
    own = set(dict(module.named_parameters()))
    return {name: tensor.detach() for name, tensor in module.state_dict().items() if name not in own}


@dataclass(slots=True)
class Packed:
    """A quantised module of a skeleton, and where its tensors are put for it: `weight` and its companions, by name
    within the module."""

    name: str
    module: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def unpack(self) -> None:
        """Give the module its weight; its companions are read now. Raises CheckpointIncomplete, CheckpointCorrupt."""
        import bitsandbytes as bnb

        module, beside = self.module, dict(self.tensors)
        try:
            weight = beside.pop("weight").detach()
            if isinstance(module, bnb.nn.Linear8bitLt):
                module.weight = bnb.nn.Int8Params(
                    weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=beside["SCB"]
                )
                shape = tuple(weight.shape)
            else:
                stats = {key.removeprefix("weight."): tensor for key, tensor in beside.items()}
                module.weight = bnb.nn.Params4bit.from_prequantized(weight, stats, device=weight.device, module=module)
                shape = tuple(module.weight.quant_state.shape)
        except KeyError as error:
            raise CheckpointIncomplete(f"quantised module {self.name} has no {error}.") from None
        except (ValueError, AssertionError, RuntimeError, TypeError) as error:
            what = f"the quantisation state of {self.name} cannot be read: {first_line(error)}."
            raise CheckpointCorrupt(what) from error
        if shape != (module.out_features, module.in_features):
            wanted = [module.out_features, module.in_features]
            raise CheckpointCorrupt(
                f"quantised {self.name} has shape {list(shape)}, the model's config wants {wanted}."
            )


def modules(model: Any) -> tuple[Packed, ...]:
    return tuple(Packed(name, module) for name, module in model.named_modules() if is_quantized(module))
