"""`sllm_invoker.runner.cuda` where the device is plain memory."""

from __future__ import annotations

import functools

from sllm_invoker.runner import template
from sllm_invoker.runner.device_weights import Stage

from tests.engines.fake_device import FakeDevice


@functools.cache
def open_stage() -> Stage:
    return Stage(FakeDevice(), piece=4096, group=1)


def warm() -> None:
    template.import_libs(("torch", "transformers"))
    open_stage()
