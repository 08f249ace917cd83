"""The state with everything that follows from it, kept in step by paired verbs.

Not a decision-maker: `state.Machine` and `scaling.Scaler` decide and write here. Invariant, checked by `validate()`:
the indexes are exactly what a scan of the state would give.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from sllm_faas.controller import tables
from sllm_faas.controller.commands import Command, SendStart
from sllm_faas.controller.locality import Locality
from sllm_faas.controller.model import App, Gateway, Instance, Node, State, TargetState, Version, key_of
from sllm_faas.controller.shares import Shares
from sllm_faas.spec import FunctionSpec, Target
from sllm_faas.wire.messages import TargetDemand

T = TypeVar("T")
Instances = dict[str, Instance]
"""By id, in order of creation."""
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
    "_holding",
    "_loading",
    "_ending",
    "_spare",
    "_spare_of",
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
        self._by_target: dict[str, Instances] = {}
        self._by_node: dict[str, Instances] = {}
        self._demand: dict[str, dict[str, TargetDemand]] = {}
        self._private: dict[str, int] = {}
        self._gpus: dict[str, int] = {}
        self._shared: dict[str, dict[str, int]] = {}
        """Node -> digest -> instances that share it."""
        self._attached: dict[str, dict[str, None]] = {}
        """Digest -> nodes where instances share it."""
        self._attached_mb: dict[str, int] = {}
        self._holding: dict[str, dict[str, int]] = {}
        """Digest -> node -> instances there that have it in their memory."""
        self._loading: dict[str, Instances] = {}
        self._ending: dict[str, Instances] = {}
        self._spare: dict[str, Instances] = {}
        """Node -> instances beyond what their targets want."""
        self._spare_of: dict[str, Instances] = {}
        """Target -> those of its instances."""
        self._replaced: dict[str, str] = {}
        """Busy instance -> the one that takes over from it."""
        self._specs: dict[tuple[str, int, str], FunctionSpec] = {}
        """Resolved, by app, version and function."""
        self._named: dict[tuple[str, int], dict[str, FunctionSpec]] = {}
        self.where = Locality(state.nodes)
        self.shares = Shares(state)
        for instance in sorted(state.instances.values(), key=lambda instance: instance.seq):
            self._index(instance)
        for key, record in state.targets.items():
            live = self.live(key)
            self.note_spare(key, len(live) - record.desired, [i for i in live if i.state == "ready"])
        for gateway in state.gateways.values():
            for key, item in gateway.demand.items():
                self._demand.setdefault(key, {})[gateway.name] = item

    # -- an event --------------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        self.now = now
        self._commands = []

    def emit(self, command: Command) -> None:
        self._commands.append(command)

    def restate(self, instance: str, predicted: float) -> None:
        """Of a start that was commanded for this event."""
        for index, command in enumerate(self._commands):
            if isinstance(command, SendStart) and command.body.instance == instance:
                self._commands[index] = SendStart(command.node, replace(command.body, predicted=predicted))

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
        name = (target.app, target.version, target.function)
        known = self._specs.get(name)
        if known is not None:
            return known
        version = self.version(target.app, target.version)
        spec = self._functions(version).get(target.function) if version is not None else None
        if version is None or spec is None:
            return None
        known = self._specs[name] = spec.resolved(version.digests)
        return known

    def _functions(self, version: Version) -> dict[str, FunctionSpec]:
        """By name: an app may have thousands."""
        known = self._named.get((version.app, version.number))
        if known is None:
            known = self._named[version.app, version.number] = {spec.name: spec for spec in version.spec.functions}
        return known

    def forget_specs(self) -> None:
        """Versions are gone from the records, or their digests have become known: nothing of them is kept here."""
        self._specs.clear()
        self._named.clear()

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
        self.room_changed()

    def instances_of(self, key: str) -> list[Instance]:
        """In order of creation."""
        return list(self._by_target[key].values()) if key in self._by_target else []

    def ids_of(self, key: str) -> Collection[str]:
        """Of all its instances."""
        return self._by_target.get(key, ())

    def live(self, key: str) -> list[Instance]:
        """Those that serve or will; not one that is to take over from another, as long as that is there."""
        mine = self._by_target.get(key)
        if mine is None:
            return []
        return [i for i in mine.values() if i.state != "draining" and not (i.replaces and self._takes_over(i))]

    def _takes_over(self, instance: Instance) -> bool:
        old = self.state.instances.get(instance.replaces)
        return old is not None and old.state in tables.LIVE

    def replacement(self, instance: str) -> str:
        """The instance that is to take over from this one; empty: none."""
        return self._replaced.get(instance, "")

    def release_heir(self, instance: str) -> None:
        """Whoever was to take over from it counts for itself from now on."""
        heir = self.state.instances.get(self._replaced.pop(instance, ""))
        if heir is not None:
            heir.replaces = ""
            self.where.touch(heir.node)
            self.touch(heir.target)
        if instance in self.state.instances:
            self.where.touch(self.state.instances[instance].node)

    def on_node(self, node: str) -> list[Instance]:
        """In order of creation."""
        return list(self._by_node[node].values()) if node in self._by_node else []

    def _index(self, instance: Instance) -> None:
        self._by_target.setdefault(key_of(instance.target), {})[instance.id] = instance
        self._by_node.setdefault(instance.node, {})[instance.id] = instance
        if instance.replaces:
            self._replaced[instance.replaces] = instance.id
        self.shares.add(instance)
        self._index_state(instance)
        self._private[instance.node] = self._private.get(instance.node, 0) + instance.memory_mb
        self._gpus[instance.node] = self._gpus.get(instance.node, 0) + instance.gpus
        if instance.digest:
            shared = self._shared.setdefault(instance.node, {})
            shared[instance.digest] = shared.get(instance.digest, 0) + 1
            if shared[instance.digest] == 1:
                self._attached.setdefault(instance.digest, {})[instance.node] = None
                self._attached_mb[instance.node] = self._attached_mb.get(instance.node, 0) + self.size_mb(
                    instance.digest
                )
            if instance.ready is not None:
                self._hold(instance)

    def _hold(self, instance: Instance) -> None:
        holding = self._holding.setdefault(instance.digest, {})
        holding[instance.node] = holding.get(instance.node, 0) + 1

    def _unindex(self, instance: Instance) -> None:
        key = key_of(instance.target)
        _discard(self._by_target, key, instance.id)
        _discard(self._by_node, instance.node, instance.id)
        self._replaced.pop(instance.replaces, None)
        self.release_heir(instance.id)
        for index in (self._loading, self._ending, self._spare):
            _discard(index, instance.node, instance.id)
        _discard(self._spare_of, key, instance.id)
        self.shares.drop(instance)
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
            if instance.ready is not None:
                holding = self._holding[instance.digest]
                holding[instance.node] -= 1
                if not holding[instance.node]:
                    _discard(self._holding, instance.digest, instance.node)

    def note_state(self, instance: Instance) -> None:
        """Call it after its state has changed, or it was told to end sooner."""
        if instance.state == "draining":
            instance.draining_since = self.now
        self._index_state(instance)

    def _index_state(self, instance: Instance) -> None:
        if instance.state in ("requested", "starting"):
            self._loading.setdefault(instance.node, {})[instance.id] = instance
        else:
            _discard(self._loading, instance.node, instance.id)
        if instance.state == "draining":
            self._ending.setdefault(instance.node, {})[instance.id] = instance
            self.shares.drop(instance)
        else:
            _discard(self._ending, instance.node, instance.id)
        self.where.touch(instance.node)

    def note_ready(self, instance: Instance) -> None:
        """It has become ready now: its checkpoint is in its memory."""
        instance.ready = self.now
        if instance.digest:
            self._hold(instance)

    def note_spare(self, key: str, beyond: int, ready: Sequence[Instance]) -> bool:
        """The target has so many live instances more than it wants, and these, in order of creation, are ready: so many
        of them may go, those that run nothing and the newest first. True when one of them could not before."""
        before = self._spare_of.get(key)
        if beyond <= 0 and before is None:
            return False
        if beyond <= 0:
            ready = ()
        elif beyond < len(ready):
            newest = ready[::-1]
            ready = ([i for i in newest if not i.running] + [i for i in newest if i.running])[:beyond]
        after = {instance.id: instance for instance in ready}
        if before is None:
            before = {}
        if before.keys() == after.keys():
            return False
        for name, instance in before.items():
            if name not in after:
                self._unspare(instance)
        for name, instance in after.items():
            if name not in before:
                if instance.spare is None:
                    instance.spare = self.now
                self._spare.setdefault(instance.node, {})[name] = instance
                self.where.touch(instance.node)
        if after:
            self._spare_of[key] = after
        else:
            del self._spare_of[key]
        return not after.keys() <= before.keys()

    def take_spare(self, instance: Instance) -> bool:
        """One that could go does: its target has as many as it wants without it. False: it was none."""
        key = key_of(instance.target)
        mine = self._spare_of.get(key)
        if mine is None or instance.id not in mine:
            return False
        _discard(self._spare_of, key, instance.id)
        self._unspare(instance)
        return True

    def _unspare(self, instance: Instance) -> None:
        instance.spare = None
        _discard(self._spare, instance.node, instance.id)
        self.where.touch(instance.node)

    def loading_on(self, node: str) -> Collection[Instance]:
        """Those that start there, in no order."""
        return self._loading[node].values() if node in self._loading else ()

    def ending_on(self, node: str) -> list[Instance]:
        """Those that drain there, in no order; and those that another is about to replace."""
        ending = list(self._ending[node].values()) if node in self._ending else []
        if self._replaced:
            here = self._by_node.get(node, {})
            ending += [i for name, i in here.items() if name in self._replaced and i.state in tables.LIVE]
        return ending

    def spare_on(self, node: str) -> Collection[Instance]:
        return self._spare[node].values() if node in self._spare else ()

    def has_spare(self, key: str) -> bool:
        """Whether the target has more instances ready than it wants."""
        return key in self._spare_of

    # -- memory ----------------------------------------------------------------------------------------------

    def used_mb(self, node: str) -> int:
        """Private memory of all instances there, each checkpoint they attach once, and what is pinned in memory though
        nobody attaches it."""
        used = self._private.get(node, 0) + self._attached_mb.get(node, 0)
        if pinned := self.pinned(node):
            shared = self._shared.get(node, {})
            used += sum(mb for digest, mb in pinned.items() if digest not in shared)
        return used

    def pinned(self, node: str) -> dict[str, int]:
        """digest -> MiB that stay in the node's memory whatever else needs it."""
        known = self.state.nodes.get(node)
        return known.stats.pinned if known is not None and known.stats is not None else {}

    def dram_mb(self, node: str) -> int | None:
        """What the node's DRAM tier may hold; None: not known."""
        known = self.state.nodes.get(node)
        return known.stats.dram_mb if known is not None and known.stats is not None else None

    def attached_mb(self, node: str) -> int:
        """Of the checkpoints that instances there share or soon will, each once."""
        return self._attached_mb.get(node, 0)

    def crowded_out(self, node: str, digest: str) -> bool:
        """Whether the node's DRAM tier cannot hold the checkpoint beside those that instances there share."""
        room = self.dram_mb(node)
        if room is None:
            return False
        beside = 0 if node in self.attached(digest) else self.size_mb(digest)
        return self.attached_mb(node) + beside > room

    def attached(self, digest: str) -> Collection[str]:
        """Nodes where an instance has the checkpoint attached, or soon will."""
        return self._attached.get(digest, ())

    def holding(self, digest: str) -> Collection[str]:
        """Nodes where an instance has the checkpoint in its memory."""
        return self._holding.get(digest, ())

    def note_size(self, digest: str, size: int) -> None:
        """How many bytes a checkpoint has."""
        before = self.size_mb(digest)
        self.state.sizes[digest] = size
        for node in self._attached.get(digest, ()):
            self._attached_mb[node] += self.size_mb(digest) - before
            self.where.touch(node)

    def used_gpus(self, node: str) -> int:
        return self._gpus.get(node, 0)

    def size_mb(self, digest: str) -> int:
        return -(-self.state.sizes.get(digest, 0) // MIB)

    def gives_back(self, instances: Collection[Instance]) -> int:
        """MiB that the end of all of these (of one node) would free."""
        total = 0
        ending: dict[str, int] = {}
        for instance in instances:
            total += instance.memory_mb
            digest = instance.digest
            if digest:
                count = ending[digest] = ending.get(digest, 0) + 1
                if count == self._shared[instance.node][digest] and digest not in self.pinned(instance.node):
                    total += self.size_mb(digest)
        return total

    # -- demand ----------------------------------------------------------------------------------------------

    def set_demand(self, gateway: Gateway, item: TargetDemand) -> None:
        key = key_of(item.target)
        if item.waiting or item.running:
            gateway.demand[key] = item
            self._demand.setdefault(key, {})[gateway.name] = item
        else:
            self._clear_demand(gateway, key)
        target = self._target(key, item.target)
        if gateway.name in target.told:
            target.told.remove(gateway.name)
        self.dirty.add(key)

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
        owners = self._demand.get(key)
        if owners is None:
            return 0, 0
        waiting = running = 0
        for item in owners.values():
            waiting += item.waiting
            running += item.running
        return waiting, running

    def tokens(self, key: str) -> int:
        """In the prompts that wait for the target, about, and in the contexts that run."""
        waiting = sum(item.tokens for item in self._demand.get(key, {}).values())
        return waiting + sum(instance.tokens for instance in self._by_target.get(key, {}).values() if instance.running)

    def room_changed(self) -> None:
        """There may be room where there was none, or none where it was awaited: who waits for room looks anew."""
        for key in self.state.blocked:
            self.state.targets[key].look_at = self.now
        self.dirty.update(self.state.blocked)

    # -- targets and time ------------------------------------------------------------------------------------

    def target(self, target: Target) -> TargetState:
        """Its record, made when there is none."""
        return self._target(key_of(target), target)

    def _target(self, key: str, target: Target) -> TargetState:
        found = self.state.targets.get(key)
        if found is None:
            found = self.state.targets[key] = TargetState(target)
        return found

    def touch(self, target: Target) -> None:
        key = key_of(target)
        self._target(key, target)
        self.dirty.add(key)

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
        self.shares.validate(fresh.shares)
        for name in INDEXES:
            assert getattr(self, name) == getattr(fresh, name), f"{name} is not what the state gives"
        for (name, number, function), spec in self._specs.items():
            version = self.version(name, number)
            assert version is not None and resolve(version, function) == spec, f"{name}/{function}@{number} is stale"
        for mine in (*self._by_target.values(), *self._by_node.values()):
            order = [instance.seq for instance in mine.values()]
            assert order == sorted(order), "instances are not in order of creation"
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
    """A version's function, its checkpoints' digests filled in."""
    spec = version.spec.function(function)
    return spec.resolved(version.digests) if spec is not None else None


def _discard(index: dict[str, dict[str, T]], key: str, name: str) -> None:
    """Nothing happens when it is not there."""
    found = index.get(key)
    if found is not None and name in found:
        del found[name]
        if not found:
            del index[key]
