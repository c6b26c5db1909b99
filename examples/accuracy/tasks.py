"""What is learnt in the study, and every way in which its gradients are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bf16_hook import bf16_hook
from decentralized import SortedShards
from image_classification import ImageClassifier, ImageDataModule
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from resnet import resnet18
from text_transformer import ByteTransformer, TextDataModule

from lightning_powersgd import PowerGossipStrategy, PowerSGDStrategy

# Settings of the strategy by the name of the variant; `None` is plain DDP. Of `start_step`, the share of all steps.
# Not of PowerSGD are "all_reduce", "alone", the settings of low-rank "averaging", and those of the "module".
VARIANTS: dict[str, dict[str, Any] | None] = {
    "DDP": None,
    "rank 1": {"rank": 1},
    "rank 2": {"rank": 2},
    "rank 4": {"rank": 4},
    "alternating, rank 2": {"rank": 2, "alternate": True},
    "alternating, rank 4": {"rank": 4, "alternate": True},
    "rank 2, bfloat16 errors": {"rank": 2, "error_dtype": "bfloat16"},
    "rank 2, no error feedback": {"rank": 2, "error_feedback": False},
    "rank 2, no warm start": {"rank": 2, "warm_start": False},
    "rank 2, first tenth exact": {"rank": 2, "start_step": 0.1},
    "rank 8": {"rank": 8},
    "rank 16": {"rank": 16},
    "rank 32": {"rank": 32},
}
# The same ranks in fewer bits, the rank that follows from the length of the training, and what to compare them with.
CODECS: dict[str, dict[str, Any] | None] = {
    "rank 8, int8": {"rank": 8, "comm_dtype": "int8"},
    "rank 8, int4": {"rank": 8, "comm_dtype": "int4"},
    "rank 16, int8": {"rank": 16, "comm_dtype": "int8"},
    "rank 16, int4": {"rank": 16, "comm_dtype": "int4"},
    "rank 32, int8": {"rank": 32, "comm_dtype": "int8"},
    "rank 32, int4": {"rank": 32, "comm_dtype": "int4"},
    "rank 32, P int4, Q int8": {"rank": 32, "comm_dtype": {"P": "int4", "Q": "int8"}},
    "rank 32, P int8, Q int4": {"rank": 32, "comm_dtype": {"P": "int8", "Q": "int4"}},
    "rank 64, int4": {"rank": 64, "comm_dtype": "int4"},
    "auto": {},
    "auto, int8": {"comm_dtype": "int8"},
    "auto, int4": {"comm_dtype": "int4"},
    "bfloat16 all-reduce": {"all_reduce": "bfloat16"},
    "one process alone": {"alone": "own"},
}
# Every process with a model of its own, which they average a few directions at a time.
AVERAGING: dict[str, dict[str, Any] | None] = {
    "averaging, rank 4": {"averaging": {"rank": 4}},
    "averaging, rank 8, int8": {"averaging": {"rank": 8, "comm_dtype": "int8"}},
    "averaging, rank 16, int4": {"averaging": {"rank": 16, "comm_dtype": "int4"}},
    "averaging, rank 32, int8": {"averaging": {"rank": 32, "comm_dtype": "int8"}},
}


# Beside 10⁻³ and 0.95, which the modules have by themselves.
TUNING = (
    {"learning_rate": 5e-4},
    {"learning_rate": 2e-3},
    {"beta2": 0.99},
    {"learning_rate": 2e-3, "beta2": 0.99},
)


def tuned(variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Give plain DDP and others with every learning rate, and with every decay of Adam's mean of squares."""
    tried: dict[str, dict[str, Any] | None] = {}
    for name, settings in {"DDP": {"all_reduce": "float32"}, **variants}.items():
        tried[name] = None if name == "DDP" else settings
        for values in TUNING:
            said = ", ".join(f"{argument.replace('_', ' ')} {value:g}" for argument, value in values.items())
            tried[f"{name}, {said}"] = {**settings, "module": values}
    return tried


