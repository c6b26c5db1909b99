"""ResNet-18 for small images: the network of the accuracy study and of a benchmark.

He, Zhang, Ren and Sun, arXiv 1512.03385, in the form that is usual for CIFAR: it begins with a 3×3 convolution and does
not pool.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around which the input is led.

    Args:
        channels_in: of the input.
        channels: of the output.
        stride: of the first convolution.
        running_statistics: whether BatchNorm keeps them, for evaluation.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, running_statistics: bool = True) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(channels, track_running_stats=running_statistics)

        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            norm(),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm())

    def forward(self, images: Tensor) -> Tensor:
        """Add the block's output to its input."""
        return F.relu(self.body(images) + self.shortcut(images))


def resnet18(
    width: int = 64, channels_in: int = 3, stride: int = 1, classes: int = 10, running_statistics: bool = True
) -> nn.Sequential:
    """Make the network: 11.2 M parameters as it stands.

    Args:
        width: channels of the first blocks; the last have eight times as many.
        channels_in: of the images.
        stride: of the first convolution; 2 halves the images, and with it quarters the arithmetic.
        classes: to tell apart.
        running_statistics: whether BatchNorm keeps them, for evaluation.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width, track_running_stats=running_statistics),
        nn.ReLU(),
    ]
    before = width
    for channels, block_stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [
            ResidualBlock(before, channels, block_stride, running_statistics),
            ResidualBlock(channels, channels, 1, running_statistics),
        ]
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
