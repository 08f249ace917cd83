"""The architecture page is kept true here: imports point down only, and pure modules stay pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOTS = {
    "sllm_faas": ROOT / "sllm_faas",
    "sllm": ROOT / "sdk/sllm",
    "sllm_gateway": ROOT / "gateway/sllm_gateway",
    "sllm_invoker": ROOT / "invoker/sllm_invoker",
}
GROUND = ("sllm_faas.errors", "sllm_faas.spec")
LEAVES = (
    "sllm_faas.modules",
    "sllm_faas.imports",
    "sllm_faas.parameters",
    "sllm_faas.bundle",
    "sllm_faas.config",
    "sllm_faas.layers",
)
SHARED = (*GROUND, *LEAVES, "sllm_faas.logging", "sllm_faas.stopping", "sllm_faas.wire")

# A room and what it may import of ours, longest prefix first. A room may always import itself.
ALLOWED: dict[str, tuple[str, ...]] = {
    "sllm_faas.errors": (),
    "sllm_faas.spec": (),
    "sllm_faas.bundle": GROUND,
    "sllm_faas.config": GROUND,
    "sllm_faas.layers": GROUND,
    "sllm_faas.logging": (*GROUND, "sllm_faas.config"),
    "sllm_faas.modules": GROUND,
    "sllm_faas.imports": (*GROUND, "sllm_faas.modules"),
    "sllm_faas.parameters": GROUND,
    "sllm_faas.stopping": (),
    "sllm_faas.wire": (*GROUND, "sllm_faas.modules"),
    "sllm_faas.dispatch": (*GROUND, "sllm_faas.parameters", "sllm_faas.wire"),
    "sllm_faas.controller": (*SHARED, "sllm_faas.dispatch"),
    "sllm_faas.sim": (*SHARED, "sllm_faas.dispatch", "sllm_faas.controller"),
    "sllm_gateway": (*SHARED, "sllm_faas.dispatch"),
    "sllm_invoker.checkpoints": (
        *SHARED,
        "sllm_invoker.runner.attach",
        "sllm_invoker.runner.quantized",
        "sllm_invoker.runner.traits",
    ),
    "sllm_invoker.runner": (*SHARED, "sllm_invoker.checkpoints", "sllm._runtime", "sllm._context"),
    "sllm_invoker": (*SHARED, "sllm_faas.dispatch"),
    "sllm.testing": ("sllm", "sllm_faas.local"),
    "sllm": (*GROUND, *LEAVES, "sllm_faas.wire.payload", "sllm_faas.wire.exceptions"),
    "sllm_faas.local": ("sllm", "sllm_faas", "sllm_gateway", "sllm_invoker"),
    "sllm_faas.cli": ("sllm", "sllm_faas", "sllm_gateway", "sllm_invoker"),
}
IMPURE = {"asyncio", "zmq", "torch", "time", "random", "threading", "socket", "subprocess", "os"}
PURE = [
    "sllm_faas/spec.py",
    "sllm_faas/errors.py",
    "sllm_faas/layers.py",
    "sllm_faas/wire/header.py",
    "sllm_faas/wire/messages.py",
    "sllm_faas/wire/liveness.py",
    "sllm_faas/dispatch/*.py",
    "sllm_faas/controller/state.py",
    "sllm_faas/controller/events.py",
    "sllm_faas/controller/commands.py",
    "sllm_faas/controller/estimate.py",
    "sllm_faas/controller/placement.py",
    "sllm_faas/controller/autoscale.py",
    "sllm_faas/controller/candidates.py",
    "sllm_faas/controller/index.py",
    "sllm_faas/controller/locality.py",
    "invoker/sllm_invoker/containers/pool.py",
    "invoker/sllm_invoker/containers/gpus.py",
    "invoker/sllm_invoker/containers/residency.py",
    "invoker/sllm_invoker/checkpoints/slab_book.py",
    "invoker/sllm_invoker/checkpoints/eviction.py",
]


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(module: str, path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def inside(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def room_of(module: str) -> str:
    return max((room for room in ALLOWED if inside(module, room)), key=len, default="")


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down_only(module: str, path: Path) -> None:
    room = room_of(module)
    if not room:
        assert module == "sllm_faas"
        return
    for name, line in imported(module, path):
        if not any(inside(name, package) for package in ROOTS):
            continue
        allowed = inside(name, room) or any(inside(name, prefix) for prefix in ALLOWED[room])
        assert allowed, f"{path.relative_to(ROOT)}:{line}: {room} may not import {name}"


def test_the_gateway_and_the_invoker_never_import_each_other_nor_the_command_line() -> None:
    for module, path in modules():
        if module.startswith(("sllm_faas.cli", "sllm_faas.local", "sllm.testing")):
            continue
        for name, line in imported(module, path):
            assert not inside(name, "sllm_faas.cli"), f"{path}:{line}"
            assert not inside(name, "sllm_faas.local"), f"{path}:{line}"


@pytest.mark.parametrize("pattern", PURE)
def test_pure_modules_take_clock_and_chance_as_arguments(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths, f"{pattern} names no file"
    for path in paths:
        for name, line in imported("", path):
            assert name.split(".")[0] not in IMPURE, f"{path.relative_to(ROOT)}:{line}: pure, but imports {name}"


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("sllm", ["torch", "zmq", "starlette", "msgspec", "httpx", "numpy", "pydantic", "click"]),
        ("sllm_gateway.app", ["torch", "transformers", "tokenizers"]),
        ("sllm_faas.controller.service", ["torch", "transformers", "starlette"]),
        ("sllm_invoker.agent", ["torch", "transformers"]),
        ("sllm_faas.cli", ["torch", "zmq", "starlette", "sqlalchemy"]),
    ],
)
def test_light_processes_stay_light(module: str, never: list[str]) -> None:
    code = f"import {module}, sys; print(*[name for name in {never!r} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == []


def test_no_file_of_ours_passes_600_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for _, path in modules()
        if (count := len(path.read_text().splitlines())) > 600
    }
    assert long == {}
