"""Which server and which token: the first that is set, and the local admin token for the local server only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sllm._profile import Profile, load_profile

from sllm_faas.errors import BadSpec


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config" / "sllm").mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="sllm-") as state:  # a short path, so that run/ is inside of it
        (Path(state) / "run").mkdir()
        (Path(state) / "admin.token").write_text("sllm_admin\n")
        yield {"SLLM_STATE_DIR": state, "XDG_CONFIG_HOME": str(tmp_path / "config")}


def profiles(env: dict[str, str], text: str, mode: int = 0o600) -> None:
    path = Path(env["XDG_CONFIG_HOME"]) / "sllm" / "profiles.toml"
    path.write_text(text)
    path.chmod(mode)


def test_nothing_set_means_the_local_platform_with_its_admin_token(env: dict[str, str]) -> None:
    assert load_profile(env) == Profile("http://127.0.0.1:8700", "sllm_admin")


def test_the_running_platform_says_where_it_listens(env: dict[str, str]) -> None:
    (Path(env["SLLM_STATE_DIR"]) / "run" / "supervisor.json").write_text(json.dumps({"url": "http://127.0.0.1:9999"}))
    assert load_profile(env) == Profile("http://127.0.0.1:9999", "sllm_admin")


def test_the_admin_token_never_goes_to_another_server(env: dict[str, str]) -> None:
    assert load_profile({**env, "SLLM_SERVER": "https://other"}) == Profile("https://other", "")
    assert load_profile({**env, "SLLM_SERVER": "http://127.0.0.1:8700/"}).token == "sllm_admin"


def test_the_environment_comes_first(env: dict[str, str]) -> None:
    profiles(env, '[lab]\nserver = "https://lab:1"\ntoken = "t"\n')
    both = {**env, "SLLM_SERVER": "https://other", "SLLM_PROFILE": "lab", "SLLM_TOKEN": "mine"}
    assert load_profile(both) == Profile("https://other", "mine")
    assert load_profile({**env, "SLLM_PROFILE": "lab"}) == Profile("https://lab:1", "t")
    assert load_profile({**env, "SLLM_PROFILE": "lab", "SLLM_TOKEN": "mine"}).token == "mine"


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Profile("http://x", "secret"))


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ('[lap]\nserver = "http://x"\n', 0o600, "Did you mean 'lap'"),
        ("[lab]\n", 0o600, "is ''; allowed: a URL"),
        ('[lab]\nserver = "ftp://x"\n', 0o600, "allowed: a URL"),
        ('[lab]\nserver = "http://x"\nport = 3\n', 0o600, "no option 'port'"),
        ('[lab]\nserver = "http://x"\ntoken = 3\n', 0o600, "as text"),
        ('[lab]\nserver = "http://x"\ntoken = "t"\n', 0o644, "chmod 600"),
        ("[lab\n", 0o600, "cannot be read"),
    ],
)
def test_a_wrong_profile_is_refused_with_the_reason(env: dict[str, str], text: str, mode: int, message: str) -> None:
    profiles(env, text, mode)
    with pytest.raises(BadSpec, match=message):
        load_profile({**env, "SLLM_PROFILE": "lab"})


def test_a_wrong_server_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(BadSpec, match="SLLM_SERVER is 'localhost:8700'"):
        load_profile({**env, "SLLM_SERVER": "localhost:8700"})
