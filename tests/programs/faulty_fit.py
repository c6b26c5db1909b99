"""A training script to which something happens: python faulty_fit.py DIRECTORY FAULT.

It saves `last.ckpt` every third step and resumes from what it finds. Every rank that comes to the end leaves its
parameters in the directory. What a step trains on depends on the step and the rank alone, so that a run can be resumed
in the middle of an epoch.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from models import Classifier
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_powersgd import PowerSGDStrategy

STEPS = 8


class TrainedByStep(Classifier):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2 * self.global_step + self.global_rank))
        return super().training_step([x, x[:, :10].argmax(dim=1)], batch_idx)


class LeaveParameters(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        left = {"first_step": self.first_step, "last_step": trainer.global_step, "parameters": pl_module.state_dict()}
        torch.save(left, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


class After(Callback):
    """Does something when a step has been taken, before ModelCheckpoint saves it."""

    def __init__(self, step: int, act: Callable[[Trainer], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer)


class BeforeNext(After):
    """Does something when the batch after a step begins."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        pass


class KillOnce(Callback):
    """Kills a rank in the middle of the last backward pass, the first time that it comes there."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        marker = Path(trainer.default_root_dir) / "killed"

        def kill(_: Tensor) -> None:
            if trainer.global_step == STEPS - 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        if trainer.global_rank == self.rank:
            pl_module.net[2].weight.register_hook(kill)


def send_myself(number: signal.Signals, on_every_rank: bool = True) -> Callable[[Trainer], None]:
    def send(trainer: Trainer) -> None:
        if on_every_rank or trainer.is_global_zero:
            os.kill(os.getpid(), number)

    return send


def fill_the_disk(trainer: Trainer) -> None:
    """Let the next file break off half way, and keep a copy of the last one."""
    if trainer.is_global_zero:
        last = Path(trainer.default_root_dir) / "last.ckpt"
        shutil.copy(last, last.with_name("before.ckpt"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size // 2, resource.RLIM_INFINITY))


def fit(
    directory: str,
    *callbacks: Callback,
    every: int = 3,
    ckpt_path: str | None = "last",
    devices: int = 2,
    **options: Any,
) -> None:
    torch.set_num_threads(1)
    saver = ModelCheckpoint(
        directory, save_top_k=0, save_last=True, every_n_train_steps=every, enable_version_counter=False
    )
    # With small buckets, collectives are under way in the middle of a backward pass. No test lasts until the timeout.
    strategy = PowerSGDStrategy(rank=2, bucket_cap_mb=0.004, timeout=timedelta(minutes=30), **options)
    Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[*callbacks, saver, LeaveParameters()],
    ).fit(TrainedByStep(), DataLoader(range(100)), ckpt_path=ckpt_path)


def main(directory: str, fault: str) -> None:
    if fault == "kill rank 0":
        fit(directory, KillOnce(0))
    elif fault == "kill rank 1":
        fit(directory, KillOnce(1))
    elif fault == "full disk":
        fit(directory, After(5, fill_the_disk))
    elif fault == "requeue":
        fit(directory, After(3, send_myself(signal.SIGUSR1)), ckpt_path=None)
    elif fault == "requeue by rank 0 alone":
        fit(directory, BeforeNext(4, send_myself(signal.SIGUSR1, on_every_rank=False)), ckpt_path=None)
    elif fault == "terminate":
        fit(directory, After(4, send_myself(signal.SIGTERM)), OnExceptionCheckpoint(directory), every=100)
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    main(*sys.argv[1:])
