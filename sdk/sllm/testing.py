"""Run apps in this process, with no server: the semantics of a deployment in a test.

    def test_square():
        with sllm.testing.run(app):
            assert square.remote(3) == 9

Or as a pytest fixture, the platform for every test that asks for it:

    @pytest.fixture
    def platform():
        with sllm.testing.run(app) as platform:
            yield platform

Needs the platform's parts: pip install 'sllm-faas[gateway,invoker]'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sllm import App
    from sllm_faas.local import LocalPlatform

__all__ = ["LocalPlatform", "run"]


@contextmanager
def run(*apps: App) -> Iterator[LocalPlatform]:
    """A platform that serves `apps`; calls made in the block go to it. Raises what deploying them fails with."""
    from sllm_faas.local import LocalPlatform

    with LocalPlatform() as platform:
        for app in apps:
            platform.deploy(app)
        yield platform


def __getattr__(name: str) -> Any:
    if name == "LocalPlatform":
        from sllm_faas.local import LocalPlatform

        return LocalPlatform
    raise AttributeError(f"module 'sllm.testing' has no attribute {name!r}")
