"""What the HTTP backend sends, what it makes of every kind of answer, and what happens when the network fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgpack
import pytest
from sllm import _http
from sllm._backend import Call
from sllm._http import MAX_RECORD, HttpBackend
from sllm._profile import Profile

from sllm_faas.errors import (
    DeadlineExceeded,
    NotFound,
    PlatformError,
    QueueFull,
    RemoteError,
    TooLarge,
    Unavailable,
    WireError,
)
from sllm_faas.spec import MAX_PAYLOAD
from sllm_faas.wire.exceptions import exception_to_info
from sllm_faas.wire.payload import encode

CALL = Call("my-app", "C", b"payload", "go", '{"size":3}', (("first_output", 1.5), ("execution", 9.0)), "inv-1")


def info_map(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__dataclass_fields__}


def backend(answer: Callable[[httpx.Request], httpx.Response]) -> HttpBackend:
    return HttpBackend(Profile("http://server", "secret"), httpx.MockTransport(answer))


def record(**fields: Any) -> bytes:
    body = msgpack.packb(fields)
    return len(body).to_bytes(4, "big") + bytes(body)


class Chunks(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk

    async def aclose(self) -> None:
        self.closed = True


def streaming(*chunks: bytes) -> HttpBackend:
    return backend(lambda request: httpx.Response(200, stream=Chunks(list(chunks))))


async def collect(outputs: AsyncIterator[bytes]) -> list[bytes]:
    return [output async for output in outputs]


async def test_a_call_says_all_of_itself_in_the_request() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=b"result")

    assert await backend(answer).call(CALL) == b"result"
    (request,) = seen
    assert (request.method, request.url.path) == ("POST", "/v1/functions/my-app/C.go")
    assert request.url.params["parameters"] == '{"size":3}'
    assert request.content == b"payload"
    assert request.headers["content-type"] == request.headers["accept"] == "application/msgpack"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["x-sllm-timeout-first-output"] == "1.5"
    assert request.headers["x-sllm-timeout-execution"] == "9"
    assert request.headers["x-sllm-caller"] == "inv-1"


async def test_a_plain_call_sends_no_more_than_it_must() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/functions/a/f"
        assert not request.url.query
        assert not [name for name in request.headers if name.startswith("x-sllm")]
        return httpx.Response(200)

    await backend(answer).call(Call("a", "f", b""))


async def test_arguments_beyond_the_limit_are_not_sent() -> None:
    with pytest.raises(TooLarge, match=str(MAX_PAYLOAD)):
        await backend(lambda request: httpx.Response(200)).call(Call("a", "f", bytes(MAX_PAYLOAD + 1)))


async def test_an_exception_of_the_function_is_raised_as_its_own_type() -> None:
    body = msgpack.packb(info_map(exception_to_info(KeyError("lost"))))
    failing = backend(
        lambda request: httpx.Response(500, content=body, headers={"content-type": "application/msgpack"})
    )
    with pytest.raises(KeyError, match="lost"):
        await failing.call(CALL)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "not_found", NotFound),
        (429, "queue_full", QueueFull),
        (504, "deadline_exceeded", DeadlineExceeded),
        (500, "function_error", RemoteError),
        (500, "no_such_code", PlatformError),
    ],
)
async def test_a_json_error_is_the_error_of_its_code(status: int, code: str, kind: type[Exception]) -> None:
    body = {"error": {"message": "m", "code": code, "hint": "h", "param": "idle", "type": "x", "request_id": "r"}}
    failing = backend(lambda request: httpx.Response(status, json=body, headers={"retry-after": "7"}))
    with pytest.raises(Exception, match="m h") as caught:
        await failing.call(CALL)
    assert isinstance(caught.value, kind) or code == "function_error"
    if isinstance(caught.value, QueueFull):
        assert caught.value.retry_after == 7


@pytest.mark.parametrize(
    ("status", "content", "headers", "kind"),
    [
        (307, b"", {"location": "http://elsewhere"}, PlatformError),
        (502, b"<html>", {"content-type": "text/html"}, Unavailable),
        (500, b"", {}, PlatformError),
        (500, b"{}", {"content-type": "application/json"}, PlatformError),
        (500, b'{"error": 3}', {}, PlatformError),
        (500, b"\xc1", {"content-type": "application/msgpack"}, PlatformError),
        (500, b"\x03", {"content-type": "application/msgpack"}, PlatformError),
        (500, msgpack.packb({"code": 3, "status": "x"}), {"content-type": "application/msgpack"}, PlatformError),
    ],
)
async def test_an_answer_that_is_no_error_of_ours_is_still_an_error(
    status: int, content: bytes, headers: dict[str, str], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        await backend(lambda request: httpx.Response(status, content=content, headers=headers)).call(CALL)


async def test_records_are_outputs_however_the_bytes_are_cut() -> None:
    whole = record(t="output", seq=0, data=b"a") + record(t="ping") + record(t="output", seq=1, data=b"b" * 300)
    whole += record(t="done", seconds=1.0)
    for size in (1, 3, 7, len(whole)):
        chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
        assert await collect(streaming(*chunks).stream(CALL)) == [b"a", b"b" * 300]


async def test_an_error_record_is_raised_after_the_outputs_before_it() -> None:
    error = info_map(exception_to_info(ValueError("bad")))
    outputs = streaming(record(t="output", seq=0, data=b"a") + record(t="error", error=error)).stream(CALL)
    assert await anext(outputs) == b"a"
    with pytest.raises(ValueError, match="bad"):
        await anext(outputs)


@pytest.mark.parametrize("chunks", [[], [record(t="output", seq=0, data=b"a")], [record(t="done")[:-1]]])
async def test_a_stream_that_ends_without_a_terminal_record_is_an_error(chunks: list[bytes]) -> None:
    with pytest.raises(Unavailable, match="before its end"):
        await collect(streaming(*chunks).stream(CALL))


@pytest.mark.parametrize(
    "chunk",
    [
        (MAX_RECORD + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x01\x03",
        record(t="output", seq=1, data=b"gap"),
    ],
)
async def test_a_damaged_stream_is_a_wire_error(chunk: bytes) -> None:
    with pytest.raises(WireError):
        await collect(streaming(chunk).stream(CALL))


class Gateways:
    """Answers in turn; the first is to POST, the others to re-attach. A number is a status with that code's error."""

    def __init__(self, *answers: bytes | int | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str, str | None]] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path, request.headers.get("last-event-id")))
        answer = self.answers.pop(0) if self.answers else 409
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            codes = {404: "not_found", 409: "conflict", 410: "gone", 503: "unavailable"}
            return httpx.Response(answer, json={"error": {"message": "no", "code": codes[answer]}})
        return httpx.Response(200, headers={"x-invocation-id": "inv-7"}, stream=Chunks([answer]))

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def backend(self) -> HttpBackend:
        return HttpBackend(Profile("http://server", "secret"), httpx.MockTransport(self), self.sleep)


