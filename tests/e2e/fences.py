"""What a platform says of frames that were not believed, and of what still runs."""

from __future__ import annotations

import httpx

from tests.e2e.conftest import Platform


def metrics(platform: Platform, name: str) -> dict[str, float]:
    """The samples of a metric with one label, by that label's value."""
    found = {}
    for line in httpx.get(f"{platform.url}/metrics", timeout=30).text.splitlines():
        if line.startswith(f"{name}{{"):
            labels, _, value = line.partition("} ")
            found[labels.split('"')[1]] = float(value)
    return found


def dropped(platform: Platform, reason: str) -> float:
    return metrics(platform, "sllm_frames_dropped_total").get(reason, 0.0)


def nothing_runs(platform: Platform) -> bool:
    """Every node is up, and no instance of any runs anything."""
    nodes = platform.get("/v1/nodes")["nodes"]
    rows = platform.get("/v1/instances")["instances"]
    return all(node["state"] == "up" for node in nodes) and not any(row["running"] for row in rows)
