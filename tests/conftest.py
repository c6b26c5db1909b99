"""Tiers, cheapest first: pure functions in this process; one to eight gloo ranks; whole Trainer runs on those ranks;
and last, programs started as a user starts them. A test that needs a GPU says so where it is skipped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from ranks import Ranks

# Looked through for doctests otherwise, and it needs Triton.
collect_ignore = ["programs/compiled_kernels.py"]

# The same examples in every run, so that a test that passes here passes everywhere. To look for new ones:
# `pytest tests/test_properties.py --hypothesis-profile=search`.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
settings.register_profile("search", deadline=None, database=None, max_examples=2000, print_blob=True)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    """Let the ranks of this test run build the C code once, instead of each for itself."""
    if "CC" not in os.environ:
        folder = tempfile.mkdtemp(prefix="lightning_powersgd_")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["BUILT_BY_TESTS"] = folder
        os.environ["CC"] = shlex.join(["sh", str(Path(__file__).parent / "programs" / "cc.sh")])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU, and torch finds none; `make gpu` runs this test on one")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _variables_stay_with_their_test() -> Iterator[None]:
    """Take back what Lightning sets while it reads a launcher's variables; `MASTER_ADDR` misled all later programs."""
    with mock.patch.dict(os.environ):
        # Tables are as wide as in files, wherever the tests run.
        os.environ.pop("COLUMNS", None)
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[dict[int, Ranks]]:
    """One to four gloo ranks, or eight, by their number. They start when they are first used."""
    by_number = {number: Ranks(number) for number in (1, 2, 3, 4, 8)}
    yield by_number
    for group in by_number.values():
        group.stop()


@pytest.fixture(scope="session")
def two_ranks(ranks: dict[int, Ranks]) -> Ranks:
    """Two gloo ranks."""
    return ranks[2]


@pytest.fixture(scope="session")
def four_ranks(ranks: dict[int, Ranks]) -> Ranks:
    """Four gloo ranks."""
    return ranks[4]


@pytest.fixture(scope="session")
def eight_ranks(ranks: dict[int, Ranks]) -> Ranks:
    """Eight gloo ranks."""
    return ranks[8]


@pytest.fixture
def fit(two_ranks: Ranks, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a function on both ranks with a directory of its own."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        return two_ranks.run(function, str(tmp_path), *args, **kwargs)

    return run


@pytest.fixture
def namespaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two network namespaces, as the benchmarks make them: 10.0.0.1 and 10.0.0.2, each on its `eth0`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "benchmarks"))
    import network

    try:
        with network.emulated_network(2) as names:
            yield names
    except network.NetworkError as error:
        pytest.skip(str(error))
