"""Whether compressed steps are faster than exact ones here: found out by making some of both in turn.

A trial is data, without a clock and without ranks: the exchange tells it how long steps took, and lets all ranks answer
its questions alike. So a checkpoint can hold it, and a run that is resumed goes on as it would have.

    steps       5 of the way in use, timed | 3 of the other | 5 and 5 | 9 and 9 | thousands of the faster
    questions                              1                2         3         4

After a change of the way the first step is not timed. Question 1 asks whether there is anything to try: where an exact
step is known to be several times as slow, it is not made. Questions 2 to 4 end the trial as soon as one way is faster
by more than chance: at first by a large margin, since few steps were timed, and at last by 3 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median_low
from typing import Any

# Synchronised backward passes that are not timed at the beginning of a training, and those between trials.
_WARM_UP = 5
PAUSE = 3000
# Timed steps of the way in use before the first question, and of both ways before each of the others.
_BEFORE = 5
_ROUNDS = (2, 4, 8)
# How many times as fast a way must be to end the trial at each of these.
_MARGINS = (1.6, 1.18, 1.03)
# Exact steps that are known to take longer than this many compressed ones are not made.
_HOPELESS = 3.0


def _schedule() -> tuple[list[tuple[bool, bool]], list[int]]:
    """Give of each step of a trial whether it goes the way in use, and is timed; and where there are questions."""
    steps, questions = [(True, True)] * _BEFORE, [_BEFORE]
    for number, length in enumerate(_ROUNDS):
        for in_use in (False,) if number == 0 else (True, False):
            steps += [(in_use, False), *[(in_use, True)] * length]
        questions.append(len(steps))
    return steps, questions


_STEPS, _QUESTIONS = _schedule()


@dataclass
class Trial:
    """Decides between compressed and exact steps.

    Attributes:
        chosen: whether compressed steps are the way in use.
        position: steps into the trial; negative while it has not begun.
        compressed_seconds: of the timed compressed steps of this trial, on this rank.
        exact_seconds: of the timed exact ones.
        exact_forecast: seconds that an exact step takes at least, by what is known of the network or was measured.
        ratio: seconds of a compressed step ÷ those of an exact one, in the last trial; ``None`` before.
        decisions: trials that are over.
        world_size: ranks that the trial is of.
    """

    world_size: int
    chosen: bool = True
    position: int = -_WARM_UP
    compressed_seconds: list[float] = field(default_factory=list)
    exact_seconds: list[float] = field(default_factory=list)
    exact_forecast: float = 0.0
    ratio: float | None = None
    decisions: int = 0

    @property
    def compressing(self) -> bool:
        """Whether the next step is compressed."""
        in_use = self.position < 0 or _STEPS[self.position][0]
        return self.chosen == in_use

    @property
    def rests_exact(self) -> bool:
        """Whether the next step is exact, and so are many that follow it."""
        return self.position < 0 and not self.chosen

    @property
    def timed(self) -> list[float] | None:
        """Where the seconds of the next step belong; ``None`` if it is not timed."""
        if self.position < 0 or not _STEPS[self.position][1]:
            return None
        return self.compressed_seconds if self.compressing else self.exact_seconds

    @property
    def asks(self) -> bool:
        """Whether the ranks must `answer` before the next step."""
        return self.position in _QUESTIONS

    def finish_step(self) -> None:
        """Count a step."""
        self.position += 1

    def medians(self) -> tuple[float, float]:
        """Give the median seconds of a compressed and of an exact step on this rank; 0 where none was timed."""
        return _median(self.compressed_seconds), _median(self.exact_seconds)

    def answer(self, compressed: float, exact: float) -> None:
        """Decide, or go on with the trial.

        Args:
            compressed: seconds of a compressed step, of the slowest rank; 0 if none was timed.
            exact: the same of an exact step.
        """
        question = _QUESTIONS.index(self.position)
        if question == 0:
            if self.chosen and self.exact_forecast > _HOPELESS * compressed > 0:
                self._end()
            return
        last = question == len(_ROUNDS)
        if not compressed or not exact:
            # A run that was resumed meanwhile may have lost what was timed.
            if last:
                self._end()
            return
        self.ratio = compressed / exact
        slower = self.ratio if self.chosen else 1 / self.ratio
        margin = _MARGINS[question - 1]
        if last or not 1 / margin <= slower <= margin:
            self.exact_forecast = exact
            self._end(change=slower > margin)

    def _end(self, change: bool = False) -> None:
        self.chosen ^= change
        self.position = -PAUSE
        self.compressed_seconds, self.exact_seconds = [], []
        self.decisions += 1

    def to_dict(self) -> dict[str, Any]:
        """Give it as numbers, bools and lists of them: loadable with ``weights_only=True``."""
        return asdict(self)


def defects_of(saved: Any) -> list[str]:
    """Say what in a mapping is not as `Trial.to_dict` writes it."""
    if not isinstance(saved, Mapping) or set(saved) != set(Trial.__dataclass_fields__):
        return [f"{saved!r:.40}"]
    kinds = {"world_size": int, "chosen": bool, "position": int, "decisions": int, "exact_forecast": float}
    defects = [f"{key!r} is {saved[key]!r:.40}" for key, kind in kinds.items() if type(saved[key]) is not kind]
    if not defects and not -PAUSE <= saved["position"] < len(_STEPS):
        defects.append(f"'position' is {saved['position']}")
    times = {key: saved[key] for key in ("compressed_seconds", "exact_seconds")} | {"ratio": [saved["ratio"] or 0.0]}
    return defects + [
        f"{key!r} is {value!r:.40}"
        for key, value in times.items()
        if not isinstance(value, list) or not all(_is_time(seconds) for seconds in value)
    ]


def _is_time(value: object) -> bool:
    return isinstance(value, float) and 0 <= value < math.inf


def _median(seconds: list[float]) -> float:
    # Of two, the lower: what makes a step longer by chance is more often than what makes it shorter.
    return median_low(seconds) if seconds else 0.0
