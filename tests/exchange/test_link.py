"""Tiers one and two: what is measured of the network between ranks, and the ring that is fitted to it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_powersgd.exchange.link import (
    MESSAGE_BYTES,
    Link,
    Sample,
    fit_link,
    measure_link,
    ring_seconds,
)


def samples_of(world_size: int, latency: float, rate: float, noise: float = 0.0, sizes=MESSAGE_BYTES) -> list[Sample]:
    """What a ring would take, with times that are wrong by a factor of up to 1 + noise either way."""
    drawn = random.Random(0)
    times = [ring_seconds([size], world_size, latency, rate) * (1 + drawn.uniform(-noise, noise)) for size in sizes]
    return [Sample(size, t, 0.9 * t, 1.1 * t, 3) for size, t in zip(sizes, times, strict=True)]


@given(
    world_size=st.integers(2, 512),
    latency=st.floats(1e-6, 1e-2),
    rate=st.floats(1e6, 1e12),
)
def test_the_fit_finds_the_ring(world_size, latency, rate):
    link = fit_link(world_size, samples_of(world_size, latency, rate))
    # As near as the sum of latency and bytes is rounded, of which either may be a thousandth of a per mille.
    assert link.all_reduce_seconds(MESSAGE_BYTES[0]) == pytest.approx(
        ring_seconds(MESSAGE_BYTES[:1], world_size, latency, rate), rel=1e-9
    )
    assert link.all_reduce_seconds(MESSAGE_BYTES[-1]) == pytest.approx(
        ring_seconds(MESSAGE_BYTES[-1:], world_size, latency, rate), rel=1e-9
    )
    assert link.world_size == world_size


@pytest.mark.parametrize("world_size", [2, 3, 16])
@pytest.mark.parametrize(("latency", "rate"), [(1e-4, 1e8), (1e-4, 1e9), (2e-5, 1e10), (0.01, 1e9)])
def test_the_fit_bears_noise(world_size, latency, rate):
    link = fit_link(world_size, samples_of(world_size, latency, rate, noise=0.1))
    assert link.bits_per_second == pytest.approx(rate, rel=0.1)
    assert link.latency == pytest.approx(latency, rel=0.3)


@pytest.mark.parametrize("disturbed", range(len(MESSAGE_BYTES)))
@pytest.mark.parametrize("factor", [0.3, 5])
def test_one_size_that_is_disturbed_does_not_move_the_fit(disturbed, factor):
    samples = samples_of(4, 1e-4, 1e9)
    size = samples[disturbed]
    samples[disturbed] = Sample(size.payload_bytes, factor * size.seconds, size.low, size.high, size.repetitions)
    link = fit_link(4, samples)
    assert link.bits_per_second == pytest.approx(1e9)
    assert link.latency == pytest.approx(1e-4)


def test_a_fit_to_two_sizes():
    link = fit_link(2, samples_of(2, 1e-3, 1e6, sizes=MESSAGE_BYTES[:2]))
    assert (link.latency, link.bits_per_second) == pytest.approx((1e-3, 1e6))


@pytest.mark.parametrize("times", [[1e-3, 1e-3], [2e-3, 1e-3], [1e-3, 8e-3]])
def test_neither_figure_is_negative_or_infinite(times):
    samples = [Sample(size, t, t, t, 3) for size, t in zip(MESSAGE_BYTES[:2], times, strict=True)]
    link = fit_link(2, samples)
    assert 0 <= link.latency < float("inf")
    assert 0 < link.bits_per_second < float("inf")


def test_the_terms_of_a_link():
    link = Link(4, latency=1e-3, bits_per_second=1e9, samples=(Sample(1_000_000, 0.024, 0.021, 0.027, 5),))
    assert link.all_reduce_seconds(1_000_000) == pytest.approx(6 * (1e-3 + 2e-3))
    assert link.all_reduce_seconds(1_000_000, 1_000_000) == pytest.approx(2 * 6 * (1e-3 + 2e-3))
    assert link.all_reduce_seconds() == 0
    assert link.spread == pytest.approx(0.25)
    # 6 messages of a quarter of a megabyte
    assert link.bits_per_second_of(link.samples[0]) == pytest.approx(12e6 / 0.024)


def _measure(seconds: float) -> tuple[Link, list[float]]:
    shares: list[float] = []
    return measure_link(device="cpu", seconds=seconds, on_progress=shares.append), shares


@pytest.mark.parametrize("number", [2, 3])
def test_all_ranks_get_the_same_figures(ranks, number):
    measured = ranks[number].run(_measure, 0.05)
    link, shares = measured[0]
    assert all(theirs == (link, shares) for theirs in measured)
    assert link.world_size == number
    assert link.latency >= 0
    assert link.bits_per_second > 0
    assert link.spread >= 0
    assert tuple(sample.payload_bytes for sample in link.samples) == MESSAGE_BYTES[: len(link.samples)]
    assert len(link.samples) == len(shares) >= 2
    for sample in link.samples:
        assert 0 < sample.low <= sample.seconds <= sample.high
        assert 3 <= sample.repetitions <= 50
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] <= 1


def test_a_time_that_is_too_short_gives_two_sizes(two_ranks):
    ((link, shares), _) = two_ranks.run(_measure, 1e-9)
    assert [sample.repetitions for sample in link.samples] == [3, 3]
    assert shares == [1, 1]


def _measure_in_a_clock_of_ones_own(seconds: float) -> tuple[Link, float]:
    """All-reduces of a ring with a latency of 1 ms and 100 Mbit/s, by a clock that only they move."""
    import time
    from unittest import mock

    now = 0.0

    def all_reduce(tensor: torch.Tensor, *args: object, **kwargs: object) -> None:
        nonlocal now
        # The second rank is late, and slower.
        now += ring_seconds([tensor.nbytes], 2, 1e-3, 1e8) * (1 + 0.01 * dist.get_rank())
        original(tensor, *args, **kwargs)

    def clock() -> float:
        return now

    original = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", all_reduce), mock.patch.object(time, "perf_counter", clock):
        return measure_link(seconds=seconds), now


@pytest.mark.parametrize("seconds", [0.2, 1.0, 10.0])
def test_it_is_done_in_time_and_fits_the_slowest(two_ranks, seconds):
    (link, _), (theirs, spent) = two_ranks.run(_measure_in_a_clock_of_ones_own, seconds)
    assert link == theirs
    assert spent < 1.1 * seconds
    assert link.bits_per_second == pytest.approx(1e8 / 1.01)
    assert link.latency == pytest.approx(1.01e-3)
    assert len(link.samples) == {0.2: 3, 1.0: 5, 10.0: 6}[seconds]
    assert link.samples[0].repetitions > link.samples[-1].repetitions >= 3


def _measure_wrongly(seconds: float) -> None:
    measure_link(seconds=seconds)


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_time_that_is_none(two_ranks, seconds):
    for text in two_ranks.run_to_errors(_measure_wrongly, seconds):
        assert f"ValueError: `seconds={seconds!r}` is not a time to measure for. Give seconds, such as 1.0." in text


def test_a_single_rank_has_no_link(ranks):
    (text,) = ranks[1].run_to_errors(_measure_wrongly, 1.0)
    assert "ValueError: A single rank has no link to be measured. Start two or more." in text


def test_the_two_largest_decide_on_the_bandwidth():
    # As over a link that is limited by a token bucket: small messages travel on what has been saved, larger ones wait.
    times = [0.00041, 0.00248, 0.0149, 0.0274, 0.0908, 0.3636]
    samples = [Sample(size, t, t, t, 3) for size, t in zip(MESSAGE_BYTES[:6], times, strict=True)]
    assert fit_link(2, samples).bits_per_second == pytest.approx(92.3e6, rel=0.02)


def test_the_latency_is_not_lost_beside_large_messages():
    # As over 1 Gbit/s with small messages that travel on what a token bucket has saved.
    times = [0.000151, 0.000144, 0.000463, 0.00243, 0.0088, 0.03535, 0.152, 0.5856]
    samples = [Sample(size, t, t, t, 3) for size, t in zip(MESSAGE_BYTES, times, strict=True)]
    link = fit_link(2, samples)
    assert link.latency == pytest.approx(58e-6, rel=0.05)
    assert link.bits_per_second == pytest.approx(917e6, rel=0.01)