class ResNetClassifier(ImageClassifier):
    """The image classifier with ResNet-18 as its network, and weight decay.

    Args:
        learning_rate: peak of the one-cycle schedule.
        width: channels of the network's first blocks.
    """

    def __init__(self, learning_rate: float = 0.05, width: int = 32) -> None:
        super().__init__(learning_rate, weight_decay=5e-4)
        self.network = resnet18(width, channels_in=1, stride=2)


class HalfWidth(DDPStrategy):
    """Plain all-reduce of gradients that are rounded to bfloat16."""

    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on GPUs only.
        self.model.register_comm_hook(None, bf16_hook)


class Alone(PowerGossipStrategy):
    """No communication: what an exchange is to be better than."""

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        return DDPStrategy.optimizer_step(self, optimizer, closure, model, **kwargs)


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        title: for tables.
        metric: the name that the test logs.
        scale: by which it is multiplied, to read it in `unit`.
        unit: of the scaled metric.
        higher_is_better: whether the metric is.
        goal: how far from plain DDP is near enough: points of the scaled metric, or ``%`` of plain DDP's.
        module: makes the module.
        data: makes the data from the folder that holds them.
        steps: of a training, by default.
        variants: what is tried.
        trainer: further arguments of the Trainer.
        sent: what is counted of each variant, for tables.
        options: of the study's command, for tables.
    """

    title: str
    metric: str
    scale: float
    unit: str
    higher_is_better: bool
    goal: str
    module: Callable[..., LightningModule]
    data: Callable[[Path | None], LightningDataModule]
    steps: int
    variants: dict[str, dict[str, Any] | None]
    trainer: dict[str, Any]
    sent: str = "bytes a step"
    options: str = "--data-dir FOLDER"

    def module_of(self, variant: str) -> LightningModule:
        """Make the module that a variant trains."""
        return self.module(**(self.variants[variant] or {}).get("module", {}))

    def strategy(self, variant: str, steps: int) -> DDPStrategy:
        """Make the strategy of a variant, for a training of that many steps."""
        settings = self.variants[variant]
        if settings is None:
            return DDPStrategy()
        settings = {name: value for name, value in settings.items() if name != "module"}
        if "averaging" in settings:
            return PowerGossipStrategy("all", **settings["averaging"], log_metrics=False)
        if "all_reduce" in settings:
            return HalfWidth() if settings["all_reduce"] == "bfloat16" else DDPStrategy()
        if "alone" in settings:
            return Alone(average_model=settings["alone"] == "average", log_metrics=False)
        if "start_step" in settings:
            settings = {**settings, "start_step": round(settings["start_step"] * steps)}
        # At the end, averaging the errors for a checkpoint would count as much as a hundred steps. And what is to be
        # studied are compressed steps, however fast the network is.
        return PowerSGDStrategy(**settings, compress="always", log_metrics=False, checkpoint_error_feedback=False)

    def bytes_per_step(self, strategy: DDPStrategy, dense_bytes: int, steps: int) -> float:
        """Count what a process handed to collectives in a step of a training that is over."""
        if isinstance(strategy, Alone):
            return 0
        if isinstance(strategy, PowerGossipStrategy):
            return sum(exchange.total_sent_bytes for exchange in strategy.exchanges) / steps
        if not isinstance(strategy, PowerSGDStrategy):
            return dense_bytes / (2 if isinstance(strategy, HalfWidth) else 1)
        assert strategy.exchange is not None
        return strategy.exchange.state.total_sent_bytes / steps

    def lost(self, value: float, ddp: float) -> float:
        """Say how much worse than plain DDP a value is, in units of the goal: up to 1 is near enough."""
        amount, unit = self.goal.split()
        worse = ddp - value if self.higher_is_better else value - ddp
        return worse / float(amount) * (100 / ddp if unit == "%" else 1)


class GossipTask(Task):
    """Something to learn without a server. ``settings`` are PowerGossip's; ``alone`` among them is no communication."""

    def strategy(self, variant: str, steps: int) -> DDPStrategy:
        settings = self.variants[variant]
        if settings is None or "alone" in settings:
            return super().strategy(variant, steps)
        return PowerGossipStrategy(**settings, log_metrics=False)

    def bytes_per_step(self, strategy: DDPStrategy, dense_bytes: int, steps: int) -> float:
        """Count what went over a link in a step, one way. An all-reduce is taken for one around a ring."""
        if not isinstance(strategy, PowerGossipStrategy):
            return 2 * (strategy.world_size - 1) / strategy.world_size * dense_bytes
        return sum(exchange.total_link_bytes for exchange in strategy.exchanges) / steps


