"""Deploying: versions, failed deployments, rollback, models without code, scale to zero and back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import EXAMPLES, Platform, eventually, write_app

pytestmark = pytest.mark.e2e

GOOD = """
import sllm
app = sllm.App("ver")

@app.function(scaledown_window={window})
def which() -> int:
    return {number}
"""


def deploy(platform: Platform, folder: Path, number: int, window: float = 60) -> None:
    platform.sllm("deploy", str(write_app(folder, GOOD.format(number=number, window=window))))


def which(platform: Platform) -> int:
    answer = platform.call("ver/which", {})
    assert answer.status_code == 200, answer.text
    return int(answer.json())


def test_a_new_version_takes_over_and_rollback_brings_the_old_one_back(platform: Platform, tmp_path: Path) -> None:
    deploy(platform, tmp_path, 1)
    assert which(platform) == 1
    deploy(platform, tmp_path, 2)
    assert which(platform) == 2
    platform.sllm("rollback", "ver")
    assert which(platform) == 1
    states = {version["version"]: version for version in platform.get("/v1/apps/ver")["versions"]}
    assert states[1]["active"]
    assert not states[2]["active"]


def test_deploying_the_same_again_changes_nothing(platform: Platform, tmp_path: Path) -> None:
    deploy(platform, tmp_path, 5)
    before = platform.get("/v1/apps/ver")["version"]
    deploy(platform, tmp_path, 5)
    assert platform.get("/v1/apps/ver")["version"] == before


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("import sllm\nimport no_such_module_here\napp = sllm.App('ver')\n", "no_such_module_here"),
        ("import sllm\napp = sllm.App('ver')\n1 / 0\n", "ZeroDivisionError"),
        ("import sllm\napp = sllm.App('ver')\n", "no functions"),
        ("x = 1\n", "App"),
        ("def broken(:\n", "SyntaxError"),
    ],
    ids=["missing module", "raises", "empty", "no app", "syntax"],
)
def test_what_does_not_import_is_refused_with_the_users_traceback(
    platform: Platform, tmp_path: Path, source: str, text: str
) -> None:
    deploy(platform, tmp_path / "good", 7)
    done = platform.run("deploy", str(write_app(tmp_path / "bad", source)))
    assert done.returncode == 1
    assert text in done.stdout + done.stderr
    assert which(platform) == 7


def test_an_import_that_fails_only_on_the_server_leaves_the_old_version_serving(
    platform: Platform, tmp_path: Path
) -> None:
    deploy(platform, tmp_path / "good", 8)
    source = GOOD.format(number=9, window=60) + (
        "\nimport os\nif not os.environ.get('HERE_IT_IMPORTS'):\n    raise RuntimeError('only in a container')\n"
    )
    client = dataclasses.replace(platform, env={**platform.env, "HERE_IT_IMPORTS": "1"})
    done = client.run("deploy", str(write_app(tmp_path / "bad", source)))
    assert done.returncode == 1, done.stdout
    assert "only in a container" in done.stdout + done.stderr
    assert which(platform) == 8


def test_a_start_that_fails_is_a_503_with_the_traceback_and_others_go_on(platform: Platform, tmp_path: Path) -> None:
    source = """
import sllm
app = sllm.App("sick")

@app.cls()
class Sick:
    @sllm.enter()
    def prepare(self) -> None:
        raise RuntimeError("cannot prepare")

    @sllm.method()
    def run(self) -> int:
        return 1
"""
    platform.sllm("deploy", str(write_app(tmp_path / "sick", source)))
    deploy(platform, tmp_path / "good", 11)
    answer = platform.call("sick/Sick.run", {})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "start_failed"
    assert "cannot prepare" in answer.text
    assert which(platform) == 11


def test_an_idle_function_scales_to_zero_and_comes_back(platform: Platform, tmp_path: Path) -> None:
    deploy(platform, tmp_path, 12, window=0.5)
    assert which(platform) == 12

    def running() -> list[object]:
        return [row for row in platform.json("ps") if row["app"] == "ver"]

    eventually(lambda: not running(), why="no instance is left")
    assert which(platform) == 12


def test_a_model_directory_is_deployed_with_no_file_at_all(platform: Platform) -> None:
    platform.sllm("deploy", "--model", str(EXAMPLES / "counting/model"), "--name", "plain-counting")
    answer = httpx.post(
        f"{platform.url}/v1/completions",
        json={"model": "plain-counting", "prompt": "1 2 3", "max_tokens": 5, "temperature": 0},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"].split() == ["4", "5", "6", "7", "8"]


@pytest.mark.parametrize("damage", ["truncated weights", "bad header", "bad config", "pickle", "no weights"])
def test_a_damaged_model_is_refused_with_a_reason(platform: Platform, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(EXAMPLES / "counting/model", model)
    weights = model / "model.safetensors"
    data = weights.read_bytes()
    match damage:
        case "truncated weights":
            weights.write_bytes(data[: len(data) // 2])
        case "bad header":
            weights.write_bytes(b"\xff" * 16 + data[16:])
        case "bad config":
            (model / "config.json").write_text("{")
        case "pickle":
            weights.rename(model / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
    done = platform.run("deploy", "--model", str(model), "--name", "damaged")
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    assert len(done.stdout + done.stderr) > 40


def test_deleting_an_app_ends_its_instances_and_its_names(platform: Platform, tmp_path: Path) -> None:
    deploy(platform, tmp_path, 13)
    assert which(platform) == 13
    platform.sllm("delete", "--yes", "ver")
    assert platform.call("ver/which", {}).status_code == 404
    eventually(lambda: not [row for row in platform.json("ps") if row["app"] == "ver"])
    done = platform.run("delete", "--yes", "ver")
    assert done.returncode == 4
