"""The life of an instance's process: start, failed start, import check, drain, death."""

from __future__ import annotations

from pathlib import Path

import pytest
from sllm_invoker.runner.config import InstanceConfig
from sllm_invoker.runner.link import BROKEN, ORPHANED

from sllm_faas.spec import FunctionSpec, MethodSpec, Target
from sllm_faas.wire.header import Type
from tests.runner.harness import APPS, LIMIT, specs, start, started


def handwritten(name: str) -> FunctionSpec:
    return FunctionSpec(name, "function", "app", name, methods=(MethodSpec(name),))


def broken(directory: Path, source: str, name: str = "f") -> dict[str, object]:
    (directory / "src").mkdir()
    (directory / "src" / "app.py").write_text(source)
    return {"source": directory / "src", "spec": handwritten(name)}


# -- starting --------------------------------------------------------------------------------------------------


def test_hello_comes_first_and_ready_carries_the_timeline(short_path: Path) -> None:
    with start("echo", short_path) as r:
        ready = r.ready()
        hello = r.control[0]
        assert (hello.header.type, hello.body.role, hello.body.name) == (Type.HELLO, "container", "i-1")
        assert hello.body.pid == r.process.pid
        assert [span.name for span in ready.body.timeline.spans] == ["import", "enter"]


def test_hooks_run_in_order_around_the_calls_and_a_failing_exit_hook_stops_no_other(short_path: Path) -> None:
    with start("Hooks", short_path, target=Target("test", "Hooks", 1, '{"language":"de"}')) as r:
        r.ready()
        assert r.call(method="show") == ["enter base", "enter async", ("de", 1)]
        r.shutdown()
        r.expect(Type.BYE)
        texts = [record.text for record in r.logs if record.text.startswith("exit")]
        assert texts == ["exit sync", "exit async"]
        assert any("Shortage" in record.text for record in r.logs)
        assert r.process.wait(LIMIT) == 0


def test_secrets_and_environment_are_there_before_the_import(short_path: Path) -> None:
    source = "import os, sllm\napp = sllm.App('t')\nKEY = os.environ['KEY']\n@app.function\ndef f():\n    return KEY\n"
    with start("f", short_path, **broken(short_path, source), env={"KEY": "value"}) as r:
        r.ready()
        assert r.call() == "value"


@pytest.mark.parametrize(
    ("source", "message", "hint", "traceback"),
    [
        ("import nosuchthing", "nosuchthing", "pip install nosuchthing", 'File "app.py", line 1'),
        ("import app.missing", "app.missing", "part of the bundle", 'File "app.py", line 1'),
        ("def f(:", "SyntaxError", "", "def f(:"),
        ("raise RuntimeError('not today')", "RuntimeError: not today", "", 'File "app.py", line 1'),
        ("raise SystemExit(3)", "SystemExit", "", 'File "app.py", line 1'),
        ("import sllm", "app:f is not there", "@app.function", ""),
        ("def f(): pass", "not a decorated function", "@app.function", ""),
    ],
)
def test_an_app_that_does_not_import_says_what_to_do(
    short_path: Path, source: str, message: str, hint: str, traceback: str
) -> None:
    with start("f", short_path, **broken(short_path, source)) as r:
        error = r.start_error()
        assert error.code == "import_failed"
        assert message in error.message
        assert hint in error.hint
        assert traceback in error.traceback
        assert "sllm_invoker" not in error.traceback
        assert r.process.wait(LIMIT) == 1


def test_an_enter_hook_that_raises_fails_the_start_with_its_traceback(short_path: Path) -> None:
    with start("BadEnter", short_path) as r:
        error = r.start_error()
        assert (error.code, error.status) == ("start_failed", 503)
        assert "Shortage" in error.message
        assert "prepare" in error.traceback
        assert r.process.wait(LIMIT) == 1


def test_wrong_parameters_fail_the_start(short_path: Path) -> None:
    with start("Hooks", short_path, target=Target("test", "Hooks", 1, '{"size":"big"}')) as r:
        assert "size" in r.start_error().message


