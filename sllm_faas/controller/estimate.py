"""How long a start would take on a node, and how that is learned from starts that were.

A start reads its checkpoint beside making its container, and what needs the bytes comes after both:

    total = max(container, queue + load + tail)
    container = layers that are missing + own(function, starts at once) * pace(node)
    load = bytes / rate(node, tier, size)

`own` is what a start of the function takes from the warmest layer with nothing to wait for; `tail` what it takes from
the last byte to ready; `queue` the time until the reads already promised to the machine are done. The time ends at
ready: what follows, the first token of whoever waits, is the same wherever the function starts.

A learned value is a weighted mean that outliers move little. Where a function has not been seen, those that load the
same libraries speak for it; where it has not been seen among so many starts at once, its other starts do, corrected by
what all functions showed. The book is a plain `dict[str, float]`: it is stored, shown and replayed as it is.

    own|app/function|N   own|=libs|N     seconds, N starts at once (1, 2, 4, 8 ...)
    crowd||N     crowd|template|N        seconds that N at once take longer each than one; that a template takes longer
                                         to be made among so many
    pace|node                            how many times longer than elsewhere it takes there; less than ALIKE is chance
    layer|key|first      layer|key   layer|warmth    seconds to make a layer, a template by itself; `first` of those a
                                         start makes: beside its read, which a later one most often is not
    rate|node|tier|size  rate|node|tier  bytes per second, by size class
    cached|node|digest                   part of the starts that found it in the page cache, of those for which the
                                         node had not said that it is in its DRAM tier; since the first that did.
    cached|node|digest|full              Of those beside which its DRAM tier had no room for it, so that it was read
                                         through the page cache
    cached||digest                       1: it was found there on some node
    tail|app/function    tail|=libs      seconds
    error|app/function   error|node   error    |predicted - actual|, seconds
    starts                               how many were learned from
    #KEY   ~KEY                          how often KEY was seen, and its mean deviation
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from sllm_faas.layers import Layer
from sllm_faas.spec import Tier, Timeline, Warmth

WEIGHT = 0.2
"""Of a new observation, once there are several; of the first few the k-th counts k times, because what is made for the
first time reads files that nobody has read."""
PACE_WEIGHT = 0.05
"""Of what a start says about its node: little, for it says as much about its function."""
ALIKE = 0.05
TRUSTED = 5
"""Observations after which one that is far off counts only as far as ..."""
OUTLIER = 3.0
"""... so many mean deviations."""

OWN = 0.1
LAYER: dict[Warmth, float] = {"libs": 2.5, "template": 0.1}
"""Guesses in seconds for what was never seen: a fork that only imports the user's modules; torch and transformers
imported; a model's skeleton and tokenizer built."""
BANDWIDTH: dict[Tier, float] = {"remote": 100e6, "disk": 1e9, "dram": 8e9, "gpu": 50e9}
CROWDING = 0.25
"""Guess: each further start at once makes all of them longer by such a part. What was seen is kept in seconds: starts
wait for each other where they compute, and what one does besides, be it long or short, waits for nobody."""
AT_ONCE = 1e-3
"""Seconds that a read takes at least, for the arithmetic: one that finds everything there is infinitely fast."""
SEEN, OFTEN = 3, 0.9
"""Starts that found a checkpoint in the page cache or not, after which it is expected there, and the part that did: a
large one is once in a while, when memory in use left no room for it in the DRAM tier."""
HELD_UP = 2.0
"""A layer that takes longer to make than so many times as it is known to was held up: it counts as no more."""
LITTLE = 0.01
"""Seconds below which what is known of a layer is taken for so much there: twice nothing would stay nothing."""
STALLED = 0.005
"""Seconds of waiting for bytes above which a start is said to have been held up by them."""

Book = dict[str, float]


class Estimate(msgspec.Struct, frozen=True):
    """Seconds by part. `total` orders candidates. `margin`: the mean error of such estimates so far, None before the
    first; `starts`: how many of the function's starts it rests on."""

    queue: float
    container: float
    load: float
    tail: float
    warmth: Warmth
    tier: Tier
    margin: float | None = None
    starts: int = 0

    @property
    def total(self) -> float:
        return max(self.container, self.queue + self.load + self.tail) if self.load else self.container

    def __str__(self) -> str:
        sure = f" ± {self.margin:.2f}" if self.margin is not None else ""
        text = f"{self.total:.2f}{sure} s = {self.warmth} container {self.container:.2f}"
        if self.load:
            text += f", beside it queue {self.queue:.2f} + {self.tier} load {self.load:.2f} + {self.tail:.2f}"
        return text + f" (from {self.starts} starts)"


