"""Eight processes on a ring learn ten classes, though each has images of a few of them only: PowerGossip.

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
    """Images sorted by their label, cut into two shards for each process, and dealt out: each knows few of the classes.

    It is how McMahan and others, 2017, arXiv 1602.05629, make data that differ from place to place.
    """

    def setup(self, stage: str) -> None:
        super().setup(stage)
        labels = torch.stack([label for _, label in self.train_set])
        by_label = torch.argsort(labels, stable=True).tolist()
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        size = len(by_label) // (2 * world_size)
        starts = (rank * size, (rank + world_size) * size)
        self.train_set = Subset(self.train_set, [index for start in starts for index in by_label[start : start + size]])


def main() -> None:
    """Run this example's command line."""
    run_command_line(
        ImageClassifier,
        SortedShards,
        {
            "devices": 8,
            "max_epochs": 40,
            # Every process has data of its own already.
            "use_distributed_sampler": False,
            "strategy": {
                "class_path": "lightning_powersgd.PowerGossipStrategy",
                "init_args": {"topology": "ring", "iterations": 4},
            },
        },
    )


if __name__ == "__main__":
    main()
