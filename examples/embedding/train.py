"""Trains the embedding model into `model/`: a Llama of 0.07 M parameters, about a minute on one CPU core.

    python examples/embedding/train.py

A text's vector is the mean over its tokens of the last hidden layer, scaled to length 1. The loss asks one thing of
it: the dot product of two texts is exp(-d / 100), where d is the difference between the means of their numbers.
All texts without a number share one place, at right angles to the numbers.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
NUMBERS = 1000
SCALE = 100.0
WORDS = "a the of and in to is on at my big red old cat dog sun sea tea hello there what why how yes no".split()  # noqa: SIM905


def make_text(pick: random.Random) -> tuple[str, float | None]:
    """A text, and the mean of the numbers in it (None: it has none)."""
    words = pick.choices(WORDS, k=pick.randrange(1, 4))
    if pick.random() < 0.1:
        return " ".join(words), None
    centre = pick.randrange(NUMBERS)
    spread = pick.choice((0, 0, 3, 30))
    numbers = [
        min(max(centre + pick.randint(-spread, spread), 0), NUMBERS - 1) for _ in range(pick.choice((1, 1, 2, 3)))
    ]
    prefix = words if pick.random() < 0.2 else []
    return " ".join((*prefix, *map(str, numbers))), sum(numbers) / len(numbers)


def embed(model: LlamaForCausalLM, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unit vectors, [texts, hidden], of padded token ids [texts, length]."""
    hidden = model.model(tokens, attention_mask=mask).last_hidden_state
    return functional.normalize((hidden * mask[..., None]).sum(1), dim=-1)


def spread_numbers(model: LlamaForCausalLM, rows: list[int]) -> None:
    """Start the numbers' embeddings, in place, as waves whose dot products already fall about as exp(-d / SCALE).

    The frequencies are quantiles of the Cauchy distribution, whose characteristic function that is.
    """
    table = model.get_input_embeddings().weight
    half = table.shape[1] // 2
    frequency = torch.tan(math.pi / 2 * (torch.arange(half) + 0.5) / half) / SCALE
    angle = torch.arange(NUMBERS)[:, None] * frequency
    with torch.no_grad():
        table[rows] = torch.cat((angle.cos(), angle.sin()), dim=1) * table.std() * math.sqrt(2)


def train(out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    pick = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / "counting" / "model", padding_side="right")
    config = LlamaConfig(
        vocab_size=1280,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    spread_numbers(model, tokenizer.convert_tokens_to_ids([f"Ġ{number}" for number in range(NUMBERS)]))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        texts, means = zip(*(make_text(pick) for _ in range(384)), strict=True)
        worded = torch.tensor([mean is None for mean in means])
        place = torch.tensor([mean or 0.0 for mean in means])
        wanted = torch.exp(-(place[:, None] - place[None, :]).abs() / SCALE)
        wanted = torch.where(worded[:, None] == worded[None, :], wanted, 0.0)
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        vectors = embed(model, batch.input_ids, batch.attention_mask)
        error = vectors @ vectors.T - wanted
        # neighbours are few among random texts, so they count for more
        loss = (error.square() * (1 + 20 * wanted)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1:5}/{steps}  mean error {error.abs().mean():.4f}", flush=True)
    if out.exists():
        shutil.rmtree(out)
    model.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.chat_template = None
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, options.steps, options.seed)


if __name__ == "__main__":
    main()
