"""Tiny random models of the architectures that attach and the engine are tested on, ingested once per run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.object import CheckpointObject
from sllm_invoker.checkpoints.store import CheckpointStore
from sllm_invoker.runner.attach import prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import Engine

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-scaled": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "num_hidden_layers": 6},
    "phi3": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "deepseek_v3": {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
    "mamba": {"state_size": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model as transformers holds it, and the object made of it."""

    name: str
    model: Any
    source: Path
    checkpoint: CheckpointObject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", list(ARCHITECTURES))


def build(name: str, **more: Any) -> Any:
    """One of `ARCHITECTURES`; `more` of its configuration."""
    config = transformers.AutoConfig.for_model(name.partition("-")[0], **{**_COMMON, **ARCHITECTURES[name], **more})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)  # wide enough to tell the logits of two tokens apart
    return model


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    return CheckpointStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def case(store: CheckpointStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            source = tmp_path_factory.mktemp(name)
            built = build(name)
            built.save_pretrained(source)
            ingest(store, str(source), name)
            model = type(built).from_pretrained(source).eval()
            made[name] = Case(name, model, source, store.get(name))
        return made[name]

    return get


@pytest.fixture
def engine(case: Callable[[str], Case]) -> Iterator[Callable[..., Engine]]:
    """Makes attached engines and closes them."""
    engines: list[Engine] = []

    def make(name: str = "llama", *, eos: frozenset[int] = frozenset(), **options: Any) -> Engine:
        checkpoint = case(name).checkpoint
        skeleton = prepare(checkpoint)
        skeleton.eos = eos
        made = create(skeleton, **options)
        made.attach(checkpoint.directory)
        engines.append(made)
        return made

    yield make
    for made in engines:
        made.close()
