"""Gradients that are averaged and then thrown away, which plain DDP forgets and error feedback does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_powersgd.exchange.core import GradientExchange

# What to do, with one optimizer and with several.
_ONE = (
    "Make a pass whose gradients are not for the optimizer, such as the first of sharpness-aware minimisation, `with"
    " self.trainer.strategy.block_backward_sync():`, from its forward pass on. Each rank has its own gradients then."
)
_SEVERAL = (
    "Put each optimizer's part of `training_step` between `self.toggle_optimizer(optimizer)` and"
    " `self.untoggle_optimizer(optimizer)`, and use `find_unused_parameters=True`, so that a loss reaches no other"
    " optimizer's parameters."
)


class UntakenGradients:
    """Warns, once, if averaged gradients are thrown away, since what compression left of them is not.

    Args:
        optimizers: those that may take the gradients.
    """

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self._optimizers = optimizers
        self._waiting: dict[str, torch.Tensor] = {}
        self._step = 0
        self._warned = False
        for optimizer in optimizers:
            # Only Lightning's wrappers come to `optimizer_step`.
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_post_hook(self.taken_by)

    def averaged(self, exchange: GradientExchange) -> None:
        """Note the gradients that a backward pass has averaged, if it has."""
        state = exchange.state
        if state.step > self._step and not exchange.alone:
            self._waiting |= {name: state.parameters[name] for name in exchange.used & state.errors.keys()}
        self._step = state.step

    def look(self) -> None:
        """Look for gradients that are gone and were not taken."""
        gone = {name: parameter for name, parameter in self._waiting.items() if parameter.grad is None}
        if not gone:
            return
        self._waiting = {name: parameter for name, parameter in self._waiting.items() if name not in gone}
        held = set().union(*map(_parameters_of, self._optimizers))
        lost = sorted(name for name, parameter in gone.items() if parameter in held)
        if lost and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Gradients of {len(lost)} compressed parameters, such as {lost[0]!r}, were averaged and then thrown"
                " away before their optimizer took a step. What compression left of them stays in the error buffers and"
                f" goes into later steps, where it does harm. {_ONE if len(self._optimizers) == 1 else _SEVERAL}"
            )

    def taken_by(self, optimizer: Optimizer, *_: Any) -> None:
        """Note that an optimizer takes a step."""
        if self._waiting:
            taken = _parameters_of(optimizer)
            self._waiting = {name: parameter for name, parameter in self._waiting.items() if parameter not in taken}


def _parameters_of(optimizer: Optimizer) -> set[torch.Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
