"""Who answers what: the rows of the table of operations."""

from __future__ import annotations

from typing import Any, Protocol

from sllm_gateway.admin import Admin, app_query, deployment, instance_stop, nothing, path, path_and_json
from sllm_gateway.exchange import Exchange
from sllm_gateway.invocations import Invocations
from sllm_gateway.invoke import Functions
from sllm_gateway.openai import OpenAI
from sllm_gateway.operations import Operation


class Pages(Protocol):
    """The gateway's own."""

    async def livez(self, exchange: Exchange) -> None: ...

    async def readyz(self, exchange: Exchange) -> None: ...

    async def metrics_page(self, exchange: Exchange) -> None: ...

    async def document(self, exchange: Exchange) -> None: ...

    async def docs(self, exchange: Exchange) -> None: ...


def table(
    functions: Functions, models: OpenAI, invocations: Invocations, admin: Admin, pages: Pages
) -> list[Operation]:
    """Every operation. Where two paths match, the first row wins."""
    json, events = "application/json", "text/event-stream"
    logs = {
        "app": "of one app",
        "function": "of one function",
        "instance": "of one instance",
        "invocation": "of one invocation",
        "since": "Unix time in seconds",
        "lines": "how many earlier lines",
        "follow": "1: go on, as events",
    }

    def row(method: str, path: str, endpoint: Any, tag: str, summary: str, scope: str = "", **more: Any) -> Operation:
        return Operation(method, path, endpoint, tag, summary, scope, **more)

    return [
        row("POST", "/v1/chat/completions", models.chat, "openai", "Continue a conversation.", "invoke", body=json),
        row("POST", "/v1/completions", models.completions, "openai", "Continue a text.", "invoke", body=json),
        row("POST", "/v1/embeddings", models.embeddings, "openai", "Texts as vectors.", "invoke", body=json),
        row("GET", "/v1/models", models.models, "openai", "Language models.", "invoke"),
        row("GET", "/v1/models/{id:path}", models.model, "openai", "One language model.", "invoke"),
        row(
            "POST",
            "/v1/functions/{app}/{function}",
            functions,
            "functions",
            "Call a function: an object gives keyword arguments, an array positional ones. A generator streams.",
            "invoke",
            body=json,
            query={"parameters": "a class's parameters, a JSON object"},
        ),
        row(
            "GET",
            "/v1/functions/{app}/{function}",
            admin.ask("describe.function", "read", path),
            "functions",
            "What is known of a function.",
            "read",
        ),
        row(
            "GET",
            "/v1/invocations",
            invocations.list,
            "invocations",
            "Recent invocations, newest first.",
            "read",
            query={"app": "of one app", "limit": "how many"},
        ),
        row("GET", "/v1/invocations/{id}", invocations.get, "invocations", "One invocation and its timeline.", "read"),
        row(
            "GET",
            "/v1/invocations/{id}/events",
            invocations.events,
            "invocations",
            "Go on with a stream whose gateway died, after Last-Event-ID.",
            "invoke",
            answer=events,
        ),
        row(
            "POST",
            "/v1/invocations/{id}/migrate",
            admin.ask("invocation.migrate", "admin", path_and_json, patience=None),
            "invocations",
            "Let it go on at another node, live; answered when it does.",
            "admin",
            body=json,
        ),
        row("DELETE", "/v1/invocations/{id}", invocations.delete, "invocations", "Cancel.", "invoke"),
        row("HEAD", "/v1/bundles/{digest}", admin.bundle_head, "apps", "Whether a bundle is here.", "deploy"),
        row(
            "PUT",
            "/v1/bundles/{digest}",
            admin.bundle_put,
            "apps",
            "Upload a bundle.",
            "deploy",
            body="application/gzip",
        ),
        row("GET", "/v1/apps", admin.ask("app.list", "read", nothing, listed="apps"), "apps", "Apps.", "read"),
        row(
            "GET",
            "/v1/apps/{app}",
            admin.ask("app.get", "read", path),
            "apps",
            "An app, its functions and versions.",
            "read",
        ),
        row("DELETE", "/v1/apps/{app}", admin.ask("app.delete", "deploy", path), "apps", "Delete an app.", "deploy"),
        row(
            "POST",
            "/v1/apps/{app}/deployments",
            admin.ask_progress("app.deploy", "deploy", deployment),
            "apps",
            "Deploy a version; its progress as events.",
            "deploy",
            body=json,
        ),
        row(
            "POST",
            "/v1/apps/{app}/rollback",
            admin.ask("app.rollback", "deploy", path_and_json),
            "apps",
            "Serve an earlier version.",
            "deploy",
            body=json,
        ),
        row(
            "GET",
            "/v1/instances",
            admin.ask("instance.list", "read", app_query, listed="instances"),
            "platform",
            "Instances.",
            "read",
            query={"app": "of one app"},
        ),
        row(
            "DELETE",
            "/v1/instances/{instance}",
            admin.ask("instance.stop", "deploy", instance_stop, status=202),
            "platform",
            "Stop an instance.",
            "deploy",
            query={"drain": "seconds that what runs may take; without it all it takes"},
        ),
        row("GET", "/v1/nodes", admin.ask("node.list", "read", nothing), "platform", "Nodes.", "read"),
        row(
            "GET",
            "/v1/nodes/{node}",
            admin.ask("describe.node", "read", path),
            "platform",
            "What is known of a node.",
            "read",
        ),
        row(
            "POST",
            "/v1/nodes/{node}/restart",
            admin.restart_node,
            "platform",
            "Let a node's invoker leave in order; its supervisor starts it again.",
            "admin",
        ),
        *(
            row(
                "POST",
                f"/v1/nodes/{{node}}/{verb}",
                admin.ask(f"node.{verb}", "admin", path),
                "platform",
                summary,
                "admin",
            )
            for verb, summary in (
                ("cordon", "Place nothing new there."),
                ("uncordon", "Place there again."),
                ("drain", "Move everything away."),
            )
        ),
        row("GET", "/v1/status", admin.ask("status", "read", nothing), "platform", "The platform at a glance.", "read"),
        row(
            "GET",
            "/v1/logs",
            admin.logs,
            "platform",
            "What functions printed.",
            "read",
            query=logs,
            answer="application/x-ndjson",
        ),
        row("GET", "/v1/checkpoints", admin.checkpoints, "checkpoints", "Checkpoints by node.", "read"),
        row(
            "POST",
            "/v1/checkpoints",
            admin.ask_progress("checkpoint.pull", "deploy", path_and_json),
            "checkpoints",
            "Get a checkpoint; progress as events.",
            "deploy",
            body=json,
        ),
        *(
            row(
                "POST",
                f"/v1/checkpoints/{{ref:path}}/{verb}",
                admin.checkpoint(f"checkpoint.{verb}"),
                "checkpoints",
                summary,
                "deploy",
            )
            for verb, summary in (
                ("verify", "Compare with its checksums."),
                ("pin", "Never evict."),
                ("unpin", "Evict when space is needed."),
            )
        ),
        row(
            "DELETE",
            "/v1/checkpoints/{ref:path}",
            admin.checkpoint("checkpoint.rm"),
            "checkpoints",
            "Remove from disk.",
            "deploy",
        ),
        row(
            "GET",
            "/v1/tokens",
            admin.ask("token.list", "admin", nothing),
            "access",
            "Tokens, without their text.",
            "admin",
        ),
        row(
            "POST",
            "/v1/tokens",
            admin.ask("token.create", "admin", path_and_json, status=201),
            "access",
            "Make a token; shown once.",
            "admin",
            body=json,
        ),
        row(
            "DELETE",
            "/v1/tokens/{name}",
            admin.ask("token.delete", "admin", path),
            "access",
            "Revoke a token.",
            "admin",
        ),
        row(
            "POST",
            "/v1/join-tokens",
            admin.ask("join.create", "admin", path_and_json, status=201),
            "access",
            "Let a node join.",
            "admin",
            body=json,
        ),
        row("GET", "/livez", pages.livez, "health", "The process runs.", checked=False),
        row("GET", "/readyz", pages.readyz, "health", "It takes work.", checked=False),
        row("GET", "/metrics", pages.metrics_page, "health", "Prometheus metrics.", checked=False, answer="text/plain"),
        row("GET", "/openapi.json", pages.document, "health", "This table for programs."),
        row("GET", "/docs", pages.docs, "health", "This table for people.", answer="text/html"),
    ]
