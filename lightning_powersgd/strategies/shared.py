"""What the strategies share of the trainer's lifecycle: names, agreement, and checkpoints that a rank saves alone.

The strategies' files import no namespace of Lightning's: `namespaces` joins the classes with the one in use.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_powersgd.exchange.presence import Attendance, all_ranks_come, position_of
from lightning_powersgd.lightning_types import _PATH, DDPStrategy, TBroadcast, pl
from lightning_powersgd.metrics.monitors import Monitor
from lightning_powersgd.namespaces import follow
from lightning_powersgd.strategies.equal_ranks import require_equal_ranks
from lightning_powersgd.strategies.names import Named

# How long a rank that saves on an exception or a signal waits for ranks that may never come.
PATIENCE = timedelta(seconds=10)


class SharedLifecycle(Named, DDPStrategy):
    """A mixin for strategies with several ranks that have a state of their own beside the optimizers'.

    Args:
        log_metrics: whether to log the metrics.
        prog_bar: show the compression ratio in the progress bar. Needs ``log_metrics``.
        accelerator: as in ``DDPStrategy``; set by the trainer.
        parallel_devices: as in ``DDPStrategy``; set by the trainer.
        cluster_environment: as in ``DDPStrategy``; set by the trainer.
        checkpoint_io: as in ``DDPStrategy``.
        precision_plugin: as in ``DDPStrategy``; set by the trainer.
        process_group_backend: such as "nccl" or "gloo"; None chooses by the device.
        timeout: of collectives.
        start_method: how processes are started: "popen", "spawn", "fork" or "forkserver".
        **arguments: others of the strategy of Lightning's that follows in the order of inheritance.

    Raises:
        ValueError: for a progress bar without metrics.
    """

    part, base = "pytorch", "strategies.DDPStrategy"
    # The callback that logs the metrics.
    monitor: ClassVar[type[Monitor]]

    def __init__(self, log_metrics: bool, prog_bar: bool, **arguments: Any) -> None:
        if prog_bar and not log_metrics:
            raise ValueError("`prog_bar=True` needs `log_metrics=True`. Set both, or leave the progress bar alone.")
        super().__init__(**arguments)
        self._monitor = self.monitor(prog_bar) if log_metrics else None
        self._saved_alone = self._skips_barrier = False
        self._attendance = Attendance()

    @property
    @override
    def accelerator(self) -> pl.accelerators.Accelerator | None:
        return super().accelerator

    @accelerator.setter
    def accelerator(self, accelerator: pl.accelerators.Accelerator) -> None:
        # The first thing that a trainer gives to a strategy.
        follow(self, accelerator)
        super(SharedLifecycle, type(self)).accelerator.fset(self, accelerator)  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        ours = not dist.is_initialized()
        super().setup_environment()
        if ours and dist.is_initialized():
            atexit.register(_end_process_group)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._saved_alone = self._skips_barrier = False
        self._attendance = Attendance()
        super().setup(trainer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        emergency = self._is_emergency(filepath)
        # Plain DDP, too, writes a file that rank 0 saves without the others.
        alone = (emergency or self.needs_all_ranks(checkpoint)) and not self._all_ranks_come(emergency)
        self.complete_checkpoint(checkpoint, alone)
        with temporary_files_beside(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)
        self._saved_alone, self._skips_barrier = alone and emergency, alone

    def needs_all_ranks(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether the strategy's part of a checkpoint takes collectives. The same on every rank.

        Args:
            checkpoint: without that part.
        """
        raise NotImplementedError

    def complete_checkpoint(self, checkpoint: dict[str, Any], alone: bool) -> None:
        """Put the strategy's part into a checkpoint. Called on every rank.

        Args:
            checkpoint: changed in place.
            alone: whether other ranks may never come here, so that nothing of theirs can be had.
        """
        raise NotImplementedError

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that train together; ``None`` is the default group."""
        return None

    @property
    def moment(self) -> str | None:
        """What a rank has done so far, as far as it decides on the collectives that a checkpoint takes.

        ``None`` in the middle of a step, where ranks may be stuck.
        """
        raise NotImplementedError

    @override
    def barrier(self, name: str | None = None) -> None:
        # After a checkpoint that this rank saved alone, it would wait in vain. If the run goes on, that is true of the
        # one barrier that belongs to the checkpoint.
        if self._saved_alone:
            self._saved_alone = self._interrupted()
        elif self._skips_barrier and name == "Trainer.save_checkpoint":
            self._skips_barrier = False
        else:
            super().barrier(name)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return obj if self._saved_alone else super().broadcast(obj, src)

    @override
    def reduce(
        self, tensor: torch.Tensor, group: Any | None = None, reduce_op: dist.ReduceOp | str | None = "mean"
    ) -> torch.Tensor:
        return tensor if self._saved_alone else super().reduce(tensor, group, reduce_op)

    def add_monitor(self, trainer: pl.Trainer) -> None:
        """Let the metrics be logged, unless the trainer has a callback that does so."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        added = any(isinstance(callback, self.monitor) for callback in callbacks)
        if self._monitor is not None and not added and not trainer.barebones:
            follow(self._monitor, trainer)
            # First, so that the progress bar shows this step's values.
            callbacks.insert(0, self._monitor)

    def require_equal_ranks(self, arguments: Mapping[str, str]) -> None:
        """Make sure that the ranks have the same versions, arguments and parameters.

        Raises:
            RuntimeError: on every rank, naming the first difference.
        """
        assert self.lightning_module is not None
        arguments = {**arguments, "the argument `log_metrics`": repr(self._monitor is not None)}
        require_equal_ranks(self, arguments, self.lightning_module.named_parameters(), self.process_group)

    def _interrupted(self) -> bool:
        module = self.lightning_module
        # Processes that were spawned took the trainer with them, when they ended.
        trainer = None if module is None else module._trainer
        return trainer is not None and trainer.state.status == "interrupted"

    def _is_emergency(self, filepath: _PATH) -> bool:
        """Whether a checkpoint is saved on an exception, or from SLURM's signal handler, anywhere in the program."""
        return self._interrupted() or Path(filepath).name.startswith("hpc_ckpt")

    def _all_ranks_come(self, emergency: bool) -> bool:
        """Whether all ranks save this checkpoint too, between the same two steps."""
        if self.world_size == 1:
            return True
        if not dist.is_initialized():
            return False
        if not emergency:
            return self._attendance.all_come(self.moment, self.process_group)
        position = None if self.moment is None else position_of(self.moment, self.process_group)
        return position is not None and all_ranks_come(position, PATIENCE, self.process_group)


@contextlib.contextmanager
def temporary_files_beside(filepath: _PATH) -> Iterator[None]:
    """Let temporary files be made in a file's own directory, if it has one on this machine.

    Lightning writes a checkpoint to a temporary file and then moves it. From another filesystem, such as a ``/tmp`` of
    its own, the move is a copy, and a disk that fills up during it has destroyed the checkpoint of that name before.
    """
    before, folder = tempfile.tempdir, Path(filepath).parent
    tempfile.tempdir = str(folder) if os.path.isdir(folder) else before
    try:
        yield
    finally:
        tempfile.tempdir = before


def _end_process_group() -> None:
    """End the process group when the program ends.

    Lightning does so for NCCL only. With gloo, threads that are still running then abort now and then a program that
    had done all its work.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
