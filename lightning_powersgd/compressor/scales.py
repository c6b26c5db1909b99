"""What every rank knows of the sizes of factors, so that no message has to tell how they are scaled for the wire."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from lightning_powersgd.compressor.codec import PROFILE_STEP, profile_of
from lightning_powersgd.compressor.passes import assign
from lightning_powersgd.compressor.plan import SIDES, Side, Slot
from lightning_powersgd.compressor.verdict import Verdict


class Scales:
    """The magnitudes and profiles of factors that travel with gains (see `codec`). The same on all ranks.

    Args:
        slots: of the compressed parameters.
        device: where they are kept.

    Attributes:
        magnitudes: by name and side, of the rows of the last averaged factor, (r, 1).
        profiles: by name and side, of the last averaged factors, (1, n) or (1, m); only of those that travel as
            integers.
    """

    def __init__(self, slots: Iterable[Slot], device: torch.device) -> None:
        self.magnitudes: dict[str, dict[Side, Tensor]] = {}
        self.profiles: dict[str, dict[Side, Tensor]] = {}
        self._slots = {slot.name: slot for slot in slots}
        for slot in self._slots.values():
            if slot.formats[0].scaled:
                self.magnitudes[slot.name] = {
                    side: torch.full((slot.rank, 1), slot.format(side).first_magnitude, device=device) for side in SIDES
                }
            if slot.formats[0].integer:
                self.profiles[slot.name] = {side: torch.zeros(1, slot.length(side), device=device) for side in SIDES}
        # Sides with rows whose magnitudes are not known, and whether they will be, in the order of the sides.
        self._unknown: set[Side] = set()
        self._learning: Verdict | None = None
        self.look()

    def gains(self, slot: Slot, loss_scale: float | Tensor, world_size: int) -> dict[Side, Tensor]:
        """Give what the factors of both sides are multiplied by for the wire; nothing if they travel as they are.

        Args:
            slot: of the parameter.
            loss_scale: of the step, in units of that of the magnitudes.
            world_size: the number of ranks.
        """
        profiles = self.profiles.get(slot.name, {})
        return {
            side: slot.format(side).gain(magnitude * loss_scale, profiles.get(side), world_size)
            for side, magnitude in self.magnitudes.get(slot.name, {}).items()
        }

    def keep(self, name: str, side: Side, factor: Tensor, keep: bool | Tensor) -> None:
        """Keep the sizes of an averaged factor.

        Args:
            name: of the parameter.
            side: of the factor.
            factor: (r, n) or (r, m).
            keep: as in `assign`.
        """
        if name not in self.magnitudes:
            return
        magnitude = self.magnitudes[name][side]
        found = self._slots[name].format(side).magnitude(factor)
        assign(magnitude, torch.where(found > 0, found, magnitude), keep)
        if name in self.profiles:
            profile = self.profiles[name][side]
            assign(profile, torch.lerp(profile, profile_of(factor, found), PROFILE_STEP), keep)

    def rescale(self, name: str, side: Side, ratio: Tensor) -> None:
        """Let the magnitudes of a factor's rows refer to another loss scale: so many times the old one, a scalar."""
        if name in self.magnitudes:
            self.magnitudes[name][side].mul_(ratio)

    def known(self, sides: Collection[Side]) -> bool:
        """Whether the magnitudes of all rows of these sides are known, without which there are no levels."""
        if self._learning is not None:
            answers, self._learning = self._learning.tolist(), None
            self._unknown = {side for side, known in zip(SIDES, answers, strict=True) if not known}
        return self._unknown.isdisjoint(sides)

    def look(self) -> None:
        """Look which sides have rows whose magnitudes are not known."""
        self._learning = None
        self._unknown = {side for side in SIDES if not all((both[side] > 0).all() for both in self.magnitudes.values())}

    def learn(self) -> None:
        """Take the largest magnitude of a side for that of rows which had nothing in the first step that was kept."""
        if not self._unknown:
            return
        answers = []
        for side in SIDES:
            magnitudes = [both[side] for both in self.magnitudes.values()]
            largest = torch.stack([magnitude.max() for magnitude in magnitudes]).max()
            for magnitude in magnitudes:
                magnitude.copy_(torch.where(magnitude > 0, magnitude, largest))
            answers.append(largest > 0)
        self._learning = Verdict(torch.stack(answers))
