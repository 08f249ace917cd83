"""Models behind URLs: resumed, hashed as they come, and nothing but public addresses unless the operator says so."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from sllm_invoker.checkpoints import fetch as fetch_module
from sllm_invoker.checkpoints import remote as remote_module
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.remote import Entry, look, open_remote

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete, CheckpointUnavailable, StorageFull
from tests.checkpoints.model_server import WEIGHTS, Handler, Server, serving


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(remote_module.TRUSTED, "127.0.0.1")
    monkeypatch.setattr(fetch_module, "PAUSES", (0.0, 0.0, 0.0))
    with serving(source) as made:
        yield made


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("obstore")
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{server.address}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_module, "_CHUNK", 1)  # whatever has come is handed on
    return "s3://bucket/model"


@pytest.fixture(params=["https", "s3"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    """The same folder both ways."""
    return server.url if request.param == "https" else request.getfixturevalue("s3")


def downloads(store):
    folder = store.root / "downloads"
    return list(folder.iterdir()) if folder.exists() else []


def test_a_folder_behind_a_url_is_the_object_that_the_directory_is(store, source, url):
    there, stages = ingest(store, str(source), "local"), []
    again = ingest(store, url, "far", progress=lambda done, total, stage: stages.append((stage, done, total)))
    assert again.digest == there.digest
    fetched = [(done, total) for stage, done, total in stages if stage == "fetch"]
    assert fetched == sorted(fetched)
    assert fetched[-1][0] == fetched[-1][1]
    assert downloads(store) == [], "the object has the bytes"


def test_an_unchanged_source_is_recognised_without_fetching_it(store, server, url):
    ingest(store, url, "one")
    server.asked.clear()
    assert ingest(store, url, "two").known
    assert server.weights_asked() == []


def test_a_broken_off_fetch_goes_on_where_it_ended(store, server, source, url):
    server.cut = 50_000
    assert ingest(store, url, "far").digest == ingest(store, str(source), "local").digest
    size = (source / WEIGHTS).stat().st_size
    wanted = server.weights_asked()
    assert wanted[0] == ""
    assert all(re.match(r"bytes=\d+-", each) for each in wanted[1:])
    assert len(wanted) == -(-size // 50_000)


def test_an_answer_that_always_ends_early_is_an_error_and_the_next_pull_goes_on(store, server, monkeypatch):
    server.cut, answer = 30_000, Handler._answer
    monkeypatch.setattr(Handler, "_answer", lambda self, wanted: answer(self, wanted) if not wanted else self.close())
    monkeypatch.setattr(Handler, "close", lambda self: setattr(self, "close_connection", True), raising=False)
    with pytest.raises((CheckpointIncomplete, CheckpointUnavailable), match=r"broke off after 30000|cannot be reached"):
        ingest(store, server.url, "far")
    assert not list((store.root / "objects").iterdir())
    server.cut = 0
    monkeypatch.setattr(Handler, "_answer", answer)
    ingest(store, server.url, "far")
    assert server.weights_asked()[-1] == "bytes=30000-"


def test_a_server_without_ranges_is_asked_for_the_whole_again(store, server, source):
    server.ranges, server.cut = False, 0
    ingest(store, server.url, "far")
    server.tags = False
    before = len(server.weights_asked())
    assert ingest(store, server.url, "again").known, "by content"
    assert len(server.weights_asked()) == before + 1, "without tags nothing else tells"


def test_a_bucket_whose_answer_ends_early_and_then_refuses_is_an_error_and_the_next_pull_goes_on(store, server, s3):
    server.cut, server.refuses = 30_000, True
    with pytest.raises(CheckpointUnavailable, match="cannot be read"):
        ingest(store, s3, "far")
    assert not list((store.root / "objects").iterdir())
    server.cut, server.refuses = 0, False
    ingest(store, s3, "far")
    assert server.weights_asked()[-1] == "bytes=30000-"


@pytest.mark.parametrize(
    ("off", "error", "message"),
    [
        (-1000, CheckpointIncomplete, "gave more than its"),
        (1000, CheckpointUnavailable, r"another range than was asked for|cannot be read"),
    ],
)
def test_a_size_that_is_not_the_contents_is_an_error(store, server, source, url, off, error, message):
    """The one that was told beforehand; the answer is whole in itself."""
    server.claim = (source / WEIGHTS).stat().st_size + off
    with pytest.raises(error, match=message):
        ingest(store, url, "far")
    assert not list((store.root / "objects").iterdir())


def test_a_bucket_that_ignores_ranges_is_an_error_and_nothing_is_mixed(store, server, s3):
    server.cut, server.ranges = 40_000, False
    with pytest.raises(CheckpointUnavailable, match="cannot be read"):
        ingest(store, s3, "far")
    assert not list((store.root / "objects").iterdir())


@pytest.fixture
def changing(source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bytes]:
    """From the first range of the weights on that is not `but`, other bytes are served than those it returns."""

    def begin(but: str = "") -> bytes:
        answer, path = Handler._answer, source / WEIGHTS
        content = path.read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1])

        def change(self, wanted):
            if wanted and wanted != but:
                path.write_bytes(changed)
            answer(self, wanted)

        monkeypatch.setattr(Handler, "_answer", change)
        return content

    return begin


def test_content_that_changes_meanwhile_is_not_mixed(store, server, url, changing):
    server.cut = 40_000
    changing()
    with pytest.raises(CheckpointUnavailable, match=r"changed|cannot be read"):
        ingest(store, url, "far")
    assert not list((store.root / "objects").iterdir())


def test_a_wrong_digest_is_refused_and_the_right_one_is_not(store, server, source, url):
    with pytest.raises(CheckpointCorrupt, match="was asked for") as caught:
        ingest(store, url, "far", revision=f"blake3:{'0' * 64}")
    assert not list((store.root / "objects").iterdir())
    assert downloads(store) == []
    found = re.search(r"content (blake3:[0-9a-f]{64})", str(caught.value))
    assert found
    ingest(store, url, "far", revision=found[1])


def test_a_full_disk_is_said_before_anything_is_fetched(store, server, monkeypatch):
    usage = shutil.disk_usage(store.root)._replace(total=1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageFull, match="990 are free"):
        ingest(store, server.url, "far")
    assert server.weights_asked() == []


# -- in pieces -----------------------------------------------------------------------------------------------

PIECE = 16_000


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch, source: Path) -> list[str]:
    """The ranges of the weights when pieces are small."""
    monkeypatch.setattr(fetch_module, "PIECE", PIECE)
    size = (source / WEIGHTS).stat().st_size
    assert size > 8 * PIECE
    ends = [min(start + PIECE, size) - 1 for start in range(0, size, PIECE)]
    last = len(ends) - 1
    return [f"bytes={number * PIECE}-{'' if number == last else end}" for number, end in enumerate(ends)]


def test_a_large_file_comes_in_pieces_over_several_connections(store, server, source, url, pieces):
    assert ingest(store, url, "far").digest == ingest(store, str(source), "local").digest
    wanted = server.weights_asked()
    assert sorted(wanted) == sorted(pieces)
    assert wanted[0] == pieces[0], "it decides"


def test_pieces_that_break_off_go_on_where_they_ended(store, server, source, url, pieces):
    server.cut = 10_000
    assert ingest(store, url, "far").digest == ingest(store, str(source), "local").digest
    starts = sorted(int(each.removeprefix("bytes=").partition("-")[0]) for each in server.weights_asked())
    size = (source / WEIGHTS).stat().st_size
    firsts = range(0, size, PIECE)
    assert starts == sorted([*firsts, *(start + 10_000 for start in firsts if start + 10_000 < size)])


@pytest.mark.parametrize("tags", [True, False])
def test_a_server_without_ranges_or_tags_is_read_in_one_stream(store, server, source, pieces, tags):
    server.ranges, server.tags = not tags, tags
    assert ingest(store, server.url, "far").digest == ingest(store, str(source), "local").digest
    assert server.weights_asked() == [pieces[0] if tags else ""]


def test_one_stream_that_breaks_off_begins_anew_and_its_progress_does_not_go_back(
    store, server, source, pieces, monkeypatch
):
    server.ranges, server.cut, answer, told = False, 30_000, Handler._answer, []

    def more_each_time(self, wanted):
        if self.command == "GET" and wanted:
            server.cut += 30_000
        answer(self, wanted)

    monkeypatch.setattr(Handler, "_answer", more_each_time)
    progress = lambda done, _total, stage: told.append(done) if stage == "fetch" else None  # noqa: E731
    again = ingest(store, server.url, "far", progress=progress)
    assert again.digest == ingest(store, str(source), "local").digest
    assert len(server.weights_asked()) > 2
    assert told == sorted(told)


def test_pieces_of_content_that_changes_meanwhile_are_not_mixed(store, server, url, pieces, changing):
    content = changing(pieces[0])
    with pytest.raises(CheckpointUnavailable, match=r"changed|cannot be read"):
        ingest(store, url, "far")
    assert not list((store.root / "objects").iterdir())
    for left in (store.root / "downloads").glob(f"*/{WEIGHTS}"):
        assert content.startswith(left.read_bytes())


def test_another_piece_than_was_asked_for_is_refused(store, server, source, url, pieces):
    server.shift = 1
    with pytest.raises(CheckpointUnavailable, match=r"another range than was asked for|cannot be read"):
        ingest(store, url, "far")
    assert not list((store.root / "objects").iterdir())


def test_a_connection_that_was_closed_between_two_pieces_is_made_again(store, server, source, pieces):
    server.hangs_up = True
    ingest(store, server.url, "far")
    assert sorted(server.weights_asked()) == sorted(pieces)


def test_a_server_that_is_busy_is_asked_again(store, server, source, pieces):
    server.busy = 2
    ingest(store, server.url, "far")
    assert set(server.weights_asked()) == set(pieces)
    assert len(server.weights_asked()) == len(pieces) + 2


def test_a_disk_that_fills_up_meanwhile_is_said_and_the_next_pull_goes_on(store, server, monkeypatch, pieces):
    write, written = fetch_module._write, []

    def full(file, data):
        written.append(len(data))
        if sum(written) > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(fetch_module, "_write", full)
    with pytest.raises(StorageFull, match="no space left"):
        ingest(store, server.url, "far")
    (left,) = (store.root / "downloads").glob(f"*/{WEIGHTS}")
    size = left.stat().st_size
    monkeypatch.setattr(fetch_module, "_write", write)
    server.asked.clear()
    ingest(store, server.url, "far")
    # What connections of the first one had asked for may be seen late; it is behind what was written.
    assert min(int(each.removeprefix("bytes=").partition("-")[0]) for each in server.weights_asked()) == size


# -- names ---------------------------------------------------------------------------------------------------


class Names:
    """A source of every second name that is asked for, when so many are asked for at once."""

    url = "https://models.example/m"

    def __init__(self, at_once: int) -> None:
        self.all_here = threading.Barrier(at_once, timeout=30)

    def connect(self):
        return contextlib.nullcontext(self)

    def find(self, name: str) -> Entry | None:
        self.all_here.wait()
        if name.startswith("unreachable"):
            raise CheckpointUnavailable(f"{name}.")
        return Entry(name, 1, "") if int(name) % 2 else None


def test_names_are_asked_for_at_the_same_time_and_told_in_their_order():
    names = [str(number) for number in range(8, 0, -1)]
    assert [entry.name for entry in look(Names(8), names)] == ["7", "5", "3", "1"]


def test_the_first_name_that_cannot_be_asked_for_is_the_error():
    with pytest.raises(CheckpointUnavailable, match="unreachable 1"):
        look(Names(4), ["3", "unreachable 1", "unreachable 2", "4"])


# -- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::1", "fd00::1",
                "::ffff:127.0.0.1", "fe80::1%eth0", "100.64.0.1", "224.0.0.1"]
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(store, monkeypatch, address):
    monkeypatch.delenv(remote_module.TRUSTED, raising=False)
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(kind, socket.SOCK_STREAM, 6, "", (address, 443))])
    with pytest.raises(BadSpec, match="not public"):
        ingest(store, "https://inside.example/model", "far")


def test_a_redirect_to_an_address_that_is_not_public_is_refused(store, server, monkeypatch):
    server.redirect = "https://10.0.0.1/secrets"
    with pytest.raises(BadSpec, match="not public"):
        ingest(store, server.url, "far")
    server.redirect = f"http://localhost:{server.server_address[1]}/bucket/model/config.json"
    with pytest.raises(BadSpec, match="not https"):
        ingest(store, server.url, "far")
    server.redirect = server.url
    with pytest.raises(CheckpointUnavailable, match="redirects more than"):
        ingest(store, server.url, "far")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://models.example/m", "not https"),
        ("file:///etc", "not supported"),
        ("https://user:secret@models.example/m", "no user, password"),
        ("https://models.example/m?token=secret", "no user, password"),
        ("ftp://models.example/m", "not supported"),
    ],
)
def test_what_may_not_be_named_is_refused_without_repeating_secrets(store, url, message):
    with pytest.raises(BadSpec, match=message) as caught:
        ingest(store, url, "far")
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(store, server, source):
    (source / "config.json").unlink()
    with pytest.raises(BadSpec, match=r"no config\.json"):
        ingest(store, server.url, "far")


def test_a_revision_of_a_url_is_a_digest(store, server):
    with pytest.raises(BadSpec, match="allowed: blake3"):
        ingest(store, server.url, "far", revision="main")


def test_a_host_that_cannot_be_reached_is_unavailable(store, monkeypatch):
    monkeypatch.setenv(remote_module.TRUSTED, "127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(CheckpointUnavailable, match="cannot be reached"):
        ingest(store, f"http://127.0.0.1:{port}/model", "far")


def test_s3_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(BadSpec) as caught:
        open_remote("s3://bucket/model")
    assert "sllm-faas[s3]" in caught.value.hint


# -- TLS -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
    """What that authority signs is believed here."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    monkeypatch.setattr(remote_module, "_tls", lambda: context)


