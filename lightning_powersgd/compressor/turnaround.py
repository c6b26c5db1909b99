"""How long a training may take to send each direction of a gradient once, and the ranks that this asks for.

A step sends r of a matrix's min(n, m) directions, those in which most has gathered, and half as many when alternating.
So each has its turn within about min(n, m) / r steps; the turnaround of a network is that of its slowest matrix. What a
step leaves out is late by so much, and what that costs depends on how many turnarounds a training has
(docs/accuracy.md). All matrices have one rank: what a higher one costs a small matrix is little, and what a lower one
costs its accuracy is much.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

# What a training is taken for of which it is not known how long it will be.
ASSUMED_STEPS = 10_000

# Turnarounds that a training must have to be as good as with whole gradients, from the study in docs/accuracy.md:
# of images with SGD, and of text with AdamW, at least. Optimizers that nobody has tried are taken for the harder case.
_TURNS_WITH_SGD = 40
_LEAST_TURNS_OTHERWISE = 200
# In a longer training of text the same rank is better, but by less than in proportion: a rank is 1.2 to 1.4 % behind
# that falls from 32 over 16 to 7 when 600 steps become 2,400 and 12,000, as 1 / √T does. At twice these ranks text is
# within 0.3 % of plain DDP.
_TURNS_BY_ROOT_OF_STEPS = 4


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
    each = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return turnaround_of(steps, sgd=bool(each) and all(isinstance(one, torch.optim.SGD) for one in each))


def turnaround_of(steps: float, *, sgd: bool) -> float:
    """Give the turnaround of a training with SGD, or else with any other optimizer (see `turnaround_for`)."""
    if not 0 < steps < math.inf:
        raise ValueError(f"`steps={steps!r}` is not the length of a training. Give the number of optimizer steps.")
    turns = _TURNS_WITH_SGD if sgd else max(_LEAST_TURNS_OTHERWISE, _TURNS_BY_ROOT_OF_STEPS * math.sqrt(steps))
    return steps / turns


# Where neither the length of a training is known nor its optimizers.
DEFAULT_TURNAROUND = turnaround_of(ASSUMED_STEPS, sgd=False)


def rank_for(turnaround: float, directions: int, *, alternate: bool) -> int:
    """Give the rank with which each of so many directions has its turn in time; as many as these is all of them."""
    # A quotient that should be an integer may come out a little above it.
    return min(directions, math.ceil((2 if alternate else 1) * directions / turnaround - 1e-9))


def largest_rank(sent_bytes: Callable[[int], float], max_bytes: int, directions: int) -> int:
    """Find the largest rank, up to all directions, that sends no more bytes a step than are allowed.

    Args:
        sent_bytes: of a rank; they rise with it.
        max_bytes: that are allowed.
        directions: min(n, m) of the matrix where that is largest.

    Raises:
        ValueError: if rank 1 is too much already.
    """
    if sent_bytes(1) > max_bytes:
        raise ValueError(
            f"`max_bytes={max_bytes}` is too little: at rank 1, with everything that is sent whole, a step takes"
            f" {math.ceil(sent_bytes(1))} bytes. Allow as many at least."
        )
    return bisect.bisect_right(range(2, directions + 1), max_bytes, key=lambda rank: math.ceil(sent_bytes(rank))) + 1
