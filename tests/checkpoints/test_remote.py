"""Models behind URLs: resumed, hashed as they come, and nothing but public addresses unless the operator says so."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from sllm_invoker.checkpoints import remote as remote_module
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.checkpoints.remote import open_remote

from sllm_faas.errors import BadSpec, CheckpointCorrupt, CheckpointIncomplete, CheckpointUnavailable, StorageFull
from tests.checkpoints.model_server import WEIGHTS, Handler, Server, serving


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(remote_module.TRUSTED, "127.0.0.1")
    monkeypatch.setattr(remote_module, "PAUSES", (0.0, 0.0, 0.0))
    with serving(source) as made:
        yield made


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("obstore")
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{server.address}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_module, "_PIECE", 1)  # whatever has come is handed on
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


def test_content_that_changes_meanwhile_is_not_mixed(store, server, source, url, monkeypatch):
    server.cut, answer, path = 40_000, Handler._answer, source / WEIGHTS
    content = path.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])

    def change(self, wanted):
        if wanted:
            path.write_bytes(changed)
        answer(self, wanted)

    monkeypatch.setattr(Handler, "_answer", change)
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
