"""What compressed steps have not sent yet, when steps are to be exact from now on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.passes import add_scaled
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.exchange.loss_scale import LossScale
from lightning_powersgd.exchange.use import ReachedParameters


class UnsentErrors:
    """Sends all errors with the gradients of one exact step.

    Args:
        state: whose errors.
        loss_scale: of the step.
        reached: the parameters that this rank's loss reaches; ``None`` where that is all of them.
        process_group: the ranks that average.
        judges: as in `GradientExchange`.
    """

    def __init__(
        self,
        state: PowerSGDState,
        loss_scale: LossScale,
        reached: ReachedParameters | None,
        process_group: dist.ProcessGroup | None,
        judges: dist.ProcessGroup | None,
    ) -> None:
        self._state, self._loss_scale, self._reached = state, loss_scale, reached
        self._process_group, self._judges = process_group, judges
        self._gradients: dict[str, Tensor] = {}

    def add_to(self, name: str, gradient: Tensor) -> None:
        """Add a parameter's error, if it has one, to its gradient, laid out in memory as the parameter is."""
        self._gradients[name] = gradient
        if name in self._state.errors:
            add_scaled(gradient, self._state.errors[name], self._loss_scale.ratio)

    def settle(self) -> None:
        """Empty the error buffers whose values have arrived, now that the gradients are averages.

        What a step that is not finite has sent is lost with it, and so is what DDP throws away, since no rank's loss
        reached the parameter. Such errors stay, for the next step. The host waits for that answer: errors are sent in
        one step out of thousands.
        """
        names = list(self._gradients)
        if not names:
            return
        arrived = torch.stack([gradient.isfinite().all() for gradient in self._gradients.values()])
        if self._loss_scale.changes or self._judges is not None:
            arrived &= arrived.all()
        arrived = arrived.to(torch.uint8)
        if self._judges is not None:
            # Of unequal shards, each rank knows other gradients.
            all_arrived = arrived.min()
            dist.all_reduce(all_arrived, dist.ReduceOp.MIN, group=self._judges)
            arrived *= all_arrived
        if self._reached is not None:
            used = torch.tensor([name in self._reached for name in names], dtype=torch.uint8, device=arrived.device)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=self._process_group)
            arrived *= used
        self._state.owing = False
        for name, its in zip(names, arrived.tolist(), strict=True):
            if name in self._state.errors and its:
                self._state.errors[name].zero_()
            elif name in self._state.errors:
                self._state.owing = True
        if not self._state.owing:
            self._state.averaged = True
