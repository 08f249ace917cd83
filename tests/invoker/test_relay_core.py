"""The relay's tables: who gets which frame, and that no slot outlives its invocation."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sllm_invoker.relay_core import Action, Drain, Instance, Kill, RelayCore, Send

from sllm_faas.errors import WorkerLost, to_info
from sllm_faas.spec import Target, Timeline
from sllm_faas.wire.codec import decode, encode
from sllm_faas.wire.header import NO_LIMIT, Header, Type, unpack
from sllm_faas.wire.messages import Adopted, Done, Failed, Grant, Invoke, Refused

G, H = b"gateway-0:x", b"gateway-1:y"
PEER = b"ins-1"
TARGET = Target("app", "f", 1)


def ident(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Rig:
    """A core with one ready instance, number 1, and gateways that acknowledge every grant at once."""

    def __init__(self, concurrency: int = 2, gateways: tuple[bytes, ...] = (G,), **options: Any) -> None:
        self.core = RelayCore("node-0", **options)
        self.now = 0.0
        for gateway in gateways:
            self.join(gateway)
        self.instance = Instance(1, "ins-1", PEER, TARGET, concurrency, 100.0, 5.0)
        self.core.add(self.instance)
        self.core.ready(1, Timeline())
        self.settle()

    def join(self, gateway: bytes) -> list[Action]:
        return self.core.gateway_joined(gateway, self.now)

    def settle(self) -> list[Grant]:
        grants = []
        while actions := self.core.settle():
            for action in actions:
                assert isinstance(action, Send)
                frame = decode(action.parts)
                grants.append(frame.body)
                self.core.want(action.peer, frame.header, 0)
        return grants

    def invoke(self, number: int, gateway: bytes = G, fence: int = 1, credit: int = NO_LIMIT) -> list[Action]:
        header = Header(Type.INVOKE, ident(number), fence, 1, credit=credit)
        return self.core.from_gateway(gateway, header, encode(header, Invoke("f", payload=b"secret")), self.now)

    def gateway(self, kind: Type, number: int, gateway: bytes = G, **fields: int) -> list[Action]:
        header = Header(kind, ident(number), fields.pop("fence", 1), **fields)
        return self.core.from_gateway(gateway, header, [header.pack()], self.now)

    def container(self, kind: Type, number: int, body: Any = None, peer: bytes = PEER, **fields: int) -> list[Action]:
        header = Header(kind, ident(number), fields.pop("fence", 1), **fields)
        return self.core.from_container(peer, header, encode(header, body), self.now)

    def output(self, number: int, seq: int, items: int = 1) -> list[Action]:
        return self.container(Type.OUTPUT, number, [b"x"] * items, seq=seq, items=items)

    def tick(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self.core.tick(self.now)


def test_a_core_is_quiet_once_nothing_runs_and_every_gateway_knows_its_last_grant():
    rig = Rig()
    assert rig.core.quiet
    rig.core.drain(1, rig.now)
    (grant,) = rig.core.settle()
    assert isinstance(grant, Send)
    assert not rig.core.quiet, "it may still dispatch on the grant before"
    rig.core.want(G, unpack(grant.parts[0]), 0)
    assert rig.core.quiet
    (last,) = rig.core.gone(1, "stopped", 0.0)
    assert not rig.core.quiet
    rig.core.want(G, unpack(grant.parts[0]), 0)
    assert not rig.core.quiet, "that was an older one"
    assert isinstance(last, Send)
    rig.core.gateway_lost(G, 0.0)
    assert rig.core.quiet, "whoever is gone dispatches nothing"


def kinds(actions: list[Action]) -> list[Type]:
    return [unpack(action.parts[0]).type for action in actions if isinstance(action, Send)]


def body(action: Action) -> Any:
    assert isinstance(action, Send)
    return decode(action.parts).body


def test_a_ready_instance_is_granted_to_its_gateways() -> None:
    core = RelayCore("node-0")
    core.gateway_joined(G, 0.0)
    core.add(Instance(7, "ins-7", b"ins-7", TARGET, 3, None, 5.0, why="because"))
    (first,) = core.settle()
    assert (body(first).limit, body(first).state, body(first).why) == (0, "starting", "because")
    core.ready(7, Timeline(began=1.0))
    (second,) = core.settle()
    grant = body(second)
    assert isinstance(grant, Grant) and (grant.limit, grant.state, grant.timeline) == (3, "ready", Timeline(began=1.0))


def test_frames_are_forwarded_as_they_came() -> None:
    rig = Rig()
    header = Header(Type.INVOKE, ident(1), 1, 1, credit=NO_LIMIT)
    parts = [*encode(header, Invoke("f")), b"buffer"]
    (sent,) = rig.core.from_gateway(G, header, parts, 0.0)
    assert sent == Send("container", PEER, parts) and sent.parts is parts
    (answer,) = rig.container(Type.DONE, 1, Done(b"result"))
    assert answer == Send("gateway", G, encode(Header(Type.DONE, ident(1), 1), Done(b"result")))
    rig.core.validate()


def test_a_resumed_invocation_speaks_from_the_output_its_gateway_names() -> None:
    rig = Rig()
    header = Header(Type.INVOKE, ident(1), 2, 1, seq=5, credit=NO_LIMIT)
    rig.core.from_gateway(G, header, encode(header, Invoke("f", stream=True, outputs=5)), 0.0)
    assert rig.container(Type.OUTPUT, 1, [b"x"], fence=2, seq=0, items=1) == []
    assert kinds(rig.container(Type.OUTPUT, 1, [b"x"], fence=2, seq=5, items=1)) == [Type.OUTPUT]


def test_an_orphan_is_stopped_by_whoever_knows_its_fence() -> None:
    rig = Rig(gateways=(G, H))
    rig.invoke(1, credit=8)
    rig.join(G)  # it was lost and is back: what it had is nobody's now
    assert rig.gateway(Type.CANCEL, 1, fence=9) == []
    assert kinds(rig.gateway(Type.CANCEL, 1)) == [Type.CANCEL]
    rig.core.validate()


def test_a_cancel_under_an_older_fence_is_confirmed_and_touches_nothing() -> None:
    rig = Rig()
    rig.invoke(1, fence=3)
    (answer,) = rig.gateway(Type.CANCEL, 1, fence=2)
    assert isinstance(answer, Send) and unpack(answer.parts[0])[:3] == (Type.CANCELLED, ident(1), 2)
    assert kinds(rig.container(Type.DONE, 1, Done(), fence=3)) == [Type.DONE]


def test_without_a_slot_it_is_refused_and_never_reaches_the_container() -> None:
    rig = Rig(concurrency=1)
    rig.invoke(1)
    (refused,) = rig.invoke(2)
    assert body(refused) == Refused("no_slot")
    rig.container(Type.DONE, 1, Done())
    assert kinds(rig.invoke(2)) == [Type.INVOKE]


def test_unknown_draining_and_stale_are_refused_by_name() -> None:
    rig = Rig()
    header = Header(Type.INVOKE, ident(1), 1, 99)
    assert body(rig.core.from_gateway(G, header, [header.pack()], 0.0)[0]) == Refused("unknown_instance")
    rig.invoke(2)
    assert body(rig.invoke(2)[0]) == Refused("stale_fence")
    rig.core.drain(1, rig.now)
    assert body(rig.invoke(3)[0]) == Refused("draining")
    rig.core.validate()


def test_a_higher_fence_waits_until_the_older_one_has_ended() -> None:
    rig = Rig()
    rig.invoke(1, fence=1)
    actions = rig.invoke(1, fence=2)
    assert kinds(actions) == [Type.CANCEL, Type.REFUSED]
    rig.container(Type.CANCELLED, 1)
    assert kinds(rig.invoke(1, fence=2)) == [Type.INVOKE]
    rig.container(Type.DONE, 1, Done(), fence=1)
    assert rig.core.dropped["stale_fence"] == 1
    assert rig.core.running(1) == 1


def test_a_container_speaks_only_for_its_own_invocations() -> None:
    rig = Rig()
    rig.invoke(1)
    assert rig.container(Type.DONE, 1, Done(), peer=b"ins-2") == []
    assert rig.core.dropped["not_its_invocation"] == 1
    assert rig.core.running(1) == 1


def test_outputs_out_of_order_or_beyond_credit_are_dropped_and_counted() -> None:
    rig = Rig()
    rig.invoke(1, credit=2)
    assert kinds(rig.output(1, 0)) == [Type.OUTPUT]
    assert rig.output(1, 0) == [] and rig.output(1, 5) == []
    assert rig.core.dropped["out_of_order"] == 2
    assert rig.output(1, 1, items=2) == []
    assert rig.core.dropped["beyond_credit"] == 1
    assert kinds(rig.gateway(Type.CREDIT, 1, credit=3)) == [Type.CREDIT]
    assert kinds(rig.output(1, 1, items=2)) == [Type.OUTPUT]
    assert rig.gateway(Type.CREDIT, 1, credit=2) == []


def test_cancel_is_forwarded_once_and_repeated_every_second_until_the_end() -> None:
    rig = Rig()
    rig.invoke(1)
    assert kinds(rig.gateway(Type.CANCEL, 1)) == [Type.CANCEL]
    assert rig.gateway(Type.CANCEL, 1) == []
    assert rig.tick(0.5) == []
    assert kinds(rig.tick(0.5)) == [Type.CANCEL]
    assert kinds(rig.container(Type.CANCELLED, 1)) == [Type.CANCELLED]
    assert rig.tick(10) == []


def test_cancel_of_an_unknown_invocation_is_answered_cancelled() -> None:
    rig = Rig()
    (sent,) = rig.gateway(Type.CANCEL, 9, fence=3)
    assert isinstance(sent, Send)
    assert unpack(sent.parts[0]) == Header(Type.CANCELLED, ident(9), 3)


def test_code_that_ignores_its_cancellation_is_killed_after_the_grace() -> None:
    rig = Rig(concurrency=1)
    rig.invoke(1)
    rig.gateway(Type.CANCEL, 1)
    assert not any(isinstance(action, Kill) for action in rig.tick(4.9))
    assert [type(action) for action in rig.tick(0.2)] == [Kill]
    assert rig.tick(1) == []
    assert kinds(rig.core.gone(1, "failed", rig.now)) == [Type.CANCELLED, Type.GRANT]
    assert not rig.core.flights


def test_others_in_the_container_may_end_before_it_is_killed() -> None:
    rig = Rig(concurrency=3)
    rig.invoke(1)
    rig.invoke(2)
    rig.gateway(Type.CANCEL, 1)
    (drain,) = [action for action in rig.tick(5) if not isinstance(action, Send)]
    assert isinstance(drain, Drain)
    assert body(rig.invoke(3)[0]) == Refused("draining")
    actions = rig.container(Type.DONE, 2, Done())
    assert isinstance(actions[-1], Kill)


def test_the_execution_backstop_cancels_what_its_gateway_forgot() -> None:
    rig = Rig()
    rig.invoke(1)
    assert rig.tick(104) == []
    assert kinds(rig.tick(1)) == [Type.CANCEL]


def test_a_dead_container_fails_what_ran_in_it_and_frees_nothing_twice() -> None:
    rig = Rig()
    rig.invoke(1)
    rig.invoke(2)
    rig.gateway(Type.CANCEL, 2)
    actions = rig.core.gone(1, "failed", rig.now, " killed by SIGKILL")
    assert sorted(kinds(actions)) == sorted([Type.FAILED, Type.CANCELLED, Type.GRANT])
    failed = next(body(action) for action in actions if kinds([action]) == [Type.FAILED])
    assert isinstance(failed, Failed) and failed.error.code == "worker_lost" and "SIGKILL" in failed.error.message
    assert next(body(action) for action in actions if kinds([action]) == [Type.GRANT]).state == "failed"
    rig.core.validate()


def test_an_instance_has_served_once_it_said_something() -> None:
    rig = Rig()
    rig.invoke(1)
    rig.invoke(2)
    rig.container(Type.FAILED, 2, Failed(to_info(WorkerLost("no"))))
    assert not rig.core.served(1)
    rig.output(1, 0)
    assert rig.core.served(1)
    rig.container(Type.FAILED, 1, Failed(to_info(WorkerLost("no"))), seq=1)
    assert rig.core.served(1), "the part of an answer counts"
    rig.core.gone(1, "failed", rig.now)
    assert not rig.core.served(1)


def test_an_orphan_is_adopted_replayed_and_goes_on() -> None:
    rig = Rig(gateways=(G, H))
    rig.invoke(1, credit=100)
    for seq in range(4):
        rig.output(1, seq)
    assert body(rig.gateway(Type.ADOPT, 1, H, seq=2)[0]) == Adopted("owned")
    rig.core.gateway_lost(G, rig.now)
    assert rig.output(1, 4) == []
    actions = rig.gateway(Type.ADOPT, 1, H, seq=2, credit=200)
    assert kinds(actions) == [Type.ADOPTED, *[Type.OUTPUT] * 5, Type.CREDIT]
    found = body(actions[0])
    assert (found.status, found.target, found.instance) == ("found", TARGET, "ins-1")
    seqs = [unpack(action.parts[0]).seq for action in actions[:6] if isinstance(action, Send)]
    assert seqs == [0, 0, 1, 2, 3, 4], "all of it, so that it can be resumed"
    assert kinds(rig.output(1, 5)) == [Type.OUTPUT]
    assert kinds(rig.container(Type.DONE, 1, Done())) == [Type.DONE]
    rig.core.validate()


def test_an_adopter_gets_a_large_payload_too() -> None:
    """Without it, the adopter could not resume the invocation elsewhere."""
    rig = Rig(gateways=(G, H))
    header, large = Header(Type.INVOKE, ident(1), 1, 1, credit=NO_LIMIT), b"x" * 100_000
    rig.core.from_gateway(G, header, encode(header, Invoke("f"), large), rig.now)
    rig.core.gateway_lost(G, rig.now)
    (adopted, *_) = rig.gateway(Type.ADOPT, 1, H, fence=0, credit=NO_LIMIT)
    assert isinstance(adopted, Send)
    frame = decode(adopted.parts)
    assert (frame.body.status, frame.buffers) == ("found", (large,))


def test_an_orphan_that_nobody_adopts_is_cancelled() -> None:
    rig = Rig(orphan_grace=10.0)
    rig.invoke(1)
    rig.core.gateway_lost(G, rig.now)
    assert rig.tick(9.9) == []
    assert kinds(rig.tick(0.2)) == [Type.CANCEL]
    rig.container(Type.CANCELLED, 1)
    rig.core.validate()
    assert not rig.core.flights


def test_an_orphans_end_is_kept_for_its_adopter() -> None:
    rig = Rig(gateways=(G, H))
    rig.invoke(1)
    rig.core.gateway_lost(G, rig.now)
    assert rig.container(Type.DONE, 1, Done(b"late")) == []
    rig.core.validate()
    assert kinds(rig.gateway(Type.ADOPT, 1, H)) == [Type.ADOPTED, Type.DONE]
    assert body(rig.gateway(Type.ADOPT, 1, H)[0]) == Adopted("unknown")


def test_a_stream_that_ended_just_before_its_gateway_died_can_still_be_read() -> None:
    rig = Rig(gateways=(G, H))
    rig.invoke(1, credit=100)
    rig.output(1, 0)
    rig.container(Type.DONE, 1, Done())
    rig.tick(3)
    rig.core.gateway_lost(G, rig.now)
    assert kinds(rig.gateway(Type.ADOPT, 1, H)) == [Type.ADOPTED, Type.OUTPUT, Type.DONE]


def test_a_window_that_has_moved_on_is_gone() -> None:
    rig = Rig(gateways=(G, H), stream_window=2)
    rig.invoke(1, credit=100)
    for seq in range(5):
        rig.output(1, seq)
    rig.core.gateway_lost(G, rig.now)
    assert body(rig.gateway(Type.ADOPT, 1, H, seq=2)[0]) == Adopted("gone")
    assert kinds(rig.gateway(Type.ADOPT, 1, H, seq=3)) == [Type.ADOPTED, Type.OUTPUT, Type.OUTPUT]


def test_a_gateway_that_leaves_in_order_has_its_invocations_cancelled() -> None:
    rig = Rig()
    rig.invoke(1)
    assert kinds(rig.core.gateway_left(G, rig.now)) == [Type.CANCEL]


def test_a_gateway_that_says_hello_again_finds_its_invocations_as_orphans() -> None:
    rig = Rig()
    rig.invoke(1)
    rig.join(G)
    rig.settle()
    assert kinds(rig.gateway(Type.ADOPT, 1)) == [Type.ADOPTED]
    rig.container(Type.DONE, 1, Done())
    rig.core.validate()


def test_foreign_and_misplaced_frames_are_dropped_by_reason() -> None:
    rig = Rig(gateways=(G, H))
    rig.invoke(1)
    assert rig.gateway(Type.CANCEL, 1, b"stranger") == []
    assert rig.gateway(Type.CANCEL, 1, H) == []
    assert rig.gateway(Type.CREDIT, 1, fence=7, credit=5) == []
    assert rig.gateway(Type.ROUTES, 1) == []
    assert rig.container(Type.DONE, 8, Done()) == []
    assert rig.core.dropped == {
        "no_hello": 1, "not_owner": 1, "stale_fence": 1, "unexpected_type": 1, "unknown_invocation": 1,
    }  # fmt: skip


class Traffic(RuleBasedStateMachine):
    """Any order of frames, losses and time keeps the tables sound."""

    ids = st.integers(1, 6)
    gateways = st.sampled_from((G, H))

    @initialize()
    def begin(self) -> None:
        self.rig = Rig(concurrency=3, gateways=(G, H), orphan_grace=3.0, stream_window=3)
        self.dead = False

    @rule(number=ids, gateway=gateways, fence=st.integers(1, 2), credit=st.sampled_from((2, NO_LIMIT)))
    def invoke(self, number: int, gateway: bytes, fence: int, credit: int) -> None:
        self.rig.invoke(number, gateway, fence, credit)
        self.rig.settle()

    @rule(number=ids, kind=st.sampled_from((Type.CANCEL, Type.CREDIT, Type.ADOPT)), gateway=gateways)
    def control(self, number: int, kind: Type, gateway: bytes) -> None:
        self.rig.gateway(kind, number, gateway, seq=0, credit=3)
        self.rig.settle()

    @rule(number=ids, seq=st.integers(0, 3))
    def output(self, number: int, seq: int) -> None:
        self.rig.output(number, seq)

    @rule(number=ids, kind=st.sampled_from((Type.DONE, Type.CANCELLED)))
    def end(self, number: int, kind: Type) -> None:
        self.rig.container(kind, number, Done() if kind is Type.DONE else None)
        self.rig.settle()

    @rule(gateway=gateways, again=st.booleans())
    def lose(self, gateway: bytes, again: bool) -> None:
        self.rig.core.gateway_lost(gateway, self.rig.now)
        if again:
            self.rig.join(gateway)
        self.rig.settle()

    @rule(seconds=st.sampled_from((0.5, 4.0, 120.0)))
    def tick(self, seconds: float) -> None:
        for action in self.rig.tick(seconds):
            if isinstance(action, Kill):
                self.die()
        self.rig.settle()

    @rule()
    def die(self) -> None:
        if not self.dead:
            self.rig.core.gone(1, "failed", self.rig.now)
            self.dead = True
            assert not self.rig.core.flights

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "rig"):
            self.rig.core.validate()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, derandomize=True)
