"""Resume states: what is kept of the outputs, whoever keeps it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas.dispatch import resume
from sllm_faas.errors import WireError
from sllm_faas.spec import MethodSpec
from sllm_faas.wire import codec, llm
from sllm_faas.wire.llm import LlmLogprob, LlmOutput, LlmResume


@pytest.mark.parametrize(
    ("kind", "method", "spec", "way"),
    [
        ("llm", "chat", None, "tokens"),
        ("llm", "complete", None, "tokens"),
        ("llm", "embed", None, "anew"),
        ("function", "f", MethodSpec("f", stream=True, resumable=True), "output"),
        ("class", "m", MethodSpec("m", stream=True), "never"),
        ("function", "f", MethodSpec("f"), "never"),
    ],
)
def test_the_way_a_call_goes_on_follows_from_its_method(kind, method, spec, way) -> None:  # type: ignore[no-untyped-def]
    assert resume.way_of(kind, method, spec) == way


outputs = st.builds(
    LlmOutput,
    choice=st.integers(0, 3),
    tokens=st.lists(st.integers(0, 2**31), max_size=4).map(tuple),
    text=st.text(max_size=3),
    logprobs=st.just((LlmLogprob("x", -1.0, (120,), (("x", -1.0, (120,)),)),)),
    finish=st.sampled_from([None, None, None, "stop", "length"]),
)


@given(st.lists(outputs, max_size=600), st.lists(st.integers(0, 300), max_size=5))
def test_the_state_of_a_generation_is_its_tokens_by_choice_however_they_were_batched(
    said: list[LlmOutput], cuts: list[int]
) -> None:
    kept = resume.begin("tokens")
    assert kept is not None
    encoded, at = [llm.encode(output) for output in said], 0
    for cut in (*cuts, len(encoded)):
        kept.take(encoded[at : at + cut])
        at += cut
    choices = max((output.choice + 1 for output in said), default=0)
    expected: list[list[int]] = [[] for _ in range(choices)]
    finish: list[str | None] = [None] * choices
    for output in said:
        expected[output.choice] += output.tokens
        finish[output.choice] = output.finish or finish[output.choice]
    assert codec.unpack_as(LlmResume, kept.state()) == LlmResume(tuple(map(tuple, expected)), tuple(finish))  # type: ignore[arg-type]


def test_a_generation_that_was_resumed_before_goes_on_from_there() -> None:
    before = resume.begin("tokens")
    assert before is not None
    first, second = llm.encode(LlmOutput(1, (7, 8))), llm.encode(LlmOutput(1, (9,), finish="stop"))
    before.take([first])
    after = resume.begin("tokens", before.state())
    assert after is not None
    after.take([second])
    before.take([second])
    assert after.state() == before.state()


def test_outputs_that_are_no_generations_have_no_state() -> None:
    for wrong in (
        b"\xc1",
        llm.encode(LlmOutput(-1, (1,))),
        llm.encode(LlmOutput(2**40, (1,))),
        codec.pack({"choice": "x"}),
    ):
        kept = resume.begin("tokens")
        assert kept is not None
        kept.take([wrong])
        with pytest.raises(WireError):
            kept.state()


def test_a_generators_state_is_its_last_output_as_it_was_sent() -> None:
    kept = resume.begin("output")
    assert kept is not None
    assert resume.last_output(kept.state()) is None
    kept.take([b"1", b"[2]"])
    kept.take([])
    assert resume.last_output(kept.state()) == b"[2]"
    again = resume.begin("output", kept.state())
    assert again is not None and again.state() == kept.state()


def test_what_cannot_go_on_has_none_and_what_is_run_again_needs_none() -> None:
    assert resume.begin("never") is None
    anew = resume.begin("anew")
    assert anew is not None and anew.state() == b""