def test_what_is_printed_while_importing_is_logged_outside_of_any_invocation(short_path: Path) -> None:
    source = "import sllm\nprint('importing')\napp = sllm.App('t')\n@app.function\ndef f():\n    return 1\n"
    with start("f", short_path, **broken(short_path, source)) as r:
        r.ready()
        assert r.wait_log("importing").invocation == ""


# -- checking --------------------------------------------------------------------------------------------------


def check(directory: Path, source: Path, names: list[FunctionSpec]) -> InstanceConfig:
    return InstanceConfig(
        "check-1",
        Target("test", "echo", 1),
        tuple(names),
        mode="check",
        source_dir=str(source),
    )


def test_a_check_imports_looks_up_and_leaves(short_path: Path) -> None:
    with started(check(short_path, APPS, list(specs().values())), short_path) as r:
        r.ready()
        r.expect(Type.BYE)
        assert r.process.wait(LIMIT) == 0


def test_a_check_fails_on_a_function_that_is_not_there(short_path: Path) -> None:
    with started(check(short_path, APPS, [specs()["echo"], handwritten("gone")]), short_path) as r:
        assert "app:gone is not there" in r.start_error().message
        assert r.process.wait(LIMIT) == 1


# -- ending ----------------------------------------------------------------------------------------------------


def test_shutdown_waits_for_what_runs(short_path: Path) -> None:
    with start("Loop", short_path) as r:
        r.ready()
        call = r.invoke(method="wait_for_opening")
        r.wait_log("waiting", call)
        r.shutdown()
        r.call(method="unlock")
        assert r.result(call) == "open"
        r.expect(Type.BYE)
        assert r.process.wait(LIMIT) == 0


def test_shutdown_with_a_limit_cancels_what_runs_longer(short_path: Path) -> None:
    with start("One", short_path) as r:
        r.ready()
        call = r.invoke(method="sleep")
        r.wait_log("asleep", call)
        r.shutdown(drain=0.01)
        assert r.end(call).header.type is Type.CANCELLED
        r.expect(Type.BYE)
        assert r.process.wait(LIMIT) == 0


def test_an_instance_with_threads_drains_too(short_path: Path) -> None:
    with start("Many", short_path) as r:
        r.ready()
        call = r.invoke(10**6, method="count", credit=1)
        r.wait_outputs(call, 1)
        r.shutdown(drain=0.01)
        assert r.end(call).header.type is Type.CANCELLED
        assert r.process.wait(LIMIT) == 0


def test_shutdown_before_ready_ends_the_process(short_path: Path) -> None:
    source = "import sllm, threading\nprint('importing')\nthreading.Event().wait()\n"
    with start("f", short_path, **broken(short_path, source)) as r:
        r.wait_log("importing")
        r.shutdown()
        assert r.process.wait(LIMIT) == 0


def test_code_that_exits_the_process_takes_the_instance_with_it(short_path: Path) -> None:
    with start("One", short_path) as r:
        r.ready()
        r.invoke(method="die")
        assert r.process.wait(LIMIT) == 9


@pytest.mark.parametrize("method", ["sleep", "spin"])
def test_the_process_ends_when_its_link_does(short_path: Path, method: str) -> None:
    """The invoker was killed: whatever user code is doing."""
    with start("One", short_path) as r:
        r.ready()
        call = r.invoke(method=method)
        r.wait(lambda: any(record.invocation == call.hex() for record in r.logs))
        r.socket.close()
        assert r.process.wait(LIMIT) == ORPHANED


def test_an_asynchronous_instance_ends_when_its_link_does(short_path: Path) -> None:
    with start("Loop", short_path) as r:
        r.ready()
        r.socket.close()
        assert r.process.wait(LIMIT) == ORPHANED


def test_an_instance_ends_when_what_it_is_sent_is_no_message(short_path: Path) -> None:
    with start("Loop", short_path) as r:
        r.ready()
        r.socket.sendall(b"\xff" * 8)
        assert r.process.wait(LIMIT) == BROKEN
