"""Tier three: a run that is stopped and goes on with another number of ranks is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from models import learnable, norm, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_powersgd import PowerSGDStrategy

GLOBAL_BATCH = 12


class EachStepItsBatch(LightningModule):
    """Takes its batch from the step's number, so that all ranks together see the same samples at any number of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 10))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x, y = learnable(self.global_step, GLOBAL_BATCH, torch.float64)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return F.cross_entropy(self.net(x[rank::world_size].to(self.dtype)), y[rank::world_size])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def go_on(root: str, start: int, end: int, config: dict[str, Any], precision: str) -> tuple[dict[str, Tensor], float]:
    """Train from one step to another, and save; give the parameters and the mean error's norm."""
    # Lightning restores weights before it converts the module to the trainer's precision.
    model = EachStepItsBatch().to(torch.float64 if precision == "64-true" else torch.float32)
    run = trainer(
        PowerSGDStrategy(**{"rank": 2, **config}), root=root, max_steps=end, max_epochs=-1, precision=precision
    )
    run.fit(model, DataLoader(torch.zeros(1000)), ckpt_path=f"{root}/{start}.ckpt" if start else None)
    run.save_checkpoint(f"{root}/{end}.ckpt")
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return parameters, norm(run.strategy.exchange.state.errors.values())


def follow(ranks, root: Path, path: list[tuple[int, int]], config: dict[str, Any], precision: str) -> dict[str, Tensor]:
    """Go on at every number of ranks to the step beside it."""
    root.mkdir()
    start = 0
    for world_size, end in path:
        parameters, held_back = ranks[world_size].run(go_on, str(root), start, end, config, precision)[0]
        start = end
    assert held_back > 0, "nothing was held back that could be lost"
    return parameters


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


# In float64, where fifty steps do not amplify rounding to anything that could be taken for a lost error buffer.
@pytest.mark.parametrize("config", [{}, {"alternate": True}, {"start_step": 25}], ids=str)
@pytest.mark.parametrize(
    "path",
    [
        [(4, 20), (2, 70)],
        [(4, 20), (3, 70)],
        [(4, 20), (1, 70)],
        [(4, 20), (1, 40), (4, 70)],
        [(2, 20), (3, 40), (4, 70)],
    ],
    ids=lambda path: "-".join(str(world_size) for world_size, _ in path),
)
def test_a_run_goes_on_at_any_number_of_ranks(ranks, tmp_path, path, config):
    expected = follow(ranks, tmp_path / "uninterrupted", [(path[0][0], 70)], config, "64-true")
    found = follow(ranks, tmp_path / "interrupted", path, config, "64-true")
    assert deviation(found, expected) < 1e-10


def test_in_single_precision_the_runs_stay_close(ranks, tmp_path):
    expected = follow(ranks, tmp_path / "uninterrupted", [(4, 70)], {}, "32-true")
    found = follow(ranks, tmp_path / "interrupted", [(4, 20), (2, 70)], {}, "32-true")
    assert deviation(found, expected) < 1e-2


def test_without_the_errors_it_would_be_another_run(ranks, tmp_path):
    config = {"checkpoint_error_feedback": False}
    expected = follow(ranks, tmp_path / "uninterrupted", [(4, 70)], config, "64-true")
    found = follow(ranks, tmp_path / "interrupted", [(4, 20), (2, 70)], config, "64-true")
    assert deviation(found, expected) > 1e-3


def test_a_checkpoint_is_as_large_at_any_number_of_ranks(ranks, tmp_path):
    sizes = []
    for world_size in (2, 4):
        follow(ranks, tmp_path / str(world_size), [(world_size, 5)], {}, "32-true")
        sizes.append((tmp_path / str(world_size) / "5.ckpt").stat().st_size)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.001)
