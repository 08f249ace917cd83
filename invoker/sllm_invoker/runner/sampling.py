"""Drawing a token, as a pure function of (logits, tokens after the prompt, seed, position).

`draw` applies penalties, temperature, top-k and top-p, in this order, then adds Gumbel noise and takes the
argmax: argmax(log p + g) with independent standard Gumbel g draws exactly from p (the Gumbel-max trick). The
noise of token t is a function of (seed, position, t) alone, so neither the batch a sequence shares, nor the
instance it runs on, nor what was drawn for others can change what it draws. Temperature 0 is the argmax.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): the key is the seed, the counter is (t // 4, position), the lane is t % 4.

Log-probabilities are the log-softmax of the raw logits, before penalties, temperature and filters.

Not here: where logits come from, stop strings, and state of any sort. numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sllm_invoker.runner.engines.base import Sampling, TokenLogprob

Floats = NDArray[np.floating]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_NUCLEUS_GUESS = 1024  # sort only so many tokens when they already hold top_p of the mass


@dataclass(frozen=True, slots=True)
class Drawn:
    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


def draw(logits: Floats, samplings: Sequence[Sampling], histories: Sequence[Sequence[int]]) -> list[Drawn]:
    """One token per row of `logits` [rows, vocabulary].

    `histories[i]` are the tokens after row i's prompt, whoever drew them; its length is the position drawn.
    """
    chosen = [0] * len(samplings)
    whole: list[int] = []  # rows where every token is a candidate
    some: list[int] = []  # rows that top-k or top-p narrows
    for row, sampling in enumerate(samplings):
        if sampling.temperature <= 0:
            chosen[row] = int(_penalised(logits[row], sampling, histories[row]).argmax())
        elif sampling.top_k > 0 or sampling.top_p < 1.0:
            some.append(row)
        else:
            whole.append(row)
    keys = [(sampling.seed, len(history)) for sampling, history in zip(samplings, histories, strict=True)]
    scores = {row: _scaled(logits[row], samplings[row], histories[row]) for row in (*whole, *some)}
    # Noise is made for all rows at once: what a call costs hardly depends on how much it makes.
    if whole:
        noise = gumbel_of_all([keys[row] for row in whole], logits.shape[1])
        for row, drawn in zip(whole, (np.stack([scores[row] for row in whole]) + noise).argmax(axis=1), strict=True):
            chosen[row] = int(drawn)
    if some:
        tokens = [_candidates(scores[row], samplings[row].top_k, samplings[row].top_p) for row in some]
        parts = gumbel_of([keys[row] for row in some], tokens)
        for row, candidates, part in zip(some, tokens, parts, strict=True):
            chosen[row] = int(candidates[(scores[row][candidates] + part).argmax()])
    return [
        Drawn(token) if sampling.logprobs is None else _with_logprobs(row, token, sampling.logprobs)
        for row, token, sampling in zip(logits, chosen, samplings, strict=True)
    ]


def _scaled(logits: Floats, sampling: Sampling, history: Sequence[int]) -> NDArray[np.float64]:
    return _penalised(logits, sampling, history).astype(np.float64) / max(sampling.temperature, 1e-5)


def _penalised(logits: Floats, sampling: Sampling, history: Sequence[int]) -> Floats:
    """OpenAI's definition: logits[t] -= presence * (count[t] > 0) + frequency * count[t]."""
    if not history or not (sampling.presence_penalty or sampling.frequency_penalty):
        return logits
    scores = logits.astype(np.float64)
    tokens, counts = np.unique(np.asarray(history, dtype=np.int64), return_counts=True)
    scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return scores


