"""Tests that need a GPU; one is enough."""

from __future__ import annotations

import pytest


@pytest.fixture
def device() -> str:
    """Where tensors live."""
    return "cuda"