@dataclass(frozen=True, slots=True)
class Start:
    """What distinguishes one start from another, before and after. `function`: `app/function`; `libs`: names the
    layer with its libraries; `missing`: layers it has to make, `awaited`: seconds already spent on them by
    another start; `size`: bytes it has to read; `at_once`: starts on the machine while it goes on, itself included."""

    node: str
    function: str
    libs: str
    warmth: Warmth
    tier: Tier
    size: int
    digest: str = ""
    missing: Sequence[Layer] = ()
    awaited: float = 0.0
    at_once: float = 1.0


class Known(msgspec.Struct):
    """What the book says of a function, looked up once for all nodes. `own`: by class of crowd, filled as asked for;
    `paced`: whether the nodes' pace counts, because it was seen at all."""

    book: Mapping[str, float]
    function: str
    libs: str
    tail: float | None
    margin: float | None
    starts: int
    own: dict[int, tuple[float, bool]] = {}

    def estimate(
        self, warmth: Warmth, tier: Tier, making: float, load: float, queue: float, pace: float, at_once: float = 1.0
    ) -> Estimate:
        """On a node of that `pace`: `making` the layers that are missing, `load` and `queue` of the read, seconds."""
        crowd = 1 if at_once <= 1.0 else _crowd(at_once)
        found = self.own.get(crowd)
        if found is None:
            found = self.own[crowd] = own_seconds(self.book, self.function, self.libs, crowd)
        own, paced = found
        if paced:
            own *= pace
        tail = own if self.tail is None else self.tail
        return Estimate(queue, making + own, load, tail, warmth, tier, self.margin, self.starts)


def known(book: Mapping[str, float], function: str, libs: str) -> Known:
    """`function`: `app/function`; `libs`: names what its container has imported."""
    tail = book.get(f"tail|{function}")
    margin = book.get(f"error|{function}")
    return Known(
        book,
        function,
        libs,
        book.get(f"tail|={libs}") if tail is None else tail,
        book.get("error") if margin is None else margin,
        int(book.get(f"#error|{function}", 0.0)),
    )


def estimate(book: Mapping[str, float], calibrated: Mapping[str, float], start: Start, queue: float) -> Estimate:
    """Of one start by itself."""
    making = max(0.0, making_seconds(book, start.missing, start.at_once) - start.awaited)
    load = start.size / bandwidth(book, calibrated, start.node, start.tier, start.size) if start.size else 0.0
    pace = pace_of(book, start.node)
    one = known(book, start.function, start.libs)
    return one.estimate(start.warmth, start.tier, making, load, queue, pace, start.at_once)


def making_seconds(book: Mapping[str, float], layers: Sequence[Layer], at_once: float = 1.0) -> float:
    """Of layers that follow each other, by a start that finds what the first of them is made from."""
    crowd = _crowd(at_once)
    return sum([_among(book, _layer(book, layer, k == 0), crowd, layer.warmth) for k, layer in enumerate(layers)])


def own_seconds(book: Mapping[str, float], function: str, libs: str, crowd: int) -> tuple[float, bool]:
    """What its container takes with all its layers there and nothing to wait for, on a node of pace 1, and whether
    that was ever seen."""
    found = _nearest(book, f"own|{function}", crowd) or _nearest(book, f"own|={libs}", crowd)
    if found is None:
        return _among(book, OWN, crowd), False
    level, seconds = found
    return (seconds if level == crowd else _among(book, _by_itself(book, seconds, level), crowd)), True


def pace_of(book: Mapping[str, float], node: str) -> float:
    """Nodes that differ by no more than ALIKE are the same: what is chance must move nobody."""
    pace = book.get(f"pace|{node}", 1.0)
    return pace if abs(pace - 1.0) > ALIKE else 1.0


def bandwidth(
    book: Mapping[str, float], calibrated: Mapping[str, float], node: str, tier: Tier, size: int = 0
) -> float:
    """Learned, else the invoker's own calibration, else a guess; bytes per second, above zero. With a `size`, of
    reads of about that size."""
    by_size, any_size = _rate_keys(node, tier, size)
    value = book.get(by_size, 0.0) if size else 0.0
    value = value or book.get(any_size, 0.0) or calibrated.get(tier, 0.0)
    return value if value > 0 else BANDWIDTH[tier]


