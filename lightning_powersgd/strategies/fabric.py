"""PowerSGD as a strategy of Fabric, for training loops of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_powersgd.compressor.config import AUTO, CommDtype, Compress, PowerSGDConfig, Rank, floating_dtype
from lightning_powersgd.compressor.parameters import require_values
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.ddp import attach_powersgd
from lightning_powersgd.exchange.loss_scale import Scaler
from lightning_powersgd.exchange.presence import Attendance
from lightning_powersgd.lightning_types import (
    _PATH,
    CheckpointIO,
    ClusterEnvironment,
    FabricAccelerator,
    FabricDDPStrategy,
    FabricPrecision,
)
from lightning_powersgd.namespaces import follow
from lightning_powersgd.strategies.advice import needs_exact_gradients, warn_of_muon
from lightning_powersgd.strategies.arguments import ddp_arguments, documented
from lightning_powersgd.strategies.automatic_rank import say_what_is_compressed
from lightning_powersgd.strategies.checkpoint import CHECKPOINT_KEY, ERRORS_NOT_SAVED, load_exchange
from lightning_powersgd.strategies.equal_ranks import describe_exchange, require_equal_ranks
from lightning_powersgd.strategies.names import Named
from lightning_powersgd.strategies.never_slower import settle_what_is_worth_it
from lightning_powersgd.strategies.powersgd import PowerSGDStrategy
from lightning_powersgd.strategies.shared import SharedLifecycle, temporary_files_beside


@documented(PowerSGDConfig, SharedLifecycle, PowerSGDStrategy)
class PowerSGDFabricStrategy(Named, FabricDDPStrategy):
    """Distributed data-parallel training with PowerSGD gradient compression, in a loop of one's own.

    Use it as ``Fabric(strategy=PowerSGDFabricStrategy(rank=2))``, or by name as ``Fabric(strategy="powersgd")``. It is
    `lightning.fabric.strategies.DDPStrategy` in everything but the exchange of gradients. Every module that is set up
    has an exchange of its own. `Fabric.save` adds the error buffers to a checkpoint that holds such a module, and
    `Fabric.load` takes them up again.

    Args:
        precision: as in ``DDPStrategy``; set by Fabric.

    Raises:
        TypeError: for an unknown argument, or one of the wrong type.
        ValueError: for an argument out of range, or one that cannot be had beside PowerSGD.
    """

    part, base = "fabric", "strategies.DDPStrategy"
    registered_name = "powersgd"
    name_endings: ClassVar = PowerSGDStrategy.name_endings

    def __init__(
        self,
        rank: Rank | Mapping[str, Rank] = AUTO,
        turnaround: float | None = None,
        max_bytes: int | None = None,
        start_step: int = 0,
        min_compression_ratio: float = 2.0,
        alternate: bool = False,
        error_feedback: bool = True,
        warm_start: bool = True,
        error_dtype: torch.dtype | str | None = None,
        comm_dtype: CommDtype = None,
        seed: int = 0,
        compress: Compress | None = None,
        checkpoint_error_feedback: bool = True,
        scaler: Scaler | None = None,
        *,
        accelerator: FabricAccelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: FabricPrecision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        **ddp_kwargs: Any,
    ) -> None:
        ddp_kwargs = ddp_arguments(PowerSGDFabricStrategy, ddp_kwargs, bucket_cap_mb)
        self.config = PowerSGDConfig(
            rank=rank,
            turnaround=turnaround,
            max_bytes=max_bytes,
            start_step=start_step,
            min_compression_ratio=min_compression_ratio,
            alternate=alternate,
            error_feedback=error_feedback,
            warm_start=warm_start,
            error_dtype=floating_dtype("error_dtype", error_dtype),
            comm_dtype=comm_dtype,
            seed=seed,
            compress=compress,
        )
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **ddp_kwargs,
        )
        self.checkpoint_error_feedback = checkpoint_error_feedback
        self.scaler = scaler
        self._exact = False
        self._attendance = Attendance()
        self._exchanges: dict[nn.Module, GradientExchange] = {}

    @property
    def exchanges(self) -> list[GradientExchange]:
        """The exchanges of the modules that were set up, in that order."""
        return list(self._exchanges.values())

    @property
    @override
    def accelerator(self) -> FabricAccelerator | None:
        return super().accelerator

    @accelerator.setter
    def accelerator(self, accelerator: FabricAccelerator) -> None:
        # The first thing that Fabric gives to a strategy.
        follow(self, accelerator)
        super(PowerSGDFabricStrategy, type(self)).accelerator.fset(self, accelerator)  # type: ignore[attr-defined]

    @override
    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        require_values(module.named_parameters())
        # Before DDP makes its own checks, which leave the ranks that agree with rank 0 waiting for those that do not.
        arguments = describe_exchange(self.config, self._ddp_kwargs, self.root_device)
        require_equal_ranks(self, arguments, module.named_parameters(), self._ddp_kwargs.get("process_group"))
        ddp: DistributedDataParallel = super().setup_module(module)
        exchange = attach_powersgd(ddp, self.config, self.scaler or getattr(self.precision, "scaler", None))
        exchange.state.exact = self._exact
        self._exchanges[ddp] = exchange
        settle_what_is_worth_it(exchange)
        say_what_is_compressed(exchange)
        return ddp

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if not self._exact and needs_exact_gradients([optimizer]):
            self._exact = True
            for exchange in self.exchanges:
                exchange.state.exact = True
        for exchange in self.exchanges:
            warn_of_muon([optimizer], exchange.state)
        return super().setup_optimizer(optimizer)

    @override
    def save_checkpoint(self, path: _PATH, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        exchanges = self._exchanges_in(state)
        if exchanges:
            state = {**state, CHECKPOINT_KEY: self._entries(exchanges)}
        with temporary_files_beside(path):
            super().save_checkpoint(path, state, *args, **kwargs)

    @override
    def load_checkpoint(self, path: _PATH, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        remainder: dict[str, Any] = super().load_checkpoint(path, state, *args, **kwargs)
        exchanges = self._exchanges_in(state)
        if exchanges:
            entries = remainder.pop(CHECKPOINT_KEY, {})
            for key, exchange in exchanges.items():
                load_exchange(exchange, entries.get(key))
        return remainder

    @override
    def teardown(self) -> None:
        super().teardown()
        for exchange in self.exchanges:
            exchange.retire()

    def _exchanges_in(self, state: Any) -> dict[str, GradientExchange]:
        """Give the exchanges of the modules in what is saved or loaded, by their keys there."""
        if not isinstance(state, Mapping):
            return {}
        by_module = {module: exchange for ddp, exchange in self._exchanges.items() for module in (ddp, ddp.module)}
        modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
        return {key: by_module[module] for key, module in modules.items() if module in by_module}

    def _entries(self, exchanges: Mapping[str, GradientExchange]) -> dict[str, Any]:
        """Give the states of exchanges for a checkpoint, with the mean of their errors if all ranks are here."""
        with_errors = self.checkpoint_error_feedback
        if with_errors and not all(exchange.state.averaged for exchange in exchanges.values()):
            steps = "/".join(str(exchange.state.step) for exchange in self.exchanges)
            if self._attendance.all_come(f"step {steps}", self._ddp_kwargs.get("process_group")):
                for exchange in exchanges.values():
                    exchange.average_errors()
            else:
                with_errors = False
                rank_zero_warn(ERRORS_NOT_SAVED)
        return {key: exchange.state.state_dict(error_feedback=with_errors) for key, exchange in exchanges.items()}
