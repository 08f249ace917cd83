"""The SDK's types accept what works and refuse what does not: mypy --strict over two files of calls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """file -> line -> error code, from one run over both files."""
    configuration = tmp_path_factory.mktemp("mypy") / "mypy.ini"
    # As a user's checker sees the SDK: errors in the libraries themselves are not theirs.
    configuration.write_text(
        f"[mypy]\nstrict = True\nmypy_path = {ROOT}:{ROOT / 'sdk'}\n"
        "[mypy-sllm.*]\nfollow_imports = silent\n[mypy-sllm_faas.*]\nfollow_imports = silent\n"
        "[mypy-msgpack.*]\nignore_missing_imports = True\n"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--config-file", str(configuration), "--no-error-summary", "--no-pretty",
            "--cache-dir", str(tmp_path_factory.mktemp("cache")), *map(str, sorted(FIXTURES.glob("*.py"))),
        ],
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    found: dict[str, dict[int, str]] = {"accepted.py": {}, "rejected.py": {}}
    for line in done.stdout.splitlines():
        if match := re.match(r"(.+?):(\d+): error: .*\[([a-z-]+)\]$", line):
            found[Path(match[1]).name][int(match[2])] = match[3]
    assert done.returncode in (0, 1), done.stderr or done.stdout
    assert found["rejected.py"], done.stdout
    return found


def test_everything_that_works_is_accepted_with_its_exact_type(errors: dict[str, dict[int, str]]) -> None:
    assert errors["accepted.py"] == {}


def test_everything_that_does_not_work_is_refused(errors: dict[str, dict[int, str]]) -> None:
    lines = (FIXTURES / "rejected.py").read_text().splitlines()
    expected = {
        number: match[1] for number, line in enumerate(lines, 1) if (match := re.search(r"# error: ([a-z-]+)$", line))
    }
    assert errors["rejected.py"] == expected
