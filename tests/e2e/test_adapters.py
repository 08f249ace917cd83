"""LoRA adapters end to end: one instance answers as the model and as each adapter, by the name the client asks for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest
import torch
import transformers

from tests.e2e.conftest import EXAMPLES, Platform, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]
MODEL = EXAMPLES / "counting/model"
APP = """
import sllm
app = sllm.App("tongues")
app.llm("tongues", checkpoint={model!r}, adapters={{"first": {first!r}, "second": {second!r}}}, max_containers=1)
"""
PROMPT = "41 42 43"


def adapter(directory: Path, seed: int) -> tuple[Path, list[int]]:
    """An adapter that PEFT saved, and what PEFT says after PROMPT with it."""
    import peft

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(directory)
    wrapped.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    said = wrapped.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    return directory, [ids.shape[1], tokenizer.decode(said, skip_special_tokens=True)]


def test_model_and_adapters_answer_together_each_as_peft_does(platform: Platform, tmp_path: Path) -> None:
    (first, one), (second, other) = (adapter(tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    source = APP.format(model=str(MODEL), first=str(first), second=str(second))
    platform.sllm("deploy", str(write_app(tmp_path / "app", source)))
    names = ["tongues", "tongues:first", "tongues/tongues:second"]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{platform.url}/v1", api_key=platform.token, timeout=60) as api:
            listed = {model.id async for model in api.models.list()}
            assert {"tongues", "tongues:first", "tongues:second"} <= listed
            with pytest.raises(openai.NotFoundError, match="tongues:third"):
                await api.completions.create(model="tongues:third", prompt=PROMPT)
            with pytest.raises(openai.BadRequestError, match="not of an adapter"):
                await api.embeddings.create(model="tongues:first", input="1")
            answers = await asyncio.gather(
                *(
                    api.completions.create(
                        model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
                    )
                    for name in names
                )
            )
            return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(ask())
    assert [int(word) for word in texts[0].split()] == list(range(44, 56))
    assert texts[1:] == [one[1], other[1]]
    assert len(set(texts)) == 3
    listed = platform.json("checkpoint", "list")
    assert len([item for item in listed if item["bytes"] < 1_000_000]) >= 2
