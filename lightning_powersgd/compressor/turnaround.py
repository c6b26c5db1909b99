"""How long a training may take to send each direction of a gradient once, and the ranks that this asks for.

A step sends r of a matrix's min(n, m) directions, those in which most has gathered, and half as many when alternating.
So each has its turn within about min(n, m) / r steps: the turnaround. What a step leaves out is late by so much, and
what that costs depends on how many turnarounds a training has (docs/accuracy.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

# Where neither the length of a training is known nor its optimizers.
DEFAULT_TURNAROUND = 50.0

# Turnarounds that a training must have to be as good as with whole gradients, from the study in docs/accuracy.md:
# of images with SGD, and of text with AdamW. Optimizers that nobody has tried are taken for the harder case.
_TURNS_WITH_SGD = 20
_TURNS_OTHERWISE = 200


def turnaround_for(steps: float, optimizers: Optimizer | Iterable[Optimizer]) -> float:
    """Give the turnaround with which a training is about as good as with whole gradients.

    Args:
        steps: of the optimizers, in the whole training.
        optimizers: one or several, of which the most demanding counts.

    Returns:
        Steps within which each direction of a gradient must have its turn.

    Raises:
        ValueError: if ``steps`` is not a positive, finite number.
    """
    if not 0 < steps < math.inf:
        raise ValueError(f"`steps={steps!r}` is not the length of a training. Give the number of optimizer steps.")
    each = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return steps / (_TURNS_WITH_SGD if each and all(map(_is_sgd, each)) else _TURNS_OTHERWISE)


def rank_for(turnaround: float, rows: int, columns: int, *, alternate: bool) -> int:
    """Give the columns with which each direction of a matrix has its turn in time; min(n, m) is all of it."""
    directions = min(rows, columns)
    # A quotient that should be an integer may come out a little above it.
    return min(directions, math.ceil((2 if alternate else 1) * directions / turnaround - 1e-9))


def smallest_turnaround(
    sent_bytes: Callable[[float], float], max_bytes: int, directions: Iterable[int], *, alternate: bool
) -> float:
    """Find the smallest turnaround whose ranks send no more bytes a step than are allowed.

    Args:
        sent_bytes: of a turnaround, which fall where it rises.
        max_bytes: that are allowed.
        directions: min(n, m) of every matrix whose rank is to be found.
        alternate: whether one factor is sent a step.

    Raises:
        ValueError: if rank 1 is too much already.
    """
    sides = 2 if alternate else 1
    # Ranks change at these alone.
    turnarounds = sorted({sides * size / rank for size in set(directions) for rank in range(1, size + 1)})
    if not turnarounds or sent_bytes(turnarounds[-1]) > max_bytes:
        least = sent_bytes(turnarounds[-1] if turnarounds else 1.0)
        raise ValueError(
            f"`max_bytes={max_bytes}` is too little: at rank 1, with everything that is sent whole, a step takes"
            f" {math.ceil(least)} bytes. Allow as many at least."
        )
    first, last = 0, len(turnarounds) - 1
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if sent_bytes(turnarounds[middle]) <= max_bytes else (middle + 1, last)
    return turnarounds[last]


def _is_sgd(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD)
