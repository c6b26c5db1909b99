"""The networks whose gradients are exchanged.

They keep no running statistics, so DDP has no buffers to broadcast, and draw no random numbers in their forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    """A residual block of two 3×3 convolutions."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels, track_running_stats=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels, track_running_stats=False),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Add the block's output to its input."""
        return F.relu(self.body(images) + self.shortcut(images))


def resnet18() -> nn.Module:
    """ResNet-18 in the form for images of 32×32 pixels: 11.2 M parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64, track_running_stats=False),
        nn.ReLU(),
    ]
    channels_in = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(channels_in, channels, stride), _Block(channels, channels, 1)]
        channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def transformer(width: int, layers: int) -> nn.Module:
    """A transformer's encoder: heads of 64, feed-forward layers of four times the width; 18.9 M parameters at 512×6."""
    layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@dataclass(frozen=True)
class Network:
    """A network and its input, described so that other processes can make them.

    Args:
        name: for tables.
        make: builds the module.
        batch: the shape of its input on a CPU. A GPU gets 32 times as many samples.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]

    def build(self, device: torch.device) -> nn.Module:
        """Make the module, with the same weights in every process."""
        torch.manual_seed(0)
        return self.make().to(device)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        with torch.device("meta"):
            return sum(parameter.nbytes for parameter in self.make().parameters())

    def draw(self, device: torch.device, seed: int) -> Tensor:
        """Draw an input."""
        samples = self.batch[0] * (32 if device.type == "cuda" else 1)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(samples, *self.batch[1:], generator=generator).to(device)


def transformer_of(width: int, layers: int, batch: int, tokens: int) -> Network:
    """Describe a transformer by its size."""
    return Network(f"transformer {width}×{layers}", partial(transformer, width, layers), (batch, tokens, width))


NETWORKS = {
    "transformer": transformer_of(512, 6, batch=2, tokens=64),
    "resnet18": Network("ResNet-18", resnet18, (4, 3, 32, 32)),
    "tiny": transformer_of(64, 2, batch=2, tokens=16),
}
