"""An exchange's entry in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_powersgd.exchange.core import GradientExchange

CHECKPOINT_KEY = "powersgd"

ERRORS_NOT_SAVED = (
    "A checkpoint was saved without PowerSGD's error buffers: their mean needs every rank, and not all of them came to"
    " save in the same step. Save on all ranks, not on rank 0 alone."
)


def load_exchange(exchange: GradientExchange, saved: Mapping[str, Any] | None) -> None:
    """Let an exchange go on where a checkpoint was saved, and say what of it cannot be carried over.

    Args:
        exchange: of this run.
        saved: from `PowerSGDState.state_dict`; ``None`` if the checkpoint has none, as plain DDP's.

    Raises:
        ValueError: as `PowerSGDState.load_state_dict`.
    """
    if saved is None:
        rank_zero_info("The checkpoint has no PowerSGD state: error buffers start empty.")
        return
    not_carried_over = exchange.load_state_dict(saved)
    if not_carried_over:
        lines = "\n  ".join(not_carried_over)
        rank_zero_warn(f"Not all of the checkpoint's PowerSGD state could be carried over:\n  {lines}")
