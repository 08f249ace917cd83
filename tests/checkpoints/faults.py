"""What a checkpoint must survive, as experiments that count: kills, flipped bytes, histories of real processes.

Each takes how often and returns a frozen tally: the tests run them small, `benchmarks.faults` in full. Chance comes
from a seed; what is random in time is the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from sllm_invoker.checkpoints.channel import Resident
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.containers.tree import Tree
from sllm_invoker.memory_tier import MemoryTier, Opening

from sllm_faas.errors import SllmError
from tests.checkpoints.forks import Fork, Forks
from tests.checkpoints.objects import checksum, make_object

SLABS = ("--slab-mb", "16", "--small-mb", "0")
REFUSALS = ("error checkpoint_corrupt", "error invalid_spec")
"""A flipped digit of the manifest's format number is another format."""
PAGE_CACHE = ("--slab-mb", "16", "--small-mb", "1024")


@dataclass(frozen=True, slots=True)
class Kills:
    """`partial`: objects or names seen that were not whole. `unfinished`: restarts that did not complete with the same
    digest and leave nothing behind."""

    kills: int
    partial: int
    unfinished: int


@dataclass(frozen=True, slots=True)
class Loads:
    """`wrong`: readers that saw other bytes than their checkpoint's; `errors`: those told of an error where nothing was
    wrong with the disk; `leaked`: leases left when every reader was gone."""

    kills: int
    readers: int
    wrong: int
    errors: int
    leaked: int


@dataclass(frozen=True, slots=True)
class Flips:
    """`served`: starts that reached a token although a byte was flipped. `harmed`: starts of an untouched checkpoint
    beside it that failed or computed something else."""

    flips: int
    served: int
    harmed: int
    leaked: int


class Node:
    """A checkpoint store process and those that use it."""

    def __init__(self, tier: MemoryTier, forks: Forks) -> None:
        self.tier = tier
        self.forks = forks
        self.alive: dict[str, list[Fork]] = {}

    def users(self, digest: str) -> list[int]:
        return [fork.pid for fork in self.alive.get(digest, ())]

    async def start(self, act: str, checkpoint: CheckpointObject, opening: Opening | None = None) -> Fork:
        opening = opening or self.tier.open(checkpoint.digest, checkpoint.directory)
        try:
            fork = await self.forks.start(act, directory=checkpoint.directory, channel=opening.channel)
        finally:
            opening.close()
        self.alive.setdefault(checkpoint.digest, []).append(fork)
        return fork

    async def end(self, digest: str, fork: Fork) -> None:
        await fork.kill()
        self.alive[digest].remove(fork)

    async def residents(self) -> dict[str, Resident]:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(SllmError):  # between two lives of the store
                    return {each.digest: each for each in (await self.tier.look()).residents}
                await asyncio.sleep(0)

    async def forget(self, checkpoint: CheckpointObject) -> None:
        """Have it read from disk the next time. Nobody uses it any more; the store hears of deaths on its own."""
        found: Resident | None = None
        try:
            async with asyncio.timeout(120):
                while (found := (await self.residents()).get(checkpoint.digest)) is not None:
                    if not found.leases:
                        self.tier.forget(checkpoint.digest)
                    await asyncio.sleep(0)
        except TimeoutError:
            raise AssertionError(f"the store (pid {self.tier.pid}) does not let go of {found}") from None

    async def leases_left(self) -> int:
        """Those that do not end when everybody is gone; the store hears of deaths on its own."""
        for digest, forks in self.alive.items():
            for fork in list(forks):
                await self.end(digest, fork)
        left = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                while left := sum(each.leases for each in (await self.residents()).values()):
                    await asyncio.sleep(0)
        return left


@contextlib.asynccontextmanager
async def node(root: Path, forks: Forks, limit_mb: int, options: tuple[str, ...]) -> AsyncIterator[Node]:
    root.mkdir(exist_ok=True)
    made: Node
    tier = MemoryTier(root, limit_mb, Tree(root), users=lambda digest: made.users(digest), options=options)
    made = Node(tier, forks)
    tier.start()
    try:
        yield made
    finally:
        await made.leases_left()
        await tier.close()


# -- ingest --------------------------------------------------------------------------------------------------


async def kill_ingests(
    forks: Forks, source: Path | str, root: Path, count: int, seed: int = 1, ranks: int = 1
) -> Kills:
    """Kill an ingest at a random one of its events, look at what is visible, and start it again."""
    chance, partial, unfinished = random.Random(seed), 0, 0
    store = CheckpointStore(root)

    async def run(die: int = 0) -> str | None:
        return await forks.run("ingest", root=root, source=source, name="model", die=die, ranks=ranks)

    whole = await run()
    assert whole is not None
    digest, events = whole.split()
    for _ in range(count):
        store.remove(digest)
        assert await run(chance.randint(1, int(events) - 1)) is None, "it was to be killed"
        partial += _partial(store)
        again = await run()
        sound = again is not None and again.split()[0] == digest and not list((root / "tmp").iterdir())
        unfinished += not sound or bool(_partial(store)) or store.resolve("model") != digest
    return Kills(count, partial, unfinished)


def _partial(store: CheckpointStore) -> int:
    """Objects and names that are there and not whole."""
    found = 0
    names = [str(path.relative_to(store.root / "refs")) for path in (store.root / "refs").rglob("[!.]*")]
    for ref in [*(path.name for path in (store.root / "objects").iterdir()), *names]:
        try:
            store.verify(ref)
        except SllmError:
            found += 1
    return found


# -- load ----------------------------------------------------------------------------------------------------


