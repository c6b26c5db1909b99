"""Time as a test says, for runs with ``compress="auto"``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lightning_powersgd.exchange import stopwatch, worth
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.link import Link


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@contextmanager
def steps_that_take(compressed: float, exact: float) -> Iterator[None]:
    """Let steps take so many seconds, by the clock that an exchange looks at."""
    clock, begin = _Clock(), GradientExchange.begin_step

    def begin_step(self: GradientExchange) -> None:
        clock.now += compressed if self.state.compressing else exact
        begin(self)

    with mock.patch.object(stopwatch, "time", clock), mock.patch.object(GradientExchange, "begin_step", begin_step):
        yield


@contextmanager
def a_link_of(bits_per_second: float, seconds_per_matrix: float = 5e-5) -> Iterator[None]:
    """Let the network carry so much, and compressing any matrix take so long, without measuring."""

    def measure(plan, *_) -> float:
        return seconds_per_matrix * len(list(plan.compressed))

    link = Link(2, 0.0, bits_per_second)
    with (
        mock.patch.object(worth, "measure_compression", measure),
        mock.patch.object(worth, "measure_link", return_value=link),
    ):
        yield
