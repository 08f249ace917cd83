"""Deploying, servers and exit codes: what the command line sends, prints and exits with."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm_faas import cli
from tests.cli.conftest import Answer, Run, error, events

# -- deploying -----------------------------------------------------------------------------------------------

SOURCE = 'import sllm\napp = sllm.App("demo")\n\n@app.function\ndef square(x: int) -> int:\n    return x * x\n'
DONE = {"app": "demo", "version": 4, "unchanged": False, "seconds": 0.5}


def test_deploy_uploads_what_is_missing_and_says_how_to_call_it(sllm: Run, fake: Any, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "kiosk.py").write_text(SOURCE)

    def deployed(asked: Any) -> Any:
        spec = json.loads(asked.body)["spec"]
        assert spec["name"] == "demo"
        assert [function["qualname"] for function in spec["functions"]] == ["square"]
        uploads = [one for one in fake.asked if one.method == "PUT"]
        assert [one.path for one in uploads] == [f"/v1/bundles/{spec['bundle']}"]
        fake.answers[f"HEAD /v1/bundles/{spec['bundle']}"] = Answer()
        return events(("progress", {"stage": "check", "text": "on node-0"}), ("result", DONE))

    class Everything(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return Answer(201, {}) if key.startswith("PUT /v1/bundles/") else super().get(key, default)

    fake.answers = Everything({**fake.answers, "POST /v1/apps/demo/deployments": deployed})
    code, out, err = sllm("deploy", "source/kiosk.py")
    assert code == 0, err
    assert out.splitlines()[0] == "Deployed demo version 4 in 500 ms."
    assert f"demo/square  POST {fake.url}/v1/functions/demo/square" in out
    assert sllm("deploy", "source/kiosk.py")[0] == 0
    assert [asked.method for asked in fake.asked].count("PUT") == 1


def test_a_failed_deploy_shows_the_users_traceback_and_exits_1(sllm: Run, fake: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    failure = {"error": {"code": "import_failed", "message": "needs module 'x'", "hint": "Install it.",
                         "traceback": "Traceback (most recent call last):\n  File shop.py"}}  # fmt: skip
    fake.answers["POST /v1/apps/model/deployments"] = events(("error", failure))
    code, out, err = sllm("deploy", "--model", "model")
    assert (code, out) == (1, "")
    assert "File shop.py" in err
    assert "Install it." in err


def test_dev_deploys_again_when_the_source_changes_and_survives_a_mistake(
    sllm: Run, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "stall.py"
    file.write_text(SOURCE)
    deployed: list[str] = []

    def answer(asked: Any) -> Any:
        deployed.append(json.loads(asked.body)["spec"]["functions"][0]["name"])
        return events(("result", DONE))

    class Everything(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return Answer(200) if key.startswith("HEAD /v1/bundles/") else super().get(key, default)

    fake.answers = Everything({"POST /v1/apps/demo/deployments": answer, "GET /v1/logs": events()})

    def watch(root: Path, **_: Any) -> Iterator[set[tuple[int, str]]]:
        assert root == tmp_path / "source"
        for text in (SOURCE.replace("square", "round"), "1 / 0\n", SOURCE.replace("square", "again")):
            file.write_text(text)
            yield {(2, str(file))}

    monkeypatch.setattr("watchfiles.watch", watch)
    code, _, err = sllm("dev", "source/stall.py", "--server", fake.url)
    assert code == 0
    assert deployed == ["square", "round", "again"]
    assert "ZeroDivisionError" in err
    assert err.count("stall.py changed.") == 3


@pytest.mark.parametrize(
    ("model", "more", "app", "source"),
    [
        ("org/Tiny_Llama.v1", [], "tiny-llama-v1", "org/Tiny_Llama.v1"),
        ("org/m", ["--name", "mine", "--dtype", "float32", "--revision", "main"], "mine", "org/m"),
    ],
)
def test_a_model_is_deployed_with_no_file(
    sllm: Run, fake: Any, model: str, more: list[str], app: str, source: str
) -> None:
    fake.answers[f"POST /v1/apps/{app}/deployments"] = events(("result", {**DONE, "app": app}))
    code, out, _ = sllm("deploy", "--model", model, *more)
    assert code == 0
    assert f"model={app}/{app}" in out
    (function,) = json.loads(fake.last().body)["spec"]["functions"]
    assert (function["kind"], function["checkpoint"]["source"]) == ("llm", source)


@pytest.mark.parametrize("args", [[], ["a.py", "--model", "m"], ["a.py", "--name", "x"]])
def test_deploy_takes_a_file_or_a_model(sllm: Run, args: list[str]) -> None:
    assert sllm("deploy", *args)[0] == cli.USAGE


def test_deploying_a_file_that_does_not_import_shows_why(sllm: Run, fake: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import sllm\n\n1 / 0\n")
    code, _, err = sllm("deploy", "broken.py")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "line 3" in err
    assert fake.asked == []


# -- servers and exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [
        (401, "unauthenticated", cli.NOT_ALLOWED),
        (403, "forbidden", cli.NOT_ALLOWED),
        (404, "not_found", cli.NOT_FOUND),
        (429, "queue_full", cli.FAILED),
        (500, "internal", cli.FAILED),
        (503, "unavailable", cli.FAILED),
        (504, "deadline_exceeded", cli.FAILED),
    ],
)
def test_exit_codes_follow_the_kind_of_error(sllm: Run, fake: Any, status: int, code: str, exits: int) -> None:
    fake.answers["GET /v1/status"] = error(status, code, "it is so", "Do this.")
    result, out, err = sllm("status")
    assert (result, out) == (exits, "")
    assert err == "Error: it is so\nDo this.\n"


def test_an_unreachable_server_exits_3_and_says_what_to_do(sllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLLM_SERVER")
    code, _, err = sllm("status", "--server", "http://127.0.0.1:1")
    assert code == cli.UNREACHABLE
    assert "http://127.0.0.1:1" in err
    assert "sllm up" in err


def test_an_answer_that_is_not_ours_is_said_to_be_so(sllm: Run, fake: Any) -> None:
    fake.answers["GET /v1/status"] = Answer(200, b"<html>", "text/html")
    code, _, err = sllm("status")
    assert code == 1
    assert "Is it an sllm server?" in err


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["delete", "demi", "--yes"], "demo"),
        (["invoke", "dmeo/square"], "demo"),
        (["invoke", "demo/sqare"], "square"),
        (["describe", "demo/squar"], "square"),
        (["node", "drain", "nod-0"], "node-0"),
        (["history", "dem"], "demo"),
    ],
)
def test_a_name_nearly_right_is_suggested(sllm: Run, args: list[str], near: str) -> None:
    code, _, err = sllm(*args)
    assert code == cli.NOT_FOUND
    assert f"Did you mean '{near}'?" in err


def test_a_command_nearly_right_is_suggested(sllm: Run) -> None:
    code, _, err = sllm("deplyo")
    assert code == cli.USAGE
    assert "did you mean `sllm deploy`?" in err


def test_the_token_goes_to_the_server_it_is_for(sllm: Run, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLLM_TOKEN", "sllm_mine")
    sllm("ps")
    assert fake.last().headers["Authorization"] == "Bearer sllm_mine"


def test_the_admin_token_of_this_machine_is_not_sent_elsewhere(
    sllm: Run, fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "state" / "sllm"
    state.mkdir(parents=True)
    (state / "admin.token").write_text("sllm_admin\n")
    sllm("ps")
    assert "Authorization" not in fake.last().headers
    monkeypatch.setenv("SLLM_PORT", fake.url.rpartition(":")[2])  # now the server is this state directory's own
    sllm("ps")
    assert fake.last().headers["Authorization"] == "Bearer sllm_admin"


def test_a_profile_names_a_server_and_its_token(
    sllm: Run, fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLLM_SERVER", "http://127.0.0.1:1")
    (tmp_path / "config" / "sllm").mkdir(parents=True)
    profiles = tmp_path / "config" / "sllm" / "profiles.toml"
    profiles.write_text(f'[lab]\nserver = "{fake.url}"\ntoken = "sllm_lab"\n')
    profiles.chmod(0o600)
    assert sllm("ps", "--profile", "lab")[0] == 0
    assert fake.last().headers["Authorization"] == "Bearer sllm_lab"
    code, _, err = sllm("ps", "--profile", "lob")
    assert code == cli.USAGE
    assert "Did you mean 'lab'?" in err
    profiles.chmod(0o644)
    code, _, err = sllm("ps", "--profile", "lab")
    assert code == cli.USAGE
    assert "chmod 600" in err


def test_help_lists_every_command_and_the_exit_codes(sllm: Run) -> None:
    code, out, _ = sllm("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert "3 server unreachable" in " ".join(out.split())


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(sllm: Run, name: str) -> None:
    if name == "bench":
        return  # hands everything over
    code, out, _ = sllm(name, "--help")
    assert code == 0
    assert f"Usage: sllm {name}" in out


def test_help_needs_no_heavy_import() -> None:
    import subprocess

    script = (
        "import sys\nfrom sllm_faas import cli\ncli.execute(['--help'])\n"
        "print([m for m in ('httpx', 'torch', 'zmq', 'psutil', 'starlette', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_doctor_reports_each_check(sllm: Run) -> None:
    code, out, _ = sllm("doctor", "--json")
    found = json.loads(out)
    assert {"python", "memory", "disk", "port", "clock", "open files"} <= {item["check"] for item in found}
    assert code == int(any(item["result"] == "failed" for item in found))
    assert all(item["advice"] for item in found if item["result"] == "failed")


def test_bench_without_the_source_tree_says_where_it_is(sllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    code, _, err = sllm("bench", "dataplane")
    assert code in (cli.NOT_FOUND, cli.FAILED)
    assert "source tree" in err


SERVER_ONLY = ("psutil", "zmq", "msgspec", "rich", "starlette", "uvicorn", "sqlalchemy", "watchfiles", "torch")


@pytest.mark.parametrize(
    ("args", "exits", "said"),
    [
        (["ps"], cli.UNREACHABLE, "cannot reach"),
        (["deploy", "--model", "org/m"], cli.UNREACHABLE, "cannot reach"),
        (["logs", "-f"], cli.UNREACHABLE, "cannot reach"),
        (["config", "show"], cli.OK, ""),
        (["up"], cli.FAILED, "pip install 'sllm-faas[all]'"),
        (["run", "kiosk.py"], cli.FAILED, "pip install 'sllm-faas[all]'"),
    ],
)
def test_a_client_without_the_servers_libraries_can_do_all_but_serve(
    tmp_path: Path, args: list[str], exits: int, said: str
) -> None:
    import subprocess

    (tmp_path / "kiosk.py").write_text(SOURCE)
    blocked = f"import sys; sys.modules.update(dict.fromkeys({SERVER_ONLY!r}))"
    script = f"{blocked}; from sllm_faas import cli; sys.exit(cli.execute({args!r}))"
    env = {**os.environ, "SLLM_SERVER": "http://127.0.0.1:1", "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == exits, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
