"""Log lines: fixed fields in one order, nothing secret, files bounded in size."""

from __future__ import annotations

import io
import json
import logging as stdlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_faas import logging


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root, before, level = stdlib.getLogger(), stdlib.getLogger().handlers[:], stdlib.getLogger().level
    stream = io.StringIO()
    root.handlers[:] = []
    logging.setup("info", stream=stream)
    yield stream
    stdlib.captureWarnings(False)
    stdlib.raiseExceptions = True
    root.handlers[:] = before
    root.setLevel(level)


def parsed(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_fields_come_in_a_fixed_order_and_empty_ones_are_left_out(lines: io.StringIO) -> None:
    log = logging.bind("gateway", node="node-0", app="demo", function="")
    log.info("dispatched", seconds=0.5, invocation="inv-1")
    (line,) = parsed(lines)
    assert list(line) == ["time", "level", "component", "event", "app", "invocation", "node", "seconds"]
    assert (line["level"], line["component"], line["event"], line["app"]) == ("info", "gateway", "dispatched", "demo")
    assert str(line["time"]).endswith("Z")


def test_binding_leaves_the_original_alone(lines: io.StringIO) -> None:
    log = logging.get("invoker")
    log.bind(app="a").info("one")
    log.info("two")
    assert [line.get("app") for line in parsed(lines)] == ["a", None]


def test_lines_below_the_level_are_not_written_but_ready_is(lines: io.StringIO) -> None:
    logging.setup("error", stream=lines)
    log = logging.get("controller")
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    log.ready(port=1)
    assert [line["event"] for line in parsed(lines)] == ["d", "ready"]


@pytest.mark.parametrize("name", ["token", "authorization", "prompt", "messages", "payload", "output", "secrets"])
def test_what_is_secret_by_name_is_hidden(lines: io.StringIO, name: str) -> None:
    logging.get("gateway").info("x", **{name: "very private"}, nested={name: ["very private"]})
    assert "very private" not in lines.getvalue()


@pytest.mark.parametrize(
    "text", ["sllm_" + "a" * 43, "sllmjoin_" + "Qx-_" * 50, "hf_" + "Z" * 30, "Authorization: Bearer abc.def"]
)
def test_what_looks_like_a_token_is_hidden_wherever_it_is(lines: io.StringIO, text: str) -> None:
    logging.get("gateway").info("x", error=f"refused {text}!", items=[f"{text}"])
    stdlib.getLogger("uvicorn").error("it said %s", text)
    assert text not in lines.getvalue()
    assert lines.getvalue().count("(hidden)") == 3


def test_libraries_are_heard_from_warning_on_in_the_same_form(lines: io.StringIO) -> None:
    stdlib.getLogger("uvicorn").info("quiet")
    stdlib.getLogger("uvicorn").warning("loud %d", 3)
    (line,) = parsed(lines)
    assert (line["component"], line["event"], line["text"]) == ("uvicorn", "library", "loud 3")


def test_an_exception_carries_its_traceback_in_one_line(lines: io.StringIO) -> None:
    try:
        raise KeyError("k")
    except KeyError:
        logging.get("store").exception("cannot read", path=Path("/x"))
    (line,) = parsed(lines)
    assert "KeyError: 'k'" in str(line["traceback"])
    assert line["path"] == "/x"


def test_a_very_long_text_loses_its_middle(lines: io.StringIO) -> None:
    logging.get("runner").info("x", text="a" * 100_000 + "end")
    (line,) = parsed(lines)
    assert len(str(line["text"])) < 17_000
    assert str(line["text"]).endswith("end")


def test_a_person_reads_time_component_event_and_pairs() -> None:
    line = {"time": "2026-11-21T10:00:00.123456Z", "level": "warning", "component": "gateway", "event": "link down",
            "node": "node-0", "why": "it is silent", "seconds": 1.23456789}  # fmt: skip
    shown = logging.human_line(line)
    assert shown == '10:00:00.123 gateway      WARNING link down node=node-0 why="it is silent" seconds=1.23457'


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(100, 1000), st.integers(0, 3))
def test_a_rotating_file_keeps_the_newest_lines_whole_and_stays_bounded(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, keep: int
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    file = logging.RotatingFile(folder / "x.jsonl", max_bytes=limit, keep=keep)
    written = [str(number).encode().ljust(size, b".") + b"\n" for number, size in enumerate(sizes)]
    for line in written:
        file.write(line)
    file.close()
    kept = [folder / f"x.jsonl.{number}" for number in range(keep, 0, -1)]
    text = b"".join(path.read_bytes() for path in [*kept, folder / "x.jsonl"] if path.exists())
    assert b"".join(written).endswith(text)
    assert text.endswith(written[-1])
    assert len(list(folder.iterdir())) <= keep + 1
    for path in folder.iterdir():
        assert path.stat().st_size <= max(limit, *map(len, written))


def test_a_rotating_file_goes_on_where_an_earlier_life_stopped(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        file = logging.RotatingFile(tmp_path / "x", max_bytes=100)
        file.write(line)
        file.close()
    assert (tmp_path / "x").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
