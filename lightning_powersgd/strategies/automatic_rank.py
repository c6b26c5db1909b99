"""Ranks that follow from the length of the training, and what a user is told of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.plan import make_plan
from lightning_powersgd.compressor.turnaround import ASSUMED_STEPS, DEFAULT_TURNAROUND, turnaround_for
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.lightning_types import pl
from lightning_powersgd.strategies.advice import warn_of_muon
from lightning_powersgd.strategies.never_slower import settle_what_is_worth_it


def _is_open(config: PowerSGDConfig) -> bool:
    """Whether ranks are left to the length of the training."""
    return config.automatic and config.turnaround is None and config.max_bytes is None


def length_of(trainer: pl.Trainer) -> float:
    """Give the optimizer steps of a training whose data are set up; infinite if nobody knows."""
    with contextlib.suppress(Exception):
        # Lightning raises one if the number of batches that gradients accumulate over changes on the way.
        return float(trainer.estimated_stepping_batches)
    return math.inf


def _settled(config: PowerSGDConfig, steps: float, optimizers: Iterable[Optimizer]) -> PowerSGDConfig:
    """Give settings with the turnaround that a training asks for.

    Args:
        config: the settings, with ranks that are left to the length of the training.
        steps: of the optimizers in the whole training; infinite, or less than 1, if that is not known.
        optimizers: of the training.
    """
    known = 0 < steps < math.inf
    if not known:
        rank_zero_warn(
            f"The length of the training is not known, and `rank='auto'` takes it for {ASSUMED_STEPS:,} steps. Give"
            " `max_steps` or `max_epochs` to the trainer, or a `turnaround` or a `rank` to the strategy."
        )
    return replace(config, turnaround=turnaround_for(steps if known else ASSUMED_STEPS, optimizers))


def settle_ranks(exchange: GradientExchange, trainer: pl.Trainer, optimizers: Sequence[Optimizer]) -> None:
    """Settle ranks that are left to the length of the training, and say what is compressed, when training starts.

    Every rank must call it, after a checkpoint was loaded, whose ranks are kept.

    Args:
        exchange: of the training.
        trainer: whose data are set up.
        optimizers: of the training.
    """
    state, steps = exchange.state, length_of(trainer)
    if _is_open(state.config):
        config = _settled(state.config, steps, optimizers)
        # The first rank's, since ranks may have unequal numbers of batches.
        exchange.configure(replace(config, turnaround=trainer.strategy.broadcast(config.turnaround)))
    settle_what_is_worth_it(exchange)
    say_what_is_compressed(exchange, steps)
    warn_of_muon(optimizers, state)


def say_what_is_compressed(exchange: GradientExchange, steps: float = math.inf) -> None:
    """Say how much is compressed, and what automatic ranks come from.

    Args:
        exchange: of the training.
        steps: of the training; infinite if that is not known.
    """
    plan, config = exchange.plan, exchange.state.config
    summary = plan.summary(alternate=config.alternate)
    if exchange.state.whole and not any(plan.compressed):
        # The network is the reason, which was said (see `never_slower`).
        rank_zero_info(f"{summary}.")
        return
    if not config.automatic:
        say = rank_zero_info if any(plan.compressed) else rank_zero_warn
        say(f"{summary}.")
        return
    if config.max_bytes is not None:
        turnaround = plan.turnaround(alternate=config.alternate)
    else:
        turnaround = config.turnaround or DEFAULT_TURNAROUND
    if any(plan.compressed):
        turns = f", {steps / turnaround:,.0f} times in {steps:,.0f} steps" if 0 < steps < math.inf else ""
        rank_zero_info(f"{summary}. Each direction of a gradient has its turn within {turnaround:,.3g} steps{turns}.")
        return
    fixed = make_plan(exchange.parameters.items(), replace(config, rank=2, turnaround=None, max_bytes=None))
    if not any(fixed.compressed):
        rank_zero_warn(f"{summary}.")
        return
    rank_zero_info(
        f"{summary}: with `rank='auto'` each direction of a gradient has its turn within {turnaround:,.3g} steps, and"
        f" in so short a training that saves too little. Gradients are exchanged as plain DDP does it. `rank=2` would"
        f" send {fixed.dense_bytes / fixed.sent_bytes(alternate=config.alternate):,.0f} times less, but each direction"
        f" only every {fixed.turnaround(alternate=config.alternate):,.0f} steps, which costs accuracy."
    )
