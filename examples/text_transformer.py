r"""A language model of bytes on English text: a transformer, with PowerSGD a switch away.

Bytes are the tokens, so there is no tokenizer, and any text will do. Without ``--data.text_dir`` it learns from the
help texts that come with Python.

    python examples/text_transformer.py fit                                      # two CPU processes, plain DDP
    python examples/text_transformer.py fit --trainer.strategy PowerSGDStrategy --trainer.strategy.rank 4

Large transformers leave their embeddings and output heads whole; their patterns of parameter names say so:

    python examples/text_transformer.py fit --trainer.strategy PowerSGDStrategy \
        --trainer.strategy.rank '{"*embedding*": 0, "head*": 0, "*": 4}'
"""

from __future__ import annotations

import functools
import math
import pydoc_data.topics
from pathlib import Path

import torch
import torch.nn.functional as F
from image_classification import run_command_line
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BYTES = 256


class ByteTransformer(LightningModule):
    """A causal transformer that predicts the next byte; 3.8 M parameters as it stands.

    Args:
        width: of the residual stream, a multiple of 64: heads have 64 channels each.
        layers: blocks of attention and feed-forward layers.
        context: the most bytes it looks back on.
        learning_rate: peak of the one-cycle schedule.
        warmup: fraction of the steps in which the learning rate rises.
        beta2: of AdamW, the decay of its mean of squares.
    """

    def __init__(
        self,
        width: int = 384,
        layers: int = 2,
        context: int = 128,
        learning_rate: float = 1e-3,
        warmup: float = 0.1,
        beta2: float = 0.95,
    ) -> None:
        super().__init__()
        if width % 64:
            raise ValueError(f"`width={width}` is no multiple of 64, the channels of an attention head.")
        self.save_hyperparameters()
        self.learning_rate, self.warmup, self.beta2 = learning_rate, warmup, beta2
        self.embedding = nn.Embedding(BYTES, width)
        self.position_embedding = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, BYTES)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Give the scores, (batch, length, 256), of what follows each byte of a text, (batch, length)."""
        length = text.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=text.device)
        positions = torch.arange(length, device=text.device)
        return self.head(
            self.blocks(self.embedding(text) + self.position_embedding(positions), mask=mask, is_causal=True)
        )

    def bits_per_byte(self, batch: Tensor) -> Tensor:
        """Give the cross-entropy of windows, (batch, context + 1), in bits a byte."""
        scores = self(batch[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        bits = self.bits_per_byte(batch)
        self.log("train_bits_per_byte", bits, prog_bar=True)
        return bits * math.log(2)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_bits_per_byte", self.bits_per_byte(batch), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_bits_per_byte", self.bits_per_byte(batch), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, betas=(0.9, self.beta2), weight_decay=0.1
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=self.warmup,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TextDataModule(LightningDataModule):
    """Windows of text. Of each text nine tenths are to train; the rest is to validate and to test.

    Args:
        text_dir: folder with files ``*.txt``. ``None`` takes the help texts of Python, 0.7 MB.
        context: bytes that a window gives to look back on.
        batch_size: windows a process and step.
        eval_windows: how many windows to validate and to test with, at most.
    """

    def __init__(
        self, text_dir: Path | None = None, context: int = 128, batch_size: int = 8, eval_windows: int = 2000
    ) -> None:
        super().__init__()
        self.text_dir = text_dir
        self.context = context
        self.batch_size = batch_size
        self.eval_windows = eval_windows

    def setup(self, stage: str) -> None:
        parts = split(read_texts(self.text_dir))
        self.train_set, self.val_set, self.test_set = (Windows(part, self.context) for part in parts)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return self._eval_dataloader(self.val_set)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return self._eval_dataloader(self.test_set)

    def _eval_dataloader(self, windows: Windows) -> DataLoader[Tensor]:
        # Evenly over the texts, which stand one behind the other.
        some = range(0, len(windows), math.ceil(len(windows) / self.eval_windows))
        return DataLoader(torch.utils.data.Subset(windows, some), batch_size=50)


class Windows(Dataset[Tensor]):
    """A text, (bytes,), in windows of ``context + 1`` bytes: each byte but the first is to be predicted once."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()


@functools.cache
def read_texts(folder: Path | None) -> list[Tensor]:
    """Read the texts of a folder, or those that come with Python, as bytes.

    Raises:
        FileNotFoundError: if there is none.
    """
    if folder is None:
        texts = ["\n\n".join(pydoc_data.topics.topics.values()).encode()]
    else:
        texts = [path.read_bytes() for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise FileNotFoundError(f"There is no file *.txt in {folder}. Give a folder with plain English text.")
    return [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts]


def split(texts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each text into nine tenths to train, and half of the rest each to validate and to test."""
    pieces = [torch.tensor_split(text, (len(text) * 90 // 100, len(text) * 95 // 100)) for text in texts]
    train, val, test = (torch.cat(part) for part in zip(*pieces, strict=True))
    return train, val, test


if __name__ == "__main__":
    run_command_line(ByteTransformer, TextDataModule, {"max_epochs": 3, "gradient_clip_val": 1.0})
