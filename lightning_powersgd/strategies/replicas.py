"""Replicas that should be equal on all ranks: compared now and then, and repaired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.replicas import repair_replicas, replicas_agree


class ReplicaCheck:
    """Compares a checksum of the parameters over the ranks, and gives rank 0's to all if they differ.

    Args:
        every: synchronised backward passes between two comparisons; 0 never compares.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._next = every

    def check(self, exchange: GradientExchange, optimizers: Sequence[Any]) -> None:
        """Compare the replicas if it is time to.

        Args:
            exchange: whose parameters are compared.
            optimizers: of these parameters, whose states are repaired with them.
        """
        step = exchange.state.step
        if not self._every or step < self._next:
            return
        self._next = step + self._every
        parameters, group = dict(exchange.parameters), exchange.replicas
        if dist.get_world_size(group) == 1 or replicas_agree(parameters, group):
            return
        deviations = repair_replicas(parameters | _optimizer_tensors(parameters, optimizers), group)
        worst = max(deviations, key=lambda name: deviations[name], default="none")
        rank_zero_warn(
            f"After {step} steps the replicas were no longer equal: {len(deviations)} tensors deviated from rank 0's,"
            f" most of all {worst!r}, by {deviations.get(worst, 0.0):.1e} of its norm. All ranks go on with rank 0's."
            " Around 1e-6 it is rounding, from processors of different kinds or unequal numbers of threads, and does no"
            " harm; more comes from code that changes parameters on each rank in its own way."
        )


def _optimizer_tensors(parameters: dict[str, Tensor], optimizers: Sequence[Any]) -> dict[str, Tensor]:
    """Give the optimizers' tensors, named in an order that is the same on every rank."""
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        f"{key} of {name} in optimizer {index}": value
        for index, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (name := names.get(parameter)) is not None
        for key, value in (optimizer.state.get(parameter) or {}).items()
        if isinstance(value, Tensor)
    }
