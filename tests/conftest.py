"""What holds for all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# A property's verdict is about the code, never about how busy the machine is: no example has a deadline.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test with real processes depends on how the machine schedules them, so a failed one is played once more. The
    summary names it (`-rR`): a rerun is a bug to be found, in the product or in the test, not noise."""
    for item in items:
        if item.get_closest_marker("e2e") is not None:
            item.add_marker(pytest.mark.flaky(reruns=1))
