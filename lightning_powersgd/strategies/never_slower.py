"""``compress="auto"``: what is settled when training starts, and what a user is told of it."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_powersgd.compressor.trial import PAUSE, Trial
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.worth import leave_whole_what_is_not_worth_it


def settle_what_is_worth_it(exchange: GradientExchange) -> None:
    """Leave matrices whole that are not worth compressing on this network, if that is to be asked, and say so.

    Every rank must call it.
    """
    link = leave_whole_what_is_not_worth_it(exchange)
    if link is None:
        return
    speed = f"a network of {link.bits_per_second / 1e9:,.3g} Gbit/s"
    whole, left = len(exchange.state.whole), len(list(exchange.plan.compressed))
    if not whole:
        rank_zero_info(f"`compress='auto'`: on {speed} every matrix is worth compressing.")
    elif left:
        rank_zero_info(
            f"`compress='auto'`: on {speed}, {whole} of {whole + left} matrices are sent whole, since that takes less"
            " time than compressing them."
        )
    else:
        rank_zero_info(
            f"`compress='auto'`: on {speed} no matrix is worth compressing. Gradients are exchanged as plain DDP does"
            " it. `compress='always'` would send fewer bytes, and take longer."
        )


class TrialReport:
    """Says how the trials of compressed against exact steps end."""

    def __init__(self) -> None:
        self._told = 0

    def look(self, trial: Trial | None) -> None:
        """Say it once of each trial, when a step begins."""
        if trial is None or trial.decisions == self._told:
            return
        self._told = trial.decisions
        what = "are compressed" if trial.chosen else "are exchanged as plain DDP does it"
        if trial.ratio is None:
            why = "an exact step takes more than three times as long by what the network does"
        else:
            why = f"a compressed step takes {trial.ratio:.2f} of the time of an exact one"
        rank_zero_info(f"`compress='auto'`: {why}. Gradients {what} in the next {PAUSE:,} steps.")
