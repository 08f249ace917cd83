"""What runs in one instance is to go on in another: who is moved, where to, and what becomes of the source. Pure.

Part of the machine (`state.Machine`), which calls it; its table is there. How invocations are handed over is the
invokers' and gateways' business (`dispatch.moves`): from here it is MIGRATE and, some time later, MIGRATED.

    waiting   for the instance that takes over: it is being started, or there is no room for it yet
    moving    MIGRATE is sent
    resting   something was kept, or nothing was heard: tried again, perhaps towards another instance

There is at most one move of a source. Where a whole instance is to be emptied (to make room, for a drain, a scale-down)
the source is told to take nothing new (STOP) when the other is ready and not before, and MIGRATE follows at once: so
nothing waits, and nothing comes in behind what is taken out. What cannot go on elsewhere just ends there. A person's
move of named invocations leaves the source as it is.
Invariants (`validate`): a move has a source that is there, and either a heir that is on its way or a time when it is
looked at again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sllm_faas.controller import move_times, placement, tables
from sllm_faas.controller.commands import MoveEnded, SendMigrate
from sllm_faas.controller.ledger import Ledger
from sllm_faas.controller.model import Instance, Move, MoveRecord, MoveState, key_of
from sllm_faas.errors import IllegalTransition
from sllm_faas.spec import FunctionSpec
from sllm_faas.wire.messages import Migrate, Migrated, MoveResult

if TYPE_CHECKING:
    from sllm_faas.controller.scaling import Scaler

ANSWER = 30.0
"""Seconds, beyond four times the estimate, in which MIGRATED is to come."""
RETRY = 1.0
RETRY_LIMIT = 30.0
ROOM = 10
"""Times that room for a replacement is looked for, RETRY seconds apart, before a drain goes on without one."""
RECORDS = 200


def can_move(spec: FunctionSpec) -> bool:
    """Whether some calls of the function can go on in another instance."""
    return spec.kind == "llm" or any(method.resumable for method in spec.methods)


class Migrations:
    def __init__(self, ledger: Ledger, scaler: Scaler) -> None:
        self.ledger = ledger
        self.scaler = scaler
        self.state = ledger.state

    # -- wanted ----------------------------------------------------------------------------------------------

    def make_room(self, source: Instance, node: str, why: str) -> None:
        """Placement wants its memory: it goes on at `node`, in a ready instance there or one that is started."""
        move = self._begin(source, why)
        if self._destination(move, source, node) is None:
            self._start_heir(source, node, why)
        self._advance(move)

    def empty(self, source: Instance, why: str) -> None:
        """It is to end, as soon as another can take its place and what runs in it."""
        spec = self.ledger.function(source.target)
        if spec is None or source.state in ("requested", "starting"):
            self.scaler.stop(source, why, None if spec is None else 0.0)
            return
        if source.state == "ready" and any(spare is source for spare in self.ledger.spare_on(source.node)):
            self.scaler.stop(source, why, None)
        if source.state == "draining" and not can_move(spec):
            return
        self._advance(self._begin(source, why))

    def ask(self, instance: str, node: str, invocations: tuple[str, ...], request: str) -> None:
        """A person wants these at `node`. Raises IllegalTransition when that cannot be tried."""
        refusal = self.refusal(instance, node)
        if refusal:
            raise IllegalTransition(f"{refusal}: event 'MigrationAsked' is not possible")
        source = self.state.instances[instance]
        move = self._begin(source, f"asked for: {len(invocations)} to {node}")
        move.node, move.invocations, move.request = node, list(invocations), request
        if self._destination(move, source) is None:
            self._start_heir(source, node, move.why)
        self._advance(move)

    def refusal(self, instance: str, node: str) -> str:
        """Why a person's move of something there to that node cannot be tried; empty when it can."""
        source = self.state.instances.get(instance)
        where = self.state.nodes.get(node)
        spec = self.ledger.function(source.target) if source else None
        if source is None or spec is None:
            return f"instance {instance} is not there any more"
        if not can_move(spec):
            return f"{source.target} cannot go on elsewhere: it is no language model and no method of it is resumable"
        if instance in self.state.moves:
            return f"instance {instance} is being moved already"
        if where is None or where.state != "up":
            return f"node {node} is not up"
        if where.cordoned:
            return f"node {node} takes nothing new"
        return f"it runs on {node} already" if node == source.node else ""

    def _begin(self, source: Instance, why: str) -> Move:
        known = self.state.moves.get(source.id)
        tables.move(tables.MOVE, f"move of {source.id}", known.state if known else "absent", "asked")
        if known is not None:
            # Of a person's move the rest follows: the whole instance is to be emptied now.
            known.node, known.invocations, known.why = "", [], why
            return known
        move = self.state.moves[source.id] = Move("", source.id, "waiting", why, self.ledger.now)
        return move

    def _start_heir(self, source: Instance, node: str, why: str) -> None:
        spec = self.ledger.function(source.target)
        assert spec is not None
        there = self.scaler.candidates.one(self.state.nodes[node], source.target, spec)
        if there.fits():
            self.scaler.start(
                source.target, spec, node, there.estimate, f"takes over from {source.id}: {why}", source.id
            )

    # -- what happens ----------------------------------------------------------------------------------------

    def instance_ready(self, instance: Instance) -> None:
        """If it was started for a move, that goes on."""
        move = self.state.moves.get(instance.replaces)
        if move is not None:
            self._advance(move)

    def instance_ended(self, instance: Instance) -> None:
        """Called before it is forgotten: it may have been the source of a move, or the heir in one."""
        move = self.state.moves.get(instance.id)
        if move is not None:
            self._over(move, f"{instance.id} ended")
        heir_of = self.state.moves.get(instance.replaces)
        if heir_of is not None and heir_of.state != "moving":
            self._look_at(heir_of, self.ledger.now)

    def due(self, source: str) -> None:
        """An alarm of a move: early and stale ones do nothing."""
        move = self.state.moves.get(source)
        if move is not None and move.due is not None and move.due <= self.ledger.now:
            if move.state == "moving":
                self._rest(move, "late")
            else:
                self._advance(move)

    def answered(self, node: str, answer: Migrated) -> None:
        """MIGRATED. One that comes late, or for a move that is over, still tells what was."""
        source = self.state.instances.get(answer.instance)
        move = self.state.moves.get(answer.instance)
        current = move is not None and move.id == answer.migration
        for result in answer.results:
            self._note(node, answer.instance, result, move if current else None)
        if move is None or not current or source is None or move.state != "moving":
            return
        kept = [result for result in answer.results if result.outcome == "kept"]
        if move.invocations:
            self._over(move, kept[0].why if kept else "" if answer.results else "it was over before")
        elif kept or source.state in tables.LIVE:  # or a person's move that became one of the whole instance
            self._rest(move, "kept")
        else:
            self._over(move, "")

    def _note(self, node: str, source: str, result: MoveResult, move: Move | None) -> None:
        instance = self.state.instances.get(source)
        to = self.state.instances.get(move.to) if move else None
        function = f"{instance.target.app}/{instance.target.function}" if instance else ""
        record = MoveRecord(
            invocation=result.invocation,
            function=function,
            source=source,
            source_node=node,
            to=to.id if to else "",
            to_node=to.node if to else "",
            why=move.why if move else "",
            predicted=move.predicted if move else 0.0,
            result=result,
            at=self.ledger.now,
        )
        self.state.moved = [record, *self.state.moved][:RECORDS]
        if result.outcome == "moved" and function:
            move_times.learn(self.state.book, function, result.tokens, result.total)
        request = move.request if move else ""
        self.ledger.emit(MoveEnded(request, source, record.to, record.to_node, result, record.predicted, result.why))

    # -- one step --------------------------------------------------------------------------------------------

    def _advance(self, move: Move) -> None:
        """Send what can be sent; else see that somebody can take it, or give up."""
        if move.state == "moving":
            return
        source = self.state.instances[move.source]
        to = self._destination(move, source)
        heir = self.state.instances.get(self.ledger.replacement(source.id))
        if to is not None:
            self._send(move, source, to)
        elif heir is not None and heir.state != "ready":
            move.due = None  # it becomes ready or ends, and either is heard of
        elif move.invocations:
            self._over(move, f"{move.node} has no instance of {source.target} with a slot free, and no room for one")
        elif source.state == "draining":
            self._rest(move)
        elif not self.state.nodes[source.node].draining:
            self._over(move, "the instance that was to take over did not start")
        else:
            self._seek_heir(move, source)

    def _seek_heir(self, move: Move, source: Instance) -> None:
        """The node is drained: the source ends in any case, but if possible after another has started."""
        spec = self.ledger.function(source.target)
        record = self.ledger.target(source.target)
        move.tries += 1
        if spec is None or move.tries > ROOM or not self.ledger.open_nodes():
            self._do_without(move, source)
            return
        if self.ledger.now < record.retry_at:
            self._look_at(move, self.ledger.now + RETRY)
            return
        idle = not self.scaler.makes_room(record)
        choice = self.scaler.policy.place(self.scaler.candidates.of(source.target, spec, idle=idle, movable=False))
        if isinstance(choice, placement.Placed):
            move.due = None
            why = f"{move.why}; {choice.why}"
            self.scaler.start(source.target, spec, choice.node, choice.estimate, why, source.id)
        elif isinstance(choice, placement.Full) and choice.never:
            self._do_without(move, source)
        else:
            if isinstance(choice, placement.Evict):
                record.evicted = list(choice.instances)
                for name in choice.instances:
                    self.scaler.stop(self.state.instances[name], f"evicted for {source.target}", choice.drain)
            self._look_at(move, self.ledger.now + RETRY)

    def _do_without(self, move: Move, source: Instance) -> None:
        """Nothing can take over: it ends, and what runs in it goes on there, or wherever a slot becomes free."""
        spec = self.ledger.function(source.target)
        self.scaler.stop(source, move.why, None)
        if spec is not None and can_move(spec):
            self._rest(move)
        else:
            self._over(move, "")

    def _destination(self, move: Move, source: Instance, node: str = "") -> Instance | None:
        """The instance to send to: the one started for it, else the one with most slots free; enough for all, while
        the source still serves."""
        heir = self.ledger.replacement(source.id)
        need = len(move.invocations) or (source.running if source.state in tables.LIVE else 1)
        found = []
        for instance in self.ledger.instances_of(key_of(source.target)):
            where = self.state.nodes[instance.node]
            if (
                instance.state != "ready"
                or instance.node == source.node
                or where.cordoned
                or instance.id in self.state.moves
            ):
                continue
            if (node or move.node) not in ("", instance.node):
                continue
            free = instance.concurrency - instance.running
            if instance.id == heir or free >= max(1, need):
                found.append((instance.id != heir, -free, instance.seq, instance))
        return min(found)[3] if found else None

    def _send(self, move: Move, source: Instance, to: Instance) -> None:
        if not move.invocations and source.state in tables.LIVE:
            self.scaler.stop(source, f"{move.why}; goes on in {to.id} on {to.node}", None)
        spec = self.ledger.function(source.target)
        if spec is None or not can_move(spec):
            self._over(move, "")
            return
        if not move.id:
            move.tries = 0  # those were for room
        self._change(move, "sent")
        self.state.migrations += 1
        endpoint, key = self.state.nodes[to.node].info.reached_from(self.state.nodes[source.node].info)
        function = f"{source.target.app}/{source.target.function}"
        move.id = f"mig-{self.state.life}-{self.state.migrations}"
        move.to = to.id
        move.predicted = move_times.seconds(self.state.book, function, source.tokens)
        self._look_at(move, self.ledger.now + ANSWER + 4 * move.predicted)
        body = Migrate(
            migration=move.id,
            instance=source.id,
            node=to.node,
            endpoint=endpoint,
            to=to.id,
            number=to.number,
            curve_key=key,
            invocations=tuple(move.invocations),
        )
        self.ledger.emit(SendMigrate(source.node, body))

    def _rest(self, move: Move, event: str = "") -> None:
        """Try again later, later each time."""
        if event:
            self._change(move, event)
        move.tries += 1
        self._look_at(move, self.ledger.now + min(RETRY_LIMIT, RETRY * 2.0 ** min(move.tries - 1, 10)))

    def _change(self, move: Move, event: str) -> None:
        move.state = cast(MoveState, tables.move(tables.MOVE, f"move of {move.source}", move.state, event))

    def _over(self, move: Move, why: str) -> None:
        tables.move(tables.MOVE, f"move of {move.source}", move.state, "over")
        del self.state.moves[move.source]
        if move.request and why:
            self.ledger.emit(MoveEnded(move.request, move.source, why=why))
        self.ledger.release_heir(move.source)

    def _look_at(self, move: Move, when: float) -> None:
        move.due = when
        self.ledger.wake(when, f"move|{move.source}")

    def validate(self) -> None:
        """Raises AssertionError when an invariant does not hold."""
        for name, move in self.state.moves.items():
            assert name == move.source and name in self.state.instances, f"a move of {name}, which is not there"
            heir = self.state.instances.get(self.ledger.replacement(name))
            assert move.due is not None or (heir is not None and heir.state != "ready"), (
                f"the move of {name} waits for nothing"
            )
            assert move.state != "moving" or move.id, f"the move of {name} was never sent"
