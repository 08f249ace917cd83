"""`make demo`: the whole platform once, in front of your eyes.

Starts a platform with a state directory of its own, deploys a plain function and the counting model, streams a
cold and a warm answer over HTTP with their timelines, kills a container in the middle of an answer that goes on all the
same, waits until the instance is gone again, and stops.
Exits non-zero as soon as one of the things it shows is not so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parent
SLLM = [sys.executable, "-m", "sllm_faas.cli"]


def say(text: str) -> None:
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def sllm(*args: str, quiet: bool = False) -> str:
    """Run a command as a person would, and show it."""
    if not quiet:
        print(f"$ sllm {' '.join(args)}", flush=True)
    done = subprocess.run([*SLLM, *args], capture_output=True, text=True, check=False)
    if not quiet or done.returncode:
        print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"sllm {args[0]} ended with {done.returncode}")
    return done.stdout


def stream(url: str, token: str, prompt: str, count: int, *, kill: int = 0) -> str:
    """Stream a chat completion, print it as it comes, check the numbers; the invocation's id. `kill` is a process to be
    killed in the middle."""
    body = {
        "model": "counting",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": count,
        "temperature": 0,
        "stream": True,
    }
    print(f"POST {url}/v1/chat/completions  (the model counts on from {prompt!r})", flush=True)
    began = time.perf_counter()
    text, first, last, pause = "", 0.0, began, 0.0
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=120
    ) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{answer.status_code}: {answer.read().decode()}")
        invocation = answer.headers["x-invocation-id"]
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(f"the stream failed: {chunk['error']}")
            piece = chunk["choices"][0]["delta"].get("content") or "" if chunk["choices"] else ""
            now = time.perf_counter()
            first, pause, last = first or now - began, max(pause, now - last) if first else 0.0, now
            text += piece
            print(piece, end="", flush=True)
            if kill and text.count(" ") >= 100:
                print(f" [kill -9 {kill}]", end="", flush=True)
                os.kill(kill, signal.SIGKILL)
                kill = 0
    whole = time.perf_counter() - began
    numbers = [int(word) for word in text.split()]
    start = int(prompt.split()[-1]) + 1
    if numbers != list(range(start, start + len(numbers))) or len(numbers) < count - 2:
        raise SystemExit(f"\nthe stream was cut, repeated or altered: {numbers}")
    print(
        f"\n-> {len(numbers)} numbers in order; first token after {first * 1000:.0f} ms, "
        f"longest pause {pause * 1000:.0f} ms, all after {whole * 1000:.0f} ms"
    )
    return invocation


def wait_until_no_instance(app: str, seconds: float) -> float:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if not [row for row in json.loads(sllm("ps", "--json", quiet=True)) if row["app"] == app]:
            return time.monotonic() - began
        time.sleep(0.2)
    raise SystemExit(f"{app} still has an instance after {seconds} s")


def processes_with(state: str) -> list[int]:
    """Processes whose environment names our state directory, this one aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if f"SLLM_STATE_DIR={state}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def main() -> None:
    state = tempfile.mkdtemp(prefix="sllm-demo-")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    os.environ.update(SLLM_STATE_DIR=state, SLLM_PORT=str(port), SLLM_SERVER=url, NO_COLOR="1")
    try:
        say("platform up")
        sllm("up", "--daemon")
        token = Path(state, "admin.token").read_text().strip()

        say("two apps deployed")
        sllm("deploy", str(HERE / "hello.py"))
        sllm("deploy", str(HERE / "counting/app.py"))
        wait_until_no_instance("counting", 60)

        say("a plain function, over HTTP")
        print(f"POST {url}/v1/functions/hello/greet")
        answer = httpx.post(
            f"{url}/v1/functions/hello/greet",
            json={"name": "world"},
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
        )
        print(answer.status_code, answer.text)
        if answer.status_code != 200:
            raise SystemExit("the plain function failed")

        say("a cold call: no instance runs, its answer streams")
        cold = stream(url, token, "41 42 43", 40)
        sllm("describe", "invocation", cold)

        say("a warm call: the same instance")
        warm = stream(url, token, "97 98 99", 300)
        sllm("describe", "invocation", warm)
        sllm("ps")

        say("kill -9: the container dies in the middle of an answer, the answer does not")
        (pid,) = [row["pid"] for row in json.loads(sllm("ps", "--json", quiet=True)) if row["app"] == "counting"]
        resumed = stream(url, token, "99", 400, kill=pid)
        sllm("describe", "invocation", resumed)

        say("scale to zero")
        seconds = wait_until_no_instance("counting", 60)
        print(f"no instance of counting is left; waited {seconds:.1f} s")
        sllm("ps")
    finally:
        say("platform down")
        sllm("down")
    left = processes_with(state)
    if left:
        raise SystemExit(f"processes left behind: {left}")
    shutil.rmtree(state)
    print("no process left")


if __name__ == "__main__":
    main()
