"""A plain function: called here, called elsewhere, and called for many inputs at once.

    sllm run examples/hello.py              # no server: the platform runs inside this process
    sllm run examples/hello.py --name you
    sllm run examples/hello.py::square --x 3

The first prints

    hello, world
    squares: [0, 1, 4, 9, 16]
    halves: [0.5, ZeroDivisionError('division by zero'), 2.0]

and after `sllm deploy examples/hello.py`

    curl localhost:8700/v1/functions/hello/greet -H 'content-type: application/json' -d '{"name": "world"}'

answers "hello, world".
"""

from __future__ import annotations

import sllm

app = sllm.App("hello")


@app.function
def greet(name: str) -> str:
    return f"hello, {name}"


@app.function
def square(x: int) -> int:
    return x * x


@app.function
def divide(x: float, y: float) -> float:
    return x / y


@app.local_entrypoint
def main(name: str = "world") -> None:
    print(greet.remote(name))
    print("squares:", list(square.map(range(5))))
    print("halves:", list(divide.starmap([(1, 2), (1, 0), (4, 2)], return_exceptions=True)))
