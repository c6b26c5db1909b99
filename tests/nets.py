"""A small net with compressed and whole parameters, and its data, for tests of the exchange."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_powersgd import PowerSGDConfig, attach_powersgd, native


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 36, 24), nn.Tanh(), nn.Linear(24, 20)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(20, 10)).to(dtype)


def make_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator))
        for _ in range(steps)
    ]


def attach(
    net: nn.Module,
    bucket_cap_mb: float | None = None,
    ddp: dict[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **config: Any,
):
    model = DistributedDataParallel(net, bucket_cap_mb=bucket_cap_mb, **(ddp or {}))
    return model, attach_powersgd(model, PowerSGDConfig(**config), scaler)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def like_an_accelerator(yes: bool):
    """Let the exchange go the way it goes where the host does not wait for the device."""
    return mock.patch("lightning_powersgd.hook._waits_for", return_value=False) if yes else contextlib.nullcontext()


def with_compiled_code(yes: bool):
    """Compute with compiled code, or with PyTorch's operations as where there is no compiler."""
    return contextlib.nullcontext() if yes else mock.patch.object(native, "library", return_value=None)
