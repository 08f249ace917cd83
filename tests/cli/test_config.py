"""Settings: one precedence, one kind of message for a bad value, files that only their owner reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas import cli
from sllm_faas.config import Config, machine_memory_mb
from sllm_faas.errors import BadSpec, Conflict


def load(tmp_path: Path, flags: dict[str, Any], env: dict[str, str], toml: str | None) -> tuple[Config, dict[str, str]]:
    if toml is not None:
        (tmp_path / "sllm.toml").write_text(toml)
    return Config.load(flags, env, cwd=tmp_path)


@pytest.mark.parametrize(
    ("flags", "env", "toml", "port", "source"),
    [
        ({}, {}, None, 8700, "default"),
        ({}, {}, "port = 1", 1, "sllm.toml"),
        ({}, {"SLLM_PORT": "2"}, "port = 1", 2, "environment SLLM_PORT"),
        ({"port": 3}, {"SLLM_PORT": "2"}, "port = 1", 3, "flag --port"),
        ({"port": None}, {"SLLM_PORT": ""}, "port = 1", 1, "sllm.toml"),
        ({"port": 3}, {}, None, 3, "flag --port"),
        ({}, {"SLLM_PORT": "2"}, None, 2, "environment SLLM_PORT"),
    ],
)
def test_flag_beats_environment_beats_file_beats_default(
    tmp_path: Path, flags: dict[str, Any], env: dict[str, str], toml: str | None, port: int, source: str
) -> None:
    config, sources = load(tmp_path, flags, env, toml)
    assert config.port == port
    assert sources["port"].endswith(source)
    assert set(sources) == set(Config.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0),
        ("port", 65536),
        ("port", "http"),
        ("port", True),
        ("port", 80.5),
        ("host", ""),
        ("host", "a b"),
        ("host", "x/y"),
        ("gateways", 0),
        ("gateways", 65),
        ("invokers", -1),
        ("listen", "8701"),
        ("listen", "tcp://host"),
        ("listen", "tcp://host:0"),
        ("listen", "ipc:///tmp/x"),
        ("memory_mb", -1),
        ("memory_mb", 63),
        ("libs_mb", -2),
        ("template_mb", 2**40),
        ("log_level", "loud"),
        ("open_invoke", "maybe"),
        ("open_invoke", 1),
        ("prefetch", "maybe"),
        ("prefetch", 1),
        ("copies", -1),
        ("copies", 65),
        ("copies", True),
        ("shutdown_grace", -0.1),
        ("shutdown_grace", float("nan")),
        ("shutdown_grace", float("inf")),
        ("shutdown_grace", True),
        ("orphan_grace", 601),
        ("stream_window", 0),
        ("max_body", 100),
        ("max_body", 2**40),
        ("node_name", "Upper"),
        ("node_name", "x" * 33),
        ("state_dir", ""),
        ("state_dir", 7),
        ("join", "a\0b"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed_and_its_source(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(BadSpec) as raised:
        Config.load({name: value}, {}, cwd=tmp_path)
    said = str(raised.value)
    assert said.startswith(f"{name} is ")
    assert f"flag --{name.replace('_', '-')}" in said
    assert "allowed: " in said
    assert repr(value) in said or name == "join"


def test_each_kind_of_layer_may_have_a_part_of_what_layers_have() -> None:
    config = Config(layers_mb=2000, libs_mb=1000, template_mb=0, invokers=2)
    assert (config.node_layers_mb, config.node_layer_budgets) == (1000, {"libs": 500, "template": 0})
    assert Config(layers_mb=2000).node_layer_budgets == {}
    with pytest.raises(BadSpec, match=r"template_mb is 2001; allowed: -1, or up to layers_mb \(2000\)"):
        Config(layers_mb=2000, template_mb=2001)


@pytest.mark.parametrize(
    ("variable", "text"), [("SLLM_PORT", "8700x"), ("SLLM_SHUTDOWN_GRACE", "soon"), ("SLLM_OPEN_INVOKE", "perhaps")]
)
def test_a_bad_environment_variable_is_named(tmp_path: Path, variable: str, text: str) -> None:
    with pytest.raises(BadSpec, match=f"{text}.*environment {variable}"):
        Config.load({}, {variable: text}, cwd=tmp_path)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("prot = 1", "unknown key 'prot' Did you mean 'port'?"),
        ("[port]\nx = 1", "port is {'x': 1}"),
        ('port = "8700"', "port is '8700'"),
        ("port = ", "cannot be read"),
        ("zzzzzz = 1", "Known: "),
    ],
)
def test_a_wrong_file_says_what_is_wrong_in_it(tmp_path: Path, toml: str, said: str) -> None:
    with pytest.raises(BadSpec) as raised:
        load(tmp_path, {}, {}, toml)
    assert said in str(raised.value)
    assert "sllm.toml" in str(raised.value)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match=r"no configuration file '.*other\.toml'"):
        Config.load({}, {}, toml_path=tmp_path / "other.toml")


def test_a_relative_state_dir_of_a_file_is_relative_to_it(tmp_path: Path) -> None:
    config, _ = load(tmp_path, {}, {}, 'state_dir = "state"')
    assert config.state_dir == tmp_path / "state"


def test_the_default_state_dir_follows_xdg(tmp_path: Path) -> None:
    assert Config.load({}, {"XDG_STATE_HOME": "/x"}, cwd=tmp_path)[0].state_dir == Path("/x/sllm")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)])
def test_booleans_are_read_from_the_environment(tmp_path: Path, text: str, value: bool) -> None:
    assert Config.load({}, {"SLLM_OPEN_INVOKE": text}, cwd=tmp_path)[0].open_invoke is value


@given(
    port=st.integers(1, 65535),
    gateways=st.integers(1, 64),
    grace=st.floats(0, 3600),
    opened=st.sampled_from([None, True, False]),
    level=st.sampled_from(["debug", "info", "warning", "error"]),
)
def test_a_written_config_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, port: int, gateways: int, grace: float, opened: bool | None, level: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "config.json"
    config = Config(
        state_dir=Path("/a b/ü"),
        port=port,
        gateways=gateways,
        shutdown_grace=grace,
        open_invoke=opened,
        log_level=level,
    )
    config.write(path)
    assert Config.read(path) == config
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"port": 0}', '{"port": "x"}', '{"colour": 1}', '{"state_dir": null}']
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BadSpec):
        Config.read(path)
    with pytest.raises(BadSpec, match=r"absent\.json"):
        Config.read(tmp_path / "absent.json")


def test_socket_paths_stay_short_enough_whatever_the_state_dir() -> None:
    for state in (Path("/s"), Path("/" + "x" * 90), Path("/" + "ü" * 60)):
        config = Config(state_dir=state)
        longest = config.node_endpoint("n" * 32).removeprefix("ipc://")
        assert len(longest.encode()) <= 100, longest
    assert Config(state_dir=Path("/s")).run_dir == Path("/s/run")
    assert Config(state_dir=Path("/" + "x" * 90)).run_dir != Config(state_dir=Path("/" + "y" * 90)).run_dir


def test_a_run_dir_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(state_dir=tmp_path / ("x" * 90))
    target = tmp_path / "elsewhere"
    target.mkdir()
    config.run_dir.symlink_to(target)
    try:
        with pytest.raises(Conflict, match="not a directory of this user"):
            config.prepare()
    finally:
        config.run_dir.unlink()


@pytest.mark.parametrize(
    ("host", "open_invoke", "expected"),
    [("127.0.0.1", None, True), ("localhost", None, True), ("::1", None, True), ("0.0.0.0", None, False),
     ("0.0.0.0", True, True), ("127.0.0.1", False, False)],
)  # fmt: skip
def test_invocation_is_open_on_loopback_only_unless_said(host: str, open_invoke: bool | None, expected: bool) -> None:
    assert Config(host=host, open_invoke=open_invoke).invocation_open is expected


def test_memory_is_split_over_the_invokers() -> None:
    assert Config(memory_mb=1000, invokers=4).node_memory_mb == 250
    assert Config(invokers=2).node_memory_mb == machine_memory_mb() * 4 // 5 // 2


def test_config_show_gives_each_value_its_source_and_hides_the_join_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sllm.toml").write_text("gateways = 3")
    monkeypatch.setenv("SLLM_JOIN", "sllm-join-very-secret")
    monkeypatch.setenv("SLLM_PORT", "9000")
    assert cli.execute(["config", "show", "--json"]) == 0
    out = capsys.readouterr().out
    shown = json.loads(out)
    assert shown["gateways"] == {"value": 3, "source": str(tmp_path / "sllm.toml")}
    assert shown["port"] == {"value": 9000, "source": "environment SLLM_PORT"}
    assert shown["join"]["value"] == "(hidden)"
    assert "very-secret" not in out
    assert cli.execute(["config", "show"]) == 0
    assert "9000" in capsys.readouterr().out


def test_a_bad_setting_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLLM_PORT", "x")
    assert cli.execute(["config", "show"]) == cli.USAGE
    assert "port is 'x' (from environment SLLM_PORT); allowed: a whole number" in capsys.readouterr().err
