"""Models behind https:// and s3://: which files there are, and fetching them so that nothing is fetched twice.

    listing = look(remote, names)           names, sizes and tags; nothing is downloaded
    sums = fetch(remote, listing, folder)   files, hashed as they are written; what a killed fetch left is gone on with

A source is a folder that holds what a model directory holds; names are asked for, no listing is needed. A part is gone
on with by a range request under the tag (ETag) it was begun with: a file that changed meanwhile is begun anew. An
answer that ends early is asked again from there; one that ends there again and again is an error.

Covered: what a caller may name. https only, and no address that is not public — checked on the address that is
connected to, on every redirect. `SLLM_TRUSTED_SOURCES` (hosts, comma separated) are exempt: there http and private
addresses will do. Where s3:// leads is the operator's to say (`AWS_*`), buckets are the caller's. Not covered: a public
host that answers slowly for ever.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urljoin, urlsplit

import blake3
import httpcore

from sllm_faas.errors import BadSpec, CheckpointIncomplete, CheckpointUnavailable
from sllm_invoker.checkpoints.object import Progress, chunks_of, file_digest, first_line

TRUSTED = "SLLM_TRUSTED_SOURCES"
PAUSES = (0.5, 2.0, 5.0)
"""Seconds before an answer that brought nothing new is asked for again."""
_TIMEOUT = {"connect": 20.0, "read": 60.0, "write": 20.0, "pool": 20.0}
_REDIRECTS = 5
_RANGE = re.compile(rb"bytes (\d+)-\d+/(\d+)")
_SMALL = 64 * 1024 * 1024
_PIECE = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source. `tag` changes with its content; empty where the server gives none."""

    name: str
    bytes: int
    tag: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The content of a file from byte `start` on."""

    start: int
    chunks: Iterator[bytes]


class Remote(Protocol):
    url: str

    def find(self, name: str) -> Entry | None:
        """None where there is no such file. Raises CheckpointUnavailable, BadSpec."""

    def open(self, entry: Entry, start: int) -> contextlib.AbstractContextManager[Answer]:
        """From byte `start` on, or from 0 where the server cannot. Chunks raise ConnectionError when the answer breaks
        off. Raises CheckpointUnavailable, also when the content is not that of the entry's tag any more."""


def open_remote(url: str) -> Remote:
    """Raises BadSpec for what is none, or may not be named."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadSpec("a source URL has no user, password, query or fragment.", param="source")
    if parts.scheme == "s3" and parts.netloc:
        return _S3(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        return _Https(url)
    raise BadSpec(
        f"{parts.scheme}:// sources are not supported; supported: https:// and s3://.",
        hint="Give a URL of a folder, a local directory or a Hugging Face repo id (owner/name).",
        param="source",
    )


def look(remote: Remote, names: Iterable[str]) -> tuple[Entry, ...]:
    """Those of `names` that there are. Raises CheckpointUnavailable."""
    return tuple(entry for name in names if (entry := remote.find(name)) is not None)


def read_small(remote: Remote, entry: Entry) -> bytes:
    """The content of a small file: an index, say. Raises CheckpointUnavailable, CheckpointIncomplete."""
    if entry.bytes > _SMALL:
        raise BadSpec(f"{remote.url}/{entry.name} has {entry.bytes} bytes; allowed: {_SMALL}.", param="source")
    try:
        with remote.open(entry, 0) as answer:
            content = b"".join(answer.chunks)
    except ConnectionError as error:
        raise CheckpointUnavailable(f"{remote.url}/{entry.name} cannot be read: {error}.") from error
    if len(content) != entry.bytes:
        raise CheckpointIncomplete(f"{remote.url}/{entry.name} ended after {len(content)} of {entry.bytes} bytes.")
    return content


def fetch(remote: Remote, listing: tuple[Entry, ...], folder: Path, report: Progress) -> dict[str, str]:
    """Have the files in `folder`, which is for this listing alone; name → blake3. There is room for them (`room`).

    Raises CheckpointUnavailable, CheckpointIncomplete."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(entry.bytes for entry in listing)
    sums, before = {}, 0
    for entry in listing:
        sums[entry.name] = _fetch(remote, entry, folder, partial(_report, report, before, total))
        before += entry.bytes
    return sums


