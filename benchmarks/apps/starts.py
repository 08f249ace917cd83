"""Functions of benchmarks/starts.py: of every kind of start there is. The models are where MODELS says."""

import os
import time
from pathlib import Path

import sllm

COUNTING = Path(__file__).parents[2] / "examples/counting/model"
MODELS = Path(os.environ["SLLM_BENCH_MODELS"])
KEEP = {"scaledown_window": 3600, "max_containers": 1}
app = sllm.App("starts")


@app.function(memory=64, **KEEP)
def plain(value: int) -> int:
    return value


@app.cls(memory=64, **KEEP)
class Slow:
    """Half of its start is waiting, as for a connection, and half of it computing."""

    @sllm.enter()
    def enter(self) -> None:
        time.sleep(0.15)
        end = time.process_time() + 0.15
        while time.process_time() < end:
            sum(range(1000))

    @sllm.method()
    def value(self, value: int) -> int:
        return value


app.llm("counting", checkpoint=COUNTING, concurrency=1, memory=256, **KEEP)
for _name in ("a", "b"):
    app.llm(f"model-{_name}", checkpoint=MODELS / _name, concurrency=1, memory=512, **KEEP)
