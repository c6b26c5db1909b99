"""What a program does that a low-rank gradient does not go together with: found, and said once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_powersgd.compressor.state import PowerSGDState

# Below this rank, Muon is measurably behind what it is with whole gradients (see the documentation).
_LEAST_RANK_FOR_MUON = 32


def needs_exact_gradients(optimizers: Iterable[Any]) -> bool:
    """Whether an optimizer compares gradients of several points, or asks for one point's several times. Says so."""
    asks = any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers)
    if asks:
        rank_zero_warn(
            "LBFGS asks for several gradients a step and compares them, and error feedback changes each. All gradients"
            " are sent whole, as without PowerSGD."
        )
    return asks


def warn_of_muon(optimizers: Iterable[Any], state: PowerSGDState) -> None:
    """Say what to do if an optimizer orthonormalises gradients of low rank."""
    # There are several implementations, and PyTorch's is as young as version 2.9.
    muon = next((name for name in map(_type_name, optimizers) if "muon" in name.lower()), None)
    low = [slot.rank for slot in state.plan.compressed if slot.rank < _LEAST_RANK_FOR_MUON]
    if muon and low:
        rank_zero_warn(
            f"{muon} gives all directions of a gradient the same length, and PowerSGD leaves {max(low)} of them a step"
            " or fewer. At a low rank it trains worse than with whole gradients. Raise `rank`, or use AdamW."
        )


class GradientHooks:
    """Warns, once, if a compressed parameter has a hook that may change its gradient."""

    def __init__(self) -> None:
        self._warned = False

    def look(self, state: PowerSGDState) -> None:
        """Look for hooks.

        Args:
            state: of the compressed parameters.
        """
        if self._warned:
            return
        hooked = [slot.name for slot in state.plan.compressed if state.parameters[slot.name]._backward_hooks]
        if hooked:
            self._warned = True
            rank_zero_warn(
                f"{len(hooked)} compressed parameters, such as {hooked[0]!r}, have a hook of `Tensor.register_hook`. If"
                " it sets elements of the gradient to zero, as a mask does, these do not stay zero: a low-rank product"
                f" fills them. Send such parameters whole: `rank={{{hooked[0]!r}: 0, '*': 2}}`. A hook that only looks"
                " does no harm."
            )


def _type_name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__
