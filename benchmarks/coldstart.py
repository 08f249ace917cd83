"""Time to first token over HTTP with no instance running, by tier and by warmth.

Beside it, in the same run: the same request to a running instance (warm), and a fresh process that imports, loads with
`from_pretrained` and generates. Random bf16 Llamas, a prompt of sixteen words, greedy.

    tier      dram: the checkpoint is in the store's slabs.   disk: it is not, and nothing of it is in the page cache
              remote: it is not on this machine's disk either, but behind http on the loopback interface
    warmth    template: skeleton and tokenizer are made.      libs: torch and transformers are imported
              From the mirror with only the libraries: a node begun anew, since a template that ended would be made
              again while the weights are on their way.

Floor of a start (what no implementation can beat): the forward pass, which is what warm takes; from disk, the larger of
that and reading the file as fast as fio does with O_DIRECT; from the mirror, the larger of these and a plain fetch. The
tier and the warmth of each start are taken from its own timeline, so that no figure stands for something else. Before
each, nothing has been asked for a second and a half: an idle function is what starts cold, and what a node makes ahead
of need (`containers/zygote.py`) is there by then.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import mirror, models
from benchmarks.common import Platform, Report, arguments, platform_up, table
from benchmarks.disk import drop, fill, fio, limit

REST = 1.5
"""Seconds before each start without a request: an idle function is what starts cold."""
APP = """
import sllm

app = sllm.App("cold")
for name, path in {paths!r}.items():
    app.llm(name, checkpoint=sllm.Checkpoint(path), concurrency=1, scaledown_window=3600, max_containers=1)
"""
FRESH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
given = tokenizer(sys.argv[2], return_tensors="pt")
out = model.generate(**given, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(out[0, -1:]), flush=True)
"""
DRAM_LIMIT = 1.25
DISK_LIMIT = 1.15
FRESH_LIMIT = 15.0
COLD = (("dram", "template"), ("dram", "libs"), ("disk", "template"), ("disk", "libs"))
REMOTE = (("remote", "template"), ("remote", "libs"))
"""The second for the small model alone: from a mirror nearly all is conversion, whatever layer is there."""


@dataclass
class Start:
    """One request: seconds to its first token, and where they went."""

    seconds: float
    text: str
    cold: bool
    spans: dict[str, tuple[float, float, str]]

    @property
    def tier(self) -> str:
        if "pull" in self.spans:
            return "remote"
        return self.spans["checkpoint"][2].partition("tier=")[2].partition(" ")[0]

    @property
    def warmth(self) -> str:
        return self.spans["fork"][2].removeprefix("from ").partition(",")[0]


