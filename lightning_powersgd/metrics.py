"""What compression brings and what it costs, as torchmetrics, and the callback that logs it.

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
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_powersgd.agreement import consensus_distance
from lightning_powersgd.gossip import GossipExchange
from lightning_powersgd.hook import GradientExchange


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


class Monitor(Callback):
    """Logs the metrics of an exchange at the trainer's cadence, and from an epoch's first and last batch.

    Args:
        prefix: of the metrics' names.
        prog_bar: show the compression ratio in the progress bar.
    """

    def __init__(self, prefix: str, prog_bar: bool) -> None:
        self._prefix = prefix
        self._prog_bar = prog_bar
        self._last_logged = 0

    def steps(self, trainer: Trainer) -> int:
        """Count the exchanges so far; 0 where the trainer has another strategy."""
        raise NotImplementedError

    def values(self, trainer: Trainer) -> dict[str, Tensor]:
        """Give the metrics of the last exchange by name; asked only when they are logged."""
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_logged = self.steps(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = self.steps(trainer)
        if steps == self._last_logged:
            return  # nothing was exchanged since: gradients accumulate
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if not (batch_idx == 0 or last or trainer._logger_connector.should_update_logs):
            return
        self._last_logged = steps
        for name, value in self.values(trainer).items():
            prog_bar = self._prog_bar and name == "compression_ratio"
            pl_module.log(
                f"{self._prefix}/{name}", value, on_step=True, on_epoch=False, prog_bar=prog_bar, batch_size=1
            )


class CompressionMonitor(Monitor):
    """Logs the metrics at the trainer's cadence. `PowerSGDStrategy` adds it, unless told ``log_metrics=False``.

    Logged are, as ``powersgd/…``, the ``compression_ratio`` and ``bytes_sent`` of the last step, ``bytes_saved`` since
    the fit began, and the ``residual_ratio`` of the last step of this rank (with error feedback only: without it there
    is no residual to measure). ``trainer.callback_metrics`` has them from an epoch's first and last batch, too.

    Args:
        prog_bar: show the compression ratio in the progress bar.
    """

    def __init__(self, prog_bar: bool = False) -> None:
        super().__init__("powersgd", prog_bar)
        # Each rank logs its own: waiting for the others costs a collective and tells nothing new.
        self._compression_ratio = CompressionRatio(sync_on_compute=False)
        self._bytes_sent = BytesSent(sync_on_compute=False)
        self._bytes_saved = BytesSaved(sync_on_compute=False)
        self._residual_ratio = ResidualRatio(sync_on_compute=False)

    @override
    def steps(self, trainer: Trainer) -> int:
        exchange = _exchange_of(trainer)
        return 0 if exchange is None else exchange.state.step

    @override
    def values(self, trainer: Trainer) -> dict[str, Tensor]:
        exchange = _exchange_of(trainer)
        assert exchange is not None
        state = exchange.state
        values = {
            "compression_ratio": _measure(self._compression_ratio, state.dense_bytes, state.sent_bytes),
            "bytes_sent": _measure(self._bytes_sent, state.dense_bytes, state.sent_bytes),
            "bytes_saved": _measure(self._bytes_saved, state.total_dense_bytes, state.total_sent_bytes),
        }
        if state.config.error_feedback:
            values["residual_ratio"] = _measure(self._residual_ratio.to(state.device), *exchange.residual_norms())
        return values


class GossipMonitor(Monitor):
    """Logs the metrics of gossip. `PowerGossipStrategy` adds it, unless told ``log_metrics=False``.

    Logged are, as ``powergossip/…`` and of the last step, the ``bytes_sent`` by this rank, the ``link_bytes`` of them
    that went over each of its links, the ``compression_ratio`` to gossip of whole models, and the
    ``consensus_distance`` of the ranks' models (see `consensus_distance`), by a sketch that costs 8 kB and a pass over
    the model.

    Args:
        prog_bar: show the compression ratio in the progress bar.
    """

    def __init__(self, prog_bar: bool = False) -> None:
        super().__init__("powergossip", prog_bar)
        self._compression_ratio = CompressionRatio(sync_on_compute=False)
        self._bytes_sent = BytesSent(sync_on_compute=False)
        self._link_bytes = BytesSent(sync_on_compute=False)
        self._consensus_distance = ConsensusDistance()

    @override
    def steps(self, trainer: Trainer) -> int:
        return sum(exchange.step_count for exchange in _gossip_of(trainer))

    @override
    def values(self, trainer: Trainer) -> dict[str, Tensor]:
        exchanges = _gossip_of(trainer)
        dense, sent, link = (
            sum(getattr(exchange, name) for exchange in exchanges)
            for name in ("dense_bytes", "sent_bytes", "link_bytes")
        )
        parameters = {name: value for exchange in exchanges for name, value in exchange.parameters.items()}
        distance = consensus_distance(parameters, exact=False)
        return {
            "compression_ratio": _measure(self._compression_ratio, dense, sent),
            "bytes_sent": _measure(self._bytes_sent, dense, sent),
            "link_bytes": _measure(self._link_bytes, dense, link),
            "consensus_distance": _measure(self._consensus_distance.to(distance.device), distance),
        }


def _exchange_of(trainer: Trainer) -> GradientExchange | None:
    """Give the strategy's exchange; ``None`` where the trainer has another strategy."""
    exchange: GradientExchange | None = getattr(trainer.strategy, "exchange", None)
    return exchange


def _gossip_of(trainer: Trainer) -> list[GossipExchange]:
    """Give the exchanges of a strategy that gossips; none where the trainer has another."""
    exchanges: list[GossipExchange] = getattr(trainer.strategy, "exchanges", [])
    return exchanges


def _measure(metric: Metric, *args: float | Tensor) -> Tensor:
    metric.reset()
    metric.update(*args)
    value: Tensor = metric.compute()
    return value
