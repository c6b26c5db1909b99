"""What the ranks of a training use together: what each of them reads, when they meet, and the sum."""

from __future__ import annotations

import math
import uuid
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from datetime import timedelta
from time import perf_counter, process_time
from typing import TypeVar

import torch
import torch.distributed as dist

from lightning_powersgd.exchange.agreement import of_all_ranks
from lightning_powersgd.exchange.presence import all_ranks_come, forget_position
from lightning_powersgd.metrics.counters import ACCELERATORS, PROCESSORS, Counter, NotMeasuredError

T = TypeVar("T")

# How long ranks that may have unequal numbers of batches wait for each other at the end of a window.
_PATIENCE = timedelta(seconds=30)
# Seconds after which a counter is read in any case. The fastest go round in a minute or two at full power.
_LONGEST_UNREAD = 10.0


class Meter:
    """What one rank uses, without what it does while stopped.

    Args:
        counters: of energy, which this rank reads for all that share them; ``None`` where joules are not measured.
        device: of the rank, which is idle when counters are read.
    """

    def __init__(self, counters: Sequence[Callable[[], float]] | None, device: torch.device) -> None:
        self._counters, self._device = counters, device
        self._used = [0.0, 0.0, 0.0]
        self._began: list[float] | None = None
        self._read_at = 0.0

    def start(self) -> None:
        """Count what follows."""
        self._began = self._now()

    def stop(self) -> None:
        """Leave what follows uncounted, until the next `start`."""
        self._add(self._now())
        self._began = None

    def take(self) -> list[float]:
        """Give the joules, seconds, and seconds of processors since the last time; go on counting."""
        now = self._now()
        self._add(now)
        used, self._used, self._began = self._used, [0.0, 0.0, 0.0], now
        return used

    def keep_up(self) -> None:
        """Read the counters now and then in a long window, so that none goes round twice unseen."""
        if perf_counter() - self._read_at >= _LONGEST_UNREAD:
            self._joules()

    def _add(self, now: list[float]) -> None:
        if self._began is not None:
            pieces = zip(self._used, now, self._began, strict=True)
            self._used = [used + ended - began for used, ended, began in pieces]

    def _now(self) -> list[float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [self._joules(), perf_counter(), process_time()]

    def _joules(self) -> float:
        self._read_at = perf_counter()
        if self._counters is None:
            return math.nan
        try:
            return sum(joules() for joules in self._counters)
        except NotMeasuredError as error:
            self._counters = None
            warnings.warn(f"EnergyMonitor measures no more joules in this fit: {error}.", stacklevel=2)
            return math.nan


class Ranks:
    """The ranks of a fit, which sum up what they use. Every rank must make one, and call its methods alike.

    Args:
        world_size: the number of ranks. One needs no process group.
        batches: of this rank in an epoch; infinite where nobody knows.
        device: of the collective.
    """

    def __init__(self, world_size: int, batches: float, device: torch.device) -> None:
        self._world_size, self._device = world_size, device
        self.number = dist.get_rank() if world_size > 1 else 0
        everyone = self.all((batches, uuid.uuid4().hex))
        # Asking whether all have come costs more than the sum, and is left out where they must come.
        self._must_come = len({count for count, _ in everyone}) == 1 and math.isfinite(batches)
        self._fit = everyone[0][1]
        self._apart = False
        self._met_at = ""

    def all(self, mine: T) -> list[T]:
        """Give what every rank has said, in their order."""
        return [mine] if self._world_size == 1 else of_all_ranks(mine, None)

    def meet(self, moment: str) -> bool:
        """Say whether all ranks are at the same moment of the fit; never again once they were not.

        Ranks with unequal numbers of batches end after different steps, and a sum that some never come to would hang.
        """
        if self._world_size == 1 or self._must_come:
            return True
        if not self._apart:
            position = f"energy/{self._fit}/{moment}"
            self._apart = not all_ranks_come(position, _PATIENCE)
            if self._met_at and self.number == 0 and not self._apart:
                forget_position(self._met_at)
            self._met_at = position
        return not self._apart

    def sum(self, amounts: Sequence[float]) -> list[float]:
        """Sum amounts over all ranks; NaN, what one has not measured, is nobody's."""
        if self._world_size == 1:
            return list(amounts)
        total = torch.tensor(amounts, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        given: list[float] = total.tolist()
        return given


def share_out(mine: Sequence[Counter], ranks: Ranks) -> tuple[list[Callable[[], float]] | None, str]:
    """Decide who reads what, so that nothing is counted twice, or in part.

    Several ranks see the processors of their machine, and may share a GPU: the first of them reads. What computes is
    measured on every rank or not at all, and joules without the accelerators would be called so wrongly.

    Args:
        mine: the counters of this rank. Every rank must call this.
        ranks: of the fit.

    Returns:
        What this rank reads, ``None`` where joules are not measured; and, the same on every rank, what is measured and
        what is not.
    """
    readers: dict[tuple[str, str], int] = {}
    refusals: dict[str, str] = {}
    for rank, theirs in enumerate(ranks.all([(counter.kind, counter.name, counter.refused) for counter in mine])):
        for kind, name, refused in theirs:
            if readers.setdefault((kind, name), rank) == rank and refused:
                refusals.setdefault(kind, f"{kind} are not measured (rank {rank}: {refused})")
    things = Tally(kind for kind, _ in readers)
    needed = ACCELERATORS if things[ACCELERATORS] else PROCESSORS
    if needed in refusals:
        return None, f"CPU-seconds and no joules, since {refusals[needed]}"
    read = [
        counter.joules
        for counter in mine
        if counter.kind not in refusals and readers[counter.kind, counter.name] == ranks.number
    ]
    measured = {
        ACCELERATORS: f"{_several(things[ACCELERATORS], 'GPU')} (NVML)",
        PROCESSORS: f"the processors of {_several(things[PROCESSORS], 'machine')} (powercap)",
    }
    shown = " and ".join(text for kind, text in measured.items() if things[kind] and kind not in refusals)
    return read, "; ".join((f"joules of {shown}", *refusals.values()))


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
