"""What the strategies share of the trainer's lifecycle: names, agreement, and checkpoints that a rank saves alone."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import lightning
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override

from lightning_powersgd.agreement import all_ranks_come, position_of, require_agreement
from lightning_powersgd.metrics import Monitor
from lightning_powersgd.version import __version__

# How long a rank that saves on an exception or a signal waits for ranks that may never come.
PATIENCE = timedelta(seconds=10)


class BaseStrategy(DDPStrategy):
    """A strategy with several ranks that have a state of their own beside the optimizers'.

    Args:
        monitor: makes what logs the metrics.
        log_metrics: whether to log them.
        prog_bar: show the compression ratio in the progress bar.
        **ddp_kwargs: of `DDPStrategy`.

    Raises:
        ValueError: for a progress bar without metrics.
    """

    # The name that users give to the trainer, and what may be added to it, with the arguments that this sets.
    registered_name: ClassVar[str]
    name_endings: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}

    def __init__(
        self, monitor: Callable[[bool], Monitor], log_metrics: bool, prog_bar: bool, **ddp_kwargs: Any
    ) -> None:
        if prog_bar and not log_metrics:
            raise ValueError("`prog_bar=True` needs `log_metrics=True`. Set both, or leave the progress bar alone.")
        super().__init__(**ddp_kwargs)
        self._monitor = monitor(prog_bar) if log_metrics else None
        self._saved_alone = False

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy's names. A second call registers them again, and does no harm."""
        start_methods = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
        names = {cls.registered_name + ending: method for ending, method in start_methods.items()}
        # The trainer lowers the case of a name. Without this one, `--trainer.strategy PowerSGDStrategy` would fail
        # unless one of the strategy's own arguments follows, since jsonargparse takes it for a name then.
        names[cls.__name__.lower()] = "popen"
        for name, start_method in names.items():
            for ending, arguments in cls.name_endings.items():
                settings = {"start_method": start_method, **arguments}
                shown = ", ".join(f"{key}={value!r}" for key, value in settings.items())
                strategy_registry.register(
                    name + ending,
                    cls,
                    description=f"{cls.__name__} with {shown}",
                    override=True,
                    **settings,
                )

    @override
    def setup_distributed(self) -> None:
        ours = not dist.is_initialized()
        super().setup_distributed()
        if ours:
            atexit.register(_end_process_group)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        self._saved_alone = False
        super().setup(trainer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        alone = self._may_be_alone(filepath) and not self._all_ranks_come()
        self.complete_checkpoint(checkpoint, alone)
        with temporary_files_beside(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)
        self._saved_alone = alone

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
        added = any(isinstance(callback, type(self._monitor)) for callback in callbacks)
        if self._monitor is not None and not added and not trainer.barebones:
            # First, so that the progress bar shows this step's values.
            callbacks.insert(0, self._monitor)

    def require_equal_ranks(self, arguments: Mapping[str, Any]) -> None:
        """Make sure that the ranks have the same versions, arguments and parameters.

        Raises:
            RuntimeError: on every rank, naming the first difference.
        """
        assert self.lightning_module is not None
        fingerprint = {
            "the version of lightning_powersgd": __version__,
            "the version of torch": torch.__version__,
            "the version of lightning": lightning.__version__,
        }
        fingerprint |= {name: str(value) for name, value in arguments.items()}
        fingerprint["the argument `log_metrics`"] = repr(self._monitor is not None)
        for name, parameter in self.lightning_module.named_parameters():
            kind = "trainable" if parameter.requires_grad else "frozen"
            fingerprint[f"the parameter {name!r}"] = f"{kind} {tuple(parameter.shape)} {parameter.dtype}"
        require_agreement(fingerprint, self.process_group)

    def _interrupted(self) -> bool:
        module = self.lightning_module
        return module is not None and module.trainer.state.status == TrainerStatus.INTERRUPTED

    def _may_be_alone(self, filepath: _PATH) -> bool:
        """Whether a checkpoint is saved on an exception, or from SLURM's signal handler, anywhere in the program."""
        return self._interrupted() or Path(filepath).name.startswith("hpc_ckpt")

    def _all_ranks_come(self) -> bool:
        """Whether all ranks save this checkpoint too, between the same two steps."""
        if self.world_size == 1:
            return True
        if self.moment is None or not dist.is_initialized():
            return False
        return all_ranks_come(position_of(self.moment, self.process_group), PATIENCE, self.process_group)


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
