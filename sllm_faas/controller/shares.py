"""What each app holds of the cluster, by which it is decided whose turn it is where room is short. Pure bookkeeping.

    share(app) = max over memory and accelerators of (what its instances hold / what nodes that are up have) / weight

That is the weighted dominant share of Ghodsi et al., "Dominant Resource Fairness" (NSDI 2011, "Weighted DRF"): who has
the smallest is next. An instance holds its private memory, its checkpoint's bytes (though those of one node share
them) and its accelerators, from its start until it drains. A node that does not tell its memory adds none.

Invariant (`ledger.Ledger.validate`): the sums are what a scan of the instances and nodes would give.
"""

from __future__ import annotations

from collections.abc import Collection

from sllm_faas.controller.model import Instance, State

MIB = 1024 * 1024
CLOSE = 1e-9
"""Shares that differ by less are equal."""


class Shares:
    def __init__(self, state: State) -> None:
        self.state = state
        self._instances: dict[str, dict[str, Instance]] = {}
        """App -> its instances that do not drain, by id."""
        self._held: dict[str, tuple[int, int]] = {}
        """App -> MiB and accelerators of those."""
        self._there: tuple[int, int] | None = None
        """MiB and accelerators of the nodes that are up; None: to be added up when somebody asks."""

    def add(self, instance: Instance) -> None:
        app = instance.target.app
        self._instances.setdefault(app, {})[instance.id] = instance
        mb, gpus = self._held.get(app, (0, 0))
        self._held[app] = (mb + memory_mb(instance), gpus + instance.gpus)

    def drop(self, instance: Instance) -> None:
        """It ends, or drains. Nothing happens when it was dropped before."""
        app = instance.target.app
        mine = self._instances.get(app)
        if mine is None or mine.pop(instance.id, None) is None:
            return
        if mine:
            mb, gpus = self._held[app]
            self._held[app] = (mb - memory_mb(instance), gpus - instance.gpus)
        else:
            del self._instances[app], self._held[app]

    def nodes_changed(self) -> None:
        """Some came or went."""
        self._there = None

    def instances(self, app: str) -> Collection[Instance]:
        """That do not drain."""
        return self._instances.get(app, {}).values()

    def weight(self, app: str) -> float:
        """Of the version that serves, or is to."""
        known = self.state.apps.get(app)
        version = known.versions.get(known.active or known.pending) if known else None
        return version.spec.weight if version is not None else 1.0

    def of(self, app: str, mb: int = 0, gpus: int = 0) -> float:
        """Its weighted share if it held so much more."""
        held_mb, held_gpus = self._held.get(app, (0, 0))
        all_mb, all_gpus = self._there or self._add_up()
        share = (held_mb + mb) / all_mb if all_mb else 0.0
        if all_gpus:
            share = max(share, (held_gpus + gpus) / all_gpus)
        return share / self.weight(app)

    def above(self, share: float, but: str) -> list[str]:
        """The other apps that hold more than that, those that hold most first."""
        ranked = [(-found, app) for app in self._held if app != but and (found := self.of(app)) > share + CLOSE]
        return [app for _, app in sorted(ranked)]

    def _add_up(self) -> tuple[int, int]:
        up = [node.info for node in self.state.nodes.values() if node.state == "up"]
        self._there = (sum([info.memory_mb for info in up]), sum([info.gpus for info in up]))
        return self._there

    def validate(self, fresh: Shares) -> None:
        """`fresh`: made from the records anew."""
        assert self._instances == fresh._instances, "the instances of apps disagree"
        assert self._held == fresh._held, "what apps hold is not what their instances do"
        assert self._there in (None, fresh._add_up()), "what there is is not what the nodes have"


def memory_mb(instance: Instance) -> int:
    """That it counts with."""
    return instance.memory_mb + -(-instance.size // MIB)
