"""ResNet-18 for small images, the network of the accuracy study and of a benchmark, and ResNet-50 for large ones.

He, Zhang, Ren and Sun, arXiv 1512.03385. The former has the form that is usual for CIFAR: it begins with a 3×3
convolution and does not pool.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around which the input is led; as a bottleneck, one between two 1×1 convolutions.

    Args:
        channels_in: of the input.
        channels: of the output.
        stride: of the first 3×3 convolution.
        running_statistics: whether BatchNorm keeps them, for evaluation.
        bottleneck: whether the 3×3 convolution is one, of a quarter of the channels.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        stride: int,
        running_statistics: bool = True,
        bottleneck: bool = False,
    ) -> None:
        super().__init__()

        def convolution(channels_in: int, channels: int, size: int, stride: int = 1) -> list[nn.Module]:
            return [
                nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, bias=False),
                nn.BatchNorm2d(channels, track_running_stats=running_statistics),
            ]

        if bottleneck:
            narrow = channels // 4
            layers = [*convolution(channels_in, narrow, 1), nn.ReLU(), *convolution(narrow, narrow, 3, stride)]
            layers += [nn.ReLU(), *convolution(narrow, channels, 1)]
        else:
            layers = [*convolution(channels_in, channels, 3, stride), nn.ReLU(), *convolution(channels, channels, 3)]
        self.body = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(*convolution(channels_in, channels, 1, stride))

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


def resnet50(classes: int = 1000, running_statistics: bool = True) -> nn.Sequential:
    """Make the network for large images: 25.6 M parameters as it stands.

    Args:
        classes: to tell apart.
        running_statistics: whether BatchNorm keeps them, for evaluation.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(64, track_running_stats=running_statistics),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    before = 64
    for channels, blocks, stride in ((256, 3, 1), (512, 4, 2), (1024, 6, 2), (2048, 3, 2)):
        for index in range(blocks):
            layers.append(ResidualBlock(before, channels, 1 if index else stride, running_statistics, bottleneck=True))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
