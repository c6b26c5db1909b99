"""Lightning modules that tests train."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import gather_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_powersgd import PowerSGDStrategy


class Classifier(LightningModule):
    """A small net on data that can be learnt."""

    def __init__(self, optimizer: str = "sgd", lr: float = 0.05, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(48)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(32, 48), *norm, nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))
        self.optimizer, self.lr = optimizer, lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=self.lr)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Silent(Classifier):
    """Logs nothing: with some versions, torch.compile fails in `self.log`, whatever the strategy."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])


def loader(samples: int = 160, batch_size: int = 8, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(32, 10, generator=generator)
    x = torch.randn(samples, 32, generator=generator)
    y = (x @ rule).argmax(dim=1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def learnable(seed: int, samples: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Samples of a rule that is the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 32, generator=generator, dtype=dtype)
    return x, (x[:, :10] + x[:, 10:20]).argmax(dim=1)


class ReplicasAgree(Callback):
    """Checks at the end of every fit that parameters are equal on all ranks, bit for bit."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert replicas_agree(pl_module), "the replicas drifted apart"


def trainer(strategy: Any = "powersgd", *, root: str | Path, alike: bool = True, **kwargs: Any) -> Trainer:
    """A quiet trainer on the current ranks, which checks that replicas agree when a fit ends, if they are to.

    "powersgd" has rank 2 here: by the rule for automatic ranks, trainings as short as these are not compressed.
    """
    if isinstance(strategy, str) and strategy.startswith("powersgd"):
        strategy = PowerSGDStrategy(rank=2, find_unused_parameters="find_unused" in strategy)
    callbacks = [*kwargs.pop("callbacks", []), *([ReplicasAgree()] if alike else [])]
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": dist.get_world_size(),
        "max_epochs": 2,
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "deterministic": True,
    }
    return Trainer(strategy=strategy, default_root_dir=root, **{**defaults, **kwargs})


def replicas_agree(module: nn.Module) -> bool:
    return gather_equal(list(module.parameters()))


def norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all elements together."""
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


@contextlib.contextmanager
def messages():
    """Collect what is said through Lightning's log and as warnings."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            log.removeHandler(handler)
            said += [str(warning.message) for warning in caught]
