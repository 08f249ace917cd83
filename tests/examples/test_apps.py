"""Every example registers what its text says; the plain parts are run as the plain Python they are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load() -> Iterator[object]:
    names: list[str] = []

    def load(path: str) -> ModuleType:
        name = "example_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("path", "app", "functions"),
    [
        ("hello.py", "hello", ["greet", "square", "divide"]),
        ("stream.py", "stream", ["countdown"]),
        ("counter_class.py", "counter", ["Counter", "tenfold"]),
        ("counting/app.py", "counting", ["counting"]),
        ("embedding/app.py", "embedding", ["embedding"]),
        ("huggingface.py", "qwen", ["qwen"]),
    ],
)
def test_an_example_registers_its_functions(load, path: str, app: str, functions: list[str]) -> None:
    registered = load(path).app
    assert registered.name == app
    assert [spec.name for spec in registered.functions] == functions


def test_models_are_found_beside_the_file_whatever_the_working_directory(load, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("counting/app.py", "embedding/app.py"):
        (function,) = load(path).app.functions
        assert (Path(function.checkpoint.source) / "model.safetensors").is_file()


def test_functions_stay_callable_as_plain_python(load) -> None:
    hello = load("hello.py")
    assert hello.greet.local("world") == "hello, world"
    assert [hello.square.local(x) for x in range(5)] == [0, 1, 4, 9, 16]


async def test_the_countdown_counts_down(load) -> None:
    assert [line async for line in load("stream.py").countdown.local(3, pause=0)] == ["3", "2", "1", "lift-off"]


def test_counters_of_different_fruit_count_apart(load) -> None:
    module = load("counter_class.py")
    apples, pears = module.Counter(fruit="apples"), module.Counter(fruit="pears")
    assert [apples.add.local(), apples.add.local(), pears.add.local()] == [1, 2, 1]


@pytest.mark.parametrize("path", ["hello.py", "stream.py", "counter_class.py"])
def test_sllm_run_prints_what_the_example_promises(load, path: str) -> None:
    command = [sys.executable, "-m", "sllm_faas.cli", "run", str(EXAMPLES / path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    promised = ["5", "4", "3", "2", "1", "lift-off"] if path == "stream.py" else printed_by(load(path).__doc__)
    # Within the text, not among its lines: two instances that end at once print at once, and a line's end is a write of
    # its own.
    assert [line for line in promised if line not in run.stdout] == []


def printed_by(text: str) -> list[str]:
    """The lines of the block that follows "prints" in an example's text."""
    block = text.partition("prints\n\n")[2].partition("\n\n")[0]
    lines = [line.strip() for line in block.splitlines()]
    assert lines
    return lines
