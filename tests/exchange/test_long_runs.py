"""Tier two: thousands of steps: nothing grows, replicas stay equal, and what is small is sent in the end."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Parameter, Weights
from nets import attach
from ranks import gather_equal
from torch import Tensor

SIZE = 8
# Singular values of the gradient that is the same in every step.
SPECTRUM = torch.logspace(0, -3, SIZE, dtype=torch.float64)
STEPS = 3000
WARM_UP = 1000


def steady_gradients() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Singular vectors of a gradient, and what the two ranks have of it: more and less by a twentieth."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(2, SIZE, SIZE, generator=generator, dtype=torch.float64)).Q
    mean = left * SPECTRUM @ right.T
    difference = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    difference *= mean.norm() / difference.norm() / 20
    return left, right, [(mean + difference).float(), (mean - difference).float()]


def _train(steps: int, **config: Any) -> dict[str, Any]:
    parameters = {"steady": Parameter((SIZE, SIZE)), "noisy": Parameter((10, 3, 2, 2)), "bias": Parameter((5,))}
    model, exchange = attach(Weights(parameters), **config)
    assert set(exchange.state.errors) == {"steady", "noisy"}
    weights = list(model.parameters())
    left, right, given = steady_gradients()
    generator = torch.Generator().manual_seed(dist.get_rank())
    sent = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    norms = torch.zeros(2, len(exchange.state.errors))
    before: dict[str, int] = {}
    for step in range(steps):
        model.zero_grad()
        noise = [torch.randn(p.shape, generator=generator) for p in weights[1:]]
        model([given[dist.get_rank()], *noise]).backward()
        sent += weights[0].grad
        with torch.no_grad():
            torch._foreach_add_(weights, [p.grad for p in weights], alpha=-0.01)
        if step % 5 == 0:
            now = torch.stack([error.norm() for error in exchange.state.errors.values()])
            half = norms[step * 2 // steps]
            torch.maximum(half, now, out=half)
        if step + 1 in (WARM_UP - 1, WARM_UP):  # the first look takes memory itself
            before = _held()
    growth = {what: now - before[what] for what, now in _held().items()}
    exchange.average_errors()
    waiting = exchange.state.errors["steady"].double()
    share = [(left.T @ part @ right).diagonal() / steps / SPECTRUM for part in (sent, waiting)]
    return {
        "equal": gather_equal(weights),
        "growth": growth,
        "norms": norms.tolist(),
        "sent": share[0].tolist(),
        "waiting": share[1].tolist(),
    }


def _held() -> dict[str, int]:
    """What this process holds of tensors, files, Python's objects and memory."""
    # Tensors first: the list of all objects takes memory itself. And several looks: the thread of a collective that has
    # just ended may still hold its tensor at the first one.
    tensors = min(_tensors() for _ in range(4))
    process = Path("/proc/self")
    memory = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(list((process / "fd").iterdir()))
    return {"tensors": tensors, "files": files, "blocks": sys.getallocatedblocks(), "memory": memory}


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


# One test for all that a run shows: with several, each process of pytest that has one of them would train for itself.
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("error_dtype", [None, "bfloat16"], ids=["full errors", "bfloat16 errors"])
def test_nothing_grows_and_everything_is_sent_in_the_end(two_ranks, error_dtype):
    for run in two_ranks.run(_train, STEPS, error_dtype=error_dtype, min_compression_ratio=1.0):
        assert run["equal"]
        _check_nothing_grew(run["growth"])
        for first, last in zip(*run["norms"], strict=True):
            assert 0 < last < 1.2 * first
        # What bfloat16 rounds away a thousand times is noise that stays below 2^-12 of the gradient.
        _check_every_direction_was_sent(run["sent"], run["waiting"], 1e-6 if error_dtype is None else 2**-12)


def _check_nothing_grew(growth: dict[str, int]) -> None:
    assert growth["files"] == growth["tensors"] == 0
    # One number a step would be more blocks. The allocator takes some pages more or less by chance.
    assert growth["blocks"] < (STEPS - WARM_UP) / 4
    assert growth["memory"] < 1_000_000


def _check_every_direction_was_sent(sent: list[float], waiting: list[float], lost: float) -> None:
    for part, rest, size in zip(sent, waiting, SPECTRUM, strict=True):
        # A direction as small as a thousandth of the largest waits for hundreds of steps until it is sent.
        assert part > 0.8
        assert abs(part + rest - 1) * size < lost