def _fetch(remote: Remote, entry: Entry, folder: Path, report: Callable[[int], None]) -> str:
    """One file, under another name until it is whole. Returns its blake3."""
    whole, part = folder / entry.name, folder / f"{entry.name}@part"
    if whole.exists():
        report(entry.bytes)
        return file_digest(whole)
    part.touch()
    hasher, done, failures = _hashed(part), part.stat().st_size, 0
    while done < entry.bytes:
        reached, reason = done, "the answer ended"
        try:
            with remote.open(entry, done) as answer, part.open("r+b", buffering=0) as file:
                if answer.start != done:
                    hasher, done = blake3.blake3(), 0
                    file.truncate(0)
                file.seek(done)
                for chunk in answer.chunks:
                    file.write(chunk)
                    hasher.update(chunk)
                    done += len(chunk)
                    report(done)
        except ConnectionError as error:
            reason = str(error) or type(error).__name__
        if done > entry.bytes:
            part.unlink()
            raise CheckpointIncomplete(f"{remote.url}/{entry.name} gave more than its {entry.bytes} bytes.")
        if done < entry.bytes:
            failures = 0 if done > reached else failures + 1
            if failures == len(PAUSES):
                raise CheckpointIncomplete(
                    f"{remote.url}/{entry.name} broke off after {done} of {entry.bytes} bytes: {reason}.",
                    hint="Pull again: it goes on from there.",
                )
            time.sleep(PAUSES[failures])
    with part.open("r+b") as file:
        os.fsync(file.fileno())
    part.rename(whole)
    return str(hasher.hexdigest())


def _report(report: Progress, before: int, total: int, done: int) -> None:
    report(before + done, total, "fetch")


def _hashed(path: Path) -> Any:
    hasher = blake3.blake3()
    for chunk in chunks_of(path):
        hasher.update(chunk)
    return hasher


# -- https ---------------------------------------------------------------------------------------------------


def _trusted(host: str) -> bool:
    return host in [each.strip() for each in os.environ.get(TRUSTED, "").split(",")]


