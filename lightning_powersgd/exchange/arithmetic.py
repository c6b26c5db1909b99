"""The time that a step's arithmetic takes, measured on random gradients and without a network."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_powersgd.compressor.config import ALWAYS, PowerSGDConfig, Rank
from lightning_powersgd.compressor.plan import DEFAULT_GROUP_BYTES, Group, Plan, Slot, make_plan
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.link import synchronize

# What measuring may take: gradients and error buffers, arithmetic in one step, and steps.
_MOST_BYTES = 2**30
_MOST_OPERATIONS = 2 * 10**10
_MOST_SECONDS = 5.0
_MOST_SAMPLES = 10


def measure_compression(
    plan: Plan, config: PowerSGDConfig, device: torch.device, seconds: float = _MOST_SECONDS
) -> float:
    """Measure the arithmetic of a step: the steps that training makes, on random gradients and without a network.

    A model that is too large for 1 GiB or a few seconds is measured in part: with as many of its matrices of each
    shape, or as many of their rows, in proportion.

    Args:
        plan: what is compressed.
        config: the settings.
        device: where.
        seconds: after which it is not measured once more.

    Returns:
        Seconds.
    """
    elements = sum(slot.numel for slot in plan.compressed)
    if not elements:
        return 0.0
    operations = sum(6 * slot.rank * slot.numel for slot in plan.compressed)
    share = min(1.0, _MOST_BYTES / (2 * plan.dense_bytes), _MOST_OPERATIONS / operations)
    sample, ranks = _sample(plan, share, alternate=config.alternate)
    config = replace(
        config, rank=ranks, turnaround=None, max_bytes=None, start_step=0, min_compression_ratio=1.0, compress=ALWAYS
    )
    gradients: dict[str, Tensor] = {}
    for group in make_plan(sample, config).groups:
        gradients |= _random_gradients(group, device)
    # The exchange asks a parameter for its shape, and for nothing else: it may share the gradient's memory.
    parameters = {name: nn.Parameter(gradient) for name, gradient in gradients.items()}
    state = PowerSGDState(reversed(parameters.items()), config)
    # As if several ranks had begun the run: one that was always alone would not compress.
    state.total_sent_bytes = 1
    exchange = GradientExchange(state, dist.ProcessGroup(0, 1))  # type: ignore[call-arg]  # of two constructors

    def two_steps() -> float:
        """Make two steps, since they differ when alternating, and give the seconds of one."""
        synchronize(device)
        start = time.perf_counter()
        for _ in range(2):
            exchange.begin_step()
            for name, parameter in parameters.items():
                exchange.take(parameter, gradients[name])
                exchange.advance()
            exchange.end_step()
        synchronize(device)
        return (time.perf_counter() - start) / 2

    return _fastest(two_steps, seconds) * elements / sum(slot.numel for slot in state.plan.compressed)


def measure_casts(slots: Sequence[Slot], device: torch.device) -> float:
    """Measure the arithmetic of the bf16 hook in a step: gradients cast to bfloat16, divided, and cast back.

    It goes over one bucket of each dtype, in proportion.

    Args:
        slots: of the parameters whose gradients it casts.
        device: where.

    Returns:
        Seconds.
    """
    seconds = 0.0
    for dtype, elements in _elements_by_dtype(slots).items():
        bucket = torch.randn(min(elements, DEFAULT_GROUP_BYTES // dtype.itemsize), dtype=dtype, device=device)

        def cast(bucket: Tensor = bucket) -> float:
            synchronize(device)
            start = time.perf_counter()
            bucket.copy_(bucket.to(torch.bfloat16).div_(2))
            synchronize(device)
            return time.perf_counter() - start

        seconds += _fastest(cast) * elements / bucket.numel()
    return seconds


def _elements_by_dtype(slots: Sequence[Slot]) -> Counter[torch.dtype]:
    elements: Counter[torch.dtype] = Counter()
    for slot in slots:
        elements[slot.dtype] += slot.numel
    return +elements


def _fastest(sample: Callable[[], float], seconds: float = _MOST_SECONDS) -> float:
    """Take samples after one to warm up. The fastest is what the machine can do; the rest belongs to other programs."""
    sample()
    deadline, samples = time.perf_counter() + seconds, [sample()]
    while len(samples) < _MOST_SAMPLES and time.perf_counter() < deadline:
        samples.append(sample())
    return min(samples)


def _random_gradients(group: Group, device: torch.device) -> dict[str, Tensor]:
    """Give gradients of a group's parameters by name, which lie side by side as in DDP's buckets."""
    sizes = [slot.numel for slot in group.slots]
    buffer = torch.randn(sum(sizes), dtype=group.slots[0].dtype, device=device)
    parts = torch.split(buffer, sizes)
    return {slot.name: part.view(slot.shape) for slot, part in zip(group.slots, parts, strict=True)}


def _sample(plan: Plan, share: float, *, alternate: bool) -> tuple[list[tuple[str, Tensor]], dict[str, Rank]]:
    """Give named parameters, on the meta device, that are a share of a plan's, and their ranks."""
    sample: list[tuple[str, Tensor]] = []
    ranks: dict[str, Rank] = {}
    for kind, count in Counter(slot.kind for slot in plan.slots).items():
        shape = kind.shape
        if shape and count * share < 1:
            shape = _shortened(kind, max(4 * kind.rank, round(kind.rows * count * share), 1), alternate=alternate)
        for _ in range(max(1, round(count * share))):
            name = str(len(sample))
            ranks[name] = kind.rank
            sample.append((name, torch.empty(shape, dtype=kind.dtype, device="meta", requires_grad=True)))
    return sample, ranks


def _shortened(slot: Slot, rows: int, *, alternate: bool) -> tuple[int, ...]:
    """Give the shape of a parameter cut to its first rows, or to as many more as it takes to be compressed still."""
    while rows < slot.rows:
        shorter = replace(slot, shape=(rows, *slot.shape[slot.split :]), split=1)
        if shorter.dense_bytes >= shorter.sent_bytes(alternate=alternate):
            return shorter.shape
        rows *= 2
    return slot.shape