@contextlib.contextmanager
def certified(source: Path, authority: trustme.CA, name: str) -> Iterator[Server]:
    """A server whose certificate is for that name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    with serving(source, context) as made:
        yield made


@pytest.mark.usefixtures("trusting")
def test_pieces_come_over_tls(store, source, authority, monkeypatch):
    monkeypatch.setenv(remote_module.TRUSTED, "127.0.0.1")
    monkeypatch.setattr(fetch_module, "PIECE", PIECE)
    with certified(source, authority, "127.0.0.1") as server:
        far = ingest(store, server.url, "far")
        assert len(server.weights_asked()) > 1
    assert far.digest == ingest(store, str(source), "local").digest


def test_a_certificate_that_nobody_vouches_for_is_refused(store, source, authority, monkeypatch):
    monkeypatch.setenv(remote_module.TRUSTED, "127.0.0.1")
    with certified(source, authority, "127.0.0.1") as server:
        with pytest.raises(CheckpointUnavailable, match="certificate verify failed"):
            ingest(store, server.url, "far")
        assert server.asked == []


@pytest.mark.usefixtures("trusting")
def test_a_certificate_for_another_host_is_refused(store, source, authority, monkeypatch):
    monkeypatch.setenv(remote_module.TRUSTED, "127.0.0.1")
    with certified(source, authority, "models.example") as server:
        with pytest.raises(CheckpointUnavailable, match=r"certificate is not valid for '127\.0\.0\.1'"):
            ingest(store, server.url, "far")
        assert server.asked == []
