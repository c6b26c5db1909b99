"""A training loop of one's own with Lightning Fabric: two words of it are about PowerSGD.

    python examples/fabric_loop.py

A second run goes on where the first one stopped, with its error buffers.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from image_classification import ImageClassifier, load_mnist
from torch.utils.data import DataLoader

from lightning_powersgd import PowerSGDFabricStrategy

CHECKPOINT = Path("fabric_loop.ckpt")


def main(epochs: int = 1) -> None:
    """Train, save, and go on where a run before has saved."""
    fabric = L.Fabric(strategy=PowerSGDFabricStrategy(rank=2), accelerator="cpu", devices=2)
    fabric.launch()
    fabric.seed_everything(0)
    network = ImageClassifier().network
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9))
    batches = fabric.setup_dataloaders(DataLoader(load_mnist()[0], batch_size=32, shuffle=True))
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    if CHECKPOINT.exists():
        fabric.load(CHECKPOINT, state)
    for _ in range(epochs):
        losses = []
        for images, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=5.0)
            optimizer.step()
            losses.append(loss.detach())
        state["epoch"] += 1
        fabric.save(CHECKPOINT, state)
        [exchange] = fabric.strategy.exchanges
        sent, dense = exchange.state.sent_bytes, exchange.state.dense_bytes
        mean = torch.stack(losses).mean()
        fabric.print(f"epoch {state['epoch']}: loss {mean:.2f}, {sent:,} of {dense:,} bytes a step sent")


if __name__ == "__main__":
    main()
