"""`sllm simulate` as a user runs it: a table, JSON, plots; what cannot be simulated is said before it is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sllm_faas import cli
from sllm_faas.sim import scenario
from sllm_faas.sim.scenario import FunctionModel, LoadModel, NodeModel, Scenario

Run = Callable[..., tuple[int, str, str]]

TINY = Scenario(
    "tiny",
    (NodeModel(2, memory_gb=64.0, gpus=2, dram_gb=8.0),),
    (FunctionModel("m", count=3, checkpoint_gb=4.0, memory_mb=100, gpus=1, per_input=0.001, per_output=0.01),),
    LoadModel("poisson", rate=1.0),
    seconds=20.0,
    rates=(0.5, 2.0),
    assumptions=("invented for a test",),
)
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:48.0000000,12,7
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:54.6805900,91,30
2023-11-16 18:15:56.6805900,1311,16
"""
"""Four intervals in ten seconds."""


@pytest.fixture
def sllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Where `tiny.toml` and `azure.csv` are."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(scenario.to_toml(TINY))
    Path("azure.csv").write_text(TRACE)

    def run(*args: str) -> tuple[int, str, str]:
        code = cli.execute(["simulate", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_table_has_a_row_per_policy_and_rate_and_what_was_assumed(sllm: Run) -> None:
    code, out, _ = sllm("tiny.toml", "--policy", "ours", "--policy", "random", "--grid")
    assert code == 0
    head, *rows = out.splitlines()
    assert head.split()[:3] == ["POLICY", "RATE", "REQUESTS"]
    assert [row.split()[:2] for row in rows[:4]] == [["ours", "0.5"], ["random", "0.5"], ["ours", "2"], ["random", "2"]]
    assert "- invented for a test" in rows


def test_json_is_a_list_of_results_and_nothing_else(sllm: Run) -> None:
    code, out, _ = sllm("tiny.toml", "--all-policies", "--seeds", "2", "--json")
    results = json.loads(out)
    assert code == 0
    assert len(results) == 7 * 2
    assert {result["seed"] for result in results} == {0, 1}
    ours = results[0]
    assert (ours["scenario"], ours["policy"], ours["rate"]) == ("tiny", "ours", 1.0)
    assert ours["requests"] == ours["answered"] + ours["refused"] + ours["unfinished"] > 0
    assert ours["startup"].keys() == {"mean", "p50", "p95", "p99"}
    assert ours["assumptions"] == ["invented for a test"]


def test_the_same_command_gives_the_same_answer(sllm: Run) -> None:
    command = ("tiny.toml", "--seed", "7", "--json")
    assert sllm(*command) == sllm(*command)


def test_a_plot_is_a_png_per_rate(sllm: Run) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra sllm-faas[sim]")
    code, out, _ = sllm("tiny.toml", "--rate", "1", "--plot", "plots")
    written = Path("plots/tiny-1.png")
    assert code == 0
    assert f"wrote {written}" in out
    content = written.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[12:16] == b"IHDR"
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert (width, height) == (1200, 480)
    assert 5_000 < len(content) < 500_000


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_run(
    sllm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = sllm("tiny.toml", "--plot", "plots")
    assert (code, out) == (cli.FAILED, "")
    assert "sllm-faas[sim]" in err
    assert not Path("plots").exists()


def test_what_is_shown_is_a_scenario_to_start_from(sllm: Run) -> None:
    code, out, _ = sllm("tiny.toml", "--show", "--seconds", "5")
    assert code == 0
    Path("mine.toml").write_text(out)
    assert scenario.read(Path("mine.toml")) == replace(TINY, seconds=5.0)


def test_the_scenarios_that_come_with_it_are_listed(sllm: Run) -> None:
    code, out, _ = sllm("--list")
    assert code == 0
    assert {"small", "paper", "paper-30b", "scale"} <= {line.split()[0] for line in out.splitlines()}
    assert {item["scenario"] for item in json.loads(sllm("--list", "--json")[1])} >= {"hydraserve-cv8"}


def test_a_trace_runs_at_its_own_rate(sllm: Run) -> None:
    code, out, _ = sllm("tiny.toml", "--trace", "azure.csv", "--seconds", "12.4", "--json")
    [result] = json.loads(out)
    assert code == 0
    assert result["rate"] == pytest.approx(0.4)
    assert result["requests"] == 5  # the file's ten seconds; it begins anew one mean interval after its end


@pytest.mark.parametrize(("options", "rates"), [(("--rate", "4"), [4.0]), (("--grid",), [0.5, 2.0])])
def test_a_trace_is_scaled_to_the_rate_that_is_asked_for(
    sllm: Run, options: tuple[str, ...], rates: list[float]
) -> None:
    code, out, _ = sllm("tiny.toml", "--trace", "azure.csv", *options, "--seconds", "100", "--json")
    results = json.loads(out)
    assert code == 0
    assert [result["rate"] for result in results] == rates
    assert [result["requests"] for result in results] == pytest.approx([100 * rate for rate in rates], rel=0.02)


@pytest.mark.parametrize(
    ("args", "exits", "said"),
    [
        (("smal",), cli.NOT_FOUND, "there is no scenario 'smal'"),
        (("nowhere.toml",), cli.USAGE, "cannot read the scenario nowhere.toml"),
        (("azure.csv.toml",), cli.USAGE, "is not TOML"),
        (("tiny.toml", "--policy", "best"), cli.USAGE, "there is no policy 'best'; allowed: ours, serverlessllm"),
        (("tiny.toml", "--rate", "0"), cli.USAGE, "rate is 0.0; allowed"),
        (("tiny.toml", "--rate", "inf"), cli.USAGE, "rate is inf; allowed"),
        (("tiny.toml", "--rate", "nan"), cli.USAGE, "rate is nan; allowed"),
        (("tiny.toml", "--rate", "fast"), cli.USAGE, "'fast' is not a valid float"),
        (("tiny.toml", "--seconds", "-1"), cli.USAGE, "seconds is -1.0; allowed"),
        (("tiny.toml", "--seeds", "0"), cli.USAGE, "--seeds"),
        (("tiny.toml", "--trace", "nowhere.csv"), cli.USAGE, "'nowhere.csv' does not exist"),
        (("tiny.toml", "--trace", "."), cli.USAGE, "is a directory"),
        (("tiny.toml", "--trace", "tiny.toml"), cli.USAGE, "needed: TIMESTAMP,ContextTokens,GeneratedTokens"),
        (("tiny.toml", "--trace", "bad.csv"), cli.USAGE, "bad.csv, line 3"),
        (("tiny.toml", "--trace", "once.csv"), cli.USAGE, "Give --rate."),
        (("tiny.toml", "--plot", "azure.csv"), cli.USAGE, "is a file"),
    ],
)
def test_what_cannot_be_simulated_is_said_with_what_is_allowed(
    sllm: Run, args: tuple[str, ...], exits: int, said: str
) -> None:
    head, first, *_ = TRACE.splitlines()
    Path("azure.csv.toml").write_text(TRACE)
    Path("bad.csv").write_text(f"{head}\n{first}\nyesterday,1,2\n")
    Path("once.csv").write_text(f"{head}\n{first}\n{first}\n")
    code, out, err = sllm(*args)
    assert (code, out) == (exits, "")
    assert said in err
    assert "Traceback" not in err


def test_a_trace_of_one_moment_runs_at_a_rate_that_is_given(sllm: Run) -> None:
    Path("once.csv").write_text("\n".join(TRACE.splitlines()[:2]) + "\n")
    code, out, _ = sllm("tiny.toml", "--trace", "once.csv", "--rate", "2", "--seconds", "10", "--json")
    assert code == 0
    assert json.loads(out)[0]["requests"] == 21
