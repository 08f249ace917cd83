"""What waits for a slot: a bounded first-in-first-out line per target, bounded as a whole too. Pure.

    push ──► [ target A: a1 a2 a3 ]  ──► pop(A) when a slot of A frees
             [ target B: b1 ]              remove(b1) on cancel, O(1)
    push_front: refused or retried elsewhere; it had its place already, so no bound applies

Two bounds. `max_queue` of the function: one more is refused. The whole: when it is full, the app that is most above
its weighted share of the line (among apps that wait now) loses — the newcomer if that is its own app, else the
youngest waiting invocation of that app, which `push` returns so that the caller can end it. So one app's flood is
answered with 429s to that app, never to the others.

Invariant (`validate`): every waiting item is in exactly its target's line and its app's line.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from sllm_faas.errors import QueueFull
from sllm_faas.spec import Target

RETRY_AFTER = 1.0


class Waiter(Protocol):
    """Hashed by identity. `tokens`: about how many its prompt has, 0 where there is none; they do not change."""

    target: Target

    @property
    def tokens(self) -> int: ...


W = TypeVar("W", bound=Waiter)


class WaitQueue(Generic[W]):
    def __init__(self, limit: int = 10_000) -> None:
        self.limit = limit
        self._lines: dict[Target, OrderedDict[W, None]] = {}
        self._apps: dict[str, OrderedDict[W, None]] = {}
        self._weights: dict[str, float] = {}
        self._tokens: dict[Target, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __contains__(self, item: W) -> bool:
        return bool(self._size) and item in self._lines.get(item.target, ())

    def waiting(self, target: Target) -> int:
        if not self._size:
            return 0  # as nearly always, and this is on the path of every call
        line = self._lines.get(target)
        return len(line) if line else 0

    def tokens(self, target: Target) -> int:
        """Of all prompts in its line."""
        return self._tokens.get(target, 0)

    def targets(self) -> list[Target]:
        return list(self._lines)

    def items(self, target: Target) -> Iterator[W]:
        """Oldest first. Don't change the queue meanwhile."""
        return iter(self._lines.get(target, ()))

    def oldest(self, target: Target) -> W | None:
        line = self._lines.get(target)
        return next(iter(line)) if line else None

    def push(self, item: W, *, max_queue: int, weight: float = 1.0) -> W | None:
        """Put `item` at the end of its target's line. Returns the item that lost its place to it, if one did.

        Raises QueueFull when the function's line is full, or the whole is and nobody is further above their share.
        """
        target = item.target
        waiting = self.waiting(target)
        if waiting >= max_queue:
            raise QueueFull(
                f"{waiting} invocations of {target.app}/{target.function} wait already; allowed: {max_queue}.",
                hint="Try again later, or raise max_queue or max_containers.",
                retry_after=RETRY_AFTER,
            )
        self._weights[target.app] = weight
        loser: W | None = None
        if self._size >= self.limit:
            app = self._most_above_share(target.app)
            if app == target.app:
                raise QueueFull(
                    f"{self._size} invocations wait already; allowed: {self.limit}.",
                    hint="The platform is overloaded; try again later.",
                    retry_after=RETRY_AFTER,
                )
            loser = next(reversed(self._apps[app]))
            self.remove(loser)
        self._insert(item)
        return loser

    def push_front(self, item: W) -> None:
        """Back to the head of its line, whatever the bounds."""
        self._insert(item)
        self._lines[item.target].move_to_end(item, last=False)
        self._apps[item.target.app].move_to_end(item, last=False)

    def pop(self, target: Target) -> W | None:
        line = self._lines.get(target)
        if not line:
            return None
        item = next(iter(line))
        self.remove(item)
        return item

    def remove(self, item: W) -> None:
        """Raises KeyError when it does not wait."""
        target = item.target
        line = self._lines[target]
        del line[item]
        if item.tokens:
            self._tokens[target] -= item.tokens
        if not line:
            del self._lines[target]
            self._tokens.pop(target, None)
        mine = self._apps[target.app]
        del mine[item]
        if not mine:
            del self._apps[target.app]
            self._weights.pop(target.app, None)
        self._size -= 1

    def take_all(self, target: Target) -> list[W]:
        """All of a line, oldest first, removed."""
        items = list(self._lines.get(target, ()))
        for item in items:
            self.remove(item)
        return items

    def put_back(self, items: Iterable[W]) -> None:
        """Ahead of the lines of their targets, in the order given, whatever the bounds."""
        for item in reversed(list(items)):
            self.push_front(item)

    def _insert(self, item: W) -> None:
        if item in self:
            raise KeyError(item)
        self._lines.setdefault(item.target, OrderedDict())[item] = None
        if item.tokens:
            self._tokens[item.target] = self._tokens.get(item.target, 0) + item.tokens
        self._apps.setdefault(item.target.app, OrderedDict())[item] = None
        self._weights.setdefault(item.target.app, 1.0)
        self._size += 1

    def _most_above_share(self, newcomer: str) -> str:
        """The app with the most waiting per weight, the newcomer counted with one more; it loses ties."""

        def load(app: str) -> float:
            return (len(self._apps.get(app, ())) + (app == newcomer)) / self._weights.get(app, 1.0)

        return max({*self._apps, newcomer}, key=lambda app: (load(app), app == newcomer, app))

    def validate(self) -> None:
        in_lines = [item for line in self._lines.values() for item in line]
        in_apps = [item for line in self._apps.values() for item in line]
        assert len(in_lines) == len(in_apps) == self._size, "lines, apps and size disagree"
        assert all(self._lines.values()), "an empty line is kept"
        assert all(self._apps.values()), "an empty app is kept"
        assert self._tokens.keys() <= self._lines.keys(), "tokens of nobody"
        for target, line in self._lines.items():
            assert self.tokens(target) == sum(item.tokens for item in line), f"tokens of {target}"
        assert set(self._weights) >= set(self._apps), "an app has no weight"
        for target, line in self._lines.items():
            assert all(item.target == target and item in self._apps[target.app] for item in line), f"stray in {target}"
