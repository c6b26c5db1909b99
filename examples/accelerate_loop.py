"""A training loop with Hugging Face's Accelerate, on two processes.

    torchrun --standalone --nproc-per-node=2 examples/accelerate_loop.py

A second run goes on where the first one stopped, with its error buffers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from image_classification import ImageClassifier, load_mnist
from torch.utils.data import DataLoader

from lightning_powersgd import PowerSGDConfig, attach_powersgd

CHECKPOINT = Path("accelerate_loop")


def main(epochs: int = 1) -> None:
    """Train, save, and go on where a run before has saved."""
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    network = ImageClassifier().network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    batches = DataLoader(load_mnist()[0], batch_size=32, shuffle=True)
    model, optimizer, batches = accelerator.prepare(network, optimizer, batches)
    exchange = attach_powersgd(model, PowerSGDConfig(rank=2), scaler=accelerator.scaler)
    accelerator.register_for_checkpointing(exchange)
    if CHECKPOINT.exists():
        accelerator.load_state(CHECKPOINT)
    accelerator.print(exchange.state.plan.summary(alternate=False))
    for _ in range(epochs):
        losses = []
        for images, labels in batches:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
            losses.append(loss.detach())
        accelerator.save_state(CHECKPOINT)
        accelerator.print(f"step {exchange.state.step}: loss {torch.stack(losses).mean():.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
