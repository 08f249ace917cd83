"""The tables are total where they must be, and printed where people read them."""

from __future__ import annotations

import pytest

from sllm_faas.controller import state, tables
from sllm_faas.errors import IllegalTransition

REPORTS = ("starting", "ready", "draining", "stopped", "failed")


@pytest.mark.parametrize("table", [tables.VERSION, tables.INSTANCE, tables.NODE, tables.MOVE, tables.COPY])
def test_the_docstring_shows_the_table_that_is_used(table):
    indented = "\n".join("    " + line for line in tables.render(table).splitlines())
    assert indented in (state.__doc__ or "")


@pytest.mark.parametrize("before", ["requested", "starting", "ready", "draining"])
@pytest.mark.parametrize("report", REPORTS)
def test_every_report_of_a_known_instance_is_legal(before, report):
    """Reports come late, twice and in any order, so none may be an error."""
    after = tables.move(tables.INSTANCE, "instance i", before, report)
    assert after in (*tables.LIVE, "draining", "stopped", "failed")


def test_a_draining_instance_never_comes_back():
    """Only an end leads out of draining."""
    assert {after for (before, _), after in tables.INSTANCE.items() if before == "draining"} == {
        "draining",
        "stopped",
        "failed",
        "lost",
    }


def test_an_illegal_move_names_the_event_the_state_and_what_is_possible():
    with pytest.raises(IllegalTransition, match=r"version a@1 is failed: event 'activated' is not possible"):
        tables.move(tables.VERSION, "version a@1", "failed", "activated")
    with pytest.raises(IllegalTransition, match="possible: bye, expire, hello"):
        tables.move(tables.NODE, "node n", "lost", "silent")
