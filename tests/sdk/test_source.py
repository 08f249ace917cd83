"""From a file to an app and its deployment; every way it can go wrong says what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sllm._source import build, load_app

from sllm_faas.errors import BadSpec, ImportFailed
from sllm_faas.imports import imported_packages
from sllm_faas.modules import locate
from sllm_faas.spec import digest

APP = """
import sllm
import helpers_of_app
app = sllm.App("one")

@app.function
def f(x: int) -> int:
    return x
"""


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith(("sllm", "httpx", "msgpack")):
            del sys.modules[name]


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def simple(tmp_path: Path, text: str = APP, name: str = "my_app") -> str:
    write(tmp_path, **{name: text, "helpers_of_app": "VALUE = 1"})
    return str(tmp_path / f"{name}.py")


def test_a_files_directory_is_the_root_and_its_name_the_module(tmp_path: Path) -> None:
    loaded = load_app(simple(tmp_path))
    assert (loaded.root, loaded.module, loaded.app.name) == (tmp_path, "my_app", "one")
    spec, bundle = build(loaded)
    assert bundle is not None
    assert spec.bundle == bundle.digest == digest(bundle.data)
    assert sorted(bundle.files) == ["helpers_of_app.py", "my_app.py"]
    assert (spec.functions[0].module, spec.functions[0].qualname) == ("my_app", "f")


def test_a_file_in_a_package_is_imported_from_the_parent_of_the_top_package(tmp_path: Path) -> None:
    root = write(tmp_path, top____init="", helpers_of_app="")
    for directory in ("top", "top/sub"):
        (root / directory).mkdir(exist_ok=True)
        (root / directory / "__init__.py").write_text("")
    file = root / "top" / "sub" / "served.py"
    file.write_text(APP)
    assert locate(file) == (root, "top.sub.served")
    assert locate(root / "top" / "__init__.py") == (root, "top")
    loaded = load_app(str(file))
    assert (loaded.root, loaded.module) == (root, "top.sub.served")
    assert loaded.app.functions[0].module == "top.sub.served"


def test_a_module_name_is_found_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_app("my_app").app.name == "one"
    assert load_app("my_app:app").app.name == "one"


def test_loading_again_sees_the_file_as_it_is_now(tmp_path: Path) -> None:
    named = simple(tmp_path)
    assert load_app(named).app.name == "one"
    simple(tmp_path, APP.replace('"one"', '"changed"'))
    assert load_app(named).app.name == "changed"


def test_two_apps_with_helpers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    text = APP.replace('"one"', "helpers_of_app.NAME")
    for name in ("first", "second"):
        write(tmp_path / name, my_app=text, helpers_of_app=f"NAME = {name!r}")
    for name in ("first", "second", "first"):
        assert load_app(str(tmp_path / name / "my_app.py")).app.name == name


def test_an_app_of_language_models_alone_needs_no_bundle(tmp_path: Path) -> None:
    text = 'import sllm\napp = sllm.App("llms")\napp.llm("m", "org/model")\n'
    spec, bundle = build(load_app(simple(tmp_path, text)))
    assert (spec.bundle, bundle) == ("", None)


TWO = APP + '\nother = sllm.App("two")\nsame = app\n'


def test_one_of_several_apps_is_named(tmp_path: Path) -> None:
    named = simple(tmp_path, TWO)
    assert load_app(named + ":other").app.name == "two"
    with pytest.raises(BadSpec, match=r"has 2 apps .*Name it: .*my_app\.py:app"):
        load_app(named)
    with pytest.raises(BadSpec, match="Did you mean 'other'"):
        load_app(named + ":othr")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("x = 1", BadSpec, "has no app"),
        ("def f(:\n", ImportFailed, "SyntaxError"),
        ("1 / 0", ImportFailed, "ZeroDivisionError"),
        ("raise SystemExit(3)", ImportFailed, "SystemExit"),
        ("import no_such_package_xyz.sub", ImportFailed, "'no_such_package_xyz'.*pip install no_such_package_xyz"),
        ('import sllm\napp = sllm.App("empty")', BadSpec, "no functions"),
    ],
)
def test_a_module_that_does_not_work_says_why(
    tmp_path: Path, text: str, error: type[BadSpec | ImportFailed], message: str
) -> None:
    named = simple(tmp_path, text)
    with pytest.raises(error, match=message) as caught:
        build(load_app(named))
    if error is ImportFailed:
        assert 'File "my_app.py", line 1' in caught.value.traceback
        assert "importlib" not in caught.value.traceback


def test_a_name_that_is_no_file_or_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simple(tmp_path)
    monkeypatch.chdir(tmp_path)
    for named, message in (
        ("my_ap.py", "Did you mean 'my_app.py'"),
        ("nowhere", "no module 'nowhere'"),
        (".", "is a directory"),
        ("no such", "neither a file nor a module"),
    ):
        with pytest.raises(BadSpec, match=message):
            load_app(named)
    (tmp_path / "dotted.name.py").write_text("")
    with pytest.raises(BadSpec, match="without further dots"):
        load_app("dotted.name.py")


def test_a_file_hidden_by_another_module_of_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(APP)
    with pytest.raises(BadSpec, match=r"'json' of .* is hidden by"):
        load_app(str(tmp_path / "json.py"))


def test_a_function_whose_module_is_left_out_is_refused(tmp_path: Path) -> None:
    named = simple(tmp_path)
    (tmp_path / ".sllmignore").write_text("my_app.py\n")
    with pytest.raises(BadSpec, match="not part of the source"):
        build(load_app(named))


def test_libraries_are_what_the_module_reaches_and_nothing_else(tmp_path: Path) -> None:
    write(
        tmp_path,
        app_x="import os, numpy.linalg as la\nfrom local_pkg import deep\nimport sllm\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\n",
        local_pkg__deep="from . import sibling\nfrom .sibling import x\ndef f():\n    import torch\n",
        local_pkg__sibling="import yaml\nfrom .. import nothing\n",
        unrelated="import scipy",
        broken="def (",
    )
    (tmp_path / "local_pkg" / "__init__.py").write_text("import requests")
    assert imported_packages(tmp_path, "app_x") == ("numpy", "requests", "torch", "yaml")
    assert imported_packages(tmp_path, "broken") == ()
    assert imported_packages(tmp_path, "missing") == ()
