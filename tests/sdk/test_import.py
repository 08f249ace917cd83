"""`import sllm` stays small, and what a script defines has the name a container imports it by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ["asyncio", "torch", "zmq", "starlette", "msgspec", "msgpack", "httpx", "numpy", "pydantic", "click", "ssl"]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_importing_sllm_imports_nothing_heavy() -> None:
    code = f"import sys, sllm; print([name for name in {HEAVY} if name in sys.modules])"
    assert run("-c", code) == "[]"


def test_declaring_an_app_imports_nothing_heavy_either(tmp_path: Path) -> None:
    app = "import sys, sllm\napp = sllm.App('a')\n@app.function\ndef f(x: int) -> int: return x\napp.functions\n"
    (tmp_path / "small.py").write_text(app + f"print([name for name in {HEAVY} if name in sys.modules])")
    assert run(str(tmp_path / "small.py")) == "[]"


def test_a_script_is_known_by_its_importable_name(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import dataclasses, sllm\n"
        "from sllm_faas.wire.payload import encode, decode\n"
        "app = sllm.App('a')\n"
        "@app.function\ndef f(x: int) -> int: return x\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "data = encode(Point(1))\n"
        "print(app.functions[0].module, b'script:Point' in data, type(decode(data)) is Point)\n"
    )
    assert run(str(tmp_path / "script.py")) == "script True True"


def test_a_process_that_called_ends_cleanly_and_at_once() -> None:
    code = (
        "import sllm\n"
        "f = sllm.Function.from_name('a', 'f')\n"
        "try: f.remote(1)\n"
        "except sllm.errors.Unavailable as error: print(error.param)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"SLLM_SERVER": "http://127.0.0.1:1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert (done.stdout.strip(), done.stderr) == ("server", "")
