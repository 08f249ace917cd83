"""A real language-model instance: forked from a template, with the counting model and the transformers engine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.runner.config import InstanceConfig

from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec, Target
from sllm_faas.wire.codec import pack
from sllm_faas.wire.header import NO_LIMIT, Type
from sllm_faas.wire.llm import LlmOutput, LlmRequest, LlmResume, decode_output
from tests.runner.harness import Runner, started

MODEL = Path(__file__).parents[2] / "examples" / "counting" / "model"
METHODS = (MethodSpec("chat", stream=True), MethodSpec("complete", stream=True), MethodSpec("embed"))


@contextmanager
def started_from(module: str) -> Iterator[Runner]:
    """An instance of the counting model."""
    with tempfile.TemporaryDirectory(prefix="sllm-") as name:
        directory = Path(name)
        store = CheckpointStore(directory / "store")
        ingest(store, str(MODEL), "counting")
        config = InstanceConfig(
            instance="i-1",
            target=Target("counting", "counting", 1),
            specs=(FunctionSpec("counting", "llm", methods=METHODS, checkpoint=CheckpointSpec("c"), concurrency=4),),
            object_dir=str(store.get("counting").directory),
        )
        with started(config, directory, module=module) as runner:
            runner.ready()
            yield runner


@pytest.fixture(scope="module")
def counting() -> Iterator[Runner]:
    with started_from("tests.runner.forked") as runner:
        yield runner


def ask(r: Runner, method: str, credit: int = NO_LIMIT, resume: bytes = b"", outputs: int = 0, **fields: Any) -> bytes:
    request = LlmRequest(**fields)
    return r.invoke_raw(pack(request), method=method, credit=credit, stream=True, resume=resume, outputs=outputs)


def said(r: Runner, call: bytes) -> list[LlmOutput]:
    return [decode_output(item) for frame in r.frames[call] if frame.header.type is Type.OUTPUT for item in frame.body]


def text(r: Runner, call: bytes, choice: int = 0) -> str:
    r.end(call)
    return "".join(output.text for output in said(r, call) if output.choice == choice)


def test_it_says_what_it_attached(counting: Runner) -> None:
    spans = {span.name: span for span in counting.ready().body.timeline.spans}
    assert list(spans) == ["import", "attach"]
    assert "tensors" in spans["attach"].detail


def test_without_a_template_it_makes_its_own_and_says_how_long_that_took() -> None:
    with started_from("sllm_invoker.runner.main") as runner:
        spans = {span.name: span for span in runner.ready().body.timeline.spans}
        assert list(spans) == ["import", "template", "attach"]
        assert spans["template"].detail == "made" and spans["template"].seconds > 0
        call = ask(runner, "chat", messages=({"role": "user", "content": "41 42 43"},), max_tokens=3)
        assert text(runner, call).split() == ["44", "45", "46"]


def test_it_counts_on(counting: Runner) -> None:
    call = ask(counting, "chat", messages=({"role": "user", "content": "41 42 43"},), max_tokens=50)
    assert text(counting, call).split() == [str(number) for number in range(44, 94)]
    assert counting.end(call).body.usage["completion_tokens"] == 50


def test_several_at_once_each_get_their_own(counting: Runner) -> None:
    calls = {start: ask(counting, "complete", prompts=(f"{start}",), max_tokens=20) for start in (10, 200, 500, 700)}
    for start, call in calls.items():
        assert text(counting, call).split() == [str(start + 1 + i) for i in range(20)]


def test_the_seed_decides_the_dice_and_a_resumed_stream_throws_the_same(counting: Runner) -> None:
    def roll(seed: int, resume: bytes = b"", outputs: int = 0) -> bytes:
        return ask(counting, "complete", prompts=("roll:",), max_tokens=30, seed=seed, resume=resume, outputs=outputs)

    first, again, other = roll(1), roll(1), roll(2)
    dice = text(counting, first)
    assert text(counting, again) == dice
    assert text(counting, other) != dice
    before = said(counting, first)[:7]
    tokens = tuple(token for output in before for token in output.tokens)
    rest = roll(1, pack(LlmResume((tokens,), (None,))), len(before))
    assert "".join(output.text for output in before) + text(counting, rest) == dice


def test_a_cancelled_stream_leaves_its_slot_to_others(counting: Runner) -> None:
    calls = [ask(counting, "complete", prompts=("1",)) for _ in range(4)]
    for call in calls:
        counting.wait(lambda call=call: said(counting, call))
        counting.cancel(call)
    for call in calls:
        assert counting.end(call).header.type is Type.CANCELLED
    assert text(counting, ask(counting, "complete", prompts=("7",), max_tokens=1)).split() == ["8"]


def test_it_tells_how_long_its_contexts_are(counting: Runner) -> None:
    def told() -> int:
        return max((each.header.seq for each in counting.control if each.header.type is Type.CONTEXT), default=0)

    call = ask(counting, "complete", prompts=("1 2 3",), max_tokens=4000)
    counting.wait(lambda: told() > 100)
    counting.cancel(call)
    counting.end(call)


def test_a_stop_string_and_several_choices(counting: Runner) -> None:
    call = ask(counting, "complete", prompts=("1", "20"), n=2, stop=(" 25",), max_tokens=8, temperature=0.0)
    counting.end(call)
    assert [text(counting, call, choice).split()[-1] for choice in range(4)] == ["9", "9", "24", "24"]
    finishes = {output.choice: output.finish for output in said(counting, call) if output.finish}
    assert finishes == {0: "length", 1: "length", 2: "stop", 3: "stop"}


def test_drained_it_leaves(counting: Runner) -> None:
    counting.shutdown()
    counting.expect(Type.BYE)
    assert counting.process.wait(30) == 0
