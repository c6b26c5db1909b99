"""What compression brings and what it costs, as torchmetrics.

The metrics can be used alone:

    >>> from lightning_powersgd import CompressionRatio
    >>> ratio = CompressionRatio()
    >>> ratio.update(dense_bytes=44_000_000, sent_bytes=320_000)
    >>> ratio.compute()
    tensor(137.5000, dtype=torch.float64)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


class _ByteMetric(Metric):
    """Adds up bytes. They are the same on every rank, so that ranks are not summed."""

    full_state_update = False
    dense_bytes: Tensor
    sent_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("dense_bytes", "sent_bytes"):
            # float32 would round above 16 MiB.
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    @override
    def update(self, dense_bytes: float, sent_bytes: float) -> None:
        """Add a step.

        Args:
            dense_bytes: bytes of the gradients.
            sent_bytes: bytes handed to collectives for them.
        """
        self.dense_bytes += dense_bytes
        self.sent_bytes += sent_bytes


class CompressionRatio(_ByteMetric):
    """Dense gradient bytes ÷ bytes handed to collectives; 1 where nothing had to be exchanged."""

    higher_is_better = True

    @override
    def compute(self) -> Tensor:
        """Give the ratio over all updates, a float64 scalar."""
        return torch.where(self.sent_bytes > 0, self.dense_bytes / self.sent_bytes, torch.ones_like(self.sent_bytes))


class BytesSent(_ByteMetric):
    """Bytes that a rank handed to collectives for gradients."""

    higher_is_better = False

    @override
    def compute(self) -> Tensor:
        """Give the bytes over all updates, a float64 scalar."""
        return self.sent_bytes.clone()


class BytesSaved(_ByteMetric):
    """Dense gradient bytes minus bytes handed to collectives."""

    higher_is_better = True

    @override
    def compute(self) -> Tensor:
        """Give the bytes over all updates, a float64 scalar."""
        return self.dense_bytes - self.sent_bytes


class ResidualRatio(Metric):
    """‖e‖ ÷ ‖M‖ over all compressed parameters: 0 = nothing lost, 1 = nothing sent, NaN = not a finite step."""

    full_state_update = False
    higher_is_better = False
    error: Tensor
    matrix: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("error", "matrix"):
            self.add_state(name, default=torch.zeros(()), dist_reduce_fx="sum")

    @override
    def update(self, error: Tensor, matrix: Tensor) -> None:
        """Add a step.

        Args:
            error: ‖e‖², a scalar: what was left behind.
            matrix: ‖M‖², a scalar: gradient and error together.
        """
        self.error += error
        self.matrix += matrix

    @override
    def compute(self) -> Tensor:
        """Give the ratio of the norms over all updates, a scalar."""
        # Zero times what is not finite is NaN, where an error over it might be zero.
        ratio = (self.error / self.matrix).sqrt() + self.matrix * 0
        return torch.where(self.matrix == 0, torch.zeros_like(ratio), ratio)


class ConsensusDistance(Metric):
    """Root mean square of the distances of the ranks' models to their average, as `consensus_distance` measures it."""

    full_state_update = False
    higher_is_better = False
    squared: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        # What is added is the same on every rank already.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        for name in ("squared", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean")

    @override
    def update(self, distance: Tensor) -> None:
        """Add a measurement.

        Args:
            distance: a scalar.
        """
        self.squared += distance**2
        self.count += 1

    @override
    def compute(self) -> Tensor:
        """Give the root mean square over all updates, a float64 scalar."""
        return (self.squared / self.count.clamp(min=1)).sqrt()