@dataclass(frozen=True, slots=True)
class Finished:
    """A start that has become ready: what its node said of it. `actual`: seconds from the command to ready."""

    timeline: Timeline
    read_bytes: int
    read_seconds: float
    predicted: float
    actual: float


def learn(book: Book, start: Start, finished: Finished) -> bool:
    """Take a finished start into the book. `start` is as it turned out: its tier, and how many there were at once.
    Returns whether it told how long layers take to make, which concerns others too."""
    book["starts"] = book.get("starts", 0.0) + 1.0
    for key in (f"error|{start.function}", f"error|{start.node}", "error"):
        _mix(book, key, abs(finished.predicted - finished.actual))
    spans = {span.name: span for span in finished.timeline.spans}
    making, made = 0.0, False
    layers: tuple[Warmth, ...] = ("libs", "template")
    for warmth in layers:
        span = spans.get(warmth)
        if span is not None:
            making += span.seconds
            key = next((layer.key for layer in start.missing if layer.warmth == warmth), "")
            if span.detail == "made":
                made = True
                crowd = _crowd(start.at_once)
                known = book.get(f"layer|{key}")
                if warmth == "template" and crowd > 1 and known is not None:
                    _mix(book, f"crowd|template|{crowd}", max(0.0, span.seconds - known))
                alone = _by_itself(book, span.seconds, crowd, warmth)
                _mix(book, f"layer|{warmth}", alone)
                if key:
                    _mix_layer(book, f"layer|{key}", alone)
                    if making == span.seconds:
                        _mix_layer(book, f"layer|{key}|first", alone)
    stall = 0.0
    read, attach = spans.get("checkpoint"), spans.get("attach")
    if start.size and read is not None:
        if finished.read_bytes or start.tier == "dram":
            _learn_rate(book, start, start.tier, finished.read_seconds)
        end = read.start + read.seconds
        if attach is not None:
            stall = max(0.0, end - max(attach.start, read.start))
        if stall >= STALLED:
            for name in (start.function, f"={start.libs}"):
                _mix(book, f"tail|{name}", max(0.0, finished.actual - end))
    pulled = spans["pull"].seconds if "pull" in spans else 0.0
    if start.size and pulled > 0:
        _learn_rate(book, start, "remote", pulled)
    _learn_own(book, start, max(0.0, finished.actual - making - stall - pulled), stall >= STALLED)
    return made


def _learn_rate(book: Book, start: Start, tier: Tier, seconds: float) -> None:
    """What took no time says nothing of other sizes."""
    rate = start.size / max(seconds, AT_ONCE)
    _mix(book, f"rate|{start.node}|{tier}|{_class(start.size)}", rate)
    if seconds >= AT_ONCE:
        _mix(book, f"rate|{start.node}|{tier}", rate)


def _learn_own(book: Book, start: Start, seconds: float, stalled: bool) -> None:
    """One that waited for bytes hides what it did meanwhile: it only counts where nothing better is known."""
    crowd = _crowd(start.at_once)
    mine = f"own|{start.function}"
    known = _nearest(book, mine, crowd)
    if stalled and known is not None:
        return
    key = f"pace|{start.node}"
    seen, pace = book.get(key, 1.0), pace_of(book, start.node)
    if known is not None and known[0] == crowd and known[1] > 0 and book[f"#{mine}|{crowd}"] >= TRUSTED:
        off = min(1.5, max(0.67, seconds / (known[1] * seen)))
        book[key] = seen * (1.0 + PACE_WEIGHT * (off - 1.0))
    if crowd > 1 and (alone := book.get(f"{mine}|1")) is not None:
        _mix(book, f"crowd||{crowd}", max(0.0, seconds / pace - alone))
    _mix(book, f"{mine}|{crowd}", seconds / pace)
    _mix(book, f"own|={start.libs}|{crowd}", seconds / pace)


def learn_cached(book: Book, node: str, digest: str, full: bool, tier: Tier) -> None:
    """Where a checkpoint was that is not in the node's DRAM tier: small ones are in the kernel's page cache, and where
    that tier is `full` of what is in use, others may be. Nothing is kept of what never was there."""
    key = _cached_key(node, digest, full)
    if tier == "dram":
        book[f"cached||{digest}"] = 1.0
    if tier == "dram" or key in book:
        _mix(book, key, float(tier == "dram"))


