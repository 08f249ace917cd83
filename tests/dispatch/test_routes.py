"""The routing table: snapshots, deltas, gaps, names."""

from __future__ import annotations

import pytest

from sllm_faas.dispatch.routes import RouteTable, check_parameters, nearest
from sllm_faas.errors import BadRequest, NotFound
from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec, ParameterSpec, Target
from sllm_faas.wire.messages import FunctionRoute, NodeInfo, Routes, RoutesDelta, TokenEntry


def plain(name: str, app: str = "app", version: int = 1) -> FunctionRoute:
    return FunctionRoute(app, version, FunctionSpec(name, "function", "m", name, (MethodSpec(name),)))


def llm(name: str, app: str = "app") -> FunctionRoute:
    return FunctionRoute(app, 1, FunctionSpec(name, "llm", checkpoint=CheckpointSpec("x")))


BOX = FunctionSpec(
    "Box",
    "class",
    "m",
    "Box",
    (MethodSpec("get"), MethodSpec("put")),
    (
        ParameterSpec("size", "int", required=False, default=3),
        ParameterSpec("ratio", "float", required=False, default=0.5),
        ParameterSpec("label", "str"),
    ),
)


def table(*functions: FunctionRoute) -> RouteTable:
    made = RouteTable()
    made.replace(Routes(1, functions))
    return made


def test_deltas_apply_in_sequence_and_a_gap_is_noticed() -> None:
    routes = RouteTable()
    assert not routes.known
    assert not routes.apply(RoutesDelta(1)), "a delta before the table"
    routes.replace(Routes(4, (plain("f"),), (NodeInfo("n", "ipc://x"),), (TokenEntry("t", "aa", ("admin",)),)))
    assert routes.apply(RoutesDelta(5, (plain("g"),), (("app", "f"),), nodes_gone=("n",), tokens_gone=("t",)))
    assert list(routes.functions) == [("app", "g")]
    assert not routes.nodes
    assert not routes.tokens
    assert not routes.apply(RoutesDelta(7, (plain("h"),)))
    assert routes.seq == 5
    assert ("app", "h") not in routes.functions
    assert routes.apply(RoutesDelta(5, (plain("h"),))), "an old one was taken in already"
    assert ("app", "h") not in routes.functions


def test_a_token_of_the_same_name_replaces_the_old_one() -> None:
    routes = RouteTable()
    routes.replace(Routes(1, tokens=(TokenEntry("t", "aa", ("admin",)),)))
    routes.apply(RoutesDelta(2, tokens=(TokenEntry("t", "bb", ("read",)),)))
    assert list(routes.tokens) == ["bb"]


def test_names_resolve_to_method_and_target() -> None:
    routes = table(plain("f", version=3), FunctionRoute("app", 2, BOX))
    assert routes.resolve("app", "f").target == Target("app", "f", 3)
    assert routes.resolve("app", "f") is routes.resolve("app", "f")
    found = routes.resolve("app", "Box.get", {"label": "x", "size": 3, "ratio": 2})
    assert found.method.name == "get"
    assert found.target.parameters == '{"label":"x","ratio":2.0}'


def test_a_new_version_is_resolved_at_once() -> None:
    routes = table(plain("f"))
    assert routes.resolve("app", "f").target.version == 1
    routes.apply(RoutesDelta(2, (plain("f", version=2),)))
    assert routes.resolve("app", "f").target.version == 2
    assert routes.successor(Target("app", "f", 1)) == Target("app", "f", 2)
    assert routes.serves(Target("app", "f", 2), "f")
    assert not routes.serves(Target("app", "f", 2), "g")
    routes.apply(RoutesDelta(3, functions_gone=(("app", "f"),)))
    with pytest.raises(NotFound, match="was deleted"):
        routes.successor(Target("app", "f", 1))


@pytest.mark.parametrize(
    ("app", "name", "message", "hint"),
    [
        ("ap", "f", "no app 'ap'", "Did you mean 'app'?"),
        ("app", "fumction", "no function 'fumction'", "Did you mean 'function'?"),
        ("app", "Box.gett", "no method 'gett'", "Did you mean 'get'?"),
        ("zzz", "f", "no app 'zzz'", "There is 'app'"),
    ],
)
def test_an_unknown_name_is_not_found_with_the_nearest(app: str, name: str, message: str, hint: str) -> None:
    routes = table(plain("function"), FunctionRoute("app", 1, BOX))
    with pytest.raises(NotFound, match=message) as caught:
        routes.resolve(app, name)
    assert hint in caught.value.hint


def test_a_class_needs_a_method_and_a_model_is_no_function() -> None:
    routes = table(FunctionRoute("app", 1, BOX), llm("m"))
    with pytest.raises(BadRequest, match="which method") as caught:
        routes.resolve("app", "Box", {"label": "x"})
    assert "'Box.get'" in caught.value.hint
    with pytest.raises(BadRequest, match="is a language model"):
        routes.resolve("app", "m")


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"label": "x", "colour": 1}, "colour"),
        ({"label": 1}, "label"),
        ({"label": "x", "size": True}, "size"),
        ({"label": "x", "size": 1.5}, "size"),
        ({}, "label"),
    ],
)
def test_wrong_parameters_are_named(values: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_parameters(BOX, values)
    assert caught.value.param == param


def test_models_go_by_their_short_name_while_it_is_unambiguous() -> None:
    routes = table(llm("chat"), llm("other"), llm("chat", "second"), plain("f"))
    assert routes.model("other").spec.name == "other"
    assert routes.model("second/chat").app == "second"
    assert [name for name, _ in routes.models()] == ["app/chat", "other", "second/chat"]
    with pytest.raises(NotFound, match="ambiguous") as caught:
        routes.model("chat")
    assert "'app/chat', 'second/chat'" in caught.value.hint
    with pytest.raises(NotFound, match="'f' does not exist"):
        routes.model("f")


def test_a_hint_names_all_when_they_are_few_and_nothing_when_there_is_nothing() -> None:
    assert nearest("x", ["alpha", "beta"]) == "There is 'alpha', 'beta'."
    assert nearest("x", []) == ""
    assert nearest("xxx", (f"name-{number}" for number in range(50))) == ""


def test_a_gateways_part_of_a_cap_is_one_more_when_it_is_named():
    capped = FunctionRoute("app", 2, BOX, cap=2, more=("g",))
    routes = table(capped, plain("other"))
    assert routes.caps("g") == {"app": 3}
    assert routes.caps("h") == {"app": 2}