class _PublicOnly(httpcore.NetworkBackend):
    """Connects to public addresses only; to the very address that was checked, whatever the name says next."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} is not known: {error.strerror}") from None
        address = str(found[0][4][0])
        if not _trusted(host) and not all(_is_public(str(each[4][0])) for each in found):
            raise BadSpec(
                f"{host} has an address that is not public, {address}; a source may not.",
                hint=f"The operator can allow it: {TRUSTED}={host}",
                param="source",
            )
        return self._backend.connect_tcp(address, port, timeout, local_address, socket_options)


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_global and not parsed.is_multicast


class _Https:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._pool = httpcore.ConnectionPool(network_backend=_PublicOnly(), retries=2, max_keepalive_connections=0)

    def find(self, name: str) -> Entry | None:
        with self._ask("HEAD", name, {}) as response:
            if response.status in (403, 404, 410):
                return None
            if response.status in (405, 501):
                raise CheckpointUnavailable(f"{self.url} does not answer HEAD requests.")
            self._expect(response, name, 200)
            headers = _headers(response)
            if not headers.get(b"content-length", b"").isdigit():
                raise CheckpointUnavailable(f"{self.url}/{name} does not tell its size.")
            return Entry(name, int(headers[b"content-length"]), _strong(headers))

    @contextlib.contextmanager
    def open(self, entry: Entry, start: int) -> Iterator[Answer]:
        asked: dict[bytes | str, bytes | str] = (
            {"Range": f"bytes={start}-", "If-Range": entry.tag} if start and entry.tag else {}
        )
        with self._ask("GET", entry.name, asked) as response:
            self._expect(response, entry.name, 206 if asked else 200, 200)
            headers = _headers(response)
            begun = 0
            if response.status == 206:
                match = _RANGE.fullmatch(headers.get(b"content-range", b""))
                if match is None or int(match[1]) != start or int(match[2]) != entry.bytes:
                    raise CheckpointUnavailable(f"{self.url}/{entry.name} answered another range than was asked for.")
                begun = start
            if entry.tag and _strong(headers) != entry.tag:
                raise CheckpointUnavailable(f"{self.url}/{entry.name} has changed while it was fetched.")
            yield Answer(begun, self._chunks(response))

    def _chunks(self, response: httpcore.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_stream()
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error

    @contextlib.contextmanager
    def _ask(self, method: str, name: str, more: dict[bytes | str, bytes | str]) -> Iterator[httpcore.Response]:
        url = f"{self.url}/{quote(name)}"
        headers: dict[bytes | str, bytes | str] = {"User-Agent": "sllm-faas", "Accept-Encoding": "identity", **more}
        for _ in range(_REDIRECTS):
            parts = urlsplit(url)
            if parts.scheme != "https" and not (parts.scheme == "http" and _trusted(parts.hostname or "")):
                raise BadSpec(f"{parts.scheme}://{parts.hostname} is not https.", param="source")
            try:
                with self._pool.stream(method, url, headers=headers, extensions={"timeout": _TIMEOUT}) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        yield response
                        return
                    url = urljoin(url, _headers(response).get(b"location", b"").decode("ascii", "replace"))
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
                reason = str(error) or type(error).__name__
                raise CheckpointUnavailable(f"{parts.hostname} cannot be reached: {reason}.") from error
        raise CheckpointUnavailable(f"{self.url}/{name} redirects more than {_REDIRECTS} times.")

    def _expect(self, response: httpcore.Response, name: str, *allowed: int) -> None:
        if response.status not in allowed:
            raise CheckpointUnavailable(f"{self.url}/{name} answers with status {response.status}.")


def _headers(response: httpcore.Response) -> dict[bytes, bytes]:
    return {name.lower(): value for name, value in response.headers}


def _strong(headers: dict[bytes, bytes]) -> str:
    """The ETag, unless it is a weak one, under which ranges may not be joined."""
    tag = headers.get(b"etag", b"").decode("latin-1")
    return "" if tag.startswith("W/") else tag


# -- s3 ------------------------------------------------------------------------------------------------------


class _S3:
    """By obstore: credentials, region and endpoint from `AWS_*`; anonymous where there are none."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import S3Store
        except ModuleNotFoundError:
            raise BadSpec("s3:// sources need obstore.", hint="pip install 'sllm-faas[s3]'", param="source") from None
        self.url = url.rstrip("/")
        keys = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        anonymous = not any(os.environ.get(key) for key in keys)
        self._store: Any = S3Store.from_url(self.url, config={"skip_signature": anonymous})

    def find(self, name: str) -> Entry | None:
        import obstore

        try:
            found = obstore.head(self._store, name)
        except FileNotFoundError:
            return None
        except Exception as error:  # obstore's own tree
            raise CheckpointUnavailable(f"{self.url}/{name} cannot be reached: {first_line(error)}.") from error
        return Entry(name, int(found["size"]), found.get("e_tag") or "")

    @contextlib.contextmanager
    def open(self, entry: Entry, start: int) -> Iterator[Answer]:
        import obstore

        options: Any = {"range": {"offset": start}} if start else {}
        if entry.tag:
            options["if_match"] = entry.tag
        try:
            found = obstore.get(self._store, entry.name, options=options)
        except Exception as error:
            raise CheckpointUnavailable(f"{self.url}/{entry.name} cannot be read: {first_line(error)}.") from error
        yield Answer(start, self._chunks(found))

    def _chunks(self, found: Any) -> Iterator[bytes]:
        try:
            for chunk in found.stream(min_chunk_size=_PIECE):
                yield bytes(chunk)
        except Exception as error:
            raise ConnectionError(first_line(error)) from error
