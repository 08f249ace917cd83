"""A language model on the platform in one process: the real engine behind the real HTTP interface, no server."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sllm
from sllm import errors

from sllm_faas.local import LocalPlatform

MODEL = Path(__file__).parents[2] / "examples" / "counting" / "model"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    app = sllm.App("counting")
    app.llm("counting", checkpoint=MODEL)
    with LocalPlatform(checkpoints=tmp_path_factory.mktemp("checkpoints")) as platform:
        platform.deploy(app)
        yield platform.http()


def chat(url: str, **more: Any) -> httpx.Response:
    body = {"model": "counting", "messages": [{"role": "user", "content": "41 42 43"}], "max_tokens": 5, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0)


def test_the_counting_model_counts_on(url: str) -> None:
    answer = chat(url).json()
    assert answer["choices"][0]["message"]["content"] == " 44 45 46 47 48"
    assert answer["usage"]["completion_tokens"] == 5


def test_a_streamed_answer_ends_with_done(url: str) -> None:
    lines = [line for line in chat(url, stream=True).text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert "".join(lines).count(" 4") >= 5


def test_a_parameter_that_is_not_supported_is_named(url: str) -> None:
    answer = chat(url, tools=[{"type": "function", "function": {"name": "f"}}])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools"


def test_the_http_interface_lists_its_models_and_has_no_administration(url: str) -> None:
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["counting"]
    assert httpx.get(f"{url}/v1/status").status_code == 401


def test_a_checkpoint_that_is_not_there_fails_the_deployment(tmp_path: Path) -> None:
    app = sllm.App("absent")
    app.llm("absent", checkpoint=tmp_path / "nothing")
    with LocalPlatform(checkpoints=tmp_path / "store") as platform, pytest.raises(errors.SllmError, match="nothing"):
        platform.deploy(app)


def test_without_a_model_library_the_rest_still_works() -> None:
    """The platform's own modules need no torch: only an attached model does."""
    import subprocess
    import sys

    assert importlib.util.find_spec("torch") is not None
    script = (
        "import sys, sllm_faas.local; print([m for m in ('torch', 'transformers', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
