"""Eight processes on a ring learn ten classes, though each has images of two or three of them only: PowerGossip.

    python examples/decentralized.py fit                                          # the ring, rank 1
    python examples/decentralized.py fit --trainer.strategy.topology exponential  # more neighbours
    python examples/decentralized.py fit --trainer.strategy ddp                   # all-reduce instead

Every process trains a model of its own on its own images and talks to two neighbours. Images never leave a process, nor
do gradients. What is validated and tested is the average of the eight models.
"""

from __future__ import annotations

import torch
from image_classification import ImageClassifier, ImageDataModule, run_command_line
from torch.utils.data import Subset


class SortedShards(ImageDataModule):
    """Images sorted by their label, and cut into one part for each process: each knows few of the classes."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        labels = torch.stack([label for _, label in self.train_set])
        by_label = torch.argsort(labels, stable=True).tolist()
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        size = len(by_label) // world_size
        self.train_set = Subset(self.train_set, by_label[rank * size : (rank + 1) * size])


def main() -> None:
    """Run this example's command line."""
    run_command_line(
        ImageClassifier,
        SortedShards,
        {
            "devices": 8,
            "max_epochs": 20,
            # Every process has data of its own already.
            "use_distributed_sampler": False,
            "strategy": {
                "class_path": "lightning_powersgd.PowerGossipStrategy",
                "init_args": {"topology": "ring", "iterations": 2},
            },
        },
    )


if __name__ == "__main__":
    main()
