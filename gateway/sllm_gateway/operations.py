"""The table of everything this gateway answers: one row per method and path.

Routing, metrics labels, `/openapi.json` and `/docs` are all read from it, so none of them can say something else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from sllm_gateway.exchange import Exchange

Endpoint = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Operation:
    """`path` as Starlette writes it. `scope` is what a token needs, empty for none. `query`: name -> what it is."""

    method: str
    path: str
    endpoint: Endpoint
    tag: str
    summary: str
    scope: str = ""
    query: dict[str, str] = field(default_factory=dict)
    body: str = ""
    """Media type of the request's body, empty for none."""
    answer: str = "application/json"
    checked: bool = True
    """Host and Origin are checked; not so for probes, which come from anywhere."""

    @property
    def label(self) -> str:
        return f"{self.method} {self.path}"


def openapi(operations: list[Operation], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a table."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path}", "}")
        names = [part.partition("}")[0] for part in path.split("{")[1:]]
        parameters: list[dict[str, Any]] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
        parameters += [
            {"name": name, "in": "query", "required": False, "description": text, "schema": {"type": "string"}}
            for name, text in operation.query.items()
        ]
        entry: dict[str, Any] = {
            "operationId": f"{operation.method.lower()}{path}".replace("/", "_").replace("{", "").replace("}", ""),
            "summary": operation.summary,
            "tags": [operation.tag],
            "responses": {
                "200": {"description": "Success.", "content": {operation.answer: {"schema": {}}}},
                "default": {
                    "description": "An error.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        }
        if parameters:
            entry["parameters"] = parameters
        if operation.body:
            entry["requestBody"] = {"content": {operation.body: {"schema": {}}}}
        if operation.scope:
            entry["security"] = [{"token": [operation.scope]}]
        paths.setdefault(path, {})[operation.method.lower()] = entry
    return {
        "openapi": "3.1.0",
        "info": {"title": "sllm-faas", "version": version},
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
    }


_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "request_id"],
            "properties": dict.fromkeys(("message", "type", "param", "code", "hint", "request_id"), _TEXT),
        }
    },
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>sllm-faas</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td{border-top:1px solid #ddd;padding:.35rem .6rem;vertical-align:top}code{font:13px ui-monospace,monospace}
.m{width:4.5rem;font-weight:600}.s{color:#666;width:5rem}</style></head><body>
<h1>sllm-faas</h1><p>The interface of this gateway. Machine-readable: <a href="/openapi.json">/openapi.json</a>.
The last column is the scope that a token needs.</p>
"""


def page(operations: list[Operation]) -> bytes:
    """The same table for people: one static page that loads nothing else."""
    out = [_PAGE]
    for tag in dict.fromkeys(operation.tag for operation in operations):
        out.append(f"<h2>{tag}</h2><table>")
        for operation in operations:
            if operation.tag == tag:
                query = f"<br>query: {', '.join(operation.query)}" if operation.query else ""
                out.append(
                    f'<tr><td class="m"><code>{operation.method}</code></td><td><code>{operation.path}</code></td>'
                    f'<td>{operation.summary}{query}</td><td class="s">{operation.scope}</td></tr>'
                )
        out.append("</table>")
    return ("\n".join(out) + "</body></html>").encode()
