"""The supervisor's daemon with stand-ins for the platform's processes."""

import sys
from pathlib import Path

from sllm_faas.cli import supervisor

STUB = str(Path(__file__).with_name("stub_part.py"))

if __name__ == "__main__":
    sys.exit(supervisor.main(lambda config, part: [sys.executable, "-I", "-S", STUB, part.name, str(config.state_dir)]))
