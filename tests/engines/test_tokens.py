"""Text in and out: nothing half-decoded, no stop string shown, the same text however ids arrive."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sllm_invoker.runner.tokens import Detokenizer, StopMatcher, TextCodec, TextStream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sllm_faas.errors import BadRequest, CheckpointCorrupt, UnsupportedParameter

SPECIALS = ["<s>", "</s>", "<|user|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ bos_token if loop.first else '' }}<|user|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def byte_level() -> Tokenizer:
    """One id per byte, after the special ones: every character beyond ASCII is several ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 3 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def with_byte_fallback() -> Tokenizer:
    """Words with a leading mark for a space, bytes for what it does not know, as sentencepiece models are."""
    words = ["▁", "▁hello", "▁world", "!", "hello", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = [("<unk>", 0.0), *((word, -float(i)) for i, word in enumerate(words, 1))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def save(directory, tokenizer, template=TEMPLATE, **config):
    tokenizer.save(str(directory / "tokenizer.json"))
    settings_ = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings_))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return TextCodec.load(directory)


@pytest.fixture(scope="module", params=[byte_level, with_byte_fallback])
def codec(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("tokenizer"), request.param())


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save(tmp_path_factory.mktemp("chat"), byte_level())


TEXTS = st.text(
    alphabet=st.one_of(st.sampled_from("helo wrd!é€😀\u0301\ufffd\n"), st.characters(exclude_categories=["Cs"]))
)


def pieces(data, ids):
    """`ids` cut at random places."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(max_examples=150)
@given(text=TEXTS, data=st.data())
def test_streamed_text_is_the_decoded_text_however_it_is_cut(codec, text, data):
    ids = codec.encode(text)
    detokenizer = Detokenizer(codec)
    shown = "".join(detokenizer.feed(piece) for piece in pieces(data, ids)) + detokenizer.finish()
    assert shown == codec.decode(ids)


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 258)), data=st.data())
def test_any_ids_at_all_stream_to_one_text_however_they_are_cut(codec, ids, data):
    """Broken bytes and special tokens included."""
    whole, cut = Detokenizer(codec), Detokenizer(codec)
    expected = whole.feed(ids) + whole.finish()
    assert "".join(cut.feed(piece) for piece in pieces(data, ids)) + cut.finish() == expected


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 258)))
def test_broken_bytes_of_a_byte_level_tokenizer_stream_to_their_decoded_text(chat, ids):
    detokenizer = Detokenizer(chat)
    assert detokenizer.feed(ids) + detokenizer.finish() == chat.decode(ids)


@settings(max_examples=100)
@given(text=TEXTS)
def test_no_half_character_is_ever_shown(text):
    codec = TextCodec(_Bytes(), None, {})
    detokenizer = Detokenizer(codec)
    shown = ""
    for token in codec.encode(text):
        shown += detokenizer.feed([token])
        assert text.startswith(shown)


class _Bytes:
    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def cut_at_stop(text, stops):
    """The definition: text before the first stop string to be complete, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300)
@given(text=st.text("abc", max_size=30), stops=STOPS, data=st.data())
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text, stops, data):
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces(data, text))
    shown += "" if matcher.matched else matcher.finish()
    assert (shown, matcher.matched) == cut_at_stop(text, stops)
    assert not any(stop in shown for stop in stops)


@settings(max_examples=100)
@given(text=st.text("abc", max_size=30), stops=STOPS)
def test_only_what_could_begin_a_stop_string_is_withheld(text, stops):
    matcher = StopMatcher(stops)
    shown = matcher.feed(text)
    if matcher.matched is None:
        withheld = text[len(shown) :]
        assert withheld == "" or any(stop.startswith(withheld) for stop in stops)


@settings(max_examples=150)
@given(
    text=st.text("abé€ ", max_size=25),
    stops=st.lists(st.text("abé€", min_size=1, max_size=3), max_size=2),
    data=st.data(),
)
def test_a_stream_rebuilt_from_its_tokens_goes_on_where_it_was(text, stops, data):
    codec = TextCodec(_Bytes(), None, {})
    ids = codec.encode(text)
    at = data.draw(st.integers(0, len(ids)))
    here = TextStream(codec, stops)
    before = here.feed(ids[:at])
    there = TextStream(codec, stops, tokens=ids[:at])
    assert there.text_shown == here.text_shown == len(before)
    assert there.stopped == here.stopped
    after = there.feed(ids[at:]) + there.finish()
    assert (before + after, there.stopped) == cut_at_stop(text, stops)


def test_chat_is_rendered_with_special_tokens_and_encoded_without_adding_them_again(chat):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]
    assert chat.render_chat(messages) == "<s><|user|>hi\n<|user|>yo\n>"
    ids = chat.encode_chat(messages)
    assert ids.count(chat.encode("")[0]) == 1
    assert chat.decode(ids) == "hi\nyo\n>"


def test_plain_text_gets_the_begin_token(chat):
    assert len(chat.encode("ab")) == 3


def test_a_template_of_the_request_overrides_the_models_own(chat):
    assert chat.render_chat([{"role": "user", "content": "x"}], template="{{ messages|length }}") == "1"


def test_a_broken_template_of_the_request_is_the_callers_error(chat):
    with pytest.raises(BadRequest, match="not valid"):
        chat.render_chat([], template="{% {")


def test_a_missing_chat_template_is_the_callers_error_with_a_hint(tmp_path):
    codec = save(tmp_path, byte_level(), template=None)
    assert not codec.has_chat_template
    with pytest.raises(BadRequest, match="no chat template") as caught:
        codec.encode_chat([{"role": "user", "content": "hi"}])
    assert "completions" in caught.value.hint


def test_the_default_of_several_named_templates_is_used(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert save(tmp_path, byte_level(), template=None, chat_template=named).render_chat([]) == "d"


def test_messages_that_the_template_refuses_are_the_callers_error(chat):
    with pytest.raises(BadRequest, match="no tools here"):
        chat.encode_chat([{"role": "tool", "content": "x"}])


def test_a_template_cannot_reach_out_of_its_sandbox(chat):
    with pytest.raises(BadRequest, match="refuses"):
        chat.encode_chat([], template="{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_content_that_is_not_text_is_unsupported(chat):
    with pytest.raises(UnsupportedParameter, match=r"messages\[0\]"):
        chat.encode_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_half_a_surrogate_pair_is_the_callers_error(chat):
    with pytest.raises(BadRequest, match="surrogate"):
        chat.encode("\ud83d")


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_broken_tokenizer_file_is_a_corrupt_checkpoint(tmp_path, broken):
    save(tmp_path, byte_level())
    (tmp_path / broken).write_text("{% {")
    with pytest.raises(CheckpointCorrupt):
        TextCodec.load(tmp_path)


def test_a_checkpoint_without_tokenizer_says_so(tmp_path):
    with pytest.raises(CheckpointCorrupt, match="no tokenizer"):
        TextCodec.load(tmp_path)


def test_tokens_are_handled_without_torch(tmp_path):
    save(tmp_path, byte_level())
    code = (
        "import sys, pathlib; from sllm_invoker.runner.tokens import TextCodec;"
        f"c = TextCodec.load(pathlib.Path({str(tmp_path)!r})); c.encode_chat([{{'role': 'user', 'content': 'a'}}]);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
