"""The state with everything that follows from it, kept in step by paired verbs.

Not a decision-maker: `state.Machine` and `scaling.Scaler` decide and write here. Invariant, checked by `validate()`:
the indexes are exactly what a scan of the state would give.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from sllm_faas.controller import tables
from sllm_faas.controller.commands import Command
from sllm_faas.controller.locality import Locality
from sllm_faas.controller.model import App, Gateway, Instance, Node, State, TargetState, Version, key_of
from sllm_faas.spec import FunctionSpec, Target
from sllm_faas.wire.messages import TargetDemand

MIB = 1024 * 1024
INDEXES = (
    "_by_target",
    "_by_node",
    "_demand",
    "_private",
    "_gpus",
    "_shared",
    "_attached",
    "_attached_mb",
    "_loading",
    "_ending",
    "_spare",
    "_replaced",
)


class Ledger:
    def __init__(self, state: State) -> None:
        self.state = state
        self.now = 0.0
        """The time of the event that is being handled."""
        self._commands: list[Command] = []
        self.dirty: set[str] = set()
        """Keys of targets to look at before the event is over."""
        self._by_target: dict[str, set[str]] = {}
        self._by_node: dict[str, set[str]] = {}
        self._demand: dict[str, dict[str, TargetDemand]] = {}
        self._private: dict[str, int] = {}
        self._gpus: dict[str, int] = {}
        self._shared: dict[str, dict[str, int]] = {}
        """Node -> digest -> instances that share it."""
        self._attached: dict[str, set[str]] = {}
        """Digest -> nodes where instances share it."""
        self._attached_mb: dict[str, int] = {}
        self._loading: dict[str, set[str]] = {}
        self._ending: dict[str, set[str]] = {}
        self._spare: dict[str, set[str]] = {}
        """Node -> instances beyond what their targets want."""
        self._replaced: dict[str, str] = {}
        """Busy instance -> the one that takes over from it."""
        self.where = Locality(state.nodes)
        for instance in state.instances.values():
            self._index(instance)
        for key, record in state.targets.items():
            self.note_spare(key, record.desired, self.live(key))
        for gateway in state.gateways.values():
            for key, item in gateway.demand.items():
                self._demand.setdefault(key, {})[gateway.name] = item

    # -- an event --------------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        self.now = now
        self._commands = []

    def emit(self, command: Command) -> None:
        self._commands.append(command)

    def end(self) -> list[Command]:
        """What was commanded since `begin`, in order."""
        commands, self._commands = self._commands, []
        return commands

    # -- versions --------------------------------------------------------------------------------------------

    def version(self, app: str, number: int) -> Version | None:
        found = self.state.apps.get(app)
        return found.versions.get(number) if found else None

    def function(self, target: Target) -> FunctionSpec | None:
        """The spec an instance of `target` runs, its checkpoint's digest filled in."""
        version = self.version(target.app, target.version)
        return resolve(version, target.function) if version else None

    def versions(self) -> Iterable[tuple[App, Version]]:
        return ((app, version) for app in self.state.apps.values() for version in app.versions.values())

    # -- instances -------------------------------------------------------------------------------------------

    def add_instance(self, instance: Instance) -> None:
        self.state.instances[instance.id] = instance
        self._index(instance)
        self.touch(instance.target)

    def remove_instance(self, instance: Instance) -> None:
        """Its memory is back; whoever waited for room is looked at again."""
        del self.state.instances[instance.id]
        self._unindex(instance)
        self.touch(instance.target)
        self.dirty.update(self.state.blocked)

    def instances_of(self, key: str) -> list[Instance]:
        """In order of creation."""
        return self._ordered(self._by_target.get(key, ()))

    def live(self, key: str) -> list[Instance]:
        """Those that serve or will; not one that is to take over from another, as long as that is there."""
        return [i for i in self.instances_of(key) if i.state in tables.LIVE and not self._takes_over(i)]

    def _takes_over(self, instance: Instance) -> bool:
        old = self.state.instances.get(instance.replaces) if instance.replaces else None
        return old is not None and old.state in tables.LIVE

    def replacement(self, instance: str) -> str:
        """The instance that is to take over from this one; empty: none."""
        return self._replaced.get(instance, "")

    def on_node(self, node: str) -> list[Instance]:
        return self._ordered(self._by_node.get(node, ()))

    def _ordered(self, ids: Iterable[str]) -> list[Instance]:
        return sorted((self.state.instances[name] for name in ids), key=lambda instance: instance.seq)

    def _index(self, instance: Instance) -> None:
        self._by_target.setdefault(key_of(instance.target), set()).add(instance.id)
        self._by_node.setdefault(instance.node, set()).add(instance.id)
        if instance.replaces:
            self._replaced[instance.replaces] = instance.id
        self.note_state(instance)
        self._private[instance.node] = self._private.get(instance.node, 0) + instance.memory_mb
        self._gpus[instance.node] = self._gpus.get(instance.node, 0) + instance.gpus
        if instance.digest:
            shared = self._shared.setdefault(instance.node, {})
            shared[instance.digest] = shared.get(instance.digest, 0) + 1
            if shared[instance.digest] == 1:
                self._attached.setdefault(instance.digest, set()).add(instance.node)
                self._attached_mb[instance.node] = self._attached_mb.get(instance.node, 0) + self.size_mb(
                    instance.digest
                )

    def _unindex(self, instance: Instance) -> None:
        _discard(self._by_target, key_of(instance.target), instance.id)
        _discard(self._by_node, instance.node, instance.id)
        self._replaced.pop(instance.replaces, None)
        if (heir := self._replaced.pop(instance.id, "")) in self.state.instances:
            self.state.instances[heir].replaces = ""  # it has taken over
        for index in (self._loading, self._ending, self._spare):
            if instance.id in index.get(instance.node, ()):
                _discard(index, instance.node, instance.id)
        self.where.touch(instance.node)
        self._private[instance.node] -= instance.memory_mb
        self._gpus[instance.node] -= instance.gpus
        if instance.node not in self._by_node:
            del self._private[instance.node], self._gpus[instance.node]
        if instance.digest:
            shared = self._shared[instance.node]
            shared[instance.digest] -= 1
            if not shared[instance.digest]:
                del shared[instance.digest]
                _discard(self._attached, instance.digest, instance.node)
                self._attached_mb[instance.node] -= self.size_mb(instance.digest)
            if not shared:
                del self._shared[instance.node], self._attached_mb[instance.node]

    def note_state(self, instance: Instance) -> None:
        """Call it after its state has changed."""
        for index, states in ((self._loading, ("requested", "starting")), (self._ending, ("draining",))):
            if instance.state in states:
                index.setdefault(instance.node, set()).add(instance.id)
            elif instance.id in index.get(instance.node, ()):
                _discard(index, instance.node, instance.id)
        self.where.touch(instance.node)

    def note_spare(self, key: str, wanted: int, live: Sequence[Instance]) -> bool:
        """The target wants that many of its live instances: so many of the ready ones as are beyond that may go,
        those that run nothing and the newest first. True when one of them could not before."""
        instances, spare = self.state.instances, self._spare
        mine = self._by_target.get(key, ())
        beyond = len(live) - wanted
        after: set[str] = set()
        if beyond > 0:
            ready = [instance for instance in live if instance.state == "ready"]
            if beyond < len(ready):
                ready.sort(key=lambda instance: (instance.running > 0, -instance.seq))
            after.update(instance.id for instance in ready[:beyond])
        before = {name for name in mine if name in spare.get(instances[name].node, ())}
        if before == after:
            return False
        for name in before ^ after:
            node = instances[name].node
            if name in before:
                _discard(spare, node, name)
            else:
                spare.setdefault(node, set()).add(name)
            self.where.touch(node)
        return not after <= before

    def loading_on(self, node: str) -> list[Instance]:
        """Those that start there, in no order."""
        return [self.state.instances[name] for name in self._loading.get(node, ())]

    def ending_on(self, node: str) -> list[Instance]:
        """Those that drain there, in no order; and those that another is about to replace."""
        instances = self.state.instances
        ending = [instances[name] for name in self._ending.get(node, ())]
        if self._replaced:
            here = self._by_node.get(node, ())
            ending += [i for name in here if name in self._replaced and (i := instances[name]).state in tables.LIVE]
        return ending

    def spare_on(self, node: str) -> list[Instance]:
        return [self.state.instances[name] for name in self._spare.get(node, ())]

    # -- memory ----------------------------------------------------------------------------------------------

    def used_mb(self, node: str) -> int:
        """Private memory of all instances there, and each checkpoint they attach once."""
        return self._private.get(node, 0) + self._attached_mb.get(node, 0)

    def attached(self, digest: str) -> Collection[str]:
        """Nodes where an instance has the checkpoint attached, or soon will."""
        return self._attached.get(digest, ())

    def note_size(self, digest: str, size: int) -> None:
        """How many bytes a checkpoint has."""
        before = self.size_mb(digest)
        self.state.sizes[digest] = size
        for node in self._attached.get(digest, ()):
            self._attached_mb[node] += self.size_mb(digest) - before
            self.where.touch(node)

    def used_gpus(self, node: str) -> int:
        return self._gpus.get(node, 0)

    def shares(self, node: str, digest: str) -> int:
        """Instances on the node that have the checkpoint attached, or soon will."""
        return self._shared.get(node, {}).get(digest, 0)

    def size_mb(self, digest: str) -> int:
        return -(-self.state.sizes.get(digest, 0) // MIB)

    def gives_back(self, instances: Iterable[Instance]) -> int:
        """MiB that the end of all of these (of one node) would free."""
        total, ending = 0, dict[str, int]()
        for instance in instances:
            total += instance.memory_mb
            if instance.digest:
                ending[instance.digest] = ending.get(instance.digest, 0) + 1
                if ending[instance.digest] == self.shares(instance.node, instance.digest):
                    total += self.size_mb(instance.digest)
        return total

    # -- demand ----------------------------------------------------------------------------------------------

    def set_demand(self, gateway: Gateway, item: TargetDemand) -> None:
        key = key_of(item.target)
        if item.waiting or item.running:
            gateway.demand[key] = item
            self._demand.setdefault(key, {})[gateway.name] = item
        else:
            self._clear_demand(gateway, key)
        target = self.target(item.target)
        if gateway.name in target.told:
            target.told.remove(gateway.name)
        self.touch(item.target)

    def drop_gateway(self, gateway: Gateway) -> None:
        """Its leases end: what it waited for and ran is nobody's demand any more."""
        for key, item in list(gateway.demand.items()):
            self._clear_demand(gateway, key)
            self.touch(item.target)
        for target in self.state.targets.values():
            if gateway.name in target.told:
                target.told.remove(gateway.name)
        del self.state.gateways[gateway.name]

    def _clear_demand(self, gateway: Gateway, key: str) -> None:
        gateway.demand.pop(key, None)
        owners = self._demand.get(key)
        if owners is not None:
            owners.pop(gateway.name, None)
            if not owners:
                del self._demand[key]

    def demand(self, key: str) -> dict[str, TargetDemand]:
        """By gateway."""
        return self._demand.get(key, {})

    def load(self, key: str) -> tuple[int, int]:
        """(waiting, running) over all gateways."""
        items = self._demand.get(key, {}).values()
        return sum(item.waiting for item in items), sum(item.running for item in items)

    # -- targets and time ------------------------------------------------------------------------------------

    def target(self, target: Target) -> TargetState:
        """Its record, made when there is none."""
        key = key_of(target)
        found = self.state.targets.get(key)
        if found is None:
            found = self.state.targets[key] = TargetState(target)
        return found

    def touch(self, target: Target) -> None:
        self.target(target)
        self.dirty.add(key_of(target))

    def wake_target(self, record: TargetState, when: float) -> None:
        """Look at the target again at `when`, or before."""
        if record.alarm is None or when < record.alarm:
            record.alarm = when
            self.wake(when, f"target|{key_of(record.target)}")

    def wake(self, when: float, what: str) -> None:
        heapq.heappush(self.state.alarms, (when, what))

    def due(self) -> list[str]:
        """What was to be woken by now; taken off."""
        found = []
        while self.state.alarms and self.state.alarms[0][0] <= self.now:
            found.append(heapq.heappop(self.state.alarms)[1])
        return found

    def open_nodes(self) -> list[Node]:
        """Nodes that take new instances."""
        return [node for node in self.state.nodes.values() if node.state == "up" and not node.cordoned]

    # -- checking --------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises AssertionError when an index or a relation between records does not hold."""
        state, fresh = self.state, Ledger(self.state)
        self.where.validate(state.nodes)
        for name in INDEXES:
            assert getattr(self, name) == getattr(fresh, name), f"{name} is not what the state gives"
        for instance in state.instances.values():
            node = state.nodes.get(instance.node)
            assert node is not None and node.state == "up", f"{instance.id} is on {instance.node}, which is not up"
            assert instance.state in ("requested", "starting", "ready", "draining"), instance
            assert key_of(instance.target) in state.targets, f"{instance.id} is of an unknown target"
            assert (instance.state != "ready") or instance.ready is not None, f"{instance.id} is ready since never"
        for app in state.apps.values():
            active = app.versions.get(app.active)
            assert not app.active or (active is not None and active.state == "ready"), (
                f"{app.name}: active is not ready"
            )
            pending = app.versions.get(app.pending)
            assert not app.pending or (pending is not None and pending.state in ("checking", "warming", "ready"))
            for version in app.versions.values():
                unfinished = version.state in ("checking", "warming")
                assert not unfinished or version.storing or version.number == app.pending, (
                    f"{app.name}@{version.number} is nobody's deploy"
                )
                assert not version.check_node or version.state == "checking"
                if version.check_node:
                    assert state.nodes[version.check_node].state == "up", "a check runs on a node that is not up"
        for node in state.nodes.values():
            promised = sum(i.memory_mb for i in self.on_node(node.name) if not i.adopted)
            assert not node.info.memory_mb or promised <= node.info.memory_mb, f"{node.name} is overcommitted"
        for key in state.blocked:
            assert key in state.targets
        assert state.blocked == sorted(set(state.blocked))
        for gateway in state.gateways.values():
            assert all(item.waiting or item.running for item in gateway.demand.values())
        for record in state.targets.values():
            assert all(name in state.gateways for name in record.told), "told a gateway that is gone"


def resolve(version: Version, function: str) -> FunctionSpec | None:
    """A version's function, its checkpoint's digest filled in."""
    spec = version.spec.function(function)
    if spec is None or spec.checkpoint is None:
        return spec
    digest = version.digests.get(function, spec.checkpoint.digest)
    if digest == spec.checkpoint.digest:
        return spec
    return replace(spec, checkpoint=replace(spec.checkpoint, digest=digest))


def _discard(index: dict[str, set[str]], key: str, value: str) -> None:
    index[key].discard(value)
    if not index[key]:
        del index[key]
