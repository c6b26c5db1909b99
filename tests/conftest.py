"""Tiers, cheapest first: pure functions in this process; two and four gloo ranks; whole Trainer runs on those ranks;
and last, programs started as a user starts them. A test that needs a GPU says so where it is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ranks import Ranks


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two gloo ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four gloo ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture
def fit(two_ranks, tmp_path) -> Callable[..., list[Any]]:
    """Run a function on both ranks with a directory of its own."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return two_ranks.run(function, str(tmp_path), *args, **kwargs)

    return run
