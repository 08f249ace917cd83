"""A class: state that is made once per instance, and parameters that give each value instances of its own.

    sllm run examples/counter_class.py

prints

    apples: 1 2 3
    pears: 1
    batched: [10, 20, 30]
    counted 3 apples
    counted 1 pears

`enter` runs once before the first call of an instance, `exit` once when it stops, as the last two lines show.
Counters with different `fruit` never share an instance, so pears start at 1. (How long one instance lives, and so
how far it counts, is up to the platform: state that must last belongs into a database.)
"""

from __future__ import annotations

import sllm

app = sllm.App("counter")


@app.cls(max_containers=1)
class Counter(sllm.Parameters):
    fruit: str = sllm.parameter()

    @sllm.enter
    def open(self) -> None:
        self.count = 0

    @sllm.exit
    def close(self) -> None:
        print(f"counted {self.count} {self.fruit}")

    @sllm.method
    def add(self, amount: int = 1) -> int:
        self.count += amount
        return self.count


@app.function
@sllm.batched(max_batch_size=8, wait_ms=20)
def tenfold(numbers: list[int]) -> list[int]:
    """Called with single numbers; the platform gathers those that come together into one call."""
    return [number * 10 for number in numbers]


@app.local_entrypoint
def main() -> None:
    apples, pears = Counter(fruit="apples"), Counter(fruit="pears")
    print("apples:", *(apples.add.remote() for _ in range(3)))
    print("pears:", pears.add.remote())
    print("batched:", list(tenfold.map([1, 2, 3])))
