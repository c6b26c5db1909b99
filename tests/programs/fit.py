"""A user's training script: python fit.py STRATEGY DIRECTORY. Every rank leaves its parameters in the directory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from models import Classifier, loader

import lightning_powersgd  # noqa: F401


class LeaveParameters(Callback):
    def __init__(self, directory: str) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step >= 6

    def on_train_end(self, trainer, pl_module) -> None:
        state = trainer.strategy.exchange.state
        left = {
            "parameters": pl_module.state_dict(),
            "step": state.step,
            "ratio": state.dense_bytes / state.sent_bytes,
            "world_size": trainer.world_size,
        }
        torch.save(left, Path(self.directory) / f"rank{trainer.global_rank}.pt")


def main(strategy: str, directory: str) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        # So long that the automatic rank compresses; it is ended early. And it compresses however fast the network is.
        max_steps=1000,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=directory,
        callbacks=[LeaveParameters(directory)],
    )
    trainer.fit(Classifier(), loader())
    if strategy != "powersgd":
        # Spawned processes have ended, and this one saves alone.
        trainer.save_checkpoint(Path(directory) / "after.ckpt")


if __name__ == "__main__":
    main(*sys.argv[1:])
