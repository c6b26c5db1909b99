"""Nets that several floors' tests share: a small one with compressed and whole parameters, and a ResNet-18's shapes."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_powersgd import PowerSGDConfig, attach_powersgd
from lightning_powersgd.compressor import fused, native


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of normal numbers that depends only on its shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


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
    return model, attach_powersgd(model, PowerSGDConfig(**{"rank": 2, **config}), scaler)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def like_an_accelerator(yes: bool):
    """Let the exchange go the way it goes where the host does not wait for the device."""
    return (
        mock.patch("lightning_powersgd.compressor.verdict.host_waits_for", return_value=False)
        if yes
        else contextlib.nullcontext()
    )


def with_compiled_code(yes: bool):
    """Compute with compiled code, or with PyTorch's operations as where there is no compiler."""
    return contextlib.nullcontext() if yes else mock.patch.object(native, "library", return_value=None)


@contextlib.contextmanager
def with_triton(yes: bool):
    """Go the way of a GPU with Triton's kernels, on a CPU: where TRITON_INTERPRET=1 is set, Triton interprets them."""
    if not yes:
        yield
        return
    with (
        like_an_accelerator(True),
        mock.patch.object(fused, "runs_on", return_value=True),
        mock.patch.object(fused, "_works", return_value=True),
    ):
        yield


# ResNet-18 in its form for CIFAR-10, as in the paper: every convolution and the head, with the shapes of their weights.
RESNET_STAGES = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]


def resnet18_parameters() -> list[tuple[str, Tensor]]:
    parameters = {"conv1.weight": (64, 3, 3, 3), "bn1.weight": (64,), "bn1.bias": (64,)}
    for block, (inputs, outputs) in enumerate(RESNET_STAGES):
        for layer, channels in (("1", inputs), ("2", outputs)):
            parameters[f"block{block}.conv{layer}.weight"] = (outputs, channels, 3, 3)
            parameters[f"block{block}.bn{layer}.weight"] = (outputs,)
            parameters[f"block{block}.bn{layer}.bias"] = (outputs,)
        if inputs != outputs:
            parameters[f"block{block}.shortcut.conv.weight"] = (outputs, inputs, 1, 1)
            parameters[f"block{block}.shortcut.bn.weight"] = (outputs,)
            parameters[f"block{block}.shortcut.bn.bias"] = (outputs,)
    parameters |= {"head.weight": (10, 512), "head.bias": (10,)}
    return [(name, nn.Parameter(torch.empty(shape))) for name, shape in parameters.items()]
