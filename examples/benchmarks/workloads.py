"""The networks whose gradients are exchanged, and what else the benchmarks take from the examples.

They keep no running statistics, so DDP has no buffers to broadcast, and draw no random numbers in their forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # where the examples lie

from bf16_hook import bf16_hook as bf16_hook
from resnet import resnet18, resnet50

# GPT-2's.
_VOCABULARY = 50_257


def transformer(width: int, layers: int) -> nn.Module:
    """A transformer's encoder: heads of 64, feed-forward layers of four times the width; 18.9 M parameters at 512×6."""
    layer = nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class LanguageModel(nn.Module):
    """A decoder in GPT-2's form: learnt positions, norms before each block, and an output that shares the embedding.

    Args:
        width: of the embedding; heads have 64 of it.
        layers: number of blocks.
        vocabulary: number of tokens.
        context: the longest input.
    """

    def __init__(self, width: int, layers: int, vocabulary: int = _VOCABULARY, context: int = 1024) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        for weight in (self.embedding.weight, self.positions):
            nn.init.normal_(weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Give the logits of what comes next, (samples, length, vocabulary)."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.blocks(self.embedding(tokens) + self.positions[:length], mask=mask, is_causal=True)
        return hidden @ self.embedding.weight.t()


@dataclass(frozen=True)
class Network:
    """A network and its input, described so that other processes can make them.

    Args:
        name: for tables.
        make: builds the module.
        batch: the shape of its input on a CPU. A GPU gets 32 times as many samples.
        vocabulary: of an input that is tokens; ``None`` if it is numbers.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    vocabulary: int | None = None

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
        shape = (samples, *self.batch[1:])
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, shape, generator=generator).to(device)
        return torch.randn(shape, generator=generator).to(device)


def transformer_of(width: int, layers: int, batch: int, tokens: int) -> Network:
    """Describe a transformer by its size."""
    return Network(f"transformer {width}×{layers}", partial(transformer, width, layers), (batch, tokens, width))


NETWORKS = {
    "transformer": transformer_of(512, 6, batch=2, tokens=64),
    "resnet18": Network("ResNet-18", partial(resnet18, running_statistics=False), (4, 3, 32, 32)),
    "resnet50": Network("ResNet-50", partial(resnet50, running_statistics=False), (1, 3, 224, 224)),
    "gpt2": Network("GPT-2 small", partial(LanguageModel, 768, 12), (1, 128), _VOCABULARY),
    "1b": Network("1 B transformer", partial(LanguageModel, 2048, 18), (1, 64), _VOCABULARY),
    "tiny": transformer_of(64, 2, batch=2, tokens=16),
}
