"""Arguments and results as bytes: what goes in comes out, what cannot go in says where, what is not ours is refused."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sllm_faas.errors import BadRequest, BadResult
from sllm_faas.wire import payload
from sllm_faas.wire.payload import (
    decode,
    decode_call,
    decode_result,
    encode,
    encode_call,
    encode_result,
    to_json,
    types_of,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    value: Any
    children: tuple[Tree, ...] = ()


@dataclasses.dataclass
class Derived:
    side: int
    area: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.area = self.side**2


class Positive(pydantic.BaseModel):
    value: int = pydantic.Field(gt=0)
    name: str = pydantic.Field(default="", alias="theName")
    inner: Point | None = None


class Pair(NamedTuple):
    left: int
    right: str


def here(module: str, qualname: str) -> type | None:
    found = globals().get(qualname) if module == __name__ else None
    return found if isinstance(found, type) else None


def again(value: Any) -> Any:
    return decode(encode(value), here)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.datetimes()
    | st.datetimes(timezones=st.just(datetime.UTC))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.sampled_from(Colour)
)
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.frozensets(st.integers() | st.text())
        | st.sets(st.integers())
        | st.builds(Point, inner, inner)
        | st.builds(Tree, inner, st.lists(st.builds(Tree, inner), max_size=3).map(tuple))
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down (1 == True == 1.0 is not enough)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


@given(values)
def test_every_value_comes_back_equal_and_of_its_own_type(value: Any) -> None:
    assert same(again(value), value)


dtypes = st.sampled_from(["?", "i1", "u1", "<i2", ">i4", "<u8", "<f2", ">f4", "<f8", "<c8", "<c16"]).map(np.dtype)


@given(hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
def test_arrays_come_back_with_shape_kind_and_content(array: Any) -> None:
    back = again({"a": array, "t": array.T})
    np.testing.assert_array_equal(back["a"], array)
    np.testing.assert_array_equal(back["t"], array.T)
    assert back["a"].shape == array.shape
    assert (back["a"].dtype.kind, back["a"].dtype.itemsize) == (array.dtype.kind, array.dtype.itemsize)
    assert back["a"].flags.writeable


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(2.5)])
def test_numpy_scalars_stay_numpy_scalars(value: Any) -> None:
    back = again(value)
    assert back == value
    assert type(back) is type(value)


def test_numpy_text_becomes_text() -> None:
    assert again(np.str_("x")) == "x"


@pytest.mark.parametrize(
    "array", [np.array([object()]), np.array(["a"]), np.array([(1, 2.0)], dtype="i4,f4"), np.array(["2020"], "M8[D]")]
)
def test_arrays_of_anything_but_numbers_are_refused(array: Any) -> None:
    with pytest.raises(BadResult, match=r"\$\.x: .*dtype"):
        encode({"x": array})


def test_models_are_validated_when_they_arrive() -> None:
    model = Positive(value=3, theName="n", inner=Point(1, 2.0))
    assert again(model) == model
    forged = encode(model).replace(b"\xa5value\x03", b"\xa5value\xff")
    with pytest.raises(BadRequest, match="Positive cannot be built"):
        decode(forged, here)


def test_subclasses_of_plain_types_arrive_as_what_they_extend() -> None:
    class MyInt(int): ...

    class MyStr(str): ...

    class MyDict(dict[str, int]): ...

    class MyList(list[int]): ...

    value = {"i": MyInt(3), "s": MyStr("x"), "d": MyDict(a=1), "l": MyList([1])}
    assert same(again(value), {"i": 3, "s": "x", "d": {"a": 1}, "l": [1]})


def test_computed_fields_survive() -> None:
    derived = Derived(3)
    derived.area = 10
    assert again(derived) == derived


def test_a_result_that_its_own_type_refuses_is_a_bad_result() -> None:
    forged = encode(Positive(value=3)).replace(b"\xa5value\x03", b"\xa5value\xff")
    with pytest.raises(BadResult, match=r"cannot be decoded: .*Positive"):
        decode_result("msgpack", forged, here)
    assert decode_result("msgpack", encode(Positive(value=3)), here) == Positive(value=3)
    assert decode_result("json", b"[1]") == [1]


def test_flags_and_paths_come_back() -> None:
    assert again(Rights.READ | Rights.WRITE) == Rights.READ | Rights.WRITE
    assert again(Path("/a/b")) == Path("/a/b")


def test_a_type_that_cannot_be_had_is_a_plain_dict_or_value() -> None:
    def nothing(module: str, qualname: str) -> None:
        return None

    assert decode(encode([Point(1, 2.0), Pair(1, "r"), Colour.RED]), nothing) == [
        {"x": 1, "y": 2.0},
        {"left": 1, "right": "r"},
        "red",
    ]


def test_what_the_wire_names_is_never_imported_nor_called() -> None:
    import sys

    assert "antigravity" not in sys.modules
    for name in ("antigravity:Nothing", "os:system", "subprocess:Popen", "builtins:eval", "", ":", "os:path.join"):
        inner = msgpack.packb([name, {"args": "true"}])
        assert decode(msgpack.packb(msgpack.ExtType(payload.OBJECT, inner))) == {"args": "true"}
    assert "antigravity" not in sys.modules


def test_a_container_builds_only_types_that_its_own_modules_name(tmp_path: Path, monkeypatch: Any) -> None:
    import importlib
    import sys

    (tmp_path / "mine_payload.py").write_text(
        "import dataclasses\nfrom fractions import Fraction\nfrom other_payload import Named\n"
        "@dataclasses.dataclass\nclass Own:\n    x: int\n"
    )
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "other_payload.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Named:\n    x: int\n"
        "@dataclasses.dataclass\nclass Hidden:\n    x: int\n"
    )
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "mine_payload.py").rename(root / "mine_payload.py")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.syspath_prepend(str(outside))
    mine = importlib.import_module("mine_payload")
    resolve = types_of(root)
    try:
        assert resolve("mine_payload", "Own") is mine.Own
        assert resolve("other_payload", "Named") is mine.Named
        assert resolve("other_payload", "Hidden") is None
        assert resolve("mine_payload", "nothing") is None
        assert resolve("pathlib", "Path") is None
    finally:
        for name in ("mine_payload", "other_payload"):
            sys.modules.pop(name, None)


class Odd: ...


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ([1, {"a": Odd()}], r"\$\[1\]\.a"),
        ({"a b": [0, 0, lambda: 0]}, r"\$\['a b'\]\[2\]"),
        (Point(1, Odd()), r"\$\.y"),  # type: ignore[arg-type]
        ((1, (2, Odd())), r"\$\[1\]\[1\]"),
        ({"s": "\ud800"}, r"\$\.s"),
        ((value for value in [1]), r"\$: .*generator"),
    ],
)
def test_what_cannot_be_encoded_is_named_with_its_path(value: Any, where: str) -> None:
    with pytest.raises(BadResult, match=where):
        encode(value)


def test_an_argument_that_cannot_be_sent_is_the_callers_error() -> None:
    with pytest.raises(BadRequest, match=r"\$\.kwargs\.model: .*Odd"):
        encode_call((1,), {"model": Odd()})


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    cycle = Tree(1, ())
    object.__setattr__(cycle, "children", (cycle,))
    for value in (loop, {"a": loop}, cycle):
        for form in (encode, to_json):
            with pytest.raises(BadResult, match="contains itself"):
                form(value)


def test_deep_nesting_is_refused_both_ways() -> None:
    value: Any = 1
    for _ in range(payload.MAX_NESTING + 1):
        value = (value,)
    with pytest.raises(BadResult, match="too deeply"):
        encode(value)
    data = msgpack.packb(1)
    for _ in range(payload.MAX_NESTING + 1):
        data = msgpack.packb(msgpack.ExtType(payload.TUPLE, msgpack.packb([msgpack.ExtType(payload.TUPLE, data)])))
    with pytest.raises(BadRequest):
        decode(data)
    with pytest.raises(BadRequest):
        decode(b"\x91" * 100_000)


@pytest.mark.parametrize(
    "parts",
    [
        ["|O8", [1], b"12345678"],
        ["<f4", [2], b"1234"],
        ["<f4", [-1], b""],
        ["<f4", [2**40, 2**40], b""],
        ["<f4", "x", b""],
        ["<f4", [1]],
        ["<f4", [1], "abcd"],
    ],
)
def test_a_forged_array_is_a_bad_request(parts: list[Any]) -> None:
    with pytest.raises(BadRequest):
        decode(msgpack.packb(msgpack.ExtType(payload.ARRAY, msgpack.packb(parts))))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_arbitrary_bytes_decode_or_are_a_bad_request(data: bytes) -> None:
    try:
        decode(data)
        decode_call("msgpack", data)
    except BadRequest:
        pass
    try:
        decode_call("json", data)
    except BadRequest:
        pass


@given(values, st.data())
def test_damaged_payloads_decode_or_are_a_bad_request(value: Any, data: st.DataObject) -> None:
    good = bytearray(encode(value))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(good), here)
    except BadRequest:
        pass


def test_calls_carry_positional_and_named_arguments() -> None:
    assert decode_call("msgpack", encode_call((1, (2,)), {"k": b"v"})) == ((1, (2,)), {"k": b"v"})
    assert decode_call("json", b'{"a": 1}') == ((), {"a": 1})
    assert decode_call("json", b"[1, 2]") == ((1, 2), {})
    assert decode_call("json", b"") == ((), {})


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("json", b"3"),
        ("json", b"null"),
        ("json", b"{"),
        ("json", b'{"a": NaN}'),
        ("json", b"[" * 100_000),
        ("json", b"\xff"),
        ("json", b"[" + b"1" * 5000 + b"]"),
        ("msgpack", encode([1])),
        ("msgpack", encode({"args": []})),
        ("msgpack", encode({"args": (), "kwargs": {}})),
        ("msgpack", encode({"args": [], "kwargs": {1: 2}})),
        ("msgpack", encode({"args": [], "kwargs": {}, "more": 1})),
        ("msgpack", encode({}) + b"\x00"),
    ],
)
def test_what_is_not_a_call_is_a_bad_request(encoding: Any, data: bytes) -> None:
    with pytest.raises(BadRequest):
        decode_call(encoding, data)


def test_json_results_have_the_form_people_expect() -> None:
    value = {
        "point": Point(1, 2.0),
        "model": Positive(value=1, theName="n"),
        "array": np.eye(2),
        "scalar": np.float32(0.5),
        "bytes": b"hi",
        "set": {1},
        "when": datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        "long": datetime.timedelta(seconds=90),
        "sum": decimal.Decimal("1.10"),
        "id": uuid.UUID(int=1),
        "colour": Colour.RED,
        "pair": Pair(1, "x"),
        "text": "ü",
    }
    assert json.loads(encode_result("json", value)) == {
        "point": {"x": 1, "y": 2.0},
        "model": {"value": 1, "name": "n", "inner": None},
        "array": [[1.0, 0.0], [0.0, 1.0]],
        "scalar": 0.5,
        "bytes": "aGk=",
        "set": [1],
        "when": "2020-01-02T00:00:00+00:00",
        "long": 90.0,
        "sum": "1.10",
        "id": "00000000-0000-0000-0000-000000000001",
        "colour": "red",
        "pair": [1, "x"],
        "text": "ü",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, np.array([math.nan]), {"a": [complex(1, 2)]}, {(1, 2): 3}])
def test_what_json_cannot_say_is_refused(value: Any) -> None:
    with pytest.raises(BadResult, match=r"\$"):
        to_json({"v": value})