async def kill_loads(forks: Forks, root: Path, count: int, seed: int = 1) -> Loads:
    """Kill the store process or the reader at a random moment of a load; then load again."""
    chance, readers, wrong, errors = random.Random(seed), 0, 0, 0
    big = make_object(root, 77, 40 << 20)
    expected, clock = checksum(big), asyncio.get_running_loop().time
    async with node(root, forks, 96, SLABS) as here:
        began = clock()
        usual = await here.start("attach", big)
        await usual.hear()
        span = clock() - began
        await here.end(big.digest, usual)
        for index in range(count):
            await here.forget(big)
            opening = here.tier.open(big.digest, big.directory)
            fork, at = await here.start("attach", big, opening), clock() + chance.random() * span
            while clock() < at:
                await asyncio.sleep(0)
            if index % 2:
                await here.end(big.digest, fork)
                await asyncio.wait([opening.loaded])
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(here.tier.pid, signal.SIGKILL)
                answer = await fork.hear()
                readers += 1
                errors += answer not in ("slabs", "file")
                wrong += await fork.ask("sum") != expected
                await here.end(big.digest, fork)
            await here.residents()
            fork = await here.start("attach", big)
            answer = await fork.hear()
            readers += 1
            errors += answer not in ("slabs", "file")
            wrong += await fork.ask("sum") != expected
            await here.end(big.digest, fork)
        return Loads(count, readers, wrong, errors, await here.leases_left())


# -- flips ---------------------------------------------------------------------------------------------------


async def flip_bytes(forks: Forks, store: CheckpointStore, root: Path, count: int, seed: int = 1) -> Flips:
    """Flip one byte of one file of a checkpoint and start an instance, as the invoker does. Half the flips are seen as
    changed files; half are not, as when a disk rots, and only the reads can find them. Half of the starts read into
    slabs, half through the page cache."""
    chance, served, harmed, leaked = random.Random(seed), 0, 0, 0
    victim, other = store.get("model"), _copied(store.get("model"), root / "other")
    files = sorted(victim.directory.iterdir())
    for options in (SLABS, PAGE_CACHE):
        async with node(root / "node", forks, 64, options) as here:
            right = await _start(here, other)
            for index in range(count // 2):
                # Half of them in the weights, which are most of the bytes; the rest in any file, however small.
                path = victim.part_path() if index % 2 else chance.choice(files)
                at = chance.randrange(path.stat().st_size)
                _flip(path, at, mask := chance.randrange(1, 256))
                if index % 4 < 2:
                    answer = await _start(here, victim)
                else:
                    try:
                        store.ensure_verified(victim.digest)
                        answer = await _start(here, victim)
                    except SllmError as error:
                        answer = f"error {error.code}"
                served += answer is None or not answer.startswith(REFUSALS)
                _flip(path, at, mask)
                if index % 8 == 0:
                    harmed += await _start(here, other) != right
            store.verify(victim.digest)
            harmed += await _start(here, victim) != right
            leaked += await here.leases_left()
    return Flips(count // 2 * 2, served, harmed, leaked)


async def _start(here: Node, checkpoint: CheckpointObject) -> str | None:
    await here.forget(checkpoint)
    fork = await here.start("token", checkpoint)
    answer = await fork.hear()
    await here.end(checkpoint.digest, fork)
    return answer


def _copied(checkpoint: CheckpointObject, target: Path) -> CheckpointObject:
    shutil.copytree(checkpoint.directory, target)
    return CheckpointObject(target, checkpoint.manifest)


def _flip(path: Path, at: int, mask: int) -> None:
    """Change one byte on the disk and have the page cache forget the file."""
    path.chmod(0o644)
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- histories -----------------------------------------------------------------------------------------------


async def live_histories(forks: Forks, root: Path, count: int, seed: int = 1, steps: int = 16) -> Loads:
    """Random lives of real readers over memory that holds three of five checkpoints: they map, leave, are killed, with
    prefetches, and now and then the store itself killed. Whoever is asked must see its own bytes."""
    chance, kills, readers, wrong, errors = random.Random(seed), 0, 0, 0, 0
    objects = [make_object(root, 100 + i, (10 + i) << 20) for i in range(5)]
    sums = {each.digest: checksum(each) for each in objects}
    async with node(root, forks, 48, SLABS) as here:
        for _ in range(count):
            for _ in range(steps):
                alive = [(digest, fork) for digest, forks in here.alive.items() for fork in forks]
                chosen, wanted = chance.choice(alive) if alive else None, chance.choice(objects)
                match chance.choices(range(6), (5, 6, 4, 2, 2, 0.2))[0]:
                    case 0 if len(alive) < 8:
                        fork = await here.start("attach", wanted)
                        readers += 1
                        errors += await fork.hear() not in ("slabs", "file")
                    case 1 if chosen:
                        wrong += await chosen[1].ask("sum") != sums[chosen[0]]
                    case 2 if chosen:
                        await here.end(*chosen)
                        kills += 1
                    case 3 if chosen:
                        await chosen[1].ask("leave")
                    case 4:
                        await asyncio.wait([here.tier.open(wanted.digest, wanted.directory, prefetch=True).loaded])
                    case 5 if here.tier.pid:
                        os.kill(here.tier.pid, signal.SIGKILL)
                        kills += 1
                        await here.residents()
                    case _:
                        pass
            for digest, alive_forks in here.alive.items():
                for fork in alive_forks:
                    wrong += await fork.ask("sum") != sums[digest]
        return Loads(kills, readers, wrong, errors, await here.leases_left())
