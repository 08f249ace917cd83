"""`sllm` with stand-ins for the platform's processes, in the foreground."""

import functools
import sys
from pathlib import Path

from sllm_faas import cli
from sllm_faas.cli import up
from sllm_faas.cli.supervisor import Supervisor

STUB = str(Path(__file__).with_name("stub_part.py"))

if __name__ == "__main__":
    up.Supervisor = functools.partial(  # type: ignore[misc]
        Supervisor,
        command=lambda config, part: [sys.executable, "-I", "-S", STUB, part.name, str(config.state_dir)],
        ready_timeout=float(sys.argv[1]),
    )
    cli.main(sys.argv[2:])
