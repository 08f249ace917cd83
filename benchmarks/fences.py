"""Nodes and containers that are silent without being dead, for ten seconds each, under counting streams.

    sleep          SIGSTOP of an invoker, SIGCONT after ten seconds
    frozen         SIGSTOP of a container for good: noticed by the streams' idle limit (3 s)
    deaf gateway   a joined node in a network namespace of its own; what it sends is dropped, it hears everything
    deaf node      the same, the other way round

The same strikes the source or the destination of a migration in its middle: after HOLD, while the destination
computes, or after MOVED, before the gateway has read it. The moment is held open by a SIGSTOP of the container, then of
the gateway, that would end it.

Every stream must count through: nothing lost, nothing twice, so that one fence at a time was believed; and what is
fenced off must stop computing once it learns: a sleeper when it wakes; what is cut off when it hears again or, at the
latest, `orphan_grace` after it has lost its gateway. How long it computed is read from the processor time of its
containers. The partitions need root, for the namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.common import Report, arguments, free_port, table
from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at
from tests.e2e.fences import dropped, nothing_runs
from tests.e2e.test_kills import Counting, Stream, pid_of, unwhole

Moment = Literal["HOLD", "MOVED"]

SILENCE = 10.0
STREAMS = 8
TOKENS = 1500
MOMENT = 0.7
"""Seconds for a step of a migration to be taken, up to what is held back."""
STALLED = 60.0
MOMENTS: tuple[Moment, ...] = ("HOLD", "MOVED")
WAKING = 3.0
"""Seconds in which a sleeper stops computing once it is awake."""
ALONE = 3.0 + 10.0 + 3.0
"""Seconds in which what is cut off stops by itself: its gateway is silent for three, it keeps orphans for ten."""
NOT_BELIEVED = ("stale", "stray", "unknown_invocation")
# Nothing is scaled down: what runs would be moved to one node, and a fenced one computes again with good reason.
APP = f"""
from pathlib import Path
import sllm
app = sllm.App("fences")
model = Path({str(EXAMPLES / "counting/model")!r})
counting = app.llm("counting", checkpoint=model, concurrency=16, max_containers=2, scaledown_window=600)
watched = app.llm("watched", checkpoint=model, concurrency=16, max_containers=2, timeout=sllm.Timeouts(idle=3.0))
"""
NAMESPACE, OUTER, INNER = "sllm-fences", "10.213.77.1", "10.213.77.2"


@dataclass
class Outcome:
    name: str
    whole: int = 0
    resumes: int = 0
    refused: float = 0.0
    """Frames of the silent one that were not believed."""
    computed: float = 0.0
    """Seconds for which it computed on after it fell silent."""
    within: float = SILENCE + WAKING
    """The limit of that."""
    pause: float = 0.0
    """The longest pause at a resume, by the gateway's timeline."""
    forged: float = 0.0
    """Frames under a fence that nobody gave; there must be none."""
    became: str = ""
    """Of the invocation that was being moved: what its timeline says."""


@dataclass
class Long(Counting):
    tokens: int = TOKENS
    model = "fences/counting"


@dataclass
class Longer(Long):
    """Still under way when its neighbour has been moved."""

    tokens: int = 2 * TOKENS


@dataclass
class Watched(Long):
    model = "fences/watched"


