"""Models behind https:// and s3://: which files there are, and their bytes, from any byte to any other.

    listing = look(remote, names)           names, sizes and tags; nothing is downloaded
    with remote.connect() as connection, connection.open(entry, start, end) as answer: …

A source is a folder that holds what a model directory holds; names are asked for, no listing is needed. A part of a
file is asked for under the tag (ETag) that was listed: what has changed meanwhile is an error. `fetch` brings whole
files.

Covered: what a caller may name. https only, and no address that is not public — checked on the address that is
connected to, for every connection, on every redirect. `SLLM_TRUSTED_SOURCES` (hosts, comma separated) are exempt: there
http and private addresses will do. Where s3:// leads is the operator's to say (`AWS_*`), buckets are the caller's. Not
covered: a public host that answers slowly for ever.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import certifi

from sllm_faas.errors import BadSpec, CheckpointIncomplete, CheckpointUnavailable
from sllm_invoker.checkpoints.object import first_line

TRUSTED = "SLLM_TRUSTED_SOURCES"
_CONNECT_S, _ANSWER_S = 20.0, 60.0
"""Seconds that a connection may take, and that an answer may say nothing."""
_CONNECT_PAUSES = (0.0, 0.5)
"""Seconds before a host that cannot be reached is tried again."""
_REDIRECTS = 5
_BUSY = (429, 503)
"""A server says so that it will answer later: to one of several connections, say."""
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)", re.ASCII)
_NAMES_AT_ONCE = 8
_AS_IT_IS = "%/:@!$&'()*+,;=~"
"""Not quoted in a path: it is a URL's already."""
_GULP = 64 * 1024
"""Bytes of an answer whose length is not known that are read at once."""
_SMALL = 64 * 1024 * 1024
_CHUNK = 256 * 1024
"""Bytes that obstore gathers before it hands them on."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a source. `tag` changes with its content; empty where the server gives none."""

    name: str
    bytes: int
    tag: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Bytes `start` to `end` of a file, or as many as come. `read` puts some that have come at the beginning of the
    memory it is given and says how many; 0 at the end. It raises ConnectionError when the answer breaks off."""

    start: int
    end: int
    read: Callable[[memoryview], int]


class Connection(Protocol):
    """For one thread, and one answer at a time; `abort` is for other threads."""

    def find(self, name: str) -> Entry | None:
        """None where there is no such file. Raises CheckpointUnavailable, BadSpec."""

    def open(self, entry: Entry, start: int, end: int) -> contextlib.AbstractContextManager[Answer]:
        """Bytes `start` to `end`, or all from 0 on where the server cannot. Raises ConnectionError where it will answer
        later, CheckpointUnavailable, also when the content is not that of the entry's tag any more."""

    def abort(self) -> None:
        """End what it is waiting for, where that can be done."""


class Remote(Protocol):
    url: str

    def connect(self) -> contextlib.AbstractContextManager[Connection]: ...


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
    """Those of `names` that there are, in their order. Raises CheckpointUnavailable."""

    def find(name: str) -> Entry | None:
        with remote.connect() as connection:
            return connection.find(name)

    with ThreadPoolExecutor(_NAMES_AT_ONCE, "look") as threads:
        return tuple(entry for entry in threads.map(find, names) if entry is not None)


def read_small(remote: Remote, entry: Entry) -> bytes:
    """The content of a small file: an index, say. Raises CheckpointUnavailable, CheckpointIncomplete."""
    if entry.bytes > _SMALL:
        raise BadSpec(f"{remote.url}/{entry.name} has {entry.bytes} bytes; allowed: {_SMALL}.", param="source")
    content, done = bytearray(entry.bytes + 1), 0
    try:
        with remote.connect() as connection, connection.open(entry, 0, entry.bytes) as answer:
            while count := answer.read(memoryview(content)[done:]):
                done += count
    except ConnectionError as error:
        raise CheckpointUnavailable(f"{remote.url}/{entry.name} cannot be read: {error}.") from error
    if done != entry.bytes:
        raise CheckpointIncomplete(f"{remote.url}/{entry.name} ended after {done} of {entry.bytes} bytes.")
    return bytes(content[:done])


# -- https ---------------------------------------------------------------------------------------------------


def _trusted(host: str) -> bool:
    return host in [each.strip() for each in os.environ.get(TRUSTED, "").split(",")]


