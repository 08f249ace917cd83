"""An invoker whose store process gets options that no operator can give, to measure what is not for use.

python -m benchmarks.invoker OPTIONS --config FILE --name NODE        OPTIONS as for the store process, by commas
"""

from __future__ import annotations

import functools
import sys
from unittest import mock

from sllm_invoker import __main__ as invoker
from sllm_invoker import agent
from sllm_invoker.memory_tier import MemoryTier

if __name__ == "__main__":
    options = tuple(sys.argv.pop(1).split(","))
    with mock.patch.object(agent, "MemoryTier", functools.partial(MemoryTier, options=options)):
        sys.exit(invoker.main())
