"""LoRA adapters: objects that hold nothing of their base, unmerged, several in one batch, equal to PEFT."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from sllm_invoker.checkpoints.ingest import ingest
from sllm_invoker.runner.attach import attach, prepare
from sllm_invoker.runner.engines import create
from sllm_invoker.runner.engines.base import GenerateRequest, Sampling

from sllm_faas.errors import BadRequest, BadSpec, CheckpointCorrupt, CheckpointError

IDS = torch.tensor([[5, 9, 3, 7, 1, 8, 4, 2, 6, 11, 13]])
PROMPT = tuple(IDS[0].tolist())
SETTINGS = {
    "narrow": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "wide": {
        "r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear",
        "rank_pattern": {"layers.1.mlp.up_proj": 3}, "alpha_pattern": {"k_proj": 7},
    },
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT uses what transformers deprecates


def make_adapter(model, settings, directory, seed):
    """Saves an adapter with random matrices as PEFT does; `model` is left as it was."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name="default")
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(directory)
    wrapped.unload()
    return directory


@pytest.fixture(scope="module", params=["llama", "gpt2", "mamba"])
def served(request, case, store, tmp_path_factory):
    """(reference model with both adapters by PEFT, base's object, adapters' directories)."""
    name = request.param
    base = case(name)
    directories, digests = {}, {}
    fresh = type(base.model).from_pretrained(base.source).eval()
    for seed, (adapter, settings) in enumerate(SETTINGS.items()):
        if name != "llama":
            target = {"gpt2": ["c_attn"], "mamba": ["in_proj", "x_proj"]}[name]
            settings = {"r": 2 + seed, "lora_alpha": 8, "target_modules": target}
        directory = make_adapter(fresh, settings, tmp_path_factory.mktemp(f"{name}-{adapter}"), seed)
        digests[adapter] = ingest(store, str(directory), f"{name}-{adapter}", base=name).digest
        directories[adapter] = directory
    reference = peft.PeftModel.from_pretrained(fresh, directories["narrow"], adapter_name="narrow")
    reference.load_adapter(directories["wide"], adapter_name="wide")
    reference.eval().requires_grad_(True)  # PEFT freezes the base; torch takes another convolution kernel for that
    return reference, base.checkpoint, {adapter: store.path(digest) for adapter, digest in digests.items()}


def base_logits(reference, ids):
    with reference.disable_adapter():
        return reference(input_ids=ids).logits


def test_logits_are_bit_equal_to_unmerged_peft_and_the_base_is_untouched(served):
    reference, checkpoint, directories = served
    skeleton = prepare(checkpoint, directories)
    attach(skeleton)
    with torch.inference_mode():
        for adapter in ("narrow", "", "wide", "narrow"):
            skeleton.adapters.use([adapter])
            if adapter:
                reference.set_adapter(adapter)
            wanted = reference(input_ids=IDS).logits if adapter else base_logits(reference, IDS)
            assert torch.equal(skeleton.model(input_ids=IDS).logits, wanted)


def test_a_batch_of_different_adapters_is_that_of_peft(served):
    reference, checkpoint, directories = served
    skeleton = prepare(checkpoint, directories)
    attach(skeleton)
    rows = ["wide", "", "narrow", "wide"]
    ids = torch.stack([IDS[0], IDS[0].flip(0), IDS[0], IDS[0].roll(3)])
    with torch.inference_mode():
        skeleton.adapters.use(rows)
        ours = skeleton.model(input_ids=ids).logits
        theirs = reference(input_ids=ids, adapter_names=[row or "__base__" for row in rows]).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


async def test_the_engine_serves_base_and_adapters_together_as_each_alone(served):
    reference, checkpoint, directories = served
    engine = create(prepare(checkpoint, directories))
    engine.attach(checkpoint.directory)

    async def draw(adapter):
        request = GenerateRequest(PROMPT, 10, Sampling(temperature=0), ignore_eos=True, adapter=adapter)
        sequence = await engine.prefill(request)
        return [output.token async for outputs in engine.activate(sequence) for output in outputs]

    try:
        drawn = dict(zip(("", *directories), await asyncio.gather(*map(draw, ("", *directories))), strict=True))
        with pytest.raises(BadRequest, match="no adapter 'other'; there are: narrow, wide"):
            await draw("other")
    finally:
        engine.close()
    for adapter in directories:
        reference.set_adapter(adapter)
        wanted = reference.generate(input_ids=IDS, max_new_tokens=10, do_sample=False)[0, len(PROMPT) :].tolist()
        assert drawn[adapter] == wanted
    assert len({tuple(tokens) for tokens in drawn.values()}) == 3, "the adapters change nothing: this shows nothing"


def test_an_adapter_is_an_object_that_names_its_base_and_holds_nothing_of_it(served, store):
    _, checkpoint, directories = served
    for directory in directories.values():
        adapter = store.get(directory.name)
        assert adapter.manifest.base == checkpoint.digest
        assert all(tensor.name.endswith(("lora_A", "lora_B")) for tensor in adapter.manifest.parts[0].tensors)
        assert adapter.manifest.total_bytes < checkpoint.manifest.total_bytes


# -- refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def source(case, tmp_path):
    model = type(case("llama").model).from_pretrained(case("llama").source)
    return make_adapter(model, SETTINGS["narrow"], tmp_path / "adapter", 3)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}]
)
def test_what_plain_lora_cannot_express_is_refused_by_name(store, case, source, change):
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    case("llama")
    with pytest.raises(BadSpec, match=next(iter(change))):
        ingest(store, str(source), "refused", base="llama")


def test_an_adapter_needs_a_base_and_a_model_has_none(store, case, source):
    with pytest.raises(BadSpec, match="is a LoRA adapter and needs its base"):
        ingest(store, str(source), "alone")
    with pytest.raises(BadSpec, match="is no LoRA adapter"):
        ingest(store, str(case("llama").source), "odd", base="llama")
    with pytest.raises(CheckpointError, match="no checkpoint 'nothing'"):
        ingest(store, str(source), "alone", base="nothing")


def test_an_adapter_of_another_model_is_refused(store, case, source):
    case("gpt2")
    with pytest.raises(BadSpec, match="does not have"):
        ingest(store, str(source), "other", base="gpt2")
    digest = ingest(store, str(source), "right", base="llama").digest
    with pytest.raises(BadSpec, match="is of checkpoint"):
        prepare(case("qwen2").checkpoint, {"right": store.path(digest)})


def test_matrices_that_do_not_fit_are_corrupt(store, case, source):
    weights = load_file(source / "adapter_model.safetensors")
    name = next(key for key in weights if "lora_A" in key)
    save_file({**weights, name: weights[name][:, :-1].contiguous()}, source / "adapter_model.safetensors")
    with pytest.raises(CheckpointCorrupt, match="do not fit"):
        ingest(store, str(source), "odd", base="llama")


def test_a_changed_byte_of_an_adapter_is_refused_before_it_is_used(store, case, source, tmp_path):
    digest = ingest(store, str(source), "right", base="llama").digest
    copy = Path(shutil.copytree(store.path(digest), tmp_path / "copy"))
    path = copy / "part-0-of-1.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-7] ^= 2
    path.write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="has changed"):
        prepare(case("llama").checkpoint, {"right": copy})
