"""A small zygote: prepares a template, forks one instance from it and ends as that does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sllm_invoker.runner import template
from sllm_invoker.runner.config import loads
from sllm_invoker.runner.main import run

if __name__ == "__main__":
    config = loads(Path(sys.argv[1]).read_bytes())
    template.import_libs(("torch", "transformers", "no_such_library"))
    template.prepare(config.spec, config.object_dir)
    if (child := os.fork()) == 0:
        run(config)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