TASKS: dict[str, Task] = {
    "images": Task(
        title="ResNet-18 on Fashion-MNIST",
        metric="accuracy",
        scale=100,
        unit="accuracy",
        higher_is_better=True,
        goal="0.3 points",
        module=ResNetClassifier,
        data=lambda folder: ImageDataModule(folder, batch_size=64),
        steps=600,
        variants=VARIANTS | CODECS,
        trainer={},
    ),
    "text": Task(
        title="Transformer on English text",
        metric="bits_per_byte",
        scale=1,
        unit="bits a byte",
        higher_is_better=False,
        goal="1 %",
        module=ByteTransformer,
        data=lambda folder: TextDataModule(folder, batch_size=8),
        steps=600,
        variants={
            **VARIANTS,
            **CODECS,
            **AVERAGING,
            "rank 2, ends whole": {"rank": {"*embedding*": 0, "head*": 0, "*": 2}},
            "rank 4, ends whole": {"rank": {"*embedding*": 0, "head*": 0, "*": 4}},
        },
        trainer={"gradient_clip_val": 1.0},
    ),
}
# What is late in a short training is in time in a long one.
TASKS |= {
    f"{name}_{times}x": replace(TASKS[name], title=f"{TASKS[name].title}, {times} times as long", steps=times * 600)
    for name, times in (("images", 4), ("text", 4), ("images", 10), ("text", 20))
}

# The same batches, dealt out to more processes.
TASKS |= {
    f"text_{ranks}_ranks": replace(
        TASKS["text"],
        title=f"{TASKS['text'].title}, {ranks} processes",
        data=lambda folder, windows=16 // ranks: TextDataModule(folder, batch_size=windows),
        variants={
            "DDP": None,
            **{name: CODECS[name] for name in ("rank 8, int8", "auto", "auto, int8", "one process alone")},
            **AVERAGING,
        },
    )
    for ranks in (4, 8)
}
TASKS["text_4x_4_ranks"] = replace(
    TASKS["text_4_ranks"],
    title=f"{TASKS['text_4x'].title}, 4 processes",
    steps=TASKS["text_4x"].steps,
)
TASKS["text_tuning"] = replace(
    TASKS["text"],
    title=f"{TASKS['text'].title}, other learning rates",
    variants=tuned(
        {
            "auto, int8": CODECS["auto, int8"],
            "rank 32, int8": CODECS["rank 32, int8"],
            "averaging, rank 8, int8": AVERAGING["averaging, rank 8, int8"],
        }
    ),
)

TASKS["gossip"] = GossipTask(
    title="Sorted shards of MNIST on a ring",
    metric="accuracy",
    scale=100,
    unit="accuracy",
    higher_is_better=True,
    goal="1 points",
    module=ImageClassifier,
    data=lambda folder: SortedShards(folder, batch_size=32),
    steps=1120,
    variants={
        "DDP": None,
        "whole models": {"rank": {"*": 0}},
        "rank 1": {"rank": 1},
        "rank 1, 4 iterations": {"rank": 1, "iterations": 4},
        "rank 1, 8 iterations": {"rank": 1, "iterations": 8},
        "no communication, average model": {"alone": "average"},
        "no communication, own models": {"alone": "own"},
    },
    trainer={"use_distributed_sampler": False},
    sent="bytes over a link a step",
    options="--precision 32-true",
)