def _candidates(scores: NDArray[np.float64], top_k: int, top_p: float) -> NDArray[np.int64]:
    """The tokens left by top-k, then by top-p over what top-k left: the fewest most probable ones whose
    mass reaches `top_p`, at least one. Equal scores rank by token id."""
    size = len(scores)
    limit = min(top_k, size) if top_k > 0 else size
    if top_p >= 1.0:
        return _best(scores, limit)
    # Most often a few tokens hold the mass: sort them alone, and all only if they do not.
    weights = np.exp(scores - scores.max())
    if limit < size:
        ranked = _best(scores, limit)
        total = weights[ranked].sum()
    else:
        ranked, total = _best(scores, min(_NUCLEUS_GUESS, size)), weights.sum()
        if weights[ranked].sum() < top_p * total:
            ranked = _best(scores, size)
    mass = np.cumsum(weights[ranked])
    return ranked[: int(np.searchsorted(mass, top_p * total)) + 1]


def _best(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The `count` best tokens, best first, equal ones by id."""
    if count < len(scores):
        # Everything at or above the count-th score, so that a tie at the border is broken by id, too.
        border = np.partition(scores, len(scores) - count)[len(scores) - count]
        tokens = np.flatnonzero(scores >= border)
    else:
        tokens = np.arange(len(scores))
    return tokens[np.argsort(-scores[tokens], kind="stable")][:count]


def _with_logprobs(logits: Floats, token: int, count: int) -> Drawn:
    raw = logits.astype(np.float64)
    shifted = raw - raw.max()
    logs = shifted - np.log(np.exp(shifted).sum())
    best = _best(raw, min(count, len(raw))) if count else ()
    return Drawn(token, float(logs[token]), tuple(TokenLogprob(int(t), float(logs[t])) for t in best))


# -- noise ---------------------------------------------------------------------------------------------------


Key = tuple[int, int]
"""(seed, position)."""


def gumbel_of_all(keys: Sequence[Key], vocabulary: int) -> NDArray[np.float64]:
    """Standard Gumbel noise of every token, [len(keys), vocabulary]."""
    seeds, positions = _key_words(keys)
    blocks = np.arange(-(-vocabulary // 4), dtype=np.uint64)
    lanes = philox(seeds[:, None], positions[:, None], blocks[None])
    return _to_gumbel(lanes.transpose(1, 2, 0).reshape(len(keys), -1)[:, :vocabulary])


def gumbel_of(keys: Sequence[Key], tokens: Sequence[NDArray[np.int64]]) -> list[NDArray[np.float64]]:
    """For each key the noise of its `tokens`: the same values `gumbel_of_all` has for them."""
    sizes = [len(some) for some in tokens]
    flat = np.concatenate(tokens)
    seeds, positions = (np.repeat(words, sizes) for words in _key_words(keys))
    lanes = philox(seeds, positions, (flat >> 2).astype(np.uint64))
    noise = _to_gumbel(lanes[flat & 3, np.arange(len(flat))])
    return np.split(noise, np.cumsum(sizes)[:-1])


def _key_words(keys: Sequence[Key]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    seeds = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed, _ in keys], dtype=np.uint64)
    return seeds, np.array([position for _, position in keys], dtype=np.uint64)


def philox(seeds: NDArray[np.uint64], positions: NDArray[np.uint64], blocks: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 with key `seeds` (64 bits) and counter (block, 0, position, 0); the arguments broadcast.

    Returns the four lanes, [4, *broadcast shape], 32-bit words held in uint64.
    """
    key0, key1 = seeds & _LOW, seeds >> _HALF
    shape = np.broadcast_shapes(seeds.shape, positions.shape, blocks.shape)
    a = np.broadcast_to(blocks & _LOW, shape)
    b = np.broadcast_to(blocks >> _HALF, shape)
    c = np.broadcast_to(positions & _LOW, shape)
    d = np.broadcast_to(positions >> _HALF, shape)
    for turn in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        round0 = (key0 + np.uint64(turn * _WEYL[0] & 0xFFFFFFFF)) & _LOW
        round1 = (key1 + np.uint64(turn * _WEYL[1] & 0xFFFFFFFF)) & _LOW
        a, b, c, d = (second >> _HALF) ^ b ^ round0, second & _LOW, (first >> _HALF) ^ d ^ round1, first & _LOW
    return np.stack([a, b, c, d])


def _to_gumbel(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32  # strictly between 0 and 1
    return -np.log(-np.log(uniform))
