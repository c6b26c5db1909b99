"""PowerSGD between machines, for models that are sharded inside each: a Lightning strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer
from typing_extensions import override

from lightning_powersgd.compressor.config import (
    AUTO,
    CommDtype,
    Compress,
    PowerSGDConfig,
    Rank,
    floating_dtype,
    require_int,
)
from lightning_powersgd.compressor.plan import DEFAULT_GROUP_BYTES
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.lightning_types import _PATH, STEP_OUTPUT, pl
from lightning_powersgd.metrics.monitors import CompressionMonitor
from lightning_powersgd.strategies.advice import needs_exact_gradients
from lightning_powersgd.strategies.arguments import documented, require_bucket_cap
from lightning_powersgd.strategies.automatic_rank import settle_ranks
from lightning_powersgd.strategies.checkpoint import CHECKPOINT_KEY
from lightning_powersgd.strategies.equal_ranks import describe_exchange
from lightning_powersgd.strategies.never_slower import TrialReport
from lightning_powersgd.strategies.powersgd import PowerSGDStrategy
from lightning_powersgd.strategies.shared import SharedLifecycle, temporary_files_beside

if TYPE_CHECKING:
    from lightning_powersgd.exchange.sharded import ShardedGradients

_NOT_SAVED = (
    "A checkpoint was not saved: a sharded one needs every rank, and not all of them came to save in the same step."
    " Save on all ranks, not on rank 0 alone."
)


@documented(PowerSGDConfig, SharedLifecycle, PowerSGDStrategy)
class PowerSGDModelParallelStrategy(SharedLifecycle):
    """Training of a model that is sharded inside each machine, with PowerSGD gradient compression between machines.

    Use it as ``Trainer(strategy=PowerSGDModelParallelStrategy())``, with the ``configure_model`` of
    `lightning.pytorch.strategies.ModelParallelStrategy`, which shards the model over one machine:
    ``fully_shard(module, mesh=self.device_mesh["data_parallel"])``. Every machine holds a replica. A shard's gradients
    are averaged over the replicas with PowerSGD, and each shard is a matrix of its own.

    Args:
        replicas: how many replicas of the model there are; "auto": one on each machine.
        data_parallel_size: over how many devices a replica is sharded; "auto": as many as there are for it.
        tensor_parallel_size: how many devices share the computation of a layer.
        save_distributed_checkpoint: let every rank save its shards to a file of its own, in a folder. Otherwise one
            file has the whole model, which `PowerSGDStrategy` can read as well.
        bucket_cap_mb: MiB of a shard's gradients in a group of parameters whose factors travel together. None is 25.
            Smaller: communication starts earlier, in more messages.
        timeout: of collectives.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range. What depends on the number of processes or on the model is found when
            the fit begins.
    """

    base = "strategies.ModelParallelStrategy"
    monitor = CompressionMonitor
    registered_name = "powersgd_model_parallel"
    ways_to_start: ClassVar = {"": {}}
    # Of Lightning's strategy.
    device_mesh: DeviceMesh
    _tensor_parallel_size: int
    _save_distributed_checkpoint: bool

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
        log_metrics: bool = True,
        prog_bar: bool = False,
        checkpoint_error_feedback: bool = True,
        replicas: Literal["auto"] | int = "auto",
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        bucket_cap_mb: float | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
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
        for name, size in (("replicas", replicas), ("data_parallel_size", data_parallel_size)):
            if size != "auto":
                require_int(name, size, minimum=1, remedy="Use 'auto', or a number.")
        require_int("tensor_parallel_size", tensor_parallel_size, minimum=1, remedy="Use 1 for none.")
        require_bucket_cap(bucket_cap_mb)
        super().__init__(
            log_metrics=log_metrics,
            prog_bar=prog_bar,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.checkpoint_error_feedback = checkpoint_error_feedback
        self.replicas = replicas
        self._shards, self._bucket_cap_mb = data_parallel_size, bucket_cap_mb
        self._gradients: ShardedGradients | None = None
        self._trainable: tuple[bool, ...] = ()
        self._saves_alone = False
        self._trials = TrialReport()

    @property
    def exchange(self) -> GradientExchange | None:
        """The exchange of the current or the last fit, with the compressor's state; ``None`` before the first."""
        return None if self._gradients is None else self._gradients.exchange

    @property
    @override
    def moment(self) -> str | None:
        if self.exchange is None:
            return "no step"
        return None if self.exchange.exchanging else f"step {self.exchange.state.step}"

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        mesh = self.device_mesh["replicate", "data_parallel"]
        replica, shard = mesh.get_coordinate() or (0, 0)
        return {"num_replicas": mesh.size(), "rank": replica * mesh.size(1) + shard}

    @override
    def setup_environment(self) -> None:
        replicas, data, tensor = self._sizes()
        # Lightning's own mesh knows no replicas. It is made first, for all processes, and then replaced.
        self._data_parallel_size = replicas * data
        super().setup_environment()
        self._data_parallel_size = data
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (replicas, data, tensor),
            mesh_dim_names=("replicate", "data_parallel", "tensor_parallel"),
        )
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _sizes(self) -> tuple[int, int, int]:
        """Give the sizes of the mesh, of which the last one changes fastest, so that a replica's processes are beside.

        Raises:
            ValueError: if that many processes cannot be arranged so.
        """
        processes, tensor = self.num_nodes * self.num_processes, self._tensor_parallel_size
        replicas = self.num_nodes if self.replicas == "auto" else self.replicas
        data = processes // (replicas * tensor) if self._shards == "auto" else self._shards
        if replicas * data * tensor != processes:
            raise ValueError(
                f"`replicas={self.replicas!r}`, `data_parallel_size={self._shards!r}` and"
                f" `tensor_parallel_size={tensor}` cannot be had with {processes} processes on {self.num_nodes}"
                " machines: their product must be the number of processes."
            )
        return replicas, data, tensor

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == "fit"
        if fitting:
            self._gradients = None
            self.add_monitor(trainer)
        super().setup(trainer)
        if not fitting:
            return
        assert self.lightning_module is not None
        self.require_equal_ranks(
            describe_exchange(self.config, {}, self.root_device)
            | {"the argument `checkpoint_error_feedback`": repr(self.checkpoint_error_feedback)}
        )
        self._attach()

    def _attach(self) -> None:
        """Let gradients be exchanged; what is trainable may have changed since that was done before."""
        # Only now: what PyTorch needs for it takes a second to import.
        from lightning_powersgd.exchange.sharded import attach_powersgd_to_shards, give_the_first_replicas

        assert self.lightning_module is not None
        module, previous = self.lightning_module, self._gradients
        self._gradients = attach_powersgd_to_shards(
            module,
            self.config,
            self._group("replicate"),
            self._group("data_parallel", "tensor_parallel"),
            DEFAULT_GROUP_BYTES if self._bucket_cap_mb is None else int(self._bucket_cap_mb * 2**20),
        )
        self._trainable = tuple(parameter.requires_grad for parameter in module.parameters())
        self._gradients.exchange.state.exact = needs_exact_gradients(self.optimizers)
        if previous is None:
            # Neither FSDP2 nor Lightning makes the replicas of a model alike.
            give_the_first_replicas(module, self._group("replicate"))
        else:
            self._gradients.exchange.load_state_dict(previous.exchange.state.state_dict())
            previous.retire()

    def _group(self, *dimensions: str) -> dist.ProcessGroup:
        """Give this rank's group along dimensions of the mesh."""
        mesh = self.device_mesh[dimensions]
        group: dist.ProcessGroup = (mesh._flatten() if len(dimensions) > 1 else mesh).get_group()
        return group

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.exchange is not None
        assert self.lightning_module is not None
        settle_ranks(self.exchange, self.lightning_module.trainer, self.optimizers)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self.lightning_module is not None
        now = tuple(parameter.requires_grad for parameter in self.lightning_module.parameters())
        if self._gradients is not None and now != self._trainable:
            self._attach()
        assert self.exchange is not None
        self._trials.look(self.exchange.state.trial)
        return super().training_step(*args, **kwargs)

    @override
    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        # Gradients are reduced inside the machine all the same, so that they take no more memory.
        assert self._gradients is not None
        self._gradients.synchronises = False
        try:
            yield
        finally:
            self._gradients.synchronises = True

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self.exchange is not None and self.checkpoint_error_feedback:
            self.exchange.average_errors()

    # Checkpoints. Each takes every rank, in Lightning's strategy, too: a rank that saves alone would wait forever.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._saves_alone = not self._all_ranks_come(self._interrupted() or self.moment is None)
        return {} if self._saves_alone else super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {} if self._saves_alone else super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        from lightning_powersgd.strategies.sharded_checkpoint import (
            make_entry,
            save_errors,
            sharded_errors,
            written_beside,
        )

        self._saved_alone, self._skips_barrier = self._saves_alone and self._interrupted(), self._saves_alone
        if self._saves_alone:
            rank_zero_warn(_NOT_SAVED)
            return
        path, gradients, errors = Path(self.broadcast(filepath)), self._gradients, None
        if gradients is not None and "optimizer_states" in checkpoint:
            if self.checkpoint_error_feedback:
                gradients.exchange.average_errors()
                errors = sharded_errors(gradients)
            whole = not self._save_distributed_checkpoint
            checkpoint[CHECKPOINT_KEY] = make_entry(gradients, errors if whole else None)
        # Not Lightning's for a strategy whose ranks may save alone.
        save = super(SharedLifecycle, self).save_checkpoint
        if not self._save_distributed_checkpoint:
            with temporary_files_beside(path):
                save(checkpoint, path, storage_options)
            return
        with written_beside(path) as folder:
            save(checkpoint, folder, storage_options)
            if errors is not None:
                save_errors(errors, folder)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        assert self.lightning_module is not None
        if self._gradients is not None and self.lightning_module.trainer.state.fn == "fit":
            from lightning_powersgd.strategies.sharded_checkpoint import load_entry

            load_entry(self._gradients, checkpoint.get(CHECKPOINT_KEY), Path(self.broadcast(checkpoint_path)))
        return checkpoint

    @override
    def teardown(self) -> None:
        super().teardown()
        if self._gradients is not None:
            self._gradients.retire()
