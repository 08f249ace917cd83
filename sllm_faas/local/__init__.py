"""The platform in one process, with no server: the same gateway dispatcher, controller machine, relay core and
executors as deployed, joined by the memory bus. For `sllm run`, `sllm.testing` and tests.

    SDK ──► backend ──► Dispatcher ══ memory bus ══► node: RelayCore ──► instances: executors in threads
                            ║                          ║
                            ╚══ control: Machine ══════╝

What differs from a server: user code shares this process, so memory and module globals are shared, prints go to the
terminal, and code that ignores its cancellation is given up after its grace period but cannot be killed.
"""

from __future__ import annotations

from sllm_faas.local.platform import LocalPlatform

__all__ = ["LocalPlatform"]
