"""The row cache: keys and values of all sequences in one tensor per layer, so that a step is one forward.

    layer.keys, layer.values    [rows, capacity, heads, dim], one row per sequence

        row 0  ████████████░░░░░░   running    the rows of a step are moved together at the
        row 1  █████░░░░░░░░░░░░░   running    top, so that it computes over a plain view
        row 2  ██████████░░░░░░░░   held       [:running, :longest]
        row 3  ░░░░░░░░░░░░░░░░░░   free

On a CPU the memory is an anonymous map without reservation: a page never written costs nothing, and a freed row gives
its pages back. So capacity is simply the model's context, nothing is ever grown or copied to grow, and how many
tokens are in it is the engine's admission to count. On any other device all of it is taken at the first forward
(`_reserve` alone knows), so rows and capacity are what the device has room for.

Rows of different length meet in one forward through explicit masks and position ids. Where all rows see all
there is (one sequence, or equal lengths) no mask is passed and the model makes its own, as in `generate`.
Whether a model computes the same this way as with its own cache is proved by `supports_rows` at ingest.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from sllm_invoker.runner.adapters import Adapters
from sllm_invoker.runner.engines.compute import CPU, SMALL_CHUNK, Forward
from sllm_invoker.runner.engines.solo import attention_only

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_WINDOWED = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class _Window:
    """Which part of the cache a forward writes and reads: rows `first` to `first + len(starts)`, each from its
    own `starts`, `width` tokens; `index` is (rows, starts) as tensors when the starts differ."""

    first: int
    starts: tuple[int, ...]
    width: int
    index: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def longest(self) -> int:
        return max(self.starts) + self.width


class _RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's store. Shapes and dtype come from the first keys and values it is given."""

    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache
        self._maps: tuple[mmap.mmap, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        stores = [_reserve(self._cache.rows, self._cache.capacity, states) for states in (key_states, value_states)]
        self._maps = tuple(mapping for mapping, _ in stores if mapping is not None)
        self.keys, self.values = (store for _, store in stores)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self._cache.window
        return _put(self.keys, key_states, window), _put(self.values, value_states, window)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(self._cache.window.starts)

    def get_max_length(self) -> int:
        return -1

    def move(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            store[target, :length] = store[source, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        for store in (self.keys, self.values):
            kept = store[one, :length].clone()
            store[one, :length] = store[other, :length]
            store[other, :length] = kept

    def drop(self, row: int) -> None:
        """Give a row's whole pages back to the system; they read as zeros afterwards."""
        for mapping in self._maps:
            size = len(mapping) // self._cache.rows
            start = -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    @property
    def token_bytes(self) -> int:
        stores = (self.keys, self.values)
        return sum(store[0, 0].numel() * store.element_size() for store in stores)


class RowCache(Cache):  # type: ignore[misc]
    """All layers, and the window that the next forward uses."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows, self.capacity = rows, capacity
        self.window = _Window(0, (0,), 0, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_RowLayer(self))
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  every layer is as long
        return max(self.window.starts)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return self.get_seq_length() + query_length, 0


class Rows:
    """`Compute` over a row cache for at most `rows` sequences of `capacity` tokens."""

    chunk = 256
    small_chunk = SMALL_CHUNK

    def __init__(
        self, model: Any, *, rows: int, capacity: int, adapters: Adapters | None = None, device: torch.device = CPU
    ) -> None:
        config = model.config.get_text_config()
        self._device = device
        self._model = model
        self._adapters = adapters
        self._adapter_of: dict[int, str] = {}
        self._forward = Forward(model)
        self._cache = RowCache(rows, capacity)
        self._lengths = [0] * rows
        self._handle_at: list[int | None] = [None] * rows
        self._row_of: dict[int, int] = {}
        self._next = 0
        self._patterns = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
        self._sliding = getattr(config, "sliding_window", None)
        self._additive = config._attn_implementation == "eager"

    def open(self, adapter: str = "") -> int:
        row = self._handle_at.index(None)
        handle, self._next = self._next, self._next + 1
        self._handle_at[row], self._row_of[handle], self._lengths[row] = handle, row, 0
        self._adapter_of[handle] = adapter
        return handle

    def feed(self, handle: int, tokens: Sequence[int]) -> torch.Tensor:
        row = self._row_of[handle]
        start = self._lengths[row]
        self._cache.window = _Window(row, (start,), len(tokens), None)
        positions = torch.arange(start, start + len(tokens), device=self._device)[None]
        self._use([handle])
        ids = torch.tensor([list(tokens)], device=self._device)
        logits = self._forward(ids, self._cache, **self._positions(positions))
        self._lengths[row] = start + len(tokens)
        return logits[0]

    def step(self, tokens: Mapping[int, int]) -> tuple[list[int], torch.Tensor]:
        self._gather(tokens)
        count = len(tokens)
        handles = [handle for handle in self._handle_at[:count] if handle is not None]
        starts = tuple(self._lengths[:count])
        positions = torch.tensor(starts, device=self._device)
        even = min(starts) == max(starts)
        index = None if even else (torch.arange(count, device=self._device), positions)
        self._cache.window = _Window(0, starts, 1, index)
        more = self._positions(positions[:, None])
        if not even:
            more["attention_mask"] = self._masks(positions, max(starts) + 1)
        self._use(handles)
        ids = torch.tensor([[tokens[handle]] for handle in handles], device=self._device)
        logits = self._forward(ids, self._cache, **more)
        for row in range(count):
            self._lengths[row] += 1
        return handles, logits

    def close(self, handle: int) -> None:
        row = self._row_of.pop(handle)
        del self._adapter_of[handle]
        self._handle_at[row] = None
        self._lengths[row] = 0
        self._drop(row)

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes in the cache; known after the first forward."""
        return sum(layer.token_bytes for layer in self._cache.layers)

    def _gather(self, tokens: Mapping[int, int]) -> None:
        """Move the sequences of a step into the first rows. Nothing moves while the set stays the same."""
        count = len(tokens)
        outside = [row for row in sorted(self._row_of[handle] for handle in tokens) if row >= count]
        if not outside:
            return
        inside = [row for row in range(count) if self._handle_at[row] not in tokens]
        for source, target in zip(outside, inside, strict=True):
            length = max(self._lengths[source], self._lengths[target])
            other = self._handle_at[target]
            for layer in self._cache.layers:
                if other is None:
                    layer.move(source, target, length)
                else:
                    layer.swap(source, target, length)
            at, lengths = self._handle_at, self._lengths
            at[source], at[target] = at[target], at[source]
            lengths[source], lengths[target] = lengths[target], lengths[source]
            for row in (source, target):
                if (handle := self._handle_at[row]) is not None:
                    self._row_of[handle] = row
            if other is None:
                self._drop(source)

    def _use(self, handles: Sequence[int]) -> None:
        if self._adapters is not None:
            self._adapters.use([self._adapter_of[handle] for handle in handles])

    def _drop(self, row: int) -> None:
        for layer in self._cache.layers:
            layer.drop(row)

    def _positions(self, positions: torch.Tensor) -> dict[str, Any]:
        return {"position_ids": positions} if self._forward.takes_positions else {}

    def _masks(self, positions: torch.Tensor, longest: int) -> Any:
        """What each row may look at, [rows, 1, 1, longest]: one mask, or one per kind of layer."""
        keys, at = torch.arange(longest, device=self._device), positions[:, None, None, None]
        full = keys <= at
        near = full & (keys > at - self._sliding) if self._sliding else full
        if self._patterns:
            kinds = {"full_attention": full, "sliding_attention": near}
            return {pattern: self._mask(kinds[pattern]) for pattern in self._patterns}
        return self._mask(near)

    def _mask(self, seen: torch.Tensor) -> torch.Tensor:
        if not self._additive:
            return seen
        dtype = self._model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def supports_rows(model: Any) -> bool:
    """Whether the row cache gives this model's own logits: two sequences of different length, fed in pieces and
    stepped together, against plain forwards over the same ids."""
    config = model.config.get_text_config()
    patterns = set(getattr(config, "layer_types", None) or ())
    if not attention_only(DynamicCache(config=model.config)) or not patterns <= _WINDOWED:
        return False
    if getattr(config, "attention_chunk_size", None):
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    ids = [token % config.vocab_size for token in range(3, 14)]
    texts = [ids[:4], ids]
    try:
        with torch.inference_mode():
            rows = Rows(model, rows=3, capacity=32)
            handles = [rows.open() for _ in texts]
            for handle, text in zip(handles, texts, strict=True):
                rows.feed(handle, text[:2])
                rows.feed(handle, text[2:-1])
            order, logits = rows.step({h: text[-1] for h, text in zip(handles, texts, strict=True)})
            for handle, text in zip(handles, texts, strict=True):
                own = model(input_ids=torch.tensor([text])).logits[0, -1].float()
                ours = logits[order.index(handle)].float()
                if (own - ours).abs().max() > tolerance * max(1.0, float(own.abs().max())):
                    return False
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError):
        return False  # a model that takes no four-dimensional mask, say: it runs one by one
    return True


def _reserve(rows: int, capacity: int, states: torch.Tensor) -> tuple[mmap.mmap | None, torch.Tensor]:
    """Zeros for [rows, capacity, heads, dim] of the kind of `states` [batch, heads, width, dim] and on their device: a
    masked place counts nothing only while what is there is a number. The map, where pages can be given back."""
    heads, dim = states.shape[1], states.shape[3]
    if states.device.type != "cpu":
        return None, states.new_zeros(rows, capacity, heads, dim)
    count = rows * capacity * heads * dim
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    mapping = mmap.mmap(-1, count * states.element_size(), flags=flags)
    return mapping, torch.frombuffer(mapping, dtype=states.dtype).view(rows, capacity, heads, dim)


def _put(store: torch.Tensor, states: torch.Tensor, window: _Window) -> torch.Tensor:
    """Write `states` [rows, heads, width, dim] where the window says and return all it sees,
    [rows, heads, longest, dim]."""
    count = len(window.starts)
    if window.index is not None:
        store[window.index] = states[:, :, 0]
    else:
        start = window.starts[0]
        store[window.first : window.first + count, start : start + window.width] = states.transpose(1, 2)
    return store[window.first : window.first + count, : window.longest].transpose(1, 2)
