"""A stand-in for one process of the platform: says it is ready, then does what its control file says.

`behave.json` in the state directory maps a name to: "die" (exit 7 before ready), "silent" (never ready),
"deaf" (ignores SIGTERM). Each start appends a line to starts.txt.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

name, state = sys.argv[1], Path(sys.argv[2])
try:
    how = json.loads((state / "behave.json").read_text()).get(name, "")
except FileNotFoundError:
    how = ""
with (state / "starts.txt").open("a") as file:
    file.write(f"{name} {os.getpid()}\n")
stop_read, stop_write = os.pipe()
signal.signal(signal.SIGTERM, signal.SIG_IGN if how == "deaf" else lambda *_: os.write(stop_write, b"x"))
if how == "die":
    print("Traceback: the database is not one", file=sys.stderr, flush=True)
    sys.exit(7)
if how == "grandchild" and os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()
if how != "silent":
    print(json.dumps({"time": "t", "level": "info", "component": "stub", "event": "ready", "name": name}), flush=True)
while True:
    if how == "deaf":
        signal.pause()
    os.read(stop_read, 1)
    print(json.dumps({"time": "t", "level": "info", "component": "stub", "event": "bye", "at": time.monotonic()}))
    sys.stdout.flush()
    break
