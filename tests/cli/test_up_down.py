"""`sllm up --daemon` and `sllm down` with a real supervisor over stand-in processes: locks, ports, restarts, stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sllm_faas import cli
from sllm_faas.cli import processes, up
from sllm_faas.config import Config

HERE = Path(__file__).parent
Sllm = Callable[..., int]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path, port: int) -> Config:
    return Config(state_dir=tmp_path / "state", port=port, invokers=2, gateways=2, shutdown_grace=5.0)


@pytest.fixture
def sllm(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sllm]:
    """Runs one command line against the test's state directory; whatever is left at the end is killed."""
    monkeypatch.setattr(up, "SUPERVISOR", [sys.executable, str(HERE / "stub_supervisor.py")])
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SLLM_"):
            monkeypatch.delenv(name)
    config.state_dir.mkdir()

    def run(*args: str) -> int:
        flags = ["--state-dir", str(config.state_dir)]
        if args[0] == "up":
            flags += ["--port", str(config.port), "--invokers", "2", "--gateways", "2", "--shutdown-grace", "5"]
        return cli.execute([*args, *flags])

    yield run
    holder = processes.holder(config)
    if holder:
        psutil.Process(holder.pid).kill()
    processes.end(config, 0.0)


def behave(config: Config, **how: str) -> None:
    (config.state_dir / "behave.json").write_text(
        json.dumps({name.replace("_", "-"): what for name, what in how.items()})
    )


