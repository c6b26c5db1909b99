"""The scale of the loss, which error buffers must follow when a `GradScaler` changes it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_powersgd.compressor.passes import assign
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.verdict import known


class Scaler(Protocol):
    """What multiplies a loss before its backward pass, such as `torch.amp.GradScaler`."""

    def scale(self, outputs: Tensor) -> Tensor:
        """Multiply a loss by the present scale."""


class LossScale:
    """What the loss is multiplied by in a step.

    Args:
        scaler: what multiplies it; ``None`` if nothing does.
        state: whose error buffers refer to the scale of the last step that was kept.

    Attributes:
        ratio: of this step's scale to the one of the error buffers.
    """

    def __init__(self, scaler: Scaler | None, state: PowerSGDState) -> None:
        self._scaler = scaler
        self._state = state
        self._scale = torch.ones((), device=state.device)
        self._stepped = False
        self.ratio: float | Tensor = 1.0

    @property
    def changes(self) -> bool:
        """Whether the scale may be another one in each step."""
        return self._scaler is not None

    @property
    def may_differ(self) -> bool:
        """Whether this step's scale is another one than that of the error buffers, as far as the host knows."""
        return isinstance(self.ratio, Tensor) or self.ratio != 1.0

    def follow(self, scaler: Scaler | None) -> None:
        """Follow a scaler from now on. The steps so far count as taken with its present scale."""
        if self._stepped and not self.changes and scaler is not None:
            self._state.loss_scale.copy_(self._ask(scaler))
        self._scaler = scaler

    def begin_step(self) -> None:
        """Ask for the scale of the step that begins."""
        self._stepped = True
        if self._scaler is None:
            # What a run was saved with that had one.
            self._state.unscale()
            return
        self._scale = self._ask(self._scaler)
        self.ratio = known(self._scale / self._state.loss_scale)

    def end_step(self, keep: bool | Tensor) -> None:
        """Note that the error buffers refer to this step's scale now, if what it wrote is kept."""
        if self._scaler is not None:
            assign(self._state.loss_scale, self._scale, keep)

    def _ask(self, scaler: Scaler) -> Tensor:
        return scaler.scale(torch.ones((), device=self._scale.device))
