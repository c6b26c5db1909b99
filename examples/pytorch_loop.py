"""A training loop in plain PyTorch, on two processes, with a distributed checkpoint.

    torchrun --standalone --nproc-per-node=2 examples/pytorch_loop.py

A second run goes on where the first one stopped, with its error buffers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from image_classification import ImageClassifier, load_mnist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from lightning_powersgd import PowerSGDConfig, attach_powersgd

CHECKPOINT = Path("pytorch_loop")


def main(epochs: int = 1) -> None:
    """Train, save, and go on where a run before has saved."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(ImageClassifier().network)
    exchange = attach_powersgd(model, PowerSGDConfig(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = load_mnist()[0]
    batches = DataLoader(images, batch_size=32, sampler=DistributedSampler(images))
    if CHECKPOINT.exists():
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments, "powersgd": exchange}, checkpoint_id=CHECKPOINT)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if dist.get_rank() == 0:
        print(exchange.state.plan.summary(alternate=False))
    for _ in range(epochs):
        losses = []
        for pictures, labels in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pictures), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "powersgd": exchange}, checkpoint_id=CHECKPOINT)
        if dist.get_rank() == 0:
            print(f"step {exchange.state.step}: loss {torch.stack(losses).mean():.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
