"""Writes golden checkpoints of the present format version: ``PYTHONPATH=tests:. python -m golden.write``.

Run it when a new format version has come, and commit the files. It does not write a file anew: each of them shows what
the code of its day saved, and `test_compatibility` that it can still be read. For the same reason the network, the data
and the settings of a case stay as they are.

For each of `CASES` there is the Trainer's checkpoint after one epoch on two ranks, ``.ckpt``, and what that run held
and came to in the next epoch, ``.pt``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from models import trainer
from ranks import Ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_powersgd import PowerSGDState, PowerSGDStrategy
from lightning_powersgd.compressor.checkpoint import FORMAT_VERSION

FOLDER = Path(__file__).parent

_RANKS = {"convolution.*": 2, "*": 1}
CASES: dict[str, dict[str, Any]] = {
    "full": {"rank": _RANKS},
    "alternating": {"rank": _RANKS, "alternate": True},
    "bfloat16": {"rank": _RANKS, "error_dtype": "bfloat16", "comm_dtype": "bfloat16"},
}


class Network(LightningModule):
    """Three compressed weights: one in channels_last, one in float64, one plain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 6, 3).to(memory_format=torch.channels_last)
        self.middle = nn.Linear(6, 8, dtype=torch.float64)
        self.last = nn.Linear(8, 8)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = torch.tanh(self.convolution(batch[0])).mean(dim=(2, 3))
        return F.mse_loss(self.last(torch.tanh(self.middle(x.double())).float()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def batches() -> DataLoader:
    """Three batches for each of two ranks. Random numbers may be others in another version of torch; sines are not."""
    samples = 24
    x, y = (torch.sin(torch.arange(samples * size, dtype=torch.float64) ** 2).float() for size in (2 * 5 * 5, 8))
    return DataLoader(TensorDataset(x.view(samples, 2, 5, 5), y.view(samples, 8)), batch_size=4)


class Notes(Callback):
    """Notes what is held when training begins, and the last gradients."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.held = holdings(trainer.strategy.exchange.state)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def holdings(state: PowerSGDState) -> dict[str, Any]:
    """What a state holds, as it lies in memory."""
    return {
        **{
            name: getattr(state, name) for name in ("step", "averaged", "held", "total_dense_bytes", "total_sent_bytes")
        },
        "errors": {name: error.clone() for name, error in state.errors.items()},
        "factors": {name: {side: f.clone() for side, f in sides.items()} for name, sides in state.factors.items()},
    }


def resume(root: str, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Train for the second epoch, from a checkpoint."""
    network, notes = Network(), Notes()
    run = trainer(PowerSGDStrategy(**config), root=root, max_epochs=2, callbacks=[notes])
    run.fit(network, batches(), ckpt_path=path)
    parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
    return {"held": notes.held, "gradients": notes.gradients, "parameters": parameters, "global_step": run.global_step}


def write(root: str, name: str, config: dict[str, Any]) -> None:
    """Train for one epoch and save; note what is held then, and what another epoch comes to."""
    run = trainer(PowerSGDStrategy(**config), root=root, max_epochs=1)
    run.fit(Network(), batches())
    run.save_checkpoint(f"{root}/{name}.ckpt")
    expected = {**resume(root, f"{root}/{name}.ckpt", config), "held": holdings(run.strategy.exchange.state)}
    if dist.get_rank() == 0:
        torch.save(expected, f"{root}/{name}.pt")


def main() -> None:
    ranks = Ranks(2)
    try:
        for case, config in CASES.items():
            name = f"version_{FORMAT_VERSION}_{case}"
            with tempfile.TemporaryDirectory() as root:
                ranks.run(write, root, name, config)
                for file in Path(root).iterdir():
                    with (FOLDER / file.name).open("xb") as golden:
                        golden.write(file.read_bytes())
                    print(f"{file.name}: {file.stat().st_size:,} bytes")
    finally:
        ranks.stop()


if __name__ == "__main__":
    main()
