"""A disk that may hold one checkpoint: the next one takes its place, and a start of the first brings it again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import EXAMPLES, Platform, eventually, platform_at, write_app

pytestmark = pytest.mark.e2e
APP = """
import sllm
app = sllm.App({name!r})
app.llm({name!r}, checkpoint={model!r}, scaledown_window={idle})
"""


@pytest.fixture
def small() -> Iterator[Platform]:
    with tempfile.TemporaryDirectory(prefix="sllm-e2e-") as state, platform_at(Path(state), "--disk-mb", "2") as here:
        yield here


def test_models_that_do_not_fit_together_are_served_in_turn(small: Platform, tmp_path: Path) -> None:
    def app(name: str, idle: int) -> str:
        """A model of a little more than a MiB, each of other weights."""
        model = tmp_path / f"model-{name}"
        if not model.exists():
            shutil.copytree(EXAMPLES / "counting/model", model)
            weights = load_file(model / "model.safetensors")
            weights["model.norm.weight"] *= 1.0 + len(name) / 1e4
            save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        return str(write_app(tmp_path / f"app-{name}-{idle}", APP.format(name=name, model=str(model), idle=idle)))

    def on_disk() -> Any:
        return small.get("/v1/nodes/node-0")["checkpoints"]

    def serves(name: str) -> None:
        answer = small.post("/v1/completions", {"model": name, "prompt": "41 42", "max_tokens": 3, "temperature": 0})
        assert answer.status_code == 200, answer.text

    def all_idle() -> None:
        eventually(lambda: not small.get("/v1/instances")["instances"], why="what is idle has been stopped")

    small.sllm("deploy", app("first", 60))
    serves("first")
    (first,) = on_disk()
    refused = small.run("deploy", app("second", 1))
    assert "no space left" in refused.stderr
    assert f"{first[:12]} (in use)" in refused.stderr

    small.sllm("deploy", app("first", 1))
    serves("first")
    all_idle()
    small.sllm("deploy", app("second", 1))
    eventually(lambda: first not in on_disk(), why="the node has told what left")
    serves("second")
    (second,) = on_disk()
    all_idle()
    serves("first")
    eventually(lambda: on_disk() == [first], why="the node has told what left")
    log = (small.state / "logs/platform.jsonl").read_text()
    assert [digest in line for digest, line in zip((first, second), _evictions(log), strict=True)] == [True, True]


def _evictions(log: str) -> list[str]:
    return [line for line in log.splitlines() if "checkpoint_evicted" in line]
