"""What the network between the ranks does, measured with the collective that gradients travel in.

Axis letters: W ranks, b bytes of an all-reduce, α seconds of latency of a message, β bytes that a rank sends in a
second. An all-reduce is taken for a ring (Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002), in which every
rank sends 2 (W − 1) messages of b / W bytes to its neighbour:

    t = 2 (W − 1) (α + b / (W β))

What is measured are the bytes of tensors. The headers of the network's protocol come on top: of TCP over Ethernet
about 5 %, so that a link of 1 Gbit/s carries 0.95.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_powersgd.exchange.agreement import largest_of_ranks

# From a message that is all latency, 4 kB, to one that is larger than DDP's buckets, 64 MiB.
_GROWTH = 4
MESSAGE_BYTES = tuple(_GROWTH**exponent for exponent in range(6, 14))

# Repetitions of a size, after those that are not counted. A median takes three; more than fifty say nothing new.
_WARM_UPS, _LEAST_REPETITIONS, _MOST_REPETITIONS = 2, 3, 50


@dataclass(frozen=True)
class Sample:
    """The all-reduces of one size, on the slowest rank.

    Attributes:
        payload_bytes: of the tensor.
        seconds: the median.
        low: the lower quartile.
        high: the upper quartile.
        repetitions: how many there were.
    """

    payload_bytes: int
    seconds: float
    low: float
    high: float
    repetitions: int


@dataclass(frozen=True)
class Link:
    """What the network between the ranks does, in the terms of a ring.

    Attributes:
        world_size: number of ranks.
        latency: seconds of a message between neighbours, beside the time of its bytes.
        bits_per_second: of tensors, that a rank sends while it receives as many.
        samples: what this was fitted to, by size.
    """

    world_size: int
    latency: float
    bits_per_second: float
    samples: tuple[Sample, ...] = ()

    @property
    def spread(self) -> float:
        """How uncertain the bandwidth is: the distance of the largest message's quartiles, in units of its median.

        0 if nothing was measured.
        """
        if not self.samples:
            return 0.0
        largest = self.samples[-1]
        return (largest.high - largest.low) / largest.seconds

    def all_reduce_seconds(self, *payload_bytes: float) -> float:
        """Give the seconds that all-reduces of some bytes each take, one after another."""
        return ring_seconds(payload_bytes, self.world_size, self.latency, self.bits_per_second)

    def bits_per_second_of(self, sample: Sample) -> float:
        """Give the bits that a rank sent in a second of a sample, its latency included."""
        return _sent_bits(sample.payload_bytes, self.world_size) / sample.seconds


def ring_seconds(payloads: Sequence[float], world_size: int, latency: float, bits_per_second: float) -> float:
    """Give the seconds that all-reduces on a ring take, one after another.

    >>> ring_seconds([1_000_000], world_size=2, latency=0.001, bits_per_second=1e9)
    0.01

    Args:
        payloads: bytes of each.
        world_size: number of ranks.
        latency: seconds of a message between neighbours, beside the time of its bytes.
        bits_per_second: that a rank sends while it receives as many.
    """
    messages = 2 * (world_size - 1)
    return messages * (len(payloads) * latency + 8 * sum(payloads) / (world_size * bits_per_second))


def measure_link(
    process_group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> Link:
    """Measure all-reduces of growing size, and fit the latency and the bandwidth of a ring to them.

    Every rank must call this, with the same ``seconds``. All get the same figures, those of the slowest.

    Args:
        process_group: the ranks; ``None`` is the default group.
        device: of the tensors; the one that gradients are on.
        seconds: that it may take, after the first all-reduce has made the connections. More: larger messages on a slow
            link, and medians of more repetitions. On a link on which two small messages take longer, it takes as long
            as these.
        on_progress: is called with the share of the time that has gone, from 0 to 1.

    Returns:
        The figures, the same on every rank.

    Raises:
        ValueError: if there is only one rank, or ``seconds`` is not positive.
    """
    world_size = dist.get_world_size(process_group)
    if world_size < 2:
        raise ValueError("A single rank has no link to be measured. Start two or more.")
    if not 0 < seconds < math.inf:
        raise ValueError(f"`seconds={seconds!r}` is not a time to measure for. Give seconds, such as 1.0.")
    meter = _Meter(process_group, torch.device(device))
    meter.seconds_of(MESSAGE_BYTES[0], 1)  # makes the connections, which may take seconds
    start = time.perf_counter()
    samples: list[Sample] = []
    # Whether to go on depends on nothing but times of the slowest rank, so that all ranks do the same.
    for size in MESSAGE_BYTES:
        samples.append(meter.sample(size, seconds / (2 * len(MESSAGE_BYTES))))  # the other half is for the largest
        (spent,) = meter.slowest([time.perf_counter() - start])
        if on_progress is not None:
            on_progress(min(spent / seconds, 1.0))
        of_next = (_WARM_UPS + _LEAST_REPETITIONS) * _GROWTH * samples[-1].seconds
        if len(samples) > 1 and spent + of_next > seconds:
            break
    return fit_link(world_size, samples)


def fit_link(world_size: int, samples: Sequence[Sample]) -> Link:
    """Fit the latency and the bandwidth of a ring to the medians of samples.

    The bandwidth is that of a line through two of the points, or through one and the origin, with neither figure
    negative: of the line whose times are wrong by the smallest factors, by the least sum of logarithms, so that a
    single size that something has disturbed does not move it. Weights grow with the square of the place in the order
    of sizes, since most bytes travel in large messages: if the two largest agree, they outweigh the others; of five
    sizes or more, none does alone. With that bandwidth, the latency makes the times wrong by the smallest factors if
    all sizes count alike.

    Args:
        world_size: number of ranks.
        samples: of two sizes or more, in the order of the sizes.
    """
    points = [(float(sample.payload_bytes), sample.seconds) for sample in samples]

    def deviation(start: float, slope: float, weights: Iterable[float]) -> float:
        factors = [(start + slope * b) / t for b, t in points]
        return sum(weight * abs(math.log(factor)) for weight, factor in zip(weights, factors, strict=True))

    squares, ones = [place**2 for place in range(1, len(points) + 1)], [1] * len(points)

    lines = [(0.0, t / b) for b, t in points]
    for (b1, t1), (b2, t2) in itertools.combinations(points, 2):
        slope = (t2 - t1) / (b2 - b1)
        if slope > 0 and t1 >= slope * b1:
            lines.append((t1 - slope * b1, slope))
    start, slope = min(lines, key=lambda line: deviation(line[0], line[1], squares))
    starts = [start, 0.0, *(max(t - slope * b, 0.0) for b, t in points)]
    start = min(starts, key=lambda start: deviation(start, slope, ones))
    latency = start / (2 * (world_size - 1))
    return Link(world_size, latency, _sent_bits(1, world_size) / slope, tuple(samples))


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _sent_bits(payload_bytes: float, world_size: int) -> float:
    """Give the bits that each rank of a ring sends in an all-reduce."""
    return 16 * (world_size - 1) / world_size * payload_bytes


class _Meter:
    """The all-reduces of a rank, and what is agreed between the ranks.

    Args:
        process_group: the ranks.
        device: of the tensors.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = process_group
        self._device = device

    def sample(self, payload_bytes: int, seconds: float) -> Sample:
        """Measure one size for about some seconds."""
        # The first ones are slower: buffers are made, and TCP is finding out what the link carries.
        (once,) = self.slowest(self.seconds_of(payload_bytes, _WARM_UPS)[-1:])
        repetitions = min(max(int(seconds / once), _LEAST_REPETITIONS), _MOST_REPETITIONS)
        quartiles = statistics.quantiles(self.seconds_of(payload_bytes, repetitions), n=4, method="inclusive")
        low, median, high = self.slowest(quartiles)
        return Sample(payload_bytes, median, low, high, repetitions)

    def seconds_of(self, payload_bytes: int, repetitions: int) -> list[float]:
        """Time all-reduces one after another. No rank is done with one before all have begun it."""
        tensor = torch.zeros(payload_bytes // 4, device=self._device)
        times = []
        synchronize(self._device)
        start = time.perf_counter()
        for _ in range(repetitions):
            dist.all_reduce(tensor, group=self._group)
            synchronize(self._device)
            now = time.perf_counter()
            times.append(now - start)
            start = now
        return times

    def slowest(self, mine: Sequence[float]) -> list[float]:
        """Give the largest of each number over all ranks."""
        return largest_of_ranks(mine, self._device, self._group)
