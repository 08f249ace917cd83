"""`python -m sllm_gateway --config FILE --name NAME`: one gateway process.

Exit codes: 0 stopped as told · 2 wrong configuration · 3 the port is taken.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

from sllm_faas import logging
from sllm_faas.config import Config
from sllm_faas.errors import BadSpec, Conflict


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sllm_gateway")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", default="gateway-0")
    options = parser.parse_args(arguments)
    try:
        config = Config.read(options.config)
    except BadSpec as error:
        print(error, file=sys.stderr)
        return 2
    logging.setup(config.log_level)
    # Before anything imports prometheus_client: it decides at import whether processes share their numbers.
    config.metrics_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(config.metrics_dir)

    import uvloop

    try:
        return uvloop.run(_serve(config, options.name))
    except (BadSpec, Conflict) as error:
        logging.get("gateway").error("not started", text=str(error))
        return 3 if isinstance(error, Conflict) else 2


async def _serve(config: Config, name: str) -> int:
    from sllm_gateway.server import Service

    # Requests make little garbage in cycles; scanning everything imported for it costs milliseconds of latency.
    gc.collect()
    gc.freeze()
    await Service(config, name).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
