"""What a zygote does before it forks: import libraries, build the part of an instance that all share.

Called in single-threaded processes only, and it leaves them so: torch runs on one thread here, because a fork
after a multi-threaded OpenMP region deadlocks the child. What `prepare` built is found again after the fork by
`take_skeleton`. User code is never imported here.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sllm_faas.spec import FunctionSpec

if TYPE_CHECKING:
    from sllm_invoker.runner.attach import Skeleton

_skeleton: Skeleton | None = None


def import_libs(libs: Iterable[str]) -> None:
    """Import top-level packages that instances will need. One that does not import is left to the instance,
    which reports it with the user's own traceback."""
    for name in libs:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()


def prepare(spec: FunctionSpec, object_dir: str) -> object:
    """Build the skeleton of `spec`'s checkpoint, weights not attached. Returns it; None where there is none.

    Raises what `attach.prepare` raises: the zygote reports it and its instances would fail alike.
    """
    global _skeleton
    if spec.kind == "llm" and object_dir:
        from sllm_invoker.runner import attach

        for name in ("sllm_invoker.runner.llm", "sllm_invoker.runner.engines.transformers"):
            importlib.import_module(name)  # before the fork, for after it
        _skeleton = attach.prepare(Path(object_dir))
        gc.collect()
        gc.freeze()
    return _skeleton


def take_skeleton(object_dir: str) -> Skeleton:
    """The skeleton made before the fork, or one made now. Raises what `attach.prepare` raises."""
    global _skeleton
    prepared, _skeleton = _skeleton, None
    if prepared is not None:
        return prepared
    from sllm_invoker.runner import attach

    return attach.prepare(Path(object_dir))
