"""Which zygotes exist and which to keep: the policy of the warmth layers. Pure.

    base                    one; kept as long as the invoker lives
      └─ libs(set)          torch, transformers: one per set of libraries
           └─ template(key) skeleton and tokenizer of one version or checkpoint; the most recent few

Every layer above base has a keep-alive, restarted by each use, and templates a cap. Ending a zygote disturbs
nothing that was forked from it. A zygote that died is made again on demand, after a back-off that grows while
it keeps dying; one that could not be prepared is not kept at all: its error goes to whoever asked.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from sllm_faas.spec import FunctionSpec, Warmth

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


def path(spec: FunctionSpec | None, object_dir: str) -> list[Layer]:
    """The layers an instance of `spec` is forked through, base first."""
    layers = [Layer(BASE, "base")]
    if spec is None:
        return layers
    libs = set(spec.libs) & HEAVY_LIBS
    if spec.kind == "llm":
        libs |= {"torch", "transformers"}
    if libs:
        names = tuple(sorted(libs))
        layers.append(Layer("libs:" + ",".join(names), "libs", BASE, names))
    if spec.kind == "llm" and object_dir:
        mark = hashlib.blake2b(object_dir.encode(), digest_size=8).hexdigest()
        layers.append(Layer(f"template:{mark}", "template", layers[-1].key))
    return layers


@dataclass(slots=True)
class _Entry:
    layer: Layer
    used: float


@dataclass(slots=True)
class _Deaths:
    count: int = 0
    until: float = 0.0


@dataclass(slots=True)
class Pool:
    """`admit/leave` a zygote, `use` it, `surplus(now)` names those to end."""

    max_templates: int = 8
    libs_keep: float = 1800.0
    template_keep: float = 600.0
    first_backoff: float = 0.5
    max_backoff: float = 30.0
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _deaths: dict[str, _Deaths] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def warmest(self, layers: list[Layer]) -> Layer | None:
        """The warmest of `layers` that exists now."""
        return next((layer for layer in reversed(layers) if layer.key in self._entries), None)

    def admit(self, layer: Layer, now: float) -> None:
        self._entries[layer.key] = _Entry(layer, now)

    def use(self, layers: list[Layer], now: float) -> None:
        """An instance goes through `layers`: each restarts its keep-alive."""
        for layer in layers:
            entry = self._entries.get(layer.key)
            if entry is not None:
                entry.used = now

    def served(self, key: str) -> None:
        """A fork from it succeeded: it is healthy."""
        self._deaths.pop(key, None)

    def leave(self, key: str) -> None:
        """It was ended on purpose."""
        self._entries.pop(key, None)

    def died(self, key: str, now: float) -> float:
        """It died by itself; the seconds to wait before it is made again."""
        self._entries.pop(key, None)
        deaths = self._deaths.setdefault(key, _Deaths())
        wait = min(self.max_backoff, self.first_backoff * 2.0**deaths.count) if deaths.count else 0.0
        deaths.count += 1
        deaths.until = now + wait
        return wait

    def wait(self, key: str, now: float) -> float:
        """Seconds of back-off left before `key` may be made."""
        deaths = self._deaths.get(key)
        return max(0.0, deaths.until - now) if deaths else 0.0

    def surplus(self, now: float) -> list[str]:
        """Keys of the zygotes that are not worth their memory any more, least recently used first."""
        by_age = sorted(self._entries.values(), key=lambda entry: entry.used)
        templates = [entry for entry in by_age if entry.layer.warmth == "template"]
        doomed = {entry.layer.key for entry in templates[: max(0, len(templates) - self.max_templates)]}
        keep = {"libs": self.libs_keep, "template": self.template_keep}
        for entry in by_age:
            limit = keep.get(entry.layer.warmth)
            if limit is not None and now - entry.used >= limit:
                doomed.add(entry.layer.key)
        return [entry.layer.key for entry in by_age if entry.layer.key in doomed]
