"""Exceptions cross as their own type where it can be had, and never as more than data."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from sllm_faas.errors import ErrorInfo, FunctionError, QueueFull, RemoteError, WorkerLost, to_info
from sllm_faas.wire.exceptions import MAX_TRACEBACK, exception_to_info, format_traceback, info_to_exception


class Custom(Exception):
    """Its arguments are not those of its constructor."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"failed with {code}")
        self.code = code
        self.reason = reason


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def back(error: BaseException) -> Exception:
    return info_to_exception(exception_to_info(raised(error)))


@pytest.mark.parametrize(
    "error", [ValueError("bad", 3), KeyError("k"), ZeroDivisionError(), OSError(2, "no such file", "x")]
)
def test_a_builtin_is_raised_as_itself_with_its_arguments(error: Exception) -> None:
    again = back(error)
    assert type(again) is type(error)
    assert again.args == error.args


def test_an_exception_of_another_constructor_keeps_its_attributes() -> None:
    again = back(Custom(7, reason="tired"))
    assert isinstance(again, Custom)
    assert (again.code, again.reason, str(again)) == (7, "tired", "failed with 7")


def test_a_library_exception_is_rebuilt_from_arguments_and_attributes() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    again = info_to_exception(exception_to_info(caught.value))
    assert isinstance(again, json.JSONDecodeError)
    assert again.pos == caught.value.pos


def test_the_remote_traceback_is_attached_as_note_and_attribute() -> None:
    again: Any = back(ValueError("bad"))
    assert "raise error" in again.remote_traceback
    assert again.__notes__[0].startswith("Remote traceback:\n")


def test_a_type_that_is_not_here_becomes_a_remote_error_that_names_it() -> None:
    info = ErrorInfo("function_error", "Strange: odd", type="no_such_module_x:Strange", args=b"\x92\x90\x80")
    again = info_to_exception(info)
    assert isinstance(again, RemoteError)
    assert (again.type_name, again.message) == ("no_such_module_x:Strange", "Strange: odd")
    assert "no_such_module_x" not in sys.modules


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_would_end_the_caller_becomes_a_remote_error(error: BaseException) -> None:
    assert isinstance(back(error), RemoteError)


@pytest.mark.parametrize("name", ["os:system", "builtins:eval", "builtins:int", "subprocess:Popen", "sys:modules"])
def test_only_exception_types_are_built(name: str) -> None:
    from sllm_faas.wire.payload import encode

    info = ErrorInfo("function_error", "x", type=name, args=encode([["true"], {}]))
    assert isinstance(info_to_exception(info), RemoteError)


def test_arguments_that_cannot_be_sent_leave_the_message() -> None:
    again = back(ValueError(object()))
    assert isinstance(again, RemoteError)
    assert again.message.startswith("ValueError: <object object")


def test_attributes_that_cannot_be_sent_are_left_out() -> None:
    error = Custom(1, reason="r")
    error.handle = object()  # type: ignore[attr-defined]
    again = back(error)
    assert isinstance(again, Custom)
    assert not hasattr(again, "handle")


def test_an_exception_that_cannot_be_printed_still_crosses() -> None:
    assert exception_to_info(raised(Unprintable("x"))).message == "Unprintable"


def test_the_message_is_one_line_of_bounded_length() -> None:
    assert exception_to_info(ValueError("first\nsecond")).message == "ValueError: first"
    assert len(exception_to_info(ValueError("x" * 10**6)).message) <= 2000


def test_an_error_of_our_own_tree_raised_by_user_code_is_a_function_error() -> None:
    info = exception_to_info(raised(QueueFull("full", retry_after=3.0)))
    assert (info.code, info.status) == ("function_error", 500)
    again = info_to_exception(info)
    assert isinstance(again, QueueFull)
    assert again.retry_after == 3.0


def test_an_error_of_the_platform_is_that_error() -> None:
    again = info_to_exception(to_info(WorkerLost("gone", hint="again")))
    assert type(again) is WorkerLost
    assert isinstance(info_to_exception(to_info(FunctionError("x"))), FunctionError)


def test_damaged_arguments_leave_a_remote_error() -> None:
    for args in (b"\xc1", b"\x01", b"\x93\x01\x02\x03", b"\x92\x01\x80", b""):
        assert isinstance(
            info_to_exception(ErrorInfo("function_error", "m", type="builtins:ValueError", args=args)), RemoteError
        )


def test_the_traceback_begins_at_the_users_code(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("def inner():\n    raise ValueError('x')\n\ndef outer():\n    inner()\n")
    space: dict[str, Any] = {"__name__": "mine"}
    exec(compile((tmp_path / "mine.py").read_text(), str(tmp_path / "mine.py"), "exec"), space)
    platform: dict[str, Any] = {"__name__": "sllm_invoker.runner.call"}
    exec("def call(function):\n    function()\n", platform)
    with pytest.raises(ValueError, match="x") as caught:
        platform["call"](space["outer"])
    tb = caught.value.__traceback__
    text = format_traceback(caught.value.with_traceback(tb.tb_next if tb else None), str(tmp_path))
    assert text.splitlines()[1] == '  File "mine.py", line 5, in outer'
    assert "in call" not in text


def test_causes_are_kept_and_the_whole_is_bounded() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as cause:
            raise ValueError("second") from cause
    except ValueError as error:
        text = format_traceback(error)
    assert "KeyError: 'first'" in text
    assert "direct cause" in text
    assert len(format_traceback(ValueError("x" * 10**6))) <= MAX_TRACEBACK + 2
