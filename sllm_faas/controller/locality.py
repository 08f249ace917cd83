"""Which nodes have what: checkpoints on disk, in DRAM and on GPUs, warmth layers, a machine. Pure bookkeeping.

The nodes' records say the same the other way round; whoever changes one does it here, so both stay in step, and the
nodes whose records changed are remembered (`take_stale`) for those who keep an index of nodes.
Invariant (`validate`): the maps are exactly what a scan of the nodes would give.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence

from sllm_faas.controller.model import Node

NOWHERE: frozenset[str] = frozenset()


class Locality:
    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._holders: dict[str, set[str]] = {}
        self._resident: dict[str, set[str]] = {}
        self._on_gpu: dict[str, set[str]] = {}
        self._layers: dict[str, set[str]] = {}
        self._hosts: dict[str, set[str]] = {}
        self._stale: set[str] = set()
        self._renewed: set[str] = set()
        for node in nodes.values():
            self.add(node)

    def holders(self, digest: str) -> Collection[str]:
        """Nodes with the checkpoint on disk."""
        return self._holders.get(digest, NOWHERE)

    def resident(self, digest: str) -> Collection[str]:
        """Nodes with the checkpoint whole in DRAM."""
        return self._resident.get(digest, NOWHERE)

    def on_gpu(self, digest: str) -> Collection[str]:
        """Nodes with the checkpoint whole on a GPU that nobody holds."""
        return self._on_gpu.get(digest, NOWHERE)

    def layered(self, key: str) -> Collection[str]:
        """Nodes where that warmth layer exists."""
        return self._layers.get(key, NOWHERE)

    def beside(self, node: Node) -> Sequence[str]:
        """Nodes of its machine, itself included: they share cores and disk. In order of name, so that what is added up
        over them is always the same number."""
        return sorted(self._hosts[node.info.host]) if node.info.host else (node.name,)

    # -- changes ---------------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        """Take in a node with all that it has. Pair of `remove`, also before and after replacing its lists."""
        for index, names in self._parts(node):
            for name in names:
                index.setdefault(name, set()).add(node.name)
        self.renew(node.name)

    def remove(self, node: Node) -> None:
        for index, names in self._parts(node):
            for name in set(names):  # a node may tell one twice
                index[name].discard(node.name)
                if not index[name]:
                    del index[name]
        self.renew(node.name)

    def note_checkpoint(self, node: Node, digest: str) -> None:
        if node.name not in self.holders(digest):
            insort(node.checkpoints, digest)
            self._holders.setdefault(digest, set()).add(node.name)

    def note_layers(self, node: Node, keys: Iterable[str]) -> None:
        for key in keys:
            if node.name not in self.layered(key):
                insort(node.layers, key)
                self._layers.setdefault(key, set()).add(node.name)

    def touch(self, node: str) -> None:
        """Something else about the node changed."""
        self._stale.add(node)

    def renew(self, node: str) -> None:
        """What is known of its speed changed too."""
        self._stale.add(node)
        self._renewed.add(node)

    def take_stale(self) -> tuple[set[str], set[str]]:
        """Nodes that changed since the last call, and those of them whose speed may have."""
        found = self._stale, self._renewed
        if self._stale:
            self._stale, self._renewed = set(), set()
        return found

    def _parts(self, node: Node) -> tuple[tuple[dict[str, set[str]], Iterable[str]], ...]:
        resident, on_gpu = (node.stats.resident, node.stats.on_gpu) if node.stats is not None else ((), ())
        return (
            (self._holders, node.checkpoints),
            (self._resident, resident),
            (self._on_gpu, on_gpu),
            (self._layers, node.layers),
            (self._hosts, (node.info.host,) if node.info.host else ()),
        )

    def validate(self, nodes: Mapping[str, Node]) -> None:
        fresh = Locality(nodes)
        for name in ("_holders", "_resident", "_on_gpu", "_layers", "_hosts"):
            assert getattr(self, name) == getattr(fresh, name), f"{name} is not what the nodes say"
