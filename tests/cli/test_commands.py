"""Commands against a server with canned answers: what they ask, print, and exit with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sllm_faas import cli
from sllm_faas.cli import output
from tests.cli.conftest import APP, APPS, FUNCTION, INSTANCE, INVOCATION, NODE, RECORD, Answer, Run, error, events

# -- reading -------------------------------------------------------------------------------------------------


def test_ps_shows_a_row_per_instance(sllm: Run) -> None:
    code, out, _ = sllm("ps")
    assert code == 0
    head, row = out.splitlines()
    assert " ".join(head.split()) == "INSTANCE FUNCTION VERSION STATE RUNNING NODE STARTED FROM AGE PID MEMORY"
    assert " ".join(row.split()) == "i-1 demo/square 3 ready 1/4 node-0 libs 5.0 s 77 256.0 MiB"


def test_ps_of_an_app_asks_for_it_alone(sllm: Run, fake: Any) -> None:
    assert sllm("ps", "demo")[0] == 0
    assert fake.last().query == {"app": "demo"}


@pytest.mark.parametrize(
    ("args", "path", "body", "printed"),
    [
        (["ps"], "/v1/instances", {"instances": [INSTANCE]}, [INSTANCE]),
        (["history", "demo"], "/v1/apps/demo", APP, APP["versions"]),
        (["node", "list"], "/v1/nodes", {"nodes": [NODE]}, [NODE]),
        (["token", "list"], "/v1/tokens", {"tokens": []}, []),
        (["checkpoint", "list"], "/v1/checkpoints", {"checkpoints": []}, []),
        (["status"], "/v1/status", {"counts": {}}, {"counts": {}}),
        (["describe", "demo"], "/v1/apps/demo", APP, APP),
        (["describe", INVOCATION], f"/v1/invocations/{INVOCATION}", RECORD, {**RECORD, "moves": [], "starts": []}),
        (["describe", "node", "node-0"], "/v1/nodes/node-0", NODE, NODE),
    ],
)
def test_json_is_what_the_server_said_and_nothing_else(
    sllm: Run, fake: Any, args: list[str], path: str, body: Any, printed: Any
) -> None:
    fake.answers[f"GET {path}"] = Answer(body=body)
    code, out, err = sllm(*args, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == printed


def test_an_invocation_says_why_its_instance_was_placed_where_it_was(sllm: Run, fake: Any) -> None:
    why = "after stopping 1 on node-0: node-0: 1.00 s = base container 1.00; not moving away from node-1 1.20 s"
    start = {
        "instance": "i-1", "node": "node-0", "version": 1, "state": "ready", "warmth": "base", "tier": "disk",
        "predicted": 1.0, "margin": 0.1, "actual": 1.25, "why": why, "timeline": {"began": 0.0, "spans": []},
        "error": None, "ended": 3.0,
    }  # fmt: skip
    others = {**start, "instance": "i-2"}
    function = {**FUNCTION, "starts": [start, others], "moves": []}
    fake.answers[f"GET /v1/invocations/{INVOCATION}"] = Answer(200, RECORD)
    fake.answers[f"GET /v1/functions/{RECORD['app']}/{RECORD['function']}"] = Answer(200, function)
    code, out, _ = sllm("describe", INVOCATION)
    assert code == 0
    assert f"i-1 — {why}" in out
    assert output.duration(1.25) in out, "beside what was predicted"
    assert "i-2" not in out


STATUS = {
    "controller": {"life": "x", "uptime": 61.0, "pid": 5, "version": "0.1.0"},
    "counts": {"nodes": 2, "nodes_lost": 1, "gateways": 2, "running": 4, "waiting": 1,
               "instances": {"requested": 0, "starting": 1, "ready": 3, "draining": 0}},
    "apps": APPS["apps"],
    "nodes": [{**NODE, "running": 4, "resident": []}],
    "queues": [{"target": "demo/square@3", "waiting": 1, "running": 4, "desired": 5, "blocked": "no room yet",
                "instances": {"requested": 0, "starting": 1, "ready": 3, "draining": 0}}],
    "moving": 2,
    "storage": {"ok": False, "error": "disk full"},
}  # fmt: skip


def test_status_shows_the_platform_at_a_glance(sllm: Run, fake: Any) -> None:
    fake.answers["GET /v1/status"] = Answer(body=STATUS)
    code, out, _ = sllm("status")
    assert code == 0
    for text in (
        "pid 5, up for 1 min",
        "2, 1 lost",
        "1 starting, 3 ready",
        "4 running, 1 waiting, 2 instances being moved",
        "no room yet",
        "8.0 GiB",
        "disk full",
        "demo",
    ):
        assert text in out
    assert "demo/square@3" in out
    assert "instance of" not in out


def frames(monkeypatch: pytest.MonkeyPatch, count: int, between: Callable[[], None] = lambda: None) -> None:
    """`--watch` shows so many, without waiting, and is stopped by Ctrl-C."""
    left = [count]

    def sleep(seconds: float) -> None:
        assert seconds == 1.0
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        between()

    monkeypatch.setattr("sllm_faas.cli.status.time.sleep", sleep)


def test_status_is_watched_with_a_row_per_instance(sllm: Run, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["GET /v1/status"] = Answer(body=STATUS)

    def changes() -> None:
        draining = {**INSTANCE, "state": "draining", "running": 0}
        fake.answers["GET /v1/instances"] = Answer(body={"instances": [draining]})

    frames(monkeypatch, 2, changes)
    code, out, _ = sllm("status", "--watch")
    assert code == 130
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows.count("INSTANCE OF NODE STATE STARTED FROM AGE IN FLIGHT") == 2
    assert rows.index("demo/square@3 node-0 ready libs 5.0 s 1/4") < rows.index(
        "demo/square@3 node-0 draining libs 5.0 s 0/4"
    )


def test_a_watched_status_lists_the_busiest_of_many_instances(
    sllm: Run, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [{**INSTANCE, "instance": f"i-{n}", "function": f"f{n}", "running": n} for n in range(60)]
    fake.answers["GET /v1/status"] = Answer(body=STATUS)
    fake.answers["GET /v1/instances"] = Answer(body={"instances": many})
    frames(monkeypatch, 1)
    _, out, _ = sllm("status", "--watch")
    assert "demo/f59@3" in out
    assert "demo/f9@3" not in out
    assert "and 10 more" in out


def test_history_names_what_serves_and_what_failed(sllm: Run) -> None:
    _, out, _ = sllm("history", "demo")
    assert "yes" in out.splitlines()[1]
    assert "no torch" in out.splitlines()[2]


def test_describe_draws_the_timeline_of_an_invocation(sllm: Run, fake: Any) -> None:
    fake.answers[f"GET /v1/invocations/{INVOCATION}"] = Answer(body=RECORD)
    code, out, _ = sllm("describe", INVOCATION)
    assert code == 0
    assert "Failed: it broke" in out
    assert "only node" in out
    queue, run = (line for line in out.splitlines() if "█" in line)
    assert queue.split()[0] == "queue"
    assert run.index("█") > queue.index("█")


MOVE = {
    "invocation": "inv-" + "ab" * 16, "function": "demo/square", "from": "node-0", "source": "ins-1", "to": "node-1",
    "instance": "ins-2", "outcome": "moved", "why": "", "reason": "room for demo/big@1", "predicted": 0.2,
    "seconds": 0.18, "paused": 0.01, "rounds": 2, "tokens": 400, "sent": 900, "ended": 3.0,
}  # fmt: skip
MOVING = {
    "source": "ins-1", "from": "node-0", "to": "node-1", "instance": "ins-2", "state": "moving", "reason": "drained",
    "predicted": 0.2, "age": 0.1, "tries": 0, "next": 29.0, "invocations": [],
}  # fmt: skip


def test_describe_function_says_why_its_instances_are_where_they_are(sllm: Run, fake: Any) -> None:
    target = {"target": "demo/square@3", "failures": 0, "retry_in": None, "error": None, "blocked": "no room",
              "panics_for": 42.0, "tokens": 2500, "placement": "node-1: 0.30 s", "instances": [INSTANCE]}  # fmt: skip
    body = {**FUNCTION, "desired": 1, "targets": [target], "starts": [], "moves": [MOVE], "moving": [MOVING],
            "service_time": {"seconds": 0.25, "deviation": 0.05, "seen": 40}, "copies": [
                {"checkpoint": "f", "digest": "d" * 64, "nodes": ["node-0"], "coming": "far", "next": None,
                 "error": ""},
                {"checkpoint": "f:a", "digest": "e" * 64, "nodes": ["node-0"], "coming": None, "next": 20.0,
                 "error": "no room"},
                {"checkpoint": "f:b", "digest": "f" * 64, "nodes": [], "coming": None, "next": None, "error": "gone"},
            ]}  # fmt: skip
    fake.answers["GET /v1/functions/demo/square"] = Answer(body=body)
    code, out, _ = sllm("describe", "demo/square")
    assert code == 0
    for text in ("least estimated start", "disk 2.1 GB/s", "Waits: no room", "wanted now: 1", "first_output=none",
                 "down for 42", "about 2500", "node-1: 0.30 s", "250 ms ± 50 ms in a slot (mean of 40)",
                 "Moving ins-1 on node-0 to ins-2 on node-1", "180 ms", "dddddddddddd on node-0, coming to far",
                 "on node-0, tried again in 20", "no room",
                 "on no node, left alone until a deployment or another node: gone"):  # fmt: skip
        assert text in out


def test_logs_prints_lines_and_passes_its_filters(sllm: Run, fake: Any) -> None:
    records = [
        {"time": 0.5, "app": "demo", "function": "square", "instance": "i-1", "text": f"line {n}"} for n in (1, 2)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    fake.answers["GET /v1/logs"] = Answer(200, lines, "application/x-ndjson")
    code, out, _ = sllm("logs", "demo/square", "-n", "5", "--invocation", INVOCATION)
    assert code == 0
    assert [line.partition("| ")[2] for line in out.splitlines()] == ["line 1", "line 2"]
    query = fake.last().query
    assert (query["app"], query["function"], query["lines"], query["invocation"]) == ("demo", "square", "5", INVOCATION)
    _, out, _ = sllm("logs", "--json")
    assert [json.loads(line) for line in out.splitlines()] == records


def test_logs_follow_prints_events_as_they_come(sllm: Run, fake: Any) -> None:
    fake.answers["GET /v1/logs"] = events(("log", {"time": 0.0, "text": "a"}), ("log", {"time": 0.0, "text": "b"}))
    code, out, _ = sllm("logs", "-f")
    assert code == 0
    assert [line[-1] for line in out.splitlines()] == ["a", "b"]
    assert fake.last().query["follow"] == "1"


# -- doing ---------------------------------------------------------------------------------------------------


def test_invoke_sends_json_and_prints_the_result(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/functions/demo/square"] = Answer(body={"y": [9]})
    code, out, _ = sllm("invoke", "demo/square", '{"x": 3}', "--parameters", '{"n": 1}')
    assert (code, json.loads(out)) == (0, {"y": [9]})
    assert json.loads(fake.last().body) == {"x": 3}
    assert fake.last().query == {"parameters": '{"n": 1}'}


@pytest.mark.parametrize(("more", "printed"), [([], "hello\n"), (["--json"], '"hello"\n')])
def test_text_is_printed_bare_unless_json_is_asked_for(sllm: Run, fake: Any, more: list[str], printed: str) -> None:
    fake.answers["POST /v1/functions/demo/square"] = Answer(body="hello")
    assert sllm("invoke", "demo/square", *more)[1] == printed


def test_invoke_stream_prints_each_output(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/functions/demo/count"] = events(("output", 1), ("output", "two"), ("done", {"seconds": 0.1}))
    code, out, _ = sllm("invoke", "demo/count", "[5]", "--stream")
    assert (code, out) == (0, "1\ntwo\n")
    assert "text/event-stream" in fake.last().headers["Accept"]


def test_a_stream_that_fails_prints_what_came_then_the_error(sllm: Run, fake: Any) -> None:
    failure = {"error": {"code": "worker_lost", "message": "the node is gone", "hint": "Call again."}}
    fake.answers["POST /v1/functions/demo/count"] = events(("output", 1), ("error", failure))
    code, out, err = sllm("invoke", "demo/count", "--stream")
    assert (code, out) == (1, "1\n")
    assert "the node is gone" in err
    assert "Call again." in err


def test_a_stream_cut_before_its_end_is_a_failure(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/functions/demo/count"] = events(("output", 1))
    code, _, err = sllm("invoke", "demo/count", "--stream")
    assert code == 1
    assert "ended without its end" in err


@pytest.mark.parametrize("arguments", ["{", "3", '"x"', "nan"])
def test_arguments_that_are_not_json_are_a_usage_error(sllm: Run, fake: Any, arguments: str) -> None:
    code, _, err = sllm("invoke", "demo/square", arguments)
    assert code == cli.USAGE
    assert repr(arguments) in err
    assert fake.asked == []


def test_the_users_traceback_comes_before_the_error(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/functions/demo/square"] = error(
        500, "function_error", "ValueError: bad", traceback="Traceback …\nValueError: bad"
    )
    code, out, err = sllm("invoke", "demo/square")
    assert (code, out) == (1, "")
    assert err.index("Traceback …") < err.index("Error: ValueError: bad")


def test_rollback_says_what_serves_now(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/apps/demo/rollback"] = Answer(body={"app": "demo", "version": 2, "from": 3})
    assert sllm("rollback", "demo", "--version", "2")[1] == "demo serves version 2 (was 3).\n"
    assert json.loads(fake.last().body) == {"version": 2}


def test_delete_asks_first_and_takes_no_for_an_answer(
    sllm: Run, fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake.answers["DELETE /v1/apps/demo"] = Answer(body={"app": "demo", "deleted": True, "instances": 1})
    (tmp_path / "no").write_text("n\n")
    with (tmp_path / "no").open() as no:
        monkeypatch.setattr(sys, "stdin", no)
        assert sllm("delete", "demo")[0] == cli.INTERRUPTED
    assert "DELETE" not in {asked.method for asked in fake.asked}
    assert sllm("delete", "demo", "--yes")[0] == 0
    assert fake.last().method == "DELETE"


def test_token_create_prints_the_token_alone_on_stdout(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/tokens"] = Answer(body={"name": "ci", "token": "sllm_x", "scopes": ["deploy"], "apps": []})
    code, out, err = sllm("token", "create", "ci", "--scope", "deploy", "--app", "demo", "--expires", "2h")
    assert (code, out) == (0, "sllm_x\n")
    assert "not shown again" in err
    body = json.loads(fake.last().body)
    assert body == {"name": "ci", "scopes": ["deploy"], "apps": ["demo"], "expires_in": 7200.0}


@pytest.mark.parametrize("expires", ["0s", "2", "1w", "-1h", "", "1.5h"])
def test_a_bad_duration_is_a_usage_error(sllm: Run, expires: str) -> None:
    code, _, err = sllm("token", "create", "ci", "--expires", expires)
    assert code == cli.USAGE
    assert "allowed: 90s, 15m, 12h, 30d" in err


@pytest.mark.parametrize("verb", ["cordon", "uncordon", "drain"])
def test_node_verbs_reach_the_node(sllm: Run, fake: Any, verb: str) -> None:
    fake.answers[f"POST /v1/nodes/node-0/{verb}"] = Answer(body=NODE)
    assert sllm("node", verb, "node-0")[0] == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm_faas.cli.node.LOOK", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_drain_waits_until_nothing_is_left_and_asks_again_when_it_was_forgotten(sllm: Run, fake: Any) -> None:
    states = [
        {**NODE, "draining": True, "instances_list": [INSTANCE], "moves": [MOVE], "moving": [MOVING]},
        {**NODE, "draining": False, "instances_list": [INSTANCE], "moves": [], "moving": []},
        {**NODE, "draining": True, "instances_list": [], "moves": [], "moving": []},
    ]
    fake.answers["POST /v1/nodes/node-0/drain"] = Answer(body=NODE)
    fake.answers["GET /v1/nodes/node-0"] = lambda _: Answer(body=states.pop(0))
    code, out, _ = sllm("node", "drain", "node-0", "--wait")
    assert (code, out) == (0, "node-0 drains.\nnode-0 is empty.\n")
    assert sum(asked.path.endswith("/drain") for asked in fake.asked) == 2


@pytest.mark.usefixtures("quick")
def test_a_restart_drains_waits_for_another_life_and_uncordons(sllm: Run, fake: Any) -> None:
    empty = {**NODE, "cordoned": False, "draining": True, "instances_list": [], "moves": [], "moving": [], "life": "a"}
    states = [empty, empty, empty, {**empty, "life": "b", "state": "up"}]
    for verb in ("drain", "restart", "uncordon"):
        fake.answers[f"POST /v1/nodes/node-0/{verb}"] = Answer(body={})
    fake.answers["GET /v1/nodes/node-0"] = lambda _: Answer(body=states.pop(0))
    code, out, _ = sllm("node", "restart", "node-0")
    assert (code, out) == (0, "node-0 is back.\n")
    assert [asked.path.rsplit("/", 1)[1] for asked in fake.asked if asked.method == "POST"] == [
        "drain",
        "restart",
        "uncordon",
    ]


def test_migrate_says_where_it_goes_on(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/invocations/inv-1/migrate"] = Answer(body=MOVE)
    code, out, _ = sllm("migrate", "inv-1", "node-1")
    assert code == 0
    assert "goes on in ins-2 on node-1: moved in 180 ms, paused for 10 ms, 2 rounds, 400 tokens" in out
    assert json.loads(fake.last().body) == {"node": "node-1"}


def test_checkpoint_pull_shows_its_stages_and_result(sllm: Run, fake: Any) -> None:
    fake.answers["POST /v1/checkpoints"] = events(
        ("progress", {"stage": "hash", "done": 1, "total": 2, "text": ""}),
        ("progress", {"stage": "write", "done": 1, "total": 2, "text": ""}),
        ("result", {"name": "m", "digest": "cd" * 32, "bytes": 2048, "node": "node-0"}),
    )
    code, out, err = sllm("checkpoint", "pull", "org/m", "--name", "m")
    assert (code, out) == (0, "Pulled m: 2.0 KiB, cdcdcdcdcdcd.\n")
    assert err == "hash …\nwrite …\n"
    sllm("checkpoint", "pull", "org/m", "--tensor-parallel", "4")
    assert json.loads(fake.last().body)["tensor_parallel"] == 4
    code, _, err = sllm("checkpoint", "pull", "org/m", "--tensor-parallel", "0")
    assert (code, "0 is not in the range 1<=x<=1024" in err) == (2, True)