def starts(config: Config) -> list[tuple[str, int]]:
    lines = (config.state_dir / "starts.txt").read_text().splitlines()
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def gone(pids: list[int]) -> bool:
    return processes.wait(pids, 10.0)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the supervisor brings about in its own time."""
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.005)
    raise AssertionError("it did not happen within 10 s")


def log(config: Config) -> list[dict[str, object]]:
    return [json.loads(line) for line in (config.logs_dir / "platform.jsonl").read_text().splitlines()]


def test_up_starts_every_part_and_down_leaves_none(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sllm("up", "--daemon") == 0
    assert config.url in capsys.readouterr().err
    names = [name for name, _ in starts(config)]
    assert names[0] == "controller"
    assert sorted(names[1:]) == ["gateway-0", "gateway-1", "node-0", "node-1"]
    record = json.loads(config.supervisor_path.read_text())
    assert record["url"] == config.url
    assert record["children"] == dict(starts(config))
    assert Config.read(config.config_path) == config

    assert sllm("down") == 0
    assert "nothing is left" in capsys.readouterr().out
    assert gone([record["pid"], *record["children"].values()])
    assert processes.holder(config) is None
    assert not config.run_dir.exists()


def test_secrets_are_the_owners_alone_and_the_token_is_kept(sllm: Sllm, config: Config) -> None:
    assert sllm("up", "--daemon") == 0
    token = config.admin_token_path.read_text()
    assert token.startswith("sllm_")
    assert len(token.strip()) == 48
    for path in (config.admin_token_path, config.config_path):
        assert path.stat().st_mode & 0o777 == 0o600
    assert config.run_dir.stat().st_mode & 0o777 == 0o700
    assert sllm("down") == 0
    assert sllm("up", "--daemon") == 0
    assert config.admin_token_path.read_text() == token
    assert token.strip() not in (config.logs_dir / "platform.jsonl").read_text()


def test_parts_end_gateways_first_and_controller_last(sllm: Sllm, config: Config) -> None:
    assert sllm("up", "--daemon") == 0
    assert sllm("down") == 0
    ended = [str(line["name"]).split("-")[0] for line in log(config) if line["event"] == "ended"]
    assert ended == ["gateway", "gateway", "node", "node", "controller"]


def test_a_second_up_says_who_holds_the_state_directory(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sllm("up", "--daemon") == 0
    holder = processes.holder(config)
    assert holder is not None
    capsys.readouterr()
    assert sllm("up", "--daemon") == 1
    said = capsys.readouterr().err
    assert f"pid {holder.pid}" in said
    assert "sllm down" in said
    assert processes.holder(config) == holder


def test_a_killed_supervisors_lock_and_processes_are_recovered(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(config, node_0="deaf")
    assert sllm("up", "--daemon") == 0
    earlier = starts(config)
    record = json.loads(config.supervisor_path.read_text())
    os.kill(record["pid"], signal.SIGKILL)
    assert gone([record["pid"]])
    behave(config)
    assert sllm("up", "--daemon") == 0
    assert gone([pid for _, pid in earlier])
    assert len(starts(config)) == 10


def test_down_cleans_up_after_a_killed_supervisor(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(config, node_0="deaf")
    assert sllm("up", "--daemon") == 0
    record = json.loads(config.supervisor_path.read_text())
    os.kill(record["pid"], signal.SIGKILL)
    assert gone([record["pid"]])
    assert sllm("down") == 0
    assert "No platform runs" in capsys.readouterr().out
    assert gone(list(record["children"].values()))


def test_down_without_a_platform_says_so(sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert sllm("down") == 0
    assert capsys.readouterr().out == f"No platform runs on {config.state_dir}.\n"


def test_a_port_in_use_is_named_with_who_has_it(sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", config.port))
        other.listen()
        assert sllm("up", "--daemon") == 1
    said = capsys.readouterr().err
    assert f"port {config.port} of 127.0.0.1 is in use by pid {os.getpid()}" in said
    assert "--port" in said
    assert not (config.state_dir / "starts.txt").exists()
    assert processes.holder(config) is None


def test_a_part_that_dies_while_starting_fails_up_with_what_it_said(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(config, controller="die")
    assert sllm("up", "--daemon") == 1
    said = capsys.readouterr().err
    assert "controller died while starting (exit status 7)" in said
    assert "the database is not one" in said
    assert [name for name, _ in starts(config)] == ["controller"]
    assert processes.marked(config) == []


def test_a_killed_part_is_started_again_and_the_others_stay(sllm: Sllm, config: Config) -> None:
    assert sllm("up", "--daemon") == 0
    before = dict(starts(config))
    os.kill(before["gateway-1"], signal.SIGKILL)
    until(lambda: len(starts(config)) == 6)
    assert starts(config)[5][0] == "gateway-1"
    until(lambda: json.loads(config.supervisor_path.read_text())["children"]["gateway-1"] == starts(config)[5][1])
    assert sllm("down") == 0
    events = [(line["event"], line.get("name"), line.get("text")) for line in log(config)]
    assert ("died", "gateway-1", "killed by SIGKILL") in events
    assert [name for name, _ in starts(config)].count("controller") == 1


def test_a_part_that_ignores_its_stop_is_killed_when_its_time_is_up(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(config, node_1="deaf")
    assert sllm("up", "--daemon") == 0
    record = json.loads(config.supervisor_path.read_text())
    assert sllm("down", "--timeout", "0.2") == 0
    assert "Killed" in capsys.readouterr().out
    assert gone([record["pid"], *record["children"].values()])


def test_a_second_signal_stops_at_once(sllm: Sllm, config: Config) -> None:
    behave(config, node_1="deaf")
    assert sllm("up", "--daemon") == 0
    record = json.loads(config.supervisor_path.read_text())
    os.kill(record["pid"], signal.SIGTERM)
    assert gone([record["children"]["gateway-0"], record["children"]["gateway-1"], record["children"]["node-0"]])
    os.kill(record["pid"], signal.SIGTERM)
    assert gone([record["pid"], *record["children"].values()])
    assert processes.holder(config) is None


def test_grandchildren_in_sessions_of_their_own_end_too(sllm: Sllm, config: Config) -> None:
    behave(config, node_0="grandchild")
    assert sllm("up", "--daemon") == 0
    marked = [process.pid for process in processes.marked(config)]
    assert len(marked) == 6
    assert sllm("down") == 0
    assert gone(marked)


def test_a_full_disk_costs_log_lines_and_nothing_else(sllm: Sllm, config: Config) -> None:
    config.logs_dir.mkdir()
    (config.logs_dir / "platform.jsonl").symlink_to("/dev/full")
    assert sllm("up", "--daemon") == 0
    before = dict(starts(config))
    os.kill(before["node-0"], signal.SIGKILL)
    until(lambda: len(starts(config)) == 6)
    assert sllm("down") == 0
    assert processes.marked(config) == []


@pytest.mark.parametrize("daemon", [["--daemon"], []])
def test_a_state_directory_that_cannot_be_made_is_a_clear_error(
    sllm: Sllm, config: Config, capsys: pytest.CaptureFixture[str], daemon: list[str]
) -> None:
    (config.state_dir / "bundles").write_text("in the way")
    assert sllm("up", *daemon) == 1
    said = capsys.readouterr().err
    assert "bundles" in said
    assert "Traceback" not in said


# -- in the foreground ---------------------------------------------------------------------------------------


class Foreground:
    """`sllm up` as a person runs it, its output piped."""

    def __init__(self, config: Config, ready_timeout: float = 30.0) -> None:
        flags = ["--state-dir", str(config.state_dir), "--port", str(config.port), "--shutdown-grace", "5"]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "stub_foreground.py"), str(ready_timeout), "up", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.banner = ""

    def wait_until_up(self) -> None:
        assert self.process.stderr is not None
        self.banner = self.process.stderr.readline()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.mark.usefixtures("sllm")
def test_in_the_foreground_log_lines_are_shown_and_one_interrupt_stops_in_order(config: Config) -> None:
    running = Foreground(config)
    running.wait_until_up()
    assert config.url in running.banner
    running.process.send_signal(signal.SIGINT)
    code, out, _ = running.end()
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines if line["component"] == "stub"].count("ready") == 3
    assert [line["name"] for line in lines if line["event"] == "ended"] == ["gateway-0", "node-0", "controller"]
    assert all(line.get("code") == 0 for line in lines if line["event"] == "ended")
    assert processes.marked(config) == []


@pytest.mark.usefixtures("sllm")
def test_in_the_foreground_a_second_interrupt_stops_at_once(config: Config) -> None:
    behave(config, gateway_0="deaf")
    running = Foreground(config)
    running.wait_until_up()
    running.process.send_signal(signal.SIGINT)
    until(lambda: any(line["event"] == "stopping" for line in log(config)))
    running.process.send_signal(signal.SIGINT)
    code, out, _ = running.end()
    assert code == 0
    assert '"event": "killing", "name": "gateway-0"' in out
    assert processes.marked(config) == []


@pytest.mark.usefixtures("sllm")
def test_a_part_that_never_gets_ready_fails_up_in_time(config: Config) -> None:
    behave(config, node_0="silent")
    code, _, err = Foreground(config, ready_timeout=0.5).end()
    assert code == 1
    assert "node-0 was not ready within 0.5 s" in err
    assert processes.marked(config) == []


@pytest.mark.usefixtures("sllm")
def test_an_interrupt_while_starting_stops_what_has_started(config: Config) -> None:
    behave(config, controller="silent")
    running = Foreground(config)
    until(lambda: (config.state_dir / "starts.txt").exists())
    running.process.send_signal(signal.SIGINT)
    code, _, _ = running.end()
    assert code == 0
    assert processes.marked(config) == []