def outputs(*seqs: int) -> bytes:
    return b"".join(record(t="output", seq=seq, data=b"%d" % seq) for seq in seqs)


DONE = record(t="done", seconds=1.0)


async def test_a_stream_whose_gateway_was_lost_is_read_to_its_end_at_another() -> None:
    cut = httpx.ConnectError("refused")
    gateways = Gateways(outputs(0, 1), cut, 409, outputs(2, 3), 503, outputs(4) + DONE)
    assert await collect(gateways.backend().stream(CALL)) == [b"0", b"1", b"2", b"3", b"4"]
    again = "/v1/invocations/inv-7/events"
    assert gateways.asked[1:] == [("GET", again, "1")] * 3 + [("GET", again, "3")] * 2
    assert len(gateways.slept) == 5


async def test_a_stream_lost_before_its_first_output_is_attached_to_from_the_beginning() -> None:
    gateways = Gateways(record(t="ping"), outputs(0) + DONE)
    assert await collect(gateways.backend().stream(CALL)) == [b"0"]
    assert gateways.asked[1][2] is None


@pytest.mark.parametrize("answer", [404, 410])
async def test_a_stream_that_no_gateway_has_any_more_broke_when_it_broke(answer: int) -> None:
    gateways = Gateways(outputs(0), answer)
    with pytest.raises(Unavailable, match="before its end"):
        await collect(gateways.backend().stream(CALL))
    assert len(gateways.asked) == 2


async def test_a_call_that_never_reached_a_gateway_is_not_attached_to() -> None:
    gateways = Gateways(httpx.ConnectError("refused"))
    with pytest.raises(Unavailable, match="cannot reach"):
        await collect(gateways.backend().stream(CALL))
    assert len(gateways.asked) == 1


async def test_a_lost_stream_is_asked_for_no_longer_than_invokers_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http, "REATTACH", 0.0)
    gateways = Gateways(outputs(0))
    with pytest.raises(Unavailable, match="before its end"):
        await collect(gateways.backend().stream(CALL))


async def test_an_error_of_the_function_after_re_attaching_is_its_error() -> None:
    error = info_map(exception_to_info(ValueError("bad")))
    gateways = Gateways(outputs(0), outputs(1) + record(t="error", error=error))
    with pytest.raises(ValueError, match="bad"):
        await collect(gateways.backend().stream(CALL))


async def test_a_refused_stream_is_its_error() -> None:
    body = {"error": {"message": "nobody home", "code": "not_found"}}
    with pytest.raises(NotFound, match="nobody home"):
        await collect(backend(lambda request: httpx.Response(404, json=body)).stream(CALL))


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.ReadError("cut")])
async def test_what_the_network_does_is_unavailable(error: Exception) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(Unavailable) as caught:
        await backend(fail).call(CALL)
    assert caught.value.param == "server"
    with pytest.raises(Unavailable):
        await collect(backend(fail).stream(CALL))


async def test_a_real_server_sees_the_connection_close_when_a_stream_is_left() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"payload")
        body = record(t="output", seq=0, data=b"a")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body))
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        closed.set()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        http = HttpBackend(Profile(f"http://127.0.0.1:{port}"))
        outputs = http.stream(CALL)
        assert await anext(outputs) == b"a"
        await outputs.aclose()
        await asyncio.wait_for(closed.wait(), 10)
        await http.close()


async def test_a_server_that_is_not_there_is_unavailable_with_what_to_do() -> None:
    async with await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
    http = HttpBackend(Profile(f"http://127.0.0.1:{port}"))
    with pytest.raises(Unavailable, match="sllm up"):
        await http.call(CALL)
    await http.close()


async def test_a_value_makes_the_whole_way() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert msgpack.unpackb(request.content, strict_map_key=False) == {"args": [1], "kwargs": {}}
        return httpx.Response(200, content=encode({"n": 2}))

    import sllm
    from sllm import _backend

    with _backend.use(backend(answer)):
        assert await sllm.Function.from_name("a", "f").remote.aio(1) == {"n": 2}