def ever_cached(book: Mapping[str, float], digest: str) -> bool:
    """Whether any node's page cache ever had it."""
    return f"cached||{digest}" in book


def is_cached(book: Mapping[str, float], node: str, digest: str, full: bool) -> bool:
    """Whether the node's page cache nearly always has it: if so with room, then without."""
    return _nearly_always(book, _cached_key(node, digest, False)) or (
        full and _nearly_always(book, _cached_key(node, digest, True))
    )


def _nearly_always(book: Mapping[str, float], key: str) -> bool:
    return book.get(key, 0.0) > OFTEN and book[f"#{key}"] >= SEEN


def _cached_key(node: str, digest: str, full: bool) -> str:
    return f"cached|{node}|{digest}|full" if full else f"cached|{node}|{digest}"


def forget(book: Book, node: str) -> None:
    """Drop what was learned of a node that is gone for good."""
    for key in [key for key in book if key.split("|")[1:2] == [node]]:
        del book[key]


CROWDS = (1, 2, 4, 8, 16)


def _crowd(at_once: float) -> int:
    """The class of so many starts at once."""
    return CROWDS[min(len(CROWDS) - 1, round(math.log2(max(1.0, at_once))))]


def _nearest(book: Mapping[str, float], prefix: str, crowd: int) -> tuple[int, float] | None:
    """What is known under the prefix for the class of crowd that is nearest to this one, with that class."""
    here = book.get(f"{prefix}|{crowd}")
    if here is not None:
        return crowd, here
    index = CROWDS.index(crowd)
    for level in sorted(CROWDS, key=lambda level: abs(CROWDS.index(level) - index)):
        found = book.get(f"{prefix}|{level}")
        if found is not None:
            return level, found
    return None


def _among(book: Mapping[str, float], seconds: float, crowd: int, warmth: Warmth | None = None) -> float:
    """What takes so long by itself, among so many: an instance's own start, or a layer's making."""
    more = _more(book, crowd, warmth)
    return seconds * (1.0 + CROWDING * (crowd - 1)) if more is None else seconds + more


def _by_itself(book: Mapping[str, float], seconds: float, crowd: int, warmth: Warmth | None = None) -> float:
    """The other way round."""
    more = _more(book, crowd, warmth)
    return seconds / (1.0 + CROWDING * (crowd - 1)) if more is None else max(0.0, seconds - more)


def _more(book: Mapping[str, float], crowd: int, warmth: Warmth | None) -> float | None:
    """Seconds; None: never seen. Each function makes its own template, but the libraries are made by one start, for
    which the others wait."""
    if crowd == 1 or warmth not in (None, "template"):
        return 0.0
    return book.get(f"crowd|{warmth or ''}|{crowd}")


def _layer(book: Mapping[str, float], layer: Layer, first: bool) -> float:
    key = f"layer|{layer.key}"
    found = book.get(f"{key}|first") if first else None
    if found is None:
        found = book.get(key)
    if found is None:
        found = book.get(f"layer|{layer.warmth}")
    return LAYER.get(layer.warmth, 0.0) if found is None else found


@lru_cache(50_000)
def _rate_keys(node: str, tier: Tier, size: int) -> tuple[str, str]:
    return f"rate|{node}|{tier}|{_class(size)}", f"rate|{node}|{tier}"


@lru_cache(10_000)
def _class(size: int) -> str:
    """Sizes within a factor of eight, named by the largest in MiB."""
    return f"{8 ** max(0, math.ceil(math.log(max(1, size) / 2**20, 8)))}M"


def _mix_layer(book: Book, key: str, seconds: float) -> None:
    known = book.get(key)
    _mix(book, key, seconds if known is None else min(seconds, HELD_UP * max(known, LITTLE)))


def _mix(book: Book, key: str, value: float) -> None:
    count = book.get(f"#{key}", 0.0)
    book[f"#{key}"] = count + 1.0
    before = book.get(key)
    if before is None:
        book[key] = value
        return
    step = value - before
    off = book.get(f"~{key}", abs(step))
    weight = max(WEIGHT, 2.0 / (count + 2.0))
    if count >= TRUSTED:
        most = OUTLIER * max(off, 0.02 * abs(before))
        step = min(most, max(-most, step))
    book[key] = before + weight * step
    book[f"~{key}"] = off + weight * (abs(value - before) - off)
