"""`sllm run`: entrypoints and functions of a file, options from their signatures, no server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sllm_faas import cli

Run = Callable[..., tuple[int, str, str]]

SOURCE = '''
from __future__ import annotations
import asyncio
from dataclasses import dataclass
import sllm

app = sllm.App("calc")
second = app

@app.function
def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    print("adding")
    return a + b

@app.function
def kinds(text: str = "x", ratio: float | None = None, flag: bool = False, items: list[int] = [1]) -> dict:
    return {"text": text, "ratio": ratio, "flag": flag, "items": items}

@app.function
def letters(word: str):
    yield from word

@app.function
def fail():
    raise LookupError("not here")

@app.function
def anything(*args):
    return args

@app.cls
class Adder:
    by: int = sllm.parameter(default=10)
    @sllm.method
    def add(self, a: int) -> int:
        return a + self.by

@app.local_entrypoint
def main(n: int = 1) -> str:
    return "sum " + str(add.remote(n, b=n))

@app.local_entrypoint
async def amain(n: int) -> None:
    print(await add.remote.aio(n))
    raise RuntimeError("at the end")
'''


@pytest.fixture
def sllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "calc.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args: str) -> tuple[int, str, str]:
        code = cli.execute(["run", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("args", "out"),
    [
        (["calc.py"], "adding\nsum 2\n"),
        (["calc.py", "--n", "4"], "adding\nsum 8\n"),
        (["calc.py:app::add", "--a", "5"], "adding\n7\n"),
        (["calc::add", "--", "--a", "5", "--b", "6"], "adding\n11\n"),
        (["calc.py::letters", "--word", "hi"], "h\ni\n"),
        (["calc.py::Adder.add", "--a", "1"], "11\n"),
        (["calc.py::kinds"], '{"text": "x", "ratio": null, "flag": false, "items": [1]}\n'),
        (
            ["calc.py::kinds", "--text", "y", "--ratio", "0.5", "--flag", "--items", "[3]"],
            '{"text": "y", "ratio": 0.5, "flag": true, "items": [3]}\n',
        ),
    ],
)
def test_a_files_functions_run_with_options_from_their_signatures(sllm: Run, args: list[str], out: str) -> None:
    assert sllm(*args) == (0, out, "")


def test_a_users_error_is_shown_as_the_users_traceback_alone(sllm: Run) -> None:
    code, out, err = sllm("calc.py::fail")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert 'File "calc.py"' in err
    assert err.endswith("LookupError: not here\n")
    assert "sllm_faas" not in err


def test_an_async_entrypoint_runs_and_its_error_is_shown(sllm: Run) -> None:
    code, out, err = sllm("calc.py::amain", "--n", "1")
    assert (code, out) == (1, "adding\n3\n")
    assert err.endswith("RuntimeError: at the end\n")
    assert "site-packages" not in err


@pytest.mark.parametrize(
    ("args", "exits", "said"),
    [
        (["calc.py::ad", "--a", "1"], cli.NOT_FOUND, "Did you mean 'add'?"),
        (["calc.py::add"], cli.USAGE, "Missing option '--a'"),
        (["calc.py::add", "--a", "x"], cli.USAGE, "'x' is not a valid integer"),
        (["calc.py::add", "--a", "1", "--c", "1"], cli.USAGE, "--c"),
        (["calc.py::kinds", "--items", "[1"], cli.USAGE, "is not JSON"),
        (["calc.py::anything"], cli.FAILED, "*args cannot be given on the command line"),
        (["absent.py"], cli.FAILED, "there is no file absent.py"),
        (["calc.py:other"], cli.FAILED, "has no app 'other'"),
    ],
)
def test_what_cannot_be_run_says_why(sllm: Run, args: list[str], exits: int, said: str) -> None:
    code, out, err = sllm(*args)
    assert (code, out) == (exits, "")
    assert said in err


def test_a_file_with_several_functions_and_no_main_asks_which(sllm: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(SOURCE.replace("def main", "def first"))
    code, _, err = sllm("pairs.py")
    assert code == 1
    assert "no entrypoint named main" in err
    assert "first, amain, add" in err


def test_help_shows_the_functions_options_and_docstring(sllm: Run) -> None:
    code, out, _ = sllm("calc.py::add", "--", "--help")
    assert code == 0
    assert "Add two numbers." in out
    assert "--b INTEGER" in out
    assert "default: 2" in out
