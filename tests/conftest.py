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
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Any number of gloo ranks."""
    groups: dict[int, Ranks] = {}
    yield lambda world_size: groups.setdefault(world_size, Ranks(world_size))
    for group in groups.values():
        group.stop()


@pytest.fixture(scope="session")
def two_ranks(ranks: Callable[[int], Ranks]) -> Ranks:
    """Two gloo ranks."""
    return ranks(2)


@pytest.fixture(scope="session")
def four_ranks(ranks: Callable[[int], Ranks]) -> Ranks:
    """Four gloo ranks."""
    return ranks(4)


@pytest.fixture
def fit(two_ranks, tmp_path) -> Callable[..., list[Any]]:
    """Run a function on both ranks with a directory of its own."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return two_ranks.run(function, str(tmp_path), *args, **kwargs)

    return run
