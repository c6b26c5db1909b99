"""Muon and AdamW beside each other, with whole gradients and with PowerSGD at several ranks: bits a byte of text.

    python examples/accuracy/muon.py --steps 400

Two CPU processes train the byte transformer of `examples/text_transformer.py`. Muon takes the matrices of its blocks,
AdamW all else.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from lightning_powersgd import PowerSGDStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from text_transformer import ByteTransformer, TextDataModule

OPTIMIZERS = ("adamw", "muon")


class WithOptimizer(ByteTransformer):
    """The transformer with an optimizer to choose, both at a constant learning rate."""

    def __init__(self, optimizer: str, width: int) -> None:
        super().__init__(width=width)
        self.optimizer = optimizer
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = self.bits_per_byte(batch)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        blocks = {name: p for name, p in self.named_parameters() if p.dim() == 2 and "embedding" not in name}
        matrices = [p for name, p in blocks.items() if not name.startswith("head")] if self.optimizer == "muon" else []
        taken = set(matrices)
        rest = torch.optim.AdamW([p for p in self.parameters() if p not in taken], lr=1e-3)
        return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0), rest] if matrices else [rest]


def bits_per_byte(optimizer: str, rank: int, steps: int, width: int) -> float:
    """Train, and give the bits a byte of text that it has not seen."""
    seed_everything(0, verbose=False)
    compressed = {"min_compression_ratio": 1, "start_method": "spawn", "log_metrics": False}
    trainer = Trainer(
        strategy=PowerSGDStrategy(rank=rank, **compressed) if rank else DDPStrategy(start_method="spawn"),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model, data = WithOptimizer(optimizer, width), TextDataModule(eval_windows=400)
    trainer.fit(model, data)
    [results] = trainer.test(model, data, verbose=False)
    return results["test_bits_per_byte"]


def main() -> None:
    """Print a table: a row for each rank, a column for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 2, 8, 32], help="0 is plain DDP")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| rank | " + " | ".join(OPTIMIZERS) + " |\n|---|" + "---:|" * len(OPTIMIZERS), flush=True)
    for rank in arguments.ranks:
        values = [bits_per_byte(name, rank, arguments.steps, arguments.width) for name in OPTIMIZERS]
        print(f"| {rank or 'whole gradients'} | " + " | ".join(f"{value:.2f}" for value in values) + " |", flush=True)


if __name__ == "__main__":
    main()
