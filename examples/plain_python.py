"""Settings in plain Python, without a command line: a dataclass, and the Trainer called by hand.

    python examples/plain_python.py

Another experiment is another object, in a file that imports this one: `train(replace(SETTINGS, strategy={"rank": 4}))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from image_classification import ImageClassifier, ImageDataModule
from lightning.pytorch import Trainer, seed_everything

from lightning_powersgd import PowerSGDStrategy


@dataclass(frozen=True)
class Settings:
    """What a training depends on.

    Attributes:
        strategy: arguments of `PowerSGDStrategy`.
        trainer: arguments of `Trainer`.
        learning_rate: peak of the one-cycle schedule.
        batch_size: images a process and step.
        seed: of weights, dropout and the order of images.
    """

    strategy: Mapping[str, Any]
    trainer: Mapping[str, Any]
    learning_rate: float = 0.05
    batch_size: int = 32
    seed: int = 0


SETTINGS = Settings(
    # The last layer, which has a row for each class, is sent whole; the first 20 steps are averaged exactly.
    strategy={"rank": {"network.10.*": 0, "*": 2}, "start_step": 20, "prog_bar": True},
    trainer={"accelerator": "cpu", "devices": 2, "max_epochs": 2},
)


def train(settings: Settings) -> float:
    """Train with PowerSGD, and give the accuracy on the test set."""
    seed_everything(settings.seed)
    model = ImageClassifier(settings.learning_rate)
    data = ImageDataModule(batch_size=settings.batch_size)
    trainer = Trainer(strategy=PowerSGDStrategy(**settings.strategy), **settings.trainer)
    trainer.fit(model, data)
    [results] = trainer.test(model, data)
    return results["test_accuracy"]


if __name__ == "__main__":
    train(SETTINGS)
