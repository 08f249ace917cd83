"""Functions with a GPU on a running platform whose driver is played: placement, workers, the copy, the end."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import EXAMPLES, ROOT, Platform, eventually, platform_at, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]  # a worker per device imports torch and transformers
APP = f"""
import os
from pathlib import Path
import sllm

app = sllm.App("gpus")
model = app.llm("model", checkpoint=Path({str(EXAMPLES / "counting/model")!r}), gpu=1, max_containers=1,
    scaledown_window=600)

@app.function(gpu="any", max_containers=1, scaledown_window=600)
def sees(x: int) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]

@app.function
def blind(x: int) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]
"""


@pytest.fixture(scope="module")
def gpus() -> Iterator[Platform]:
    with tempfile.TemporaryDirectory(prefix="sllm-e2e-") as state, pytest.MonkeyPatch.context() as patch:
        paths = [str(Path(__file__).parent / "gpu"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        with platform_at(Path(state)) as here:
            here.sllm("deploy", str(write_app(Path(state) / "source", APP)))
            yield here


def weights(platform: Platform) -> tuple[bool, bool]:
    """Of the model's one instance: whether all its weights were on the device, and whether the store was asked."""
    (instance,) = [each for each in platform.get("/v1/instances")["instances"] if each["function"] == "model"]
    details = {span["name"]: span["detail"] for span in instance["timeline"]["spans"]}
    return details["attach"].startswith("tier=gpu"), "checkpoint" in details


def count(platform: Platform) -> str:
    body = {"model": "gpus/model", "prompt": "1 2 3", "max_tokens": 3, "temperature": 0}
    answer = httpx.post(f"{platform.url}/v1/completions", json=body, headers=platform.headers, timeout=300)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_model_answers_from_a_device_and_again_when_its_worker_was_killed(gpus: Platform) -> None:
    assert [node["gpus"] for node in gpus.json("node", "list")] == [2]
    assert count(gpus) == " 4 5 6"
    (before,) = gpus.get("/v1/instances")["instances"]
    assert weights(gpus) == (False, True)
    os.kill(before["pid"], signal.SIGKILL)
    eventually(lambda: before["instance"] not in str(gpus.get("/v1/instances")), why="the instance's end is not told")
    assert count(gpus) == " 4 5 6"
    assert weights(gpus) == (True, False), "what the killed instance left there was not used"


def test_instances_see_a_device_each_and_those_that_asked_for_none_see_none(gpus: Platform) -> None:
    assert count(gpus) == " 4 5 6"
    held = gpus.call("gpus/sees", {"x": 1}, timeout=300).json()
    assert held in ("GPU-0", "GPU-1")
    assert gpus.call("gpus/blind", {"x": 1}).json() == ""