@dataclass
class Client:
    """What a user does: one request at a time, and what an operator may do between."""

    platform: Platform

    def call(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(self.platform.url + path, method=method, headers=self.platform.headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def first_token(self, function: str) -> Start:
        """Until the first token's event has come, on a connection of its own."""
        host, port = self.platform.url.removeprefix("http://").split(":")
        body = {"model": f"cold/{function}", "prompt": models.PROMPT, "max_tokens": 1, "temperature": 0, "stream": True}
        began = time.perf_counter()
        connection = http.client.HTTPConnection(host, int(port), timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), self.platform.headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {answer.read()[:2000]!r}")
        while not (line := answer.readline()).startswith(b"data: {"):
            if not line:
                raise SystemExit("the answer ended before its first token")
        seconds = time.perf_counter() - began
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise SystemExit(f"the request failed: {event['error']}")
        invocation = answer.headers["X-Invocation-ID"]
        answer.read()
        connection.close()
        record = self.call(f"/v1/invocations/{invocation}")
        spans = {each["name"]: (each["start"], each["seconds"], each["detail"]) for each in record["timeline"]}
        return Start(seconds, event["choices"][0]["text"], record["cold"], spans)

    def stop_all(self) -> None:
        """No instance is left. One stopped before the controller knows that nobody waits is replaced: stopped again."""
        while instances := self.call("/v1/instances")["instances"]:
            for each in instances:
                if each["state"] != "draining":
                    self.call(f"/v1/instances/{each['instance']}", "DELETE")
            time.sleep(0.1)

    def end_templates(self) -> None:
        """The next start finds the libraries' layer: the invoker knows that they are gone and has not made new ones."""
        killed = {each["pid"] for each in self._said("zygote_ready") if each["layer"].startswith("template:")}
        killed = {pid for pid in killed if _kill(pid)}
        deadline = time.monotonic() + 5.0
        while not killed <= {each["pid"] for each in self._said("zygote_died")}:
            if time.monotonic() > deadline:
                raise SystemExit(f"the invoker did not notice within 5 s that templates {sorted(killed)} were killed")
            time.sleep(0.002)

    def renew(self) -> None:
        """The invoker begins anew: it has no layers, and makes those that are asked for."""

        def life() -> str:
            return next((node["life"] for node in self.call("/v1/nodes")["nodes"] if node["state"] == "up"), "")

        before = life()
        os.kill(self.platform.child("node-0"), signal.SIGKILL)
        while life() in ("", before):
            time.sleep(0.1)

    def _said(self, event: str) -> list[dict[str, Any]]:
        """What the platform's processes logged under that name."""
        lines = (line for path in self.platform.state.glob("logs/*.jsonl") for line in path.read_text().splitlines())
        return [json.loads(line) for line in lines if f'"{event}"' in line]


def _kill(pid: int) -> bool:
    """Whether there was such a process."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


@dataclass
class Case:
    """A model under measurement: `function` is asked, `other` is of the same size and pushes it out of memory; `far` is
    the same model by its URL."""

    shape: str
    client: Client
    source: Path
    part: Path
    url: str
    function: str = "a"
    other: str = "b"
    far: str = "far"
    starts: dict[str, list[Start]] = field(default_factory=dict)
    disk: list[dict[str, float]] = field(default_factory=list)
    network: list[float] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return self.part.stat().st_size

    def warm(self) -> None:
        self._note("warm", self.client.first_token(self.function))

    def cold(self, tier: str, warmth: str) -> None:
        """One start, of which its own timeline says that it was what is asked for."""
        client = self.client
        client.stop_all()
        if tier == "disk":
            client.first_token(self.other)
            client.stop_all()
            drop([self.part])
            if warmth == "template":
                self.disk.append(fio(self.part))
        if tier == "remote":
            self.network.append(mirror.rate(f"{self.url}/model.safetensors"))
            client.platform.sllm("checkpoint", "rm", self.part.parent.name)
            if warmth == "libs":
                client.renew()
                client.first_token(self.other)
                client.stop_all()
        time.sleep(REST)
        if warmth == "libs" and tier != "remote":
            client.end_templates()
        start = client.first_token(self.far if tier == "remote" else self.function)
        if not start.cold or (start.tier, start.warmth) != (tier, warmth):
            raise SystemExit(f"wanted a start from {tier} and {warmth}, got one from {start.tier} and {start.warmth}")
        self._note(f"{tier}, {warmth}", start)

    def fresh(self, *, cached: bool) -> None:
        """A process of its own, as one would write it without a platform."""
        self.client.stop_all()
        drop([self.source / "model.safetensors"])
        if cached:
            fill(self.source / "model.safetensors")
        began = time.perf_counter()
        command = [sys.executable, "-c", FRESH, str(self.source), models.PROMPT]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
        ) as process:
            assert process.stdout is not None
            text = process.stdout.readline().strip()
            seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"the fresh process failed ({process.returncode})")
        name = "fresh process, cached" if cached else "fresh process, disk"
        self._note(name, Start(seconds, text, True, {}))

    def _note(self, name: str, start: Start) -> None:
        self.starts.setdefault(name, []).append(start)
        print(f"{self.shape} {name}: {start.seconds * 1e3:.0f} ms", flush=True)

    def median(self, name: str) -> float:
        return statistics.median(start.seconds for start in self.starts[name])


@contextlib.contextmanager
def deployed(shape: str, root: Path) -> Iterator[Case]:
    """A platform whose memory for checkpoints holds one of this size, with two of them deployed."""
    source, other = root / shape, root / f"{shape}-b"
    models.build(shape, source, variants=[other])
    size = (source / "model.safetensors").stat().st_size // 2**20
    with mirror.mirror(root) as url, platform_up("--dram-mb", str(size * 5 // 4 + 128)) as platform:
        app = platform.state / "coldstart_app.py"
        app.write_text(APP.format(paths={"a": str(source), "b": str(other), "far": f"{url}/{shape}"}))
        platform.sllm("deploy", str(app))
        client = Client(platform)
        client.first_token("b")
        client.stop_all()
        digest = client.call("/v1/functions/cold/a")["checkpoint"]["digest"]
        objects = platform.state / "checkpoints" / "objects" / digest
        yield Case(shape, client, source, next(objects.glob("*.safetensors")), f"{url}/{shape}")


def measure(case: Case, rounds: int, fresh: int, remote: int) -> None:
    case.client.first_token("a")
    for number in range(rounds):
        for tier, warmth in COLD:
            case.cold(tier, warmth)
            case.warm()
            case.warm()
        if number < fresh:
            case.fresh(cached=False)
            case.fresh(cached=True)
            case.client.first_token("a")
        if number < remote:
            for tier, warmth in REMOTE if case.shape == "110M" else REMOTE[:1]:
                case.cold(tier, warmth)
                case.client.stop_all()
                case.client.first_token("a")


def show(case: Case, report: Report) -> None:
    shape, warm = case.shape, case.median("warm")
    read = case.bytes / (limit(case.disk) * 1e9)
    fetch = case.bytes / (statistics.median(case.network) * 1e9)
    floors = {"dram": warm, "disk": max(read, warm), "remote": max(fetch, read, warm)}
    dram, disk = case.median("dram, template"), case.median("disk, template")
    print(f"\n{shape}, {case.bytes / 1e9:.2f} GB, 16-token prompt: time to first token, ms")
    rows = []
    for name, starts in case.starts.items():
        floor = floors.get(name.partition(",")[0])
        seconds = case.median(name)
        best, worst = min(start.seconds for start in starts), max(start.seconds for start in starts)
        rows.append(
            [name, f"{seconds * 1e3:.0f}", f"{best * 1e3:.0f}", f"{worst * 1e3:.0f}", len(starts)]
            + ([f"{floor * 1e3:.0f}", f"{seconds / floor:.2f}"] if floor else ["", ""])
        )
        report.figure(f"{shape}_{name.replace(', ', '_').replace(' ', '_')}_ms", seconds * 1e3)
        if floor:
            report.figure(f"{shape}_{name.replace(', ', '_')}_over_floor", seconds / floor)
    table(["start", "median", "best", "worst", "runs", "floor", "achieved / floor"], rows)
    print(f"fio reads it in {read * 1e3:.0f} ms ({limit(case.disk):.2f} GB/s)")
    report.figure(f"{shape}_fio_read_ms", read * 1e3)
    report.figure(f"{shape}_mirror_fetch_ms", fetch * 1e3)
    ratio = case.median("fresh process, cached") / dram
    report.figure(f"{shape}_fresh_over_dram", ratio)
    print(f"the fresh process takes {ratio:.1f} times as long as a start from DRAM")
    for name in ("dram, template", "disk, template", "remote, template"):
        print(f"\n{shape}, {name}, median span, ms from the request")
        starts = case.starts[name]
        spread = [
            (span, *(statistics.median(s.spans[span][i] for s in starts if span in s.spans) * 1e3 for i in (0, 1)))
            for span in starts[0].spans
        ]
        table(["span", "from", "takes"], [[span, f"{at:.1f}", f"{took:.1f}"] for span, at, took in spread])
    if shape == "1.1B":
        report.at_most("1.1B: DRAM tier / warm", dram / warm, DRAM_LIMIT)
        report.at_most(
            "1.1B: (disk tier - what DRAM adds) / floor", (disk - (dram - warm)) / floors["disk"], DISK_LIMIT
        )
    else:
        report.at_least(f"{shape}: fresh process / DRAM tier", ratio, FRESH_LIMIT)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--models", default="", help="some of 110M, 1.1B by comma; default: both, --quick: 110M")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where models are made, and kept, on the disk to measure")
    options = parser.parse_args()
    names = options.models.split(",") if options.models else ["110M"] if options.quick else list(models.SHAPES)
    rounds = options.rounds or (2 if options.quick else 5)
    report = Report("coldstart")
    os.environ["SLLM_TRUSTED_SOURCES"] = "127.0.0.1"  # where the mirror is
    with tempfile.TemporaryDirectory(prefix="sllm-coldstart-") as scratch:
        for shape in names:
            with deployed(shape, options.directory or Path(scratch)) as case:
                measure(case, rounds, fresh=1 if options.quick else 2, remote=1 if options.quick else 3)
                show(case, report)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
