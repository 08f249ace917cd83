"""Llama models with random bf16 weights, made on the spot: the figures of a benchmark depend on nothing downloaded.

    python -m benchmarks.models SHAPE DIRECTORY [--pickle] [--variant DIRECTORY …]

`--pickle` writes the state dict for torch.load too; each `--variant` is the same model with other bytes: another
checkpoint of the same size. The tokenizer knows a word for each id: w0, w1 and so on. A directory that is there already
is left.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "35M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
}
"""Where many checkpoints of their own would be too much for a disk."""
LARGE: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
"""Made on a GPU where there is one: only for benchmarks that need one."""
VOCABULARY = 32000
PROMPT = " ".join(f"w{17 * i + 5}" for i in range(16))
"""Sixteen tokens."""


def run(*command: str) -> None:
    """A command that must succeed; its output is shown when it does not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:4])} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def build(shape: str, where: Path, *, pickle: bool = False, variants: Sequence[Path] = ()) -> Path:
    """The model's directory, made in a process of its own."""
    options = ["--pickle"] if pickle else []
    options += [word for variant in variants for word in ("--variant", str(variant))]
    run(sys.executable, "-m", "benchmarks.models", shape, str(where), *options)
    return where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices={**SMALL, **SHAPES, **LARGE})
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pickle", action="store_true")
    parser.add_argument("--variant", type=Path, action="append", default=[])
    options = parser.parse_args()
    wanted = [path for path in (options.directory, *options.variant) if not (path / "config.json").exists()]
    if not wanted:
        return
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.initialization import no_init_weights

    large = options.shape in LARGE
    shape = {"vocab_size": VOCABULARY, **{**SMALL, **SHAPES, **LARGE}[options.shape]}
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    config = transformers.LlamaConfig(
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, **shape
    )
    torch.manual_seed(1)
    device = torch.device("cuda" if large and torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16 if large else torch.float32)  # one in float32 would take twice the memory
    with no_init_weights(), device:
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    model.to("cpu")
    for path in wanted:
        if path in options.variant:
            with torch.no_grad():
                model.model.embed_tokens.weight[options.variant.index(path)] += 1.0
        tokenizer.save_pretrained(path)
        if options.pickle:
            torch.save(model.state_dict(), path / "model.pt")
        model.save_pretrained(path, max_shard_size="1TB")


if __name__ == "__main__":
    main()
