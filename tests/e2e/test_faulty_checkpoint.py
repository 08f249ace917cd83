"""A checkpoint that rotted on the disk: its function says so and serves no token, other functions do not notice."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import EXAMPLES, Platform, write_app

pytestmark = pytest.mark.e2e
APP = """
from pathlib import Path
import sllm
app = sllm.App("pair")
app.llm("rotten", checkpoint={model!r}, scaledown_window=1)

@app.function()
def sound(x: int) -> int:
    return x + 1
"""


def complete(platform: Platform) -> httpx.Response:
    return platform.post("/v1/completions", {"model": "rotten", "prompt": "41 42", "max_tokens": 3, "temperature": 0})


def flip(path: Path, at: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(data)


def test_a_flipped_byte_is_an_error_of_its_function_alone_until_it_is_repaired(
    platform: Platform, tmp_path: Path
) -> None:
    platform.sllm("deploy", str(write_app(tmp_path, APP.format(model=str(EXAMPLES / "counting/model")))))
    objects = platform.state / "checkpoints/objects"
    part = next(objects.glob("*/part-0-of-1.safetensors"))
    flip(part, part.stat().st_size // 2)
    refused = complete(platform)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "checkpoint_corrupt"
    assert "has changed" in refused.json()["error"]["message"]
    assert platform.call("pair/sound", {"x": 1}).json() == 2
    flip(part, part.stat().st_size // 2)
    deadline = time.monotonic() + 30
    while (answer := complete(platform)).status_code != 200:  # starts are tried again after a while
        assert time.monotonic() < deadline, answer.text
    assert answer.json()["choices"][0]["text"].split() == ["43", "44", "45"]
