"""Which matrices are worth compressing on the network between the ranks: measured before a training."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.plan import Group, Plan, Slot
from lightning_powersgd.exchange.agreement import largest_of_ranks
from lightning_powersgd.exchange.arithmetic import measure_compression
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.link import Link, measure_link

# For the network, and for the arithmetic.
_SECONDS = 0.3
# Matrices of one shape that are measured together, so that what a step costs beside them counts little.
_MOST_COPIES, _MOST_ELEMENTS = 16, 2**19
# How many times the network time that it saves compressing a matrix may take. Where the two are closer, only whole
# steps tell: with 1.0, ResNet-18 on loopback was 1.5 % slower than with all matrices compressed.
_CLEARLY = 2.0


def leave_whole_what_is_not_worth_it(exchange: GradientExchange) -> Link | None:
    """Let matrices be sent whole of which compressing takes much longer than the network time that it saves.

    It takes less than a second. Every rank must call it, before the first step. All decide alike, by what the slowest
    rank has measured.

    Args:
        exchange: with the settings of the training.

    Returns:
        What the network does; ``None`` where there is nothing to decide.
    """
    state, slots = exchange.state, list(exchange.plan.compressed)
    if state.trial is None or state.step or exchange.world_size == 1 or not exchange.compresses_any:
        return None
    link = measure_link(exchange.process_group, state.device, _SECONDS)
    # At least: the bytes of this rank's own gradients, without any latency.
    (state.trial.exact_forecast,) = exchange.slowest([_seconds_of(state.plan.dense_bytes, link)])
    kinds = list(dict.fromkeys(slot.kind for slot in slots))
    lost = [_seconds_lost(kind, state.config, link, state.device, _SECONDS / len(kinds)) for kind in kinds]
    margins = largest_of_ranks(lost, state.device, exchange.replicas)
    losing = {kind for kind, margin in zip(kinds, margins, strict=True) if margin > 0}
    whole = [slot.name for slot in slots if slot.kind in losing]
    if whole:
        exchange.configure(state.config, whole)
    return link


def _seconds_lost(kind: Slot, config: PowerSGDConfig, link: Link, device: torch.device, seconds: float) -> float:
    """Give the time that compressing a matrix takes, less what it may take for the network time that it saves."""
    copies = max(1, min(_MOST_COPIES, _MOST_ELEMENTS // kind.numel))
    slots = tuple(replace(kind, name=str(number)) for number in range(copies))
    arithmetic = measure_compression(Plan((Group((), slots, kind.formats),)), config, device, seconds) / copies
    saved = _seconds_of(kind.dense_bytes - kind.sent_bytes(alternate=config.alternate), link)
    return arithmetic - _CLEARLY * saved


def _seconds_of(nbytes: float, link: Link) -> float:
    return replace(link, latency=0.0).all_reduce_seconds(nbytes)
