"""What a zygote does before it forks: import libraries, build the part of an instance that all share.

Called in single-threaded processes only, and it leaves them so: torch runs on one thread here, because a fork
after a multi-threaded OpenMP region deadlocks the child. What `prepare` built is found again after the fork by
`take_skeleton`. User code is never imported here.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm_faas.spec import FunctionSpec

if TYPE_CHECKING:
    from sllm_invoker.runner.attach import Skeleton

_skeleton: Skeleton | None = None
_small: Any = None
"""What those that are forked from here rehearse with; None: nothing, or not made yet."""
_warm = False


MODEL_MODULES = (
    "sllm_invoker.runner.llm",
    "sllm_invoker.runner.engines.transformers",
    "transformers.modeling_utils",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_tokenizers",
)
"""What all language models need; transformers itself imports next to nothing until it is used."""


def import_libs(libs: Iterable[str]) -> None:
    """Import top-level packages that instances will need. One that does not import is left to the instance,
    which reports it with the user's own traceback."""
    wanted = [*libs]
    for name in [*wanted, *(MODEL_MODULES if "transformers" in wanted else ())]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
        sys.modules["torch"].manual_seed(0)  # for what that imports: every instance seeds itself
    gc.freeze()


def prepare(spec: FunctionSpec, object_dir: str) -> object:
    """Build the skeleton of `spec`'s checkpoint, weights not attached. Returns it; None where there is none.

    Raises what `attach.prepare` raises: the zygote reports it and its instances would fail alike.
    """
    global _skeleton
    if spec.kind == "llm" and object_dir:
        from sllm_invoker.runner import attach

        _skeleton = attach.prepare(Path(object_dir), _adapters(spec, object_dir))
        gc.collect()
        gc.freeze()
    return _skeleton


def warm_up() -> None:
    """Once, when nobody has asked for anything for a moment: make what is rehearsed with, and run through it, so that
    what the libraries make for a first pass is there before the fork. Best effort."""
    global _small, _warm
    if _skeleton is not None and not _warm:
        _warm = True
        with contextlib.suppress(Exception):
            from sllm_invoker.runner import rehearsal

            small = rehearsal.small(_skeleton)
            rehearsal.run(_skeleton, small)
            _small = small
        gc.collect()
        gc.freeze()


def rehearse() -> None:
    """Do what an instance does first, once, in a process that waits to become one and is never forked from. Best
    effort: an instance that was not rehearsed is slower, no more. In a thread, because a thread can be of the lowest
    priority for good, and a process could not become of a higher one again."""
    global _small
    if _skeleton is not None and _small is not None:
        working = threading.Thread(target=_rehearse, args=(_skeleton, _small), name="rehearsal")
        working.start()
        working.join()
    _small = None


def _rehearse(skeleton: Skeleton, small: Any) -> None:
    with contextlib.suppress(Exception):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        from sllm_invoker.runner import rehearsal

        sys.modules["torch"].set_num_threads(rehearsal.threads(skeleton))
        rehearsal.run(skeleton, small)


def take_skeleton(spec: FunctionSpec, object_dir: str) -> Skeleton:
    """The skeleton made before the fork, or one made now. Raises what `attach.prepare` raises."""
    global _skeleton
    if _skeleton is None:
        build(spec, object_dir)
    prepared, _skeleton = _skeleton, None
    assert prepared is not None
    return prepared


def prepared() -> bool:
    """Whether there is a skeleton to take."""
    return _skeleton is not None


def build(spec: FunctionSpec, object_dir: str) -> None:
    """`prepare` in an instance whose zygote is no template. Raises what `attach.prepare` raises."""
    global _skeleton
    import torch

    from sllm_invoker.runner import attach

    threads = torch.get_num_threads()
    try:
        _skeleton = attach.prepare(Path(object_dir), _adapters(spec, object_dir))
    finally:
        torch.set_num_threads(threads)  # nothing is forked from here: `prepare` left one


def _adapters(spec: FunctionSpec, object_dir: str) -> dict[str, Path]:
    """Directories of the function's adapters: objects of one store lie side by side."""
    return {adapter.name: Path(object_dir).parent / adapter.checkpoint.digest for adapter in spec.adapters}
