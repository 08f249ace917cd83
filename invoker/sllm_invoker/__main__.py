"""`python -m sllm_invoker --config FILE --name NODE`: the invoker's process.

SIGTERM or SIGINT: notice to the controller and an orderly stop within `shutdown_grace`; a second one: at once (the
lifeline ends the containers).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import uvloop

from sllm_faas import logging
from sllm_faas.config import Config
from sllm_faas.errors import SllmError
from sllm_faas.stopping import stop_requested
from sllm_invoker.agent import Agent
from sllm_invoker.containers.zygote import ENTRY


async def _serve(config: Config, name: str) -> None:
    stopping = stop_requested()
    entry = os.environ.get("SLLM_RUNNER_ENTRY") or ENTRY
    agent = Agent(config, name, entry=entry, asked_to_leave=stopping.set)
    await agent.start()
    # Frames make no garbage in cycles; looking for it in everything imported costs milliseconds of latency.
    gc.collect()
    gc.freeze()
    logging.get("invoker").ready(node=name, endpoint=agent.relay.endpoint)
    await stopping.wait()
    left = await agent.leave(config.shutdown_grace)
    await agent.stop(left)
    logging.get("invoker").info("stopped", node=name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="sllm_invoker")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    try:
        config = Config.read(options.config)
        config.prepare()
        logging.setup(config.log_level)
        uvloop.run(_serve(config, options.name))
    except SllmError as error:
        logging.get("invoker").error("cannot_serve", code=error.code, error=error.message, hint=error.hint)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
