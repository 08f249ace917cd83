"""Secrets come from the environment or a private file; an error never holds one."""

from __future__ import annotations

from pathlib import Path

import pytest
from sllm_invoker.secrets import resolve

from sllm_faas.errors import Forbidden, NotFound


def test_the_environment_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "KEY"
    path.write_text("from file\n")
    path.chmod(0o600)
    assert resolve(["KEY"], tmp_path, {}) == {"KEY": "from file"}
    assert resolve(["KEY"], tmp_path, {"KEY": "plain"}) == {"KEY": "plain"}
    assert resolve(["KEY"], tmp_path, {"KEY": "plain", "SLLM_SECRET_KEY": "named"}) == {"KEY": "named"}


def test_a_missing_one_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="SLLM_SECRET_KEY"):
        resolve(["KEY"], tmp_path, {})


def test_a_file_that_others_can_read_is_refused_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "KEY"
    path.write_text("hunter2")
    path.chmod(0o644)
    with pytest.raises(Forbidden) as caught:
        resolve(["KEY"], tmp_path, {})
    assert "600" in str(caught.value) and "hunter2" not in str(caught.value)
