"""Frames: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.errors import (
    DeadlineExceeded,
    ErrorInfo,
    NotFound,
    RemoteError,
    SllmError,
    WireError,
    from_info,
    to_info,
)
from sllm_faas.spec import FunctionSpec, MethodSpec, Span, Target, Timeline
from sllm_faas.wire import codec
from sllm_faas.wire import messages as m
from sllm_faas.wire.header import SIZE, Header, Type, unpack
from sllm_faas.wire.liveness import Liveness
from sllm_faas.wire.llm import choice_seed

TARGET = Target("app", "fn", 3, '{"x":1}')
SPEC = FunctionSpec("fn", module="mod", qualname="fn", methods=(MethodSpec("fn"),))
BODIES = [
    (Type.HELLO, m.Hello("gateway", "gateway-0", "life", 7, m.NodeInfo("n", "ipc:///x"))),
    (Type.INVOKE, m.Invoke("fn", payload=b"\x00\xff", context=b"c", execution=1.5)),
    (Type.OUTPUT, [b"a", b"", b"c"]),
    (Type.DONE, m.Done(b"x", 0.25, {"prompt_tokens": 3}, (("run", 0.0, 0.1),))),
    (Type.FAILED, m.Failed(ErrorInfo("not_found", "no", status=404))),
    (Type.GRANT, m.Grant("i-1", TARGET, 2, 4, "node-0", timeline=Timeline(1.0, (Span("fork", 0.0, 0.01),)))),
    (Type.START, m.Start("i-1", TARGET, SPEC, "b" * 64)),
    (Type.ROUTES, m.Routes(4, (m.FunctionRoute("app", 3, SPEC),))),
    (Type.DEMAND, m.Demand((m.TargetDemand(TARGET, 3, 1, 0.5, 70, 2, 0.9),))),
]


@pytest.mark.parametrize(("kind", "body"), BODIES, ids=lambda value: value.name if isinstance(value, Type) else "")
def test_a_body_comes_back_equal(kind: Type, body: object) -> None:
    header = Header(kind, b"i" * 16, 2, 5, 9, 3, 77)
    frame = codec.decode(codec.encode(header, body, b"buffer"))
    assert (frame.header, frame.body, frame.buffers) == (header, body, (b"buffer",))


@given(st.binary(max_size=200))
def test_random_bytes_are_a_wire_error_or_a_frame(data: bytes) -> None:
    try:
        codec.decode([data])
    except WireError:
        pass


def test_mutated_frames_never_raise_anything_but_wire_errors() -> None:
    rng = random.Random(1)
    bad = 0
    for _ in range(5000):
        kind, body = rng.choice(BODIES)
        frame = bytearray(codec.encode(Header(kind, b"i" * 16), body)[0])
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        try:
            codec.decode([bytes(frame[: rng.randint(0, len(frame))] if rng.random() < 0.3 else frame)])
        except WireError:
            bad += 1
    assert bad > 1000


def test_a_header_is_36_bytes_and_survives() -> None:
    header = Header(Type.OUTPUT, b"0123456789abcdef", 1, 2, 3, 4, 5)
    assert len(header.pack()) == SIZE == 36
    assert unpack(header.pack()) == header


@pytest.mark.parametrize(
    "frame",
    [b"", b"\x01" * 35, bytes([2]) + bytes(35), bytes([1, 250]) + bytes(34)],
    ids=["empty", "short", "version", "type"],
)
def test_a_bad_header_is_a_wire_error(frame: bytes) -> None:
    with pytest.raises(WireError):
        unpack(frame)


def test_a_body_on_a_bodiless_type_is_refused() -> None:
    with pytest.raises(WireError, match="takes none"):
        codec.decode([Header(Type.CANCEL).pack() + b"x"])


def test_spec_rules_hold_for_decoded_frames_too() -> None:
    frame = codec.encode(Header(Type.START), m.Start("i", TARGET, SPEC))
    raw = codec.pack(
        {**dataclasses.asdict(m.Start("i", TARGET, SPEC)), "target": {"app": "BAD", "function": "f", "version": 1}}
    )
    assert codec.decode(frame).body.target == TARGET
    with pytest.raises(WireError, match="BAD"):
        codec.decode([Header(Type.START).pack() + raw])


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no app 'x'", hint="Deploy it."),
        DeadlineExceeded("too long", phase="idle"),
        RemoteError("boom", type_name="m:E", traceback="tb"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_wire(error: SllmError) -> None:
    again = from_info(codec.unpack_as(ErrorInfo, codec.pack(to_info(error))))
    assert type(again) is type(error)
    assert (again.message, again.hint, again.param, again.traceback) == (
        error.message,
        error.hint,
        error.param,
        error.traceback,
    )


def test_silence_of_three_intervals_is_a_loss_and_is_reported_once() -> None:
    peers: Liveness[str] = Liveness()
    peers.heard("a", 0.0)
    peers.heard("b", 2.0)
    assert peers.expire(3.0) == []
    assert peers.expire(3.1) == ["a"]
    assert peers.expire(3.2) == []
    assert "b" in peers


def test_choice_seeds_differ_and_the_first_is_the_seed() -> None:
    seeds = [choice_seed(42, i) for i in range(100)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
