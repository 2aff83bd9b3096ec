"""Each test starts from the same random numbers."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
