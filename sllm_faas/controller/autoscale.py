"""How many instances of a target there should be. Pure arithmetic over numbers and clocks; decides, does nothing.

    desired   what the demand of this moment asks for
    held      the most that was asked for within a window, so a dip does not stop what is needed again soon
    spare     what stays beyond that while there is load, because arrivals vary by chance
    panic     demand has lately been twice what the ready ones can take: nothing is scaled down

An instance stays while `held(scaledown_window)` and `spare` ask for it, and for `scaledown_window` after it became
ready. A start is cancelled when `held(START_HOLD)` does not ask for it any more: nobody waits, it would serve no one.

Stable and panic windows are Knative's (its KPA: panic when the short window asks for twice the capacity, until it has
not for a whole stable window), with two differences. What waits now is started for now, in calm too, so the windows
only decide on scaling down. And the short window is an exponential mean, one number instead of a list of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sllm_faas.controller.model import Pressure
from sllm_faas.spec import FunctionSpec, Scaling, Target

START_HOLD = 1.0
"""Seconds for which a start survives the demand that asked for it. Keeps a demand that flickers from making starts
that never finish; short, because a start that serves nobody holds memory and bandwidth others wait for."""

FEW = 4
"""Below so many instances none is spare: they are dear, and a start each is soon made."""

PANIC_WINDOW = 6.0
"""Seconds over which demand is averaged for it: the time constant of an exponential mean."""
PANIC = 2.0
"""Times the capacity that is ready."""
SURELY = 0.01
"""Seconds after the mean has reached it, so that no rounding has somebody look at it too early for ever."""
STABLE_WINDOW = 60.0
"""Seconds a panic outlasts its cause; the `scaledown_window` of who chose a shorter one."""

BACKOFF_LIMIT = 60.0
CRASH_WINDOW = 10.0
"""An instance that fails within this many seconds of ready and has answered nothing crashes: the next start waits."""
CRASH_LIMIT = 4.0
"""The longest such wait. The version can start, so calls for it wait, where those for one that cannot are refused."""

Peak = tuple[float, int]
"""(until, desired): this many were asked for until that time."""


def scaling_of(target: Target, spec: FunctionSpec) -> Scaling:
    """`min_containers` count for the function as it is, not for every set of parameters ever asked for."""
    return replace(spec.scaling, min_containers=0) if target.parameters else spec.scaling


def desired(scaling: Scaling, concurrency: int, waiting: int, running: int, tokens: int = 0) -> int:
    """clamp(ceil((waiting + running) / concurrency) + buffer, min, max); the buffer only while there is any load.

    With `target_tokens`, no fewer than ceil(`tokens` / target_tokens), those that wait and those that run: a few long
    prompts keep an instance as busy as many short ones. But no request can be shared: at most one instance for each.
    """
    load = waiting + running
    wanted = -(-load // concurrency)
    if scaling.target_tokens:
        wanted = max(wanted, min(load, -(-tokens // scaling.target_tokens)))
    wanted += scaling.buffer_containers if load else 0
    return max(scaling.min_containers, min(scaling.max_containers, wanted))


def backoff(failures: int) -> float:
    """Seconds to wait after the k-th failure in a row: 1, 2, 4 … 60; none before the first."""
    return min(BACKOFF_LIMIT, float(2 ** min(failures - 1, 10))) if failures > 0 else 0.0


def note_peak(peaks: Sequence[Peak], now: float, before: int, window: float) -> list[Peak]:
    """The peaks after `before` stopped being the desired number at `now`; older and lower ones tell nothing more. So
    they are in order of time, and each is lower than the one before."""
    first, end = 0, len(peaks)
    while end and peaks[end - 1][1] <= before:
        end -= 1
    while first < end and peaks[first][0] + window <= now:
        first += 1
    return [*peaks[first:end], (now, before)]


def held(peaks: Iterable[Peak], now: float, current: int, window: float) -> int:
    """The highest desired number within the last `window` seconds, the current one included."""
    for until, value in peaks:
        if until + window > now:
            return max(current, value)  # the first is the highest
    return current


def next_end(peaks: Iterable[Peak], now: float, window: float) -> float:
    """When the oldest of the peaks that count within the last `window` seconds counts no more; 0: none does now."""
    for until, _ in peaks:
        if until + window > now:
            return until + window
    return 0.0


def spare(count: int, least: int) -> int:
    """How many to keep beyond the `count` that was held, of a function whose least number is `least`: the square root,
    by which random load of that size varies (the square-root staffing rule). Without it a slow decline stops and starts
    instances by turns."""
    return math.isqrt(count) if count >= FEW and count > least else 0


def note_load(pressure: Pressure, now: float, load: int, capacity: int, wanted: int, stable: float) -> int:
    """Take in what is asked for now, in invocations and in instances, and what the ready ones can take at once.
    Returns how many instances must stay because of a panic; 0: there is none. `stable`: as STABLE_WINDOW.

    With nothing ready there is no panic: whatever is asked for then is a first start, not too little of something.
    """
    pressure.mean += (pressure.load - pressure.mean) * -math.expm1(min(0.0, pressure.at - now) / PANIC_WINDOW)
    pressure.at, pressure.load = now, load
    if capacity and stable > 0 and pressure.mean >= PANIC * capacity:
        pressure.until = now + min(stable, STABLE_WINDOW)
    if pressure.until <= now:
        pressure.until, pressure.most = 0.0, 0
        return 0
    pressure.most = max(pressure.most, wanted)
    return pressure.most


def panics_in(pressure: Pressure, capacity: int) -> float | None:
    """Seconds after which the demand there is has made a panic of itself, if nothing changes; None: it would not."""
    limit = PANIC * capacity
    if not capacity or pressure.until or pressure.mean >= limit or pressure.load <= limit:
        return None
    return PANIC_WINDOW * math.log((pressure.load - pressure.mean) / (pressure.load - limit)) + SURELY
