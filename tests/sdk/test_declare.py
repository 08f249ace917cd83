"""What a user writes becomes the spec it says; what cannot work is refused where it is written, with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sllm
from sllm._runtime import bind_arguments, resolve

from sllm_faas.errors import BadRequest, BadSpec, ImportFailed, NotFound
from sllm_faas.spec import Batching, FunctionSpec, MethodSpec, ParameterSpec, RetryPolicy, Scaling, Timeouts

app = sllm.App("declared", weight=2)


@app.function
def plain(x: int, y: int = 0) -> int:
    """Adds."""
    return x + y


@app.function()
async def asynchronous(x: int) -> int:
    return x


@app.function
def numbers(n: int) -> Iterator[int]:
    yield from range(n)


@app.function
async def async_numbers(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


@app.function(
    name="tuned",
    timeout=30,
    retries=3,
    secrets=["A", sllm.Secret.from_name("B"), "A"],
    memory=512,
    min_containers=1,
    max_containers=2,
    buffer_containers=1,
    scaledown_window=5,
    max_queue=7,
    cancel_grace=1,
    checkpoint="org/model",
    gpu="any",
)
@sllm.concurrent(max_inputs=9)
async def with_options(x: int) -> int:
    return x


@app.function
@sllm.batched(max_batch_size=4, wait_ms=20)
def doubled(xs: list[int]) -> list[int]:
    return [2 * x for x in xs]


@app.function
@sllm.batched(max_batch_size=4)
async def async_doubled(xs: list[int]) -> list[int]:
    return [2 * x for x in xs]


class Base:
    @sllm.enter
    def base_enter(self) -> None:
        self.log: list[str] = ["base"]


@app.cls(max_containers=1)
class Greeter(Base, sllm.Parameters):
    language: str = sllm.parameter(default="en")
    volume: float = sllm.parameter(default=1)

    def __init__(self) -> None:
        self.made = f"{self.language}/{self.volume}"

    @sllm.enter()
    def open(self) -> None:
        self.log.append("greeter")

    @sllm.exit
    async def close(self) -> None:
        self.log.append("closed")

    @sllm.method
    def greet(self, name: str) -> str:
        return f"{self.made} {name}"

    @sllm.method()
    def twice(self, name: str) -> str:
        return self.greet.local(name) * 2

    @sllm.method
    @sllm.batched(max_batch_size=8)
    def lengths(self, names: list[str]) -> list[int]:
        return [len(name) for name in names]

    @sllm.method
    async def letters(self, name: str) -> AsyncIterator[str]:
        for letter in name:
            yield letter


llm = app.llm("chatty", Path("/models/chatty"), concurrency=4)

undecorated = 3


@app.local_entrypoint
def main(n: int = 1) -> None: ...


def spec(name: str) -> FunctionSpec:
    return next(spec for spec in app.functions if spec.name == name)


def test_each_kind_of_function_is_described_as_what_it_is() -> None:
    assert spec("plain").methods == (MethodSpec("plain"),)
    assert spec("asynchronous").methods == (MethodSpec("asynchronous", is_async=True),)
    assert spec("numbers").methods == (MethodSpec("numbers", stream=True),)
    assert spec("async_numbers").methods == (MethodSpec("async_numbers", stream=True, is_async=True),)
    assert (spec("plain").module, spec("plain").qualname) == (__name__, "plain")


def test_every_option_reaches_the_spec() -> None:
    tuned = spec("tuned")
    assert tuned.qualname == "with_options"
    assert tuned.timeouts == Timeouts(execution=30)
    assert tuned.retries == RetryPolicy(max_retries=3)
    assert tuned.secrets == ("A", "B")
    assert tuned.scaling == Scaling(1, 2, 1, 5)
    assert (tuned.memory_mb, tuned.max_queue, tuned.cancel_grace, tuned.concurrency) == (512, 7, 1, 9)
    assert tuned.checkpoint == sllm.Checkpoint("org/model")
    assert tuned.gpus == 1


def test_a_batched_function_is_one_call_over_lists_for_the_platform_and_of_one_for_local_callers() -> None:
    assert spec("doubled").methods[0].batching == Batching(4, 20)
    assert spec("doubled").concurrency == 4
    assert doubled.local(3) == 6
    assert asyncio.run(async_doubled.local(3)) == 6  # type: ignore[arg-type]


def test_a_class_is_described_with_methods_and_parameters() -> None:
    greeter = spec("Greeter")
    assert greeter.kind == "class"
    assert [method.name for method in greeter.methods] == ["greet", "twice", "lengths", "letters"]
    assert greeter.parameters == (
        ParameterSpec("language", "str", required=False, default="en"),
        ParameterSpec("volume", "float", required=False, default=1.0),
    )
    assert greeter.concurrency == 8


def test_a_language_model_needs_no_code() -> None:
    chatty = spec("chatty")
    assert (chatty.kind, chatty.module, chatty.concurrency) == ("llm", "", 4)
    assert chatty.checkpoint == sllm.Checkpoint("/models/chatty")
    assert llm.model == "declared/chatty"


def test_the_app_spec_names_the_bundle_and_its_libraries() -> None:
    whole = app.spec("0" * 64, ("numpy",))
    assert (whole.name, whole.weight, whole.bundle) == ("declared", 2.0, "0" * 64)
    assert whole.function("plain").libs == ("numpy",)  # type: ignore[union-attr]
    assert whole.function("chatty").libs == ()  # type: ignore[union-attr]
    with pytest.raises(BadSpec, match="no bundle"):
        app.spec()


def test_local_runs_the_code_here() -> None:
    assert plain.local(1, y=2) == 3
    assert list(numbers.local(3)) == [0, 1, 2]
    assert asyncio.run(asynchronous.local(3)) == 3
    greeter = Greeter(language="de")
    assert greeter.twice.local("a") == "de/1.0 ade/1.0 a"
    assert greeter.lengths.local("abc") == 3


def test_a_container_makes_the_object_and_runs_the_hooks_base_first() -> None:
    found = resolve(__name__, "Greeter")
    obj = found.instantiate('{"language":"fr"}')
    for hook in found.enter:
        hook(obj)
    assert obj.log == ["base", "greeter"]
    assert found.method("greet", obj).raw("x") == "fr/1.0 x"
    assert found.method("lengths", obj).raw(["a", "bc"]) == [1, 2]
    assert found.method("letters").stream
    for hook in found.exit:
        asyncio.run(hook(obj))
    assert obj.log == ["base", "greeter", "closed"]
    with pytest.raises(NotFound, match="greet, twice"):
        found.method("shout", obj)


def test_a_container_finds_functions_and_says_what_is_wrong_otherwise() -> None:
    assert resolve(__name__, "plain").method().raw(1, 2) == 3
    for name in ("nothing", "undecorated", "Base", "spec"):
        with pytest.raises(ImportFailed, match=f"{name} is"):
            resolve(__name__, name)


def by_hand(x: int) -> int:
    return x


handle = app.function(name="by-hand")(by_hand)


def test_a_function_registered_by_hand_is_found_by_its_code() -> None:
    assert resolve(__name__, "by_hand").method().raw(3) == 3
    assert handle.name == "by-hand"


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"z": 1}), ((1,), {"x": 1})])
def test_a_call_that_does_not_fit_the_signature_is_the_callers_error(args: Any, kwargs: Any) -> None:
    with pytest.raises(BadRequest, match=r"plain\(x: .*int.* was called wrongly"):
        bind_arguments(resolve(__name__, "plain").method().raw, args, kwargs)


@pytest.mark.parametrize(
    "values", [{"language": 3}, {"volume": "loud"}, {"volume": True}, {"speed": 1}, {"volume": float("nan")}]
)
def test_wrong_parameter_values_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=next(iter(values))):
        Greeter(**values)


def test_equal_parameter_values_name_the_same_target_however_written() -> None:
    written: list[dict[str, Any]] = [{}, {"volume": 1}, {"language": "en", "volume": 1.0}]
    assert len({Greeter(**values).greet._address for values in written}) == 1


def test_a_subclass_of_a_registered_class_extends_the_code() -> None:
    class Loud(Greeter): ...

    assert issubclass(Loud, Base)


def test_wrong_ways_of_calling_say_the_right_one() -> None:
    anything: Any = plain
    with pytest.raises(TypeError, match=r"plain\.remote\(…\)"):
        anything(1)
    with pytest.raises(AttributeError, match=r"not a generator: call \.remote"):
        anything.stream(1)
    generator: Any = numbers
    with pytest.raises(AttributeError, match=r"is a generator: call \.stream"):
        generator.remote(1)
    cls: Any = Greeter
    with pytest.raises(AttributeError, match=r"called on an object: Greeter\(language=…, volume=…\)\.greet"):
        _ = cls.greet
    with pytest.raises(AttributeError, match="no remote method 'shout'; allowed: greet"):
        _ = cls().shout
    with pytest.raises(BadRequest, match="by name"):
        cls("de")


# -- mistakes ------------------------------------------------------------------------------------------------


def nested_function(fresh: sllm.App) -> None:
    @fresh.function
    def inner() -> None: ...


def nested_class(fresh: sllm.App) -> None:
    @fresh.cls
    class Inner:
        @sllm.method
        def go(self) -> None: ...


def concurrent_above(fresh: sllm.App) -> None:
    sllm.concurrent(max_inputs=2)(fresh.function(by_hand))


def batched_above(fresh: sllm.App) -> None:
    fix: Any = sllm.batched(max_batch_size=2)
    fix(fresh.function(by_hand))


def twice_registered(fresh: sllm.App) -> None:
    fix: Any = fresh.function
    fix(fresh.function(by_hand))


def same_name(fresh: sllm.App) -> None:
    fresh.function(by_hand)
    fresh.llm("by_hand", "org/model")


def batched_generator(fresh: sllm.App) -> None:
    fix: Any = sllm.batched(max_batch_size=2)
    fresh.function(fix(lambda_free_generator))


def lambda_free_generator(xs: list[int]) -> Iterator[int]:
    yield from xs


class NoMethods: ...


class BadParameter:
    data: list[int] = sllm.parameter()

    @sllm.method
    def go(self) -> None: ...


class BadDefault:
    size: int = sllm.parameter(default="x")

    @sllm.method
    def go(self) -> None: ...


class NeedsArguments:
    def __init__(self, size: int) -> None: ...

    @sllm.method
    def go(self) -> None: ...


class Hooked:
    def generator(self) -> Iterator[int]:
        yield 1

    def go(self) -> None: ...


def test_generators_say_for_themselves_that_they_can_go_on() -> None:
    fresh = sllm.App("fresh")
    fresh.function(resumable=True)(lambda_free_generator)
    fresh.function(name="plain")(lambda_free_generator)
    specs = [function.methods[0] for function in fresh.functions]
    assert [method.resumable for method in specs] == [True, False]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (nested_function, "defined inside a function"),
        (nested_class, "defined inside a function"),
        (concurrent_above, "put it below"),
        (batched_above, "put it below"),
        (twice_registered, "stands above"),
        (same_name, "two functions named 'by_hand'"),
        (batched_generator, "generator and batched"),
        (lambda fresh: fresh.function(lambda x: x), "is a lambda"),
        (lambda fresh: fresh.function(by_hand, resumable=True), "resumable but no generator"),
        (lambda fresh: fresh.function(resumable=1)(lambda_free_generator), "allowed: True or False"),  # type: ignore[call-overload]
        (lambda fresh: sllm.method(resumable=True)(by_hand), "resumable but no generator"),
        (lambda fresh: fresh.cls(resumable=True)(Hooked), "has no option 'resumable'"),
        (lambda fresh: fresh.function(print), "defined with `def`"),
        (lambda fresh: fresh.function(Hooked), "use @app.cls"),
        (lambda fresh: fresh.function(Hooked.go), "is a method"),
        (lambda fresh: fresh.function(staticmethod(by_hand)), "staticmethod"),
        (lambda fresh: fresh.cls(by_hand), "allowed: classes"),
        (lambda fresh: fresh.cls(NoMethods), "at least one with @sllm.method"),
        (lambda fresh: fresh.cls(BadParameter), "allowed: str, int, float, bool"),
        (lambda fresh: fresh.cls(BadDefault), "has the default 'x'"),
        (lambda fresh: fresh.cls(NeedsArguments), r"__init__ that needs size.*sllm\.parameter"),
        (lambda fresh: sllm.enter(Hooked.generator), "is a generator"),
        (lambda fresh: sllm.enter(3), "allowed: methods"),  # type: ignore[type-var]
        (lambda fresh: fresh.local_entrypoint(lambda_free_generator), "is a generator"),
        (lambda fresh: sllm.concurrent(max_inputs=0), "allowed: 1 to 10000"),
        (lambda fresh: sllm.batched(max_batch_size=0), "allowed: 1 to"),
        (lambda fresh: sllm.batched(max_batch_size=2, wait_ms=-1), "allowed: 0 to"),
        (lambda fresh: sllm.App("Bad_Name"), "lower-case"),
        (lambda fresh: sllm.App(3), "allowed: text"),  # type: ignore[arg-type]
        (lambda fresh: sllm.App("x", weight=0), "0.01 to 1000"),
        (lambda fresh: fresh.llm("x", "./model"), r"Path\(__file__\)"),
        (lambda fresh: fresh.llm("x", ""), "checkpoint source"),
        (lambda fresh: fresh.llm("x y", "org/m"), "not a valid name"),
    ],
)
def test_mistakes_are_refused_where_they_are_made(mistake: Callable[[sllm.App], object], message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        mistake(sllm.App("fresh"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memry": 1}, "Did you mean 'memory'"),
        ({"memory": 0}, "allowed: 1 to"),
        ({"memory": 1.5}, "an integer"),
        ({"memory": True}, "an integer"),
        ({"max_containers": 0}, "allowed: 1 to"),
        ({"min_containers": 9, "max_containers": 2}, "at most max_containers"),
        ({"scaledown_window": "1"}, "number of seconds"),
        ({"timeout": 0}, "allowed: 0.001"),
        ({"timeout": "1m"}, r"sllm\.Timeouts"),
        ({"timeout": float("nan")}, "allowed: 0.001"),
        ({"retries": -1}, "max_retries"),
        ({"retries": 1.5}, r"sllm\.Retries"),
        ({"secrets": "A"}, "a list of names"),
        ({"secrets": ["no good"]}, "secret 'no good'"),
        ({"secrets": [3]}, "secrets holds 3"),
        ({"max_queue": -1}, "max_queue"),
        ({"cancel_grace": -1}, "cancel_grace"),
        ({"name": "1x"}, "not a valid name"),
        ({"name": 3}, "allowed: text"),
        ({"checkpoint": 3}, "allowed: a path"),
        ({"gpu": "H100"}, "gpu is 'H100'; allowed"),
        ({"gpu": 2}, "gpu is 2; allowed"),
        ({"gpu": True}, "gpu is True"),
        ({"gpu": [1]}, "gpu is "),
    ],
)
def test_options_out_of_range_are_refused_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSpec, match=message):
        sllm.App("fresh").function(**options)(by_hand)
