"""OpenAI's endpoints: chat and text completions, embeddings, models.

What may be asked is in `openai_parse`, how it is answered in `openai_render`; here a model's name becomes an instance
to run on. Strict: a parameter is honoured, or changes nothing, or is a 400 that names it. What only the model's
container knows (context length, template, vocabulary) is checked there.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import Any

import msgspec

from sllm_faas.dispatch.resume import way_of
from sllm_faas.errors import BadRequest
from sllm_faas.spec import Target, short_digest
from sllm_faas.wire import llm
from sllm_faas.wire.messages import FunctionRoute
from sllm_gateway import note
from sllm_gateway.auth import Gate, Principal
from sllm_gateway.dispatcher import Dispatcher
from sllm_gateway.errors import JSON
from sllm_gateway.exchange import Exchange
from sllm_gateway.handle import Call
from sllm_gateway.invoke import lowered, require_routes
from sllm_gateway.openai_parse import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    parse,
    parse_chat,
    parse_completion,
    parse_input,
)
from sllm_gateway.openai_render import Whole, embeddings, writer_of
from sllm_gateway.stream import Streams
from sllm_gateway.timeline import server_timing

_encode = msgspec.json.Encoder().encode
_object = msgspec.json.Decoder(dict[str, Any])


BYTES_PER_TOKEN = 4
"""Of a request that waits, about: tokens are counted where the tokenizer is."""


class OpenAI:
    def __init__(self, dispatcher: Dispatcher, gate: Gate, streams: Streams) -> None:
        self._dispatcher = dispatcher
        self._gate = gate
        self._streams = streams

    # -- generation ------------------------------------------------------------------------------------------

    async def chat(self, exchange: Exchange) -> None:
        route, adapter, fields = await self._begin(exchange)
        body = parse(fields, ChatBody)
        request = replace(parse_chat(body, _seed), adapter=adapter)
        await self._generate(exchange, route, body, request, "chat", bool(body.logprobs))

    async def completions(self, exchange: Exchange) -> None:
        route, adapter, fields = await self._begin(exchange)
        body = parse(fields, CompletionBody)
        request = replace(parse_completion(body, _seed), adapter=adapter)
        await self._generate(exchange, route, body, request, "completion", body.logprobs is not None)

    async def _generate(
        self,
        exchange: Exchange,
        route: FunctionRoute,
        body: ChatBody | CompletionBody,
        request: llm.LlmRequest,
        kind: Any,
        logprobs: bool,
    ) -> None:
        begun = note.Note(
            kind,
            ("chatcmpl-" if kind == "chat" else "cmpl-") + exchange.identity.hex(),
            body.model,
            int(time.time()),
            fingerprint(route),
            bool(body.stream_options and body.stream_options.include_usage),
            logprobs,
        )
        method = "chat" if kind == "chat" else "complete"
        handle = self._dispatcher.submit(self._call(exchange, route, method, llm.encode(request), note.pack(begun)))
        if body.stream:
            await self._streams.stream(exchange, handle, writer_of(begun))
            return
        whole = Whole(begun, request.n * max(1, len(request.prompts)))
        ended = await self._streams.collect(exchange, handle, whole.take)
        timing = [(b"server-timing", server_timing(handle))]
        if ended.error is not None:
            await exchange.fail(ended.error, timing)
        else:
            await exchange.respond(_encode(whole.answer(ended)), 200, JSON, timing)

    async def embeddings(self, exchange: Exchange) -> None:
        route, adapter, fields = await self._begin(exchange)
        body = parse(fields, EmbeddingBody)
        request = llm.LlmRequest(prompts=parse_input(body.input, "input"), adapter=adapter)
        handle = self._dispatcher.submit(self._call(exchange, route, "embed", llm.encode(request), note.FUNCTION))
        ended = await self._streams.result(exchange, handle)
        timing = [(b"server-timing", server_timing(handle))]
        if ended.error is not None:
            await exchange.fail(ended.error, timing)
            return
        answer = embeddings(ended.payload, body.model, body.encoding_format == "base64")
        await exchange.respond(_encode(answer), 200, JSON, timing)

    async def _begin(self, exchange: Exchange) -> tuple[FunctionRoute, str, dict[str, Any]]:
        """Who asks, for which model and adapter, with which fields."""
        principal = self._gate.admit(exchange, "invoke")
        require_routes(self._dispatcher.routes)
        try:
            fields = _object.decode(await exchange.body())
        except msgspec.ValidationError:
            raise BadRequest("The body is not a JSON object.") from None
        except (msgspec.DecodeError, ValueError) as error:
            raise BadRequest(f"The body is not JSON: {error}.") from None
        except RecursionError:
            raise BadRequest("The body is nested too deeply.") from None
        name = fields.get("model")
        if not isinstance(name, str) or not name:
            raise BadRequest("You must say which model to use.", param="model")
        return *self._model(exchange, principal, name[:200]), fields

    def _model(self, exchange: Exchange, principal: Principal, name: str) -> tuple[FunctionRoute, str]:
        route, adapter = self._dispatcher.routes.served(name)
        self._gate.check_app(principal, route.app)
        exchange.app, exchange.function = route.app, route.spec.name
        return route, adapter

    def _call(self, exchange: Exchange, route: FunctionRoute, method: str, payload: bytes, context: bytes) -> Call:
        spec = route.spec
        return Call(
            exchange.identity,
            Target(route.app, spec.name, route.version),
            method,
            payload,
            "msgpack",
            method != "embed",
            lowered(spec.timeouts, exchange.headers),
            spec.retries,
            spec.max_queue,
            route.weight,
            "",
            context,
            way_of("llm", method, None),
            len(payload) // BYTES_PER_TOKEN,
        )

    # -- models ----------------------------------------------------------------------------------------------

    async def models(self, exchange: Exchange) -> None:
        principal = self._gate.admit(exchange, "invoke")
        require_routes(self._dispatcher.routes)
        found = [_shown(name, route) for name, route in self._dispatcher.routes.models() if principal.sees(route.app)]
        await exchange.respond(_encode({"object": "list", "data": found}))

    async def model(self, exchange: Exchange) -> None:
        principal = self._gate.admit(exchange, "invoke")
        require_routes(self._dispatcher.routes)
        name = exchange.params["id"]
        await exchange.respond(_encode(_shown(name, self._model(exchange, principal, name)[0])))


def _shown(name: str, route: FunctionRoute) -> dict[str, Any]:
    shown = {"id": name, "object": "model", "created": int(route.created), "owned_by": route.app}
    model, colon, _ = name.partition(":")
    return {**shown, "parent": model} if colon else shown


def fingerprint(route: FunctionRoute) -> str:
    """Changes whenever answers to the same seed may: with the version, and the weights."""
    weights = "".join(checkpoint.digest for checkpoint in route.spec.checkpoints().values())
    return "fp_" + short_digest(f"{route.app}/{route.spec.name}@{route.version}:{weights}".encode())


def _seed() -> int:
    return secrets.randbits(63)
