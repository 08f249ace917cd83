"""`sllm status`: the platform at a glance."""

from __future__ import annotations

import time
from typing import Any

import click

from sllm_faas.cli import output
from sllm_faas.cli.api import path
from sllm_faas.cli.common import Session, client_command

ROWS = 50
"""Instances that a frame of `--watch` lists."""


@click.command()
@click.option("--watch", is_flag=True, help="Show it anew every second, with a row per instance, until Ctrl-C.")
@client_command(reads=True)
def status(session: Session, watch: bool) -> None:
    """Show what runs, where and since when."""
    with session.api() as api:
        while True:
            found = api.get(path("status"))
            instances = api.get(path("instances"))["instances"] if watch and not session.json else []
            if watch:
                click.clear()
            if session.json:
                output.emit_json(found)
            else:
                _show(api.server, found)
                _show_instances(instances)
            if not watch:
                return
            time.sleep(1.0)


def _show_instances(instances: list[dict[str, Any]]) -> None:
    if not instances:
        return
    click.echo()
    output.table(
        ["instance of", "node", "state", "started from", "age", "in flight"],
        [
            (
                f"{item['app']}/{item['function']}@{item['version']}",
                item["node"],
                item["state"],
                item["warmth"],
                output.duration(item["age"]),
                f"{item['running']}/{item['concurrency']}",
            )
            for item in sorted(instances, key=lambda item: (-item["running"], item["age"], item["instance"]))[:ROWS]
        ],
        "",
    )
    if len(instances) > ROWS:
        click.echo(f"and {len(instances) - ROWS} more: `sllm ps` lists all.")


def _show(server: str, found: dict[str, Any]) -> None:
    counts, controller = found["counts"], found["controller"]
    instances = counts["instances"]
    output.pairs(
        [
            ("server", server),
            ("version", controller["version"]),
            ("controller", f"pid {controller['pid']}, up for {output.duration(controller['uptime'])}"),
            ("gateways", counts["gateways"]),
            ("nodes", f"{counts['nodes']}" + (f", {counts['nodes_lost']} lost" if counts["nodes_lost"] else "")),
            ("instances", ", ".join(f"{count} {state}" for state, count in instances.items() if count) or "none"),
            (
                "invocations",
                f"{counts['running']} running, {counts['waiting']} waiting"
                + (f", {found['moving']} instances being moved" if found["moving"] else ""),
            ),
        ]
    )
    storage = found.get("storage", {})
    if not storage.get("ok", True):
        click.echo(output.style(f"The store does not take writes: {storage.get('error')}", fg="red"))
    click.echo()
    output.table(
        ["node", "state", "running", "instances", "memory used", "memory", "gpus", "on disk", "in memory"],
        [
            (
                node["name"],
                "draining" if node["draining"] else "cordoned" if node["cordoned"] else node["state"],
                node["running"],
                node["instances"],
                output.size(node["memory_used_mb"] << 20),
                output.size(node["memory_mb"] << 20),
                node["gpus"],
                len(node["checkpoints"]),
                len(node["resident"]),
            )
            for node in found["nodes"]
        ],
        "There are no nodes.",
    )
    if found["queues"]:
        click.echo()
        output.table(
            ["target", "waiting", "running", "wanted", "instances", "waits for"],
            [
                (
                    line["target"],
                    line["waiting"],
                    line["running"],
                    line["desired"],
                    ", ".join(f"{count} {state}" for state, count in line["instances"].items() if count),
                    line["blocked"],
                )
                for line in found["queues"]
            ],
            "",
        )
    click.echo()
    output.table(
        ["app", "version", "functions", "instances", "deployed"],
        [
            (
                app["name"],
                app["version"] if not app["deploying"] else f"{app['version'] or '-'} → {app['deploying']}",
                app["functions"],
                app["instances"],
                f"{output.ago(app['created'])} ago",
            )
            for app in found["apps"]
        ],
        "Nothing is deployed; `sllm deploy FILE` does.",
    )
