"""The layers of warmth that an instance of a function is forked through. Pure; which exist is a node's to say.

    base                      one per node
      └─ libs:NAMES           torch, transformers …: one per set of libraries
           └─ template:DIGEST skeleton and tokenizer of one checkpoint, with the adapters of a function

Controller and invoker name them by this one rule, so that what a node reports and what a start needs can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sllm_faas.spec import FunctionSpec, Warmth, short_digest

BASE = "base"
HEAVY_LIBS = frozenset({"torch", "transformers", "numpy", "scipy", "pandas", "tokenizers", "safetensors"})
"""Libraries worth a layer: slow to import, harmless to have imported before a fork."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One zygote's identity. `parent` is the key of the zygote that it is forked from."""

    key: str
    warmth: Warmth
    parent: str = ""
    libs: tuple[str, ...] = ()


def path(spec: FunctionSpec | None, digest: str) -> tuple[Layer, ...]:
    """The layers an instance of `spec` is forked through, base first; `digest`: of its checkpoint, if it has one."""
    if spec is None:
        return _path((), False, "")
    if digest and spec.adapters:
        adapters = "".join(f"{each.name}={each.checkpoint.digest} " for each in spec.adapters)
        digest = f"{digest}+{short_digest(adapters.encode())}"
    return _path(spec.libs, spec.kind == "llm", digest)


@lru_cache(10_000)
def _path(imported: tuple[str, ...], llm: bool, digest: str) -> tuple[Layer, ...]:
    layers = [Layer(BASE, "base")]
    libs = set(imported) & HEAVY_LIBS
    if llm:
        libs |= {"torch", "transformers"}
    if libs:
        names = tuple(sorted(libs))
        layers.append(Layer("libs:" + ",".join(names), "libs", BASE, names))
    if llm and digest:
        layers.append(Layer(f"template:{digest}", "template", layers[-1].key))
    return tuple(layers)