def _allowed(url: str) -> SplitResult:
    """Raises BadSpec for what may not be asked for."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and _trusted(parts.hostname or "")):
        raise BadSpec(f"{parts.scheme}://{parts.hostname} is not https.", param="source")
    with contextlib.suppress(ValueError):  # a port that is none
        if parts.hostname and parts.port != 0:
            return parts
    raise BadSpec(f"{parts.scheme}://{parts.hostname} has no host, or a port that is none.", param="source")


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_global and not parsed.is_multicast


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    context.set_alpn_protocols(["http/1.1"])
    return context


class _Line(http.client.HTTPConnection):
    """To one host. Connects to public addresses only; to the very address that was checked, whatever the name says
    next. Stays open between requests."""

    def __init__(self, scheme: str, host: str, port: int) -> None:
        self.default_port = 443 if scheme == "https" else 80
        super().__init__(host, port or self.default_port)
        self._secure = scheme == "https"
        self._socket: socket.socket | None = None
        self._aborted = False

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        address = str(found[0][4][0])
        if not _trusted(self.host) and not all(_is_public(str(each[4][0])) for each in found):
            raise BadSpec(
                f"{self.host} has an address that is not public, {address}; a source may not.",
                hint=f"The operator can allow it: {TRUSTED}={self.host}",
                param="source",
            )
        made = self._reach(address)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._secure:
                made = _tls().wrap_socket(made, do_handshake_on_connect=False, server_hostname=self.host)
            self._socket = made
            if self._aborted:
                raise ConnectionAbortedError("it was ended")
            if isinstance(made, ssl.SSLSocket):
                made.do_handshake()
            made.settimeout(_ANSWER_S)
        except BaseException:
            made.close()
            raise
        self.sock = made

    def _reach(self, address: str) -> socket.socket:
        for pause in _CONNECT_PAUSES:
            with contextlib.suppress(OSError):
                return socket.create_connection((address, self.port), _CONNECT_S)
            time.sleep(pause)
        return socket.create_connection((address, self.port), _CONNECT_S)

    def ask(self, method: str, target: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Raises OSError, HTTPException, BadSpec."""
        used = self.sock is not None
        try:
            self.request(method, target, headers=headers)
            return self.getresponse()
        except BaseException as error:
            self.close()
            if not used or not isinstance(error, ConnectionError):
                raise
        return self.ask(method, target, headers)  # it was closed while nothing was asked of it

    def abort(self) -> None:
        """From any thread: whoever waits for an answer is told that it has ended."""
        self._aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has ended
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # below TLS, which another thread may be in


