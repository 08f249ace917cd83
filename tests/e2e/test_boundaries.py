"""Two of the many ways in which a process can die within a move; `benchmarks/boundaries.py` tries all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.boundaries import Boundary, Scene, scene

pytestmark = pytest.mark.e2e
OFFERED = Boundary("gateway", "receive", "peer", "MOVED", 1)
COMMITTED = Boundary("destination", "receive", "peer", "ACTIVATE", 1)


@pytest.fixture(scope="module")
def here() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="sllm-boundary-") as folder, scene(Path(folder)) as found:
        yield found


@pytest.mark.parametrize(
    ("victim", "boundary", "outcome"),
    [("gateway", OFFERED, "not begun"), ("destination", COMMITTED, "resumed")],
)
def test_whoever_is_killed_within_a_move_the_answer_is_whole_and_nothing_is_left(
    here: Scene, victim: str, boundary: Boundary, outcome: str
) -> None:
    ending = here.play(victim, boundary)
    assert (ending.reached, ending.outcome, ending.wrong) == (True, outcome, ()), ending
