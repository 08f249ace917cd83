"""A hundred functions, each in a container of its own."""

import sllm

app = sllm.App("many")


async def _echo(value: str) -> str:
    return value


def _define(name: str) -> None:
    async def echo(value: str) -> str:
        return value

    echo.__name__ = echo.__qualname__ = name
    globals()[name] = app.function(memory=64, scaledown_window=3600, max_containers=1)(
        sllm.concurrent(max_inputs=64)(echo)
    )


for _number in range(100):
    _define(f"echo_{_number}")
