"""Checkpoints under kills, rot and full or failing disks. `benchmarks.faults` runs the same in full."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sllm_invoker.checkpoints.remote import TRUSTED

from tests.checkpoints.faults import flip_bytes, kill_ingests, kill_loads, live_histories
from tests.checkpoints.forks import Forks
from tests.checkpoints.model_server import serving

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRUSTED, "127.0.0.1")  # for the pulls
        made = Forks()
    yield made
    made.close()


async def test_an_ingest_killed_anywhere_shows_nothing_partial_and_is_finished_by_the_next(forks, source, tmp_path):
    tally = await kill_ingests(forks, source, tmp_path / "killed", 5)
    assert (tally.kills, tally.partial, tally.unfinished) == (5, 0, 0)


async def test_an_ingest_in_parts_killed_anywhere_shows_nothing_partial_and_is_finished_by_the_next(
    forks, source, tmp_path
):
    tally = await kill_ingests(forks, source, tmp_path / "killed", 5, ranks=2)
    assert (tally.kills, tally.partial, tally.unfinished) == (5, 0, 0)


async def test_a_pull_killed_anywhere_goes_on_with_what_it_had(forks, source, tmp_path):
    with serving(source) as server:
        tally = await kill_ingests(forks, server.url, tmp_path / "killed", 4)
        asked = server.weights_asked()
    assert (tally.kills, tally.partial, tally.unfinished) == (4, 0, 0)
    assert list((tmp_path / "killed/downloads").iterdir()) == []
    assert 1 <= asked.count("") <= 9, "every round from the beginning at most twice"


async def test_a_load_killed_on_either_side_is_whole_the_next_time_and_leaks_no_lease(forks, tmp_path):
    tally = await kill_loads(forks, tmp_path, 4)
    assert (tally.wrong, tally.errors, tally.leaked) == (0, 0, 0)
    assert tally.readers > 4


async def test_a_flipped_byte_in_any_file_is_refused_before_a_token_and_harms_no_other(forks, filled, tmp_path):
    filled.set_ref("model", filled.resolve("tiny"))
    tally = await flip_bytes(forks, filled, tmp_path, 32)
    assert (tally.flips, tally.served, tally.harmed, tally.leaked) == (32, 0, 0, 0)


async def test_no_life_of_real_processes_lets_a_reader_see_other_bytes(forks, tmp_path):
    tally = await live_histories(forks, tmp_path, 6)
    assert (tally.wrong, tally.errors, tally.leaked) == (0, 0, 0)
    assert tally.kills > 4
    assert tally.readers > 10
