"""Callbacks that log the metrics of an exchange: what they share, and one for each kind of exchange.

They import no namespace of Lightning's: `namespaces` joins them with the `Callback` of the one in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from lightning_powersgd.exchange.averages import consensus_distance
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.gossip import GossipExchange
from lightning_powersgd.lightning_types import Callback, pl
from lightning_powersgd.metrics.compression import (
    BytesSaved,
    BytesSent,
    CompressionRatio,
    ConsensusDistance,
    ResidualRatio,
)
from lightning_powersgd.metrics.growth import ErrorGrowth
from lightning_powersgd.namespaces import Joined


class Monitor(Joined, Callback):
    """Logs the metrics of an exchange at the trainer's cadence, and from an epoch's first and last batch.

    Args:
        prog_bar: show the compression ratio in the progress bar.
    """

    part, base = "pytorch", "callbacks.Callback"
    # What stands before the metrics' names, and the metrics.
    prefix: ClassVar[str]
    kinds: ClassVar[Mapping[str, type[Metric]]]

    def __init__(self, prog_bar: bool = False) -> None:
        super().__init__()
        self._prog_bar = prog_bar
        self._last_logged = 0
        # Each rank logs its own: waiting for the others costs a collective and tells nothing new.
        self._metrics = {name: kind(sync_on_compute=False) for name, kind in self.kinds.items()}

    def steps(self, trainer: pl.Trainer) -> int:
        """Count the exchanges so far; 0 where the trainer has another strategy."""
        raise NotImplementedError

    def measurements(self, trainer: pl.Trainer) -> dict[str, tuple[float | Tensor, ...]]:
        """Give what the metrics, by name, are updated with after an exchange; asked only when they are logged."""
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_logged = self.steps(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = self.steps(trainer)
        if steps == self._last_logged:
            return  # nothing was exchanged since: gradients accumulate
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if not (batch_idx == 0 or last or trainer._logger_connector.should_update_logs):
            return
        self._last_logged = steps
        for name, measured in self.measurements(trainer).items():
            prog_bar = self._prog_bar and name == "compression_ratio"
            value = self._value(name, measured)
            pl_module.log(f"{self.prefix}/{name}", value, on_step=True, on_epoch=False, prog_bar=prog_bar, batch_size=1)

    def _value(self, name: str, measured: tuple[float | Tensor, ...]) -> Tensor:
        metric = self._metrics[name]
        for given in measured:
            if isinstance(given, Tensor):
                metric.to(given.device)
        metric.reset()
        metric.update(*measured)
        value: Tensor = metric.compute()
        return value


class CompressionMonitor(Monitor):
    """Logs the metrics at the trainer's cadence. `PowerSGDStrategy` adds it, unless told ``log_metrics=False``.

    Logged are, as ``powersgd/…``, the ``compression_ratio`` and ``bytes_sent`` of the last step, ``bytes_saved`` since
    the fit began, and the ``residual_ratio`` of the last step of this rank (with error feedback only: without it there
    is no residual to measure). Where machines average inside first (``hierarchical=True``) also ``bytes_in_node``,
    which this rank handed to collectives inside its machine in the last step; the others are of those between machines.
    With ``compress="auto"`` also ``compressing``, 1 while steps are compressed and 0 while they are not, and
    ``step_time_ratio``, the time of a compressed step ÷ that of an exact one when they were last compared.
    ``trainer.callback_metrics`` has them from an epoch's first and last batch, too.

    Args:
        prog_bar: show the compression ratio in the progress bar.
    """

    prefix = "powersgd"
    kinds: ClassVar = {
        "compression_ratio": CompressionRatio,
        "bytes_sent": BytesSent,
        "bytes_saved": BytesSaved,
        "bytes_in_node": BytesSent,
        "residual_ratio": ResidualRatio,
        "compressing": MeanMetric,
        "step_time_ratio": MeanMetric,
    }

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._growth = ErrorGrowth()

    @override
    def steps(self, trainer: pl.Trainer) -> int:
        exchange = _exchange_of(trainer)
        return 0 if exchange is None else exchange.state.step

    @override
    def measurements(self, trainer: pl.Trainer) -> dict[str, tuple[float | Tensor, ...]]:
        exchange = _exchange_of(trainer)
        assert exchange is not None
        state = exchange.state
        measured: dict[str, tuple[float | Tensor, ...]] = {
            "compression_ratio": (state.dense_bytes, state.sent_bytes),
            "bytes_sent": (state.dense_bytes, state.sent_bytes),
            "bytes_saved": (state.total_dense_bytes, state.total_sent_bytes),
        }
        if exchange.bytes_in_node is not None:
            measured["bytes_in_node"] = (state.dense_bytes, exchange.bytes_in_node)
        if state.config.error_feedback:
            error, total = exchange.residual_norms()
            self._growth.measured(state, float(error), float(total))
            measured["residual_ratio"] = (error, total)
        if state.trial is not None:
            measured["compressing"] = (float(exchange.compressing),)
            if state.trial.ratio is not None:
                measured["step_time_ratio"] = (state.trial.ratio,)
        return measured


class GossipMonitor(Monitor):
    """Logs the metrics of gossip. `PowerGossipStrategy` adds it, unless told ``log_metrics=False``.

    Logged are, as ``powergossip/…`` and of the last step, the ``bytes_sent`` by this rank, the ``link_bytes`` of them
    that went over each of its links, the ``compression_ratio`` to gossip of whole models, and the
    ``consensus_distance`` of the ranks' models (see `consensus_distance`), by a sketch that costs 8 kB and a pass over
    the model.

    Args:
        prog_bar: show the compression ratio in the progress bar.
    """

    prefix = "powergossip"
    kinds: ClassVar = {
        "compression_ratio": CompressionRatio,
        "bytes_sent": BytesSent,
        "link_bytes": BytesSent,
        "consensus_distance": ConsensusDistance,
    }

    @override
    def steps(self, trainer: pl.Trainer) -> int:
        return sum(exchange.step_count for exchange in _gossip_of(trainer))

    @override
    def measurements(self, trainer: pl.Trainer) -> dict[str, tuple[float | Tensor, ...]]:
        exchanges = _gossip_of(trainer)
        dense, sent, link = (
            sum(getattr(exchange, name) for exchange in exchanges)
            for name in ("dense_bytes", "sent_bytes", "link_bytes")
        )
        parameters = {name: value for exchange in exchanges for name, value in exchange.parameters.items()}
        return {
            "compression_ratio": (dense, sent),
            "bytes_sent": (dense, sent),
            "link_bytes": (dense, link),
            "consensus_distance": (consensus_distance(parameters, exact=False),),
        }


def _exchange_of(trainer: pl.Trainer) -> GradientExchange | None:
    """Give the strategy's exchange; ``None`` where the trainer has another strategy."""
    exchange: GradientExchange | None = getattr(trainer.strategy, "exchange", None)
    return exchange


def _gossip_of(trainer: pl.Trainer) -> list[GossipExchange]:
    """Give the exchanges of a strategy that gossips; none where the trainer has another."""
    exchanges: list[GossipExchange] = getattr(trainer.strategy, "exchanges", [])
    return exchanges
