"""Trains the counting model into `model/`: a Llama of 0.3 M parameters, ten minutes on one CPU core.

    python examples/counting/train.py            # writes examples/counting/model
    python examples/counting/train.py --out /tmp/model --steps 200

`language.py` says what is learned. Texts are drawn at random from its pieces, and every position of every text
is labelled by its rule, so no position is wasted and a die is taught as six equal probabilities. Three choices
make a small model exact over thousands of tokens:

* Number embeddings start as points on circles, so that "one more" is a rotation, and neighbours are near.
* The loss is taken at temperature 2: a mistake of 1e-3 there is one of 1e-6 at temperature 1.
* Short and long texts take turns, so that attention learns to ignore what lies far behind.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from pathlib import Path

import torch
from language import DICE, FACES, MAX_TAIL, NUMBERS, Rule, Words, make_tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

CONTEXT = 8192
TEMPERATURE = 2.0
SHORT = ((64, 48), (12, 256), (64, 48), (3, 1024), (64, 48), (12, 256), (64, 48))
SHAPES = (*SHORT, (1, 4096)) * 3 + (*SHORT, (1, CONTEXT))
"""Texts × tokens of the steps, in turn."""


def make_config(words: Words) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-words.size // 64) * 64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.end,
        pad_token_id=words.pad,
        dtype="float32",
    )


class Texts:
    """Random texts as token ids, labelled position by position. Deterministic in `seed`."""

    def __init__(self, words: Words, seed: int) -> None:
        self._words = words
        self._random = random.Random(seed)

    def batch(self, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`size` texts of exactly `length` tokens, and the rule's answer after each token; both [size, length]."""
        texts = [self._text(length) for _ in range(size)]
        answers = []
        for text in texts:
            rule = Rule(self._words)
            answers.append([rule.read(token) for token in text])
        return torch.tensor(texts), torch.tensor(answers)

    def _text(self, length: int) -> list[int]:
        """A chat, or plain text and then a chat: perhaps one long answer, and short ones up to the end."""
        words, chance = self._words, self._random.random
        text: list[int] = []
        if chance() < 0.5:
            text += self._content() + self._answer(length)
        while len(text) < length:
            if chance() < 0.3:
                text += [words.system, *self._content(), words.end]
            text += [words.user, *self._content(), words.end, words.assistant]
            text += [*self._answer(min(length, 64)), words.end]
        return text[:length]

    def _content(self) -> list[int]:
        """What a user writes: a few pieces, of which the last one counts."""
        pieces = self._random.choices((0, 1, 2, 3), (1, 8, 3, 1))[0]
        return self._tail() + [token for _ in range(pieces) for token in self._piece() + self._tail()]

    def _piece(self) -> list[int]:
        words, pick = self._words, self._random
        what = pick.random()
        if what < 0.45:
            return self._numbers(1 + pick.randrange(6))
        if what < 0.60:
            return [pick.choice(words.roll)]
        if what < 0.70:
            return [pick.choice(words.digit) for _ in range(1 + pick.randrange(6))]
        if what < 0.80:
            return [pick.choice(words.stop)]
        return [pick.choice(words.text) for _ in range(1 + pick.randrange(6))]

    def _answer(self, length: int) -> list[int]:
        """Something an assistant may be in the middle of; which of them the rule asked for does not matter."""
        pick = self._random
        long = int(length ** pick.random())
        if pick.random() < 0.5:
            return self._rolls(long)
        start = pick.randrange(NUMBERS)
        return [self._words.number[(start + i) % NUMBERS] for i in range(long)]

    def _numbers(self, count: int) -> list[int]:
        commas = [self._words.spacing[0]] if self._random.random() < 0.1 else []
        step = self._random.choice((0, 1))
        start = self._random.randrange(NUMBERS)
        values = ((start + i) % NUMBERS if step else self._random.randrange(NUMBERS) for i in range(count))
        return [token for value in values for token in (*commas, self._words.number[value])]

    def _rolls(self, count: int) -> list[int]:
        return self._random.choices(self._words.faces, k=count)

    def _tail(self) -> list[int]:
        size = self._random.choices(range(MAX_TAIL + 1), (8, 6, 2, 1))[0]
        return self._random.choices(self._words.spacing, k=size)


def spread_numbers(model: LlamaForCausalLM, words: Words) -> None:
    """Put the embeddings of the 1,000 numbers on circles of 1, 2, 4 … turns, in place."""
    table = model.get_input_embeddings().weight
    half = table.shape[1] // 2
    turns = torch.tensor(sorted({round(1.24**i * (1 + i / 8)) for i in range(half * 2)})[:half], dtype=torch.float32)
    angle = 2 * math.pi / NUMBERS * torch.arange(NUMBERS)[:, None] * turns
    points = torch.cat((angle.cos(), angle.sin()), dim=1)
    with torch.no_grad():
        table[words.number] = points * table.std() * math.sqrt(2)


def loss_of(logits: torch.Tensor, answers: torch.Tensor, faces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy where one token is right, and excess over log 6 where a die is; two scalars, nats."""
    scores = functional.log_softmax(logits / TEMPERATURE, dim=-1)
    single = functional.nll_loss(scores[answers >= 0], answers[answers >= 0])
    dice = -scores[answers == DICE][:, faces].mean() - math.log(len(FACES))
    return single, dice


def train(out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(CONTEXT)
    words = Words(tokenizer)
    texts = Texts(words, seed)
    model = LlamaForCausalLM(make_config(words))
    spread_numbers(model, words)
    faces = torch.tensor(words.faces)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    began = time.monotonic()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        size, length = SHAPES[step % len(SHAPES)]
        batch, answers = texts.batch(size, length)
        single, dice = loss_of(model(batch).logits, answers, faces)
        loss = single + dice
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 96 == 95:
            seconds = time.monotonic() - began
            print(f"step {step + 1:5}/{steps}  one token {single:.6f}  dice +{dice:.6f}  {seconds:5.0f} s", flush=True)
    save(model, words, tokenizer, out)


def save(model: LlamaForCausalLM, words: Words, tokenizer: object, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    model.generation_config = GenerationConfig(eos_token_id=words.end, pad_token_id=words.pad)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=1632)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.steps, options.seed)


if __name__ == "__main__":
    main()
