"""A tiny model directory as a user would have it, and stores to ingest it into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.store import CheckpointStore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Make = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + 2 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def source(_model_directory: Path, tmp_path: Path) -> Path:
    """A model directory of the test's own."""
    return Path(shutil.copytree(_model_directory, tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


@pytest.fixture(scope="session")
def _ingested(_model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    store = CheckpointStore(tmp_path_factory.mktemp("ingested"))
    ingest(store, str(_model_directory), "tiny")
    return store


@pytest.fixture
def filled(_ingested: CheckpointStore, tmp_path: Path) -> CheckpointStore:
    """A store of the test's own that holds `tiny`, files writable so that a test can break them."""
    root = tmp_path / "filled"
    shutil.copytree(_ingested.root, root)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return CheckpointStore(root)


@pytest.fixture
def edit_json():
    """Change fields of a JSON file."""

    def edit(path: Path, **changes: object) -> None:
        value = json.loads(path.read_text())
        path.write_text(json.dumps({**value, **changes}))

    return edit


@pytest.fixture
def model(source: Path) -> Make:
    """Directories of models of one size, each of other weights."""

    def make(name: str) -> Path:
        directory = source.with_name(f"model-{name}")
        shutil.copytree(source, directory)
        weights = load_file(directory / "model.safetensors")
        weights["model.norm.weight"] += len(name) + ord(name[0])
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


@pytest.fixture
def size(model: Make, tmp_path: Path) -> int:
    """Bytes of an object of such a model, all its files."""
    other = CheckpointStore(tmp_path / "measured")
    ingest(other, str(model("measured")), "measured")
    return sum(path.stat().st_size for path in other.path(other.resolve("measured")).iterdir())
