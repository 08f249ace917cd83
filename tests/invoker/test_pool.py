"""Which zygotes to keep: base always, libraries and templates while they are used."""

from __future__ import annotations

from sllm_invoker.containers.pool import BASE, Layer, Pool, path

from sllm_faas.spec import CheckpointSpec, FunctionSpec, MethodSpec

LLM = FunctionSpec("m", kind="llm", checkpoint=CheckpointSpec("x"))


def code(*libs: str) -> FunctionSpec:
    return FunctionSpec("f", module="m", qualname="f", methods=(MethodSpec("f"),), libs=libs)


def template(number: int) -> Layer:
    return Layer(f"template:{number}", "template", BASE)


def test_code_without_heavy_libraries_is_forked_from_base() -> None:
    assert [layer.key for layer in path(code("requests"), "")] == ["base"]
    assert [layer.key for layer in path(None, "")] == ["base"]


def test_the_same_libraries_share_a_zygote_in_whatever_order() -> None:
    assert path(code("torch", "numpy"), "") == path(code("numpy", "torch", "json"), "")
    assert [layer.warmth for layer in path(code("torch"), "")] == ["base", "libs"]


def test_a_language_model_has_a_template_per_checkpoint() -> None:
    one, two = path(LLM, "/objects/1"), path(LLM, "/objects/2")
    assert [layer.warmth for layer in one] == ["base", "libs", "template"]
    assert one[:2] == two[:2] and one[2] != two[2]
    assert one[2].parent == one[1].key


def test_the_warmest_layer_that_exists_is_where_a_start_begins() -> None:
    pool, layers = Pool(), path(LLM, "/objects/1")
    assert pool.warmest(layers) is None
    pool.admit(layers[0], 0)
    pool.admit(layers[1], 0)
    assert pool.warmest(layers) == layers[1]


def test_base_is_kept_and_the_others_go_when_nobody_uses_them() -> None:
    pool, layers = Pool(libs_keep=100, template_keep=10), path(LLM, "/objects/1")
    for layer in layers:
        pool.admit(layer, 0)
    assert pool.surplus(9) == []
    assert pool.surplus(10) == [layers[2].key]
    pool.use(layers, 50)
    assert pool.surplus(59) == []
    assert set(pool.surplus(1000)) == {layers[1].key, layers[2].key}


def test_only_the_most_recent_templates_stay() -> None:
    pool = Pool(max_templates=2)
    for number in range(4):
        pool.admit(template(number), number)
    pool.use([template(0)], 10)
    assert pool.surplus(11) == ["template:1", "template:2"]


def test_a_zygote_that_keeps_dying_is_made_again_ever_later() -> None:
    pool = Pool(first_backoff=0.5, max_backoff=2.0)
    assert [pool.died(BASE, 0.0) for _ in range(5)] == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert pool.wait(BASE, 1.5) == 0.5
    pool.served(BASE)
    assert pool.wait(BASE, 1.5) == 0.0 and pool.died(BASE, 2.0) == 0.0