class Computing:
    """When the processes last used the processor, sampled from another thread."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._done = threading.Event()
        self.last = time.monotonic()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        before = self._ticks()
        while not self._done.wait(0.25):
            now = self._ticks()
            if now > before + 2:
                self.last = time.monotonic()
            before = now

    def _ticks(self) -> int:
        total = 0
        for pid in self._pids:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
                total += int(fields[11]) + int(fields[12])
        return total


def started(platform: Platform, node: str, kind: type[Long]) -> list[Stream]:
    """Streams that all run on `node` and speak. The other node has had an instance, so it starts one fast."""
    (other,) = (each["name"] for each in platform.get("/v1/nodes")["nodes"] if each["name"] != node)
    with platform.only(other):
        kind(platform, tokens=1).read()
        eventually(platform.cleared, 60, "its instance is gone")
    with platform.only(node):
        streams: list[Stream] = [kind(platform) for _ in range(STREAMS)]
        for stream in streams:
            stream.start()
        eventually(lambda: all(len(stream.values) >= 20 for stream in streams), 60, "every stream speaks")
    return streams


def silent(
    platform: Platform,
    node: str,
    name: str,
    cut: Callable[[], Any],
    heal: Callable[[], Any],
    kind: type[Long] = Long,
) -> Outcome:
    """Run streams on `node`, cut it off for `SILENCE` seconds, heal, and see."""
    print(f"{name} …", flush=True)
    return judged(platform, started(platform, node, kind), node, name, cut, heal)


def judged(
    platform: Platform,
    streams: list[Stream],
    node: str,
    name: str,
    cut: Callable[[], Any],
    heal: Callable[[], Any],
) -> Outcome:
    stale = sum(dropped(platform, reason) for reason in NOT_BELIEVED)
    computing = Computing([row["pid"] for row in instances(platform, node)])
    cut()
    began = time.monotonic()
    while time.monotonic() < began + SILENCE:
        time.sleep(0.1)
    heal()
    ended(streams)
    eventually(lambda: nothing_runs(platform), 60, "nothing runs any more")
    computing.close()
    ids = {stream.invocation for stream in streams}
    records = [each for each in platform.get("/v1/invocations")["invocations"] if each["invocation"] in ids]
    wrong = unwhole(streams, type(streams[0]))
    for each in wrong:
        print(f"{name}: {each}")
    outcome = Outcome(
        name,
        len(streams) - len(wrong),
        sum(each["resumes"] for each in records),
        sum(dropped(platform, reason) for reason in NOT_BELIEVED) - stale,
        max(0.0, computing.last - began),
        pause=max(
            (span["seconds"] for each in records for span in each["timeline"] if span["name"] == "resume"), default=0.0
        ),
        forged=dropped(platform, "forged"),
    )
    print(f"{name}: {outcome.whole} whole, computed on for {outcome.computed:.1f} s", flush=True)
    return outcome


def ended(streams: list[Stream]) -> None:
    """Returns when all have an end, or nothing has come for `STALLED` seconds: then they are not whole."""
    said, since = -1, time.monotonic()
    while not all(stream.end for stream in streams) and time.monotonic() < since + STALLED:
        time.sleep(0.1)
        before, said = said, sum(len(stream.values) for stream in streams)
        if said != before:
            since = time.monotonic()


def instances(platform: Platform, node: str) -> list[dict[str, Any]]:
    return [row for row in platform.instances() if row["node"] == node]


# -- in the middle of a migration --------------------------------------------------------------------------------------


def moving(
    platform: Platform,
    source: str,
    destination: str,
    victim: str,
    moment: Moment,
    name: str,
    cut: Callable[[], Any],
    heal: Callable[[], Any],
) -> Outcome:
    """Move a stream from `source` to `destination`, and cut the one that is the `victim` off at that moment."""
    name = f"{name} {'source' if victim == source else 'destination'} at {moment}"
    print(f"{name} …", flush=True)
    streams = started(platform, source, Longer)
    first, one = (f"/v1/invocations/{stream.invocation}" for stream in streams[:2])
    # Its instance is there from now on. A gateway that was cut off from the node before may not have heard of it yet:
    # then it keeps the stream where it is, and says that this may be tried again.
    eventually(lambda: platform.post(f"{first}/migrate", {"node": destination}).status_code == 200, 60, "one has moved")
    (container,) = [row["pid"] for row in instances(platform, destination) if row["state"] == "ready"]
    gateway = pid_of(platform, "sllm_gateway", "gateway-0")
    asking = threading.Thread(target=platform.post, args=(f"{one}/migrate", {"node": destination}))

    def strike() -> None:
        os.kill(container, signal.SIGSTOP)
        asking.start()
        time.sleep(MOMENT)
        if moment == "MOVED":
            os.kill(gateway, signal.SIGSTOP)
            os.kill(container, signal.SIGCONT)
            time.sleep(MOMENT)
        cut()
        os.kill(gateway if moment == "MOVED" else container, signal.SIGCONT)

    outcome = judged(platform, streams, victim, name, strike, heal)
    asking.join()
    record = platform.get(one)
    outcome.became = ", ".join(span["name"] for span in record["timeline"] if span["name"] in ("migration", "resume"))
    return outcome


def movements(platform: Platform, *, quick: bool) -> Iterator[Outcome]:
    """A sleeping source and a sleeping destination."""
    source, destination = "node-0", "node-1"
    for victim in (source, destination):
        pid = pid_of(platform, "sllm_invoker", victim)
        for moment in MOMENTS[-1:] if quick else MOMENTS:
            yield moving(platform, source, destination, victim, moment, "sleeping", *sleep(pid))


def partitions(platform: Platform, *, quick: bool) -> Iterator[Outcome]:
    """A far node that is not heard, or hears nothing: by itself, as a source and as a destination."""
    ways = ("deaf gateway", OUTWARD), ("deaf node", INWARD)
    for name, direction in ways[:1] if quick else ways:
        cuts = direction.drop, direction.heal
        outcomes = [silent(platform, "far", name, *cuts)]
        if not quick:
            outcomes.append(moving(platform, "far", "node-0", "far", "MOVED", f"{name},", *cuts))
            outcomes += [moving(platform, "node-0", "far", "far", moment, f"{name},", *cuts) for moment in MOMENTS]
        for outcome in outcomes:
            outcome.within = ALONE
            yield outcome


def sleep(pid: int) -> tuple[Callable[[], None], Callable[[], None]]:
    return lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT)


def asleep(platform: Platform) -> Outcome:
    pid = pid_of(platform, "sllm_invoker", "node-0")
    return silent(platform, "node-0", "sleep", *sleep(pid))


def frozen(platform: Platform) -> Outcome:
    def freeze() -> None:
        for row in platform.instances():
            if row["node"] == "node-1" and row["state"] == "ready":
                os.kill(row["pid"], signal.SIGSTOP)

    return silent(platform, "node-1", "frozen", freeze, lambda: None, Watched)


# -- two hosts -------------------------------------------------------------------------------------------------------


def ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A second host: a namespace that a veth pair connects with this one."""
    ip("netns", "add", NAMESPACE)
    try:
        ip("link", "add", "sllm-fo", "type", "veth", "peer", "name", "sllm-fi", "netns", NAMESPACE)
        ip("addr", "add", f"{OUTER}/30", "dev", "sllm-fo")
        ip("link", "set", "sllm-fo", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{INNER}/30", "dev", "sllm-fi")
        ip("-n", NAMESPACE, "link", "set", "sllm-fi", "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        yield
    finally:
        ip("netns", "del", NAMESPACE)
        subprocess.run(["ip", "link", "del", "sllm-fo"], check=False, capture_output=True)


class Direction:
    """One direction of the link: frames sent that way go to an address that nobody has, and are lost in silence."""

    def __init__(self, *where: str, to: str, device: str) -> None:
        self._at = (*where, "neigh")
        self._to = (to, "dev", device)

    def drop(self) -> None:
        ip(*self._at, "replace", self._to[0], "lladdr", "02:00:00:00:00:99", *self._to[1:], "nud", "permanent")

    def heal(self) -> None:
        ip(*self._at, "del", *self._to)


INWARD = Direction(to=INNER, device="sllm-fo")
OUTWARD = Direction("-n", NAMESPACE, to=OUTER, device="sllm-fi")


@contextlib.contextmanager
def two_hosts(folder: Path, app: Path) -> Iterator[Platform]:
    listen = f"tcp://{OUTER}:{free_port()}"
    with network(), platform_at(folder / "main", "--invokers", "1", "--listen", listen) as main:
        token = main.sllm("join-token").strip().splitlines()[-1]
        env = {**os.environ, "SLLM_STATE_DIR": str(folder / "far"), "NO_COLOR": "1"}
        far = Platform(folder / "far", 0, env)
        join = [sys.executable, "-m", "sllm_faas.cli", "invoker", "--join", token, "--node-name", "far", "--daemon"]
        subprocess.run(["ip", "netns", "exec", NAMESPACE, *join], env=env, check=True, capture_output=True)
        try:
            eventually(lambda: len([each for each in main.json("node", "list") if each["state"] == "up"]) == 2)
            main.sllm("deploy", str(app))
            yield main
        finally:
            far.run("down")


def main() -> int:
    args = arguments(__doc__).parse_args()
    report, outcomes = Report("fences"), []
    with tempfile.TemporaryDirectory(prefix="sllm-fences-") as name:
        folder = Path(name)
        app = folder / "app.py"
        app.write_text(APP)
        with platform_at(folder / "one", "--invokers", "2") as platform:
            platform.sllm("deploy", str(app))
            outcomes.append(asleep(platform))
            if not args.quick:
                outcomes.append(frozen(platform))
            outcomes += movements(platform, quick=args.quick)
        if os.geteuid() == 0:
            with two_hosts(folder, app) as platform:
                outcomes += partitions(platform, quick=args.quick)
        else:
            print("no partitions: they need root")
    table(
        ("", "streams whole", "resumes", "frames refused", "computed on, s", "longest pause, s", "the moved one"),
        [
            (
                one.name,
                f"{one.whole}/{STREAMS}",
                one.resumes,
                f"{one.refused:g}",
                f"{one.computed:.1f}",
                f"{one.pause:.1f}",
                one.became,
            )
            for one in outcomes
        ],
    )
    for each in outcomes:
        key = each.name.replace(",", "").replace(" ", "_")
        report.figure(f"{key}_computed_on_s", each.computed)
        report.figure(f"{key}_pause_s", each.pause)
        report.figure(f"{key}_frames_refused", each.refused)
        report.at_least(f"{each.name}: streams whole", each.whole, STREAMS)
        report.at_most(f"{each.name}: frames under a fence that nobody gave", each.forged, 0)
        report.at_most(f"{each.name}: seconds of computing once cut off", each.computed, each.within)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