class _Body:
    """The content of a response, straight into the reader's memory where its length is known."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response
        self._left = response.length  # None where it is in chunks, or ends with the connection
        self._begun = False

    @property
    def over(self) -> bool:
        """Nothing of it is left on the connection."""
        return self._left == 0 or (self._left is None and self._response.isclosed())

    def read(self, memory: memoryview) -> int:
        """See Answer."""
        if self._left == 0:
            return 0
        try:
            if self._left is None or not self._begun:
                self._begun = True
                data = self._response.read1(min(len(memory), _GULP))  # what came in one with the header, at first
                count = len(data)
                memory[:count] = data
            else:
                count = self._response.fp.readinto1(memory[: self._left])
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(str(error) or type(error).__name__) from error
        if self._left is not None:
            self._left -= count
        return count


class _Https:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        with contextlib.closing(_HttpsConnection(self.url)) as made:
            yield made


class _HttpsConnection:
    """To the host of a folder and to those that it redirects to."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lines: dict[tuple[str, str, int], _Line] = {}
        self._aborted = False

    def close(self) -> None:
        for line in self._lines.values():
            line.close()

    def abort(self) -> None:
        self._aborted = True
        for line in list(self._lines.values()):
            line.abort()

    def find(self, name: str) -> Entry | None:
        with self._ask("HEAD", name, {}) as (response, _):
            if response.status in (403, 404, 410):
                return None
            if response.status in (405, 501):
                raise CheckpointUnavailable(f"{self._url} does not answer HEAD requests.")
            self._expect(response, name, 200)
            size = response.headers.get("Content-Length", "")
            if not (size.isascii() and size.isdigit()):
                raise CheckpointUnavailable(f"{self._url}/{name} does not tell its size.")
            return Entry(name, int(size), _strong(response))

    @contextlib.contextmanager
    def open(self, entry: Entry, start: int, end: int) -> Iterator[Answer]:
        asked = {}
        if entry.tag and (start or end < entry.bytes):
            last = str(end - 1) if end < entry.bytes else ""
            asked = {"Range": f"bytes={start}-{last}", "If-Range": entry.tag}
        with self._ask("GET", entry.name, asked) as (response, body):
            if response.status in _BUSY:
                raise ConnectionError(f"it answers with status {response.status}")
            self._expect(response, entry.name, 206 if asked else 200, 200)
            begun, ended = 0, entry.bytes
            if response.status == 206:
                match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
                begun, ended, whole = (int(match[1]), int(match[2]) + 1, int(match[3])) if match else (-1, -1, -1)
                if (begun, whole) != (start, entry.bytes) or not start < ended <= end:  # a shorter one may be given
                    raise CheckpointUnavailable(f"{self._url}/{entry.name} answered another range than was asked for.")
            if entry.tag and _strong(response) != entry.tag:
                raise CheckpointUnavailable(f"{self._url}/{entry.name} has changed while it was fetched.")
            yield Answer(begun, ended, body.read)

    @contextlib.contextmanager
    def _ask(self, method: str, name: str, more: dict[str, str]) -> Iterator[tuple[http.client.HTTPResponse, _Body]]:
        url = f"{self._url}/{quote(name)}"
        headers = {"User-Agent": "sllm-faas", "Accept-Encoding": "identity", **more}
        for _ in range(_REDIRECTS):
            parts = _allowed(url)
            target = quote(parts.path or "/", safe=_AS_IT_IS) + (f"?{parts.query}" if parts.query else "")
            line = self._line(parts)
            try:
                response = line.ask(method, target, headers)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                reason = str(error) or type(error).__name__
                raise CheckpointUnavailable(f"{parts.hostname} cannot be reached: {reason}.") from error
            body = _Body(response)
            try:
                if response.status not in (301, 302, 303, 307, 308):
                    yield response, body
                    return
                url = urljoin(url, response.headers.get("Location", ""))
            finally:
                if not body.over:
                    line.close()  # with what is left of the answer
                response.close()
        raise CheckpointUnavailable(f"{self._url}/{name} redirects more than {_REDIRECTS} times.")

    def _line(self, parts: SplitResult) -> _Line:
        key = (parts.scheme, parts.hostname or "", parts.port or 0)
        if key not in self._lines:
            self._lines[key] = _Line(*key)
        if self._aborted:
            self._lines[key].abort()
        return self._lines[key]

    def _expect(self, response: http.client.HTTPResponse, name: str, *allowed: int) -> None:
        if response.status not in allowed:
            raise CheckpointUnavailable(f"{self._url}/{name} answers with status {response.status}.")


def _strong(response: http.client.HTTPResponse) -> str:
    """The ETag, unless it is a weak one, under which ranges may not be joined."""
    tag = response.headers.get("ETag", "")
    return "" if tag.startswith("W/") else tag


# -- s3 ------------------------------------------------------------------------------------------------------


class _S3:
    """By obstore: credentials, region and endpoint from `AWS_*`; anonymous where there are none. It has its own pool of
    connections, and its own limits of time."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import S3Store
        except ModuleNotFoundError:
            raise BadSpec("s3:// sources need obstore.", hint="pip install 'sllm-faas[s3]'", param="source") from None
        self.url = url.rstrip("/")
        keys = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        anonymous = not any(os.environ.get(key) for key in keys)
        self._store: Any = S3Store.from_url(self.url, config={"skip_signature": anonymous})

    def connect(self) -> contextlib.AbstractContextManager[Connection]:
        return contextlib.nullcontext(self)

    def abort(self) -> None:
        """What it waits for ends by itself."""

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
    def open(self, entry: Entry, start: int, end: int) -> Iterator[Answer]:
        import obstore

        options: Any = {"if_match": entry.tag} if entry.tag else {}
        if end < entry.bytes:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        try:
            found = obstore.get(self._store, entry.name, options=options)  # refuses another range than was asked for
        except Exception as error:
            raise CheckpointUnavailable(f"{self.url}/{entry.name} cannot be read: {first_line(error)}.") from error
        yield Answer(start, end, _S3Body(found).read)


class _S3Body:
    def __init__(self, found: Any) -> None:
        self._chunks = found.stream(min_chunk_size=_CHUNK)
        self._chunk = memoryview(b"")

    def read(self, memory: memoryview) -> int:
        """See Answer."""
        try:
            while not self._chunk:
                self._chunk = memoryview(next(self._chunks))
        except StopIteration:
            return 0
        except Exception as error:
            raise ConnectionError(first_line(error)) from error
        count = min(len(memory), len(self._chunk))
        memory[:count], self._chunk = self._chunk[:count], self._chunk[count:]
        return count
