"""Found through PYTHONPATH by the platform's processes in one test: a machine with two GPUs made of plain memory.

Not part of the product, which has no hook for it: the two modules that touch the driver are others. Everything between
them, from placement to the drawn token, is the product's.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
PLAYED = {"sllm_invoker.runner.cuda": "played_cuda.py", "sllm_invoker.containers.nvml": "played_nvml.py"}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = PLAYED.get(name)
        return importlib.util.spec_from_file_location(name, HERE / file) if file else None


sys.meta_path.insert(0, Finder())
