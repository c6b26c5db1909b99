"""What every rank knows of the sizes of factors, so that no message has to tell how they are scaled for the wire."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from lightning_powersgd.compressor.codec import PROFILE_STEP, profile_of
from lightning_powersgd.compressor.passes import assign
from lightning_powersgd.compressor.plan import SIDES, Group, Side
from lightning_powersgd.compressor.stacks import named
from lightning_powersgd.compressor.verdict import Verdict


class GroupScales:
    """The magnitudes and profiles of the factors of one group (see `codec`), by side and shape. The same on all ranks.

    Args:
        group: of the plan.
        device: where they are kept.

    Attributes:
        magnitudes: by side, of the rows of the last averaged factors, (b, r, 1); none if these travel as they are.
        profiles: by side, of the last averaged factors, (b, 1, n) or (b, 1, m); only of those that travel as integers.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.magnitudes: dict[Side, list[Tensor]] = {}
        self.profiles: dict[Side, list[Tensor]] = {}
        self._formats = dict(zip(SIDES, group.formats, strict=True))
        for side, form in self._formats.items():
            shapes = group.block_shapes(side)
            if form.scaled:
                first = form.first_magnitude
                self.magnitudes[side] = [torch.full((b, r, 1), first, device=device) for b, r, _ in shapes]
            if form.integer:
                self.profiles[side] = [torch.zeros(b, 1, k, device=device) for b, _, k in shapes]

    def gains(self, side: Side, loss_scale: float | Tensor, world_size: int) -> list[Tensor]:
        """Give what the factors of a side are multiplied by for the wire, by shape; nothing if they travel as they are.

        Args:
            side: of the factors.
            loss_scale: of the step, in units of that of the magnitudes.
            world_size: the number of ranks.
        """
        magnitudes = self.magnitudes.get(side, [])
        profiles: Sequence[Tensor | None] = self.profiles.get(side) or [None] * len(magnitudes)
        return [
            self._formats[side].gain(magnitude * loss_scale, profile, world_size)
            for magnitude, profile in zip(magnitudes, profiles, strict=True)
        ]

    def keep(self, side: Side, factors: Sequence[Tensor], keep: Sequence[bool | Tensor]) -> None:
        """Keep the sizes of averaged factors.

        Args:
            side: of the factors.
            factors: by shape, (b, r, n) or (b, r, m).
            keep: as in `assign`, by shape.
        """
        form = self._formats[side]
        for index, (magnitude, factor) in enumerate(zip(self.magnitudes.get(side, []), factors, strict=False)):
            found = form.magnitude(factor)
            assign(magnitude, torch.where(found > 0, found, magnitude), keep[index])
            if form.integer:
                profile = self.profiles[side][index]
                assign(profile, torch.lerp(profile, profile_of(factor, found), PROFILE_STEP), keep[index])

    def rescale(self, side: Side, ratios: Sequence[Tensor]) -> None:
        """Let the magnitudes refer to another loss scale: so many times the old one, by shape."""
        for magnitude, ratio in zip(self.magnitudes.get(side, []), ratios, strict=False):
            magnitude.mul_(ratio)


class Scales:
    """The magnitudes and profiles of factors that travel with gains, of all groups.

    Args:
        groups: of the plan.
        device: where they are kept.

    Attributes:
        of_groups: in the order of the plan.
        magnitudes: by name and side, (r, 1).
        profiles: by name and side, (1, n) or (1, m).
    """

    def __init__(self, groups: Iterable[Group], device: torch.device) -> None:
        self.of_groups: list[GroupScales] = []
        self.magnitudes: dict[str, dict[Side, Tensor]] = {}
        self.profiles: dict[str, dict[Side, Tensor]] = {}
        for group in groups:
            scales = GroupScales(group, device)
            self.of_groups.append(scales)
            for by_name, by_side in ((self.magnitudes, scales.magnitudes), (self.profiles, scales.profiles)):
                for side, blocks in by_side.items():
                    for name, one in named(group.stacks(side), blocks).items():
                        by_name.setdefault(name, {})[side] = one
        # Sides with rows whose magnitudes are not known, and whether they will be, in the order of the sides.
        self._unknown: set[Side] = {side for group in self.of_groups for side in group.profiles}
        self._learning: Verdict | None = None

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
        self._unknown = {side for side in SIDES if not all(bool((block > 0).all()) for block in self._of(side))}

    def learn(self) -> None:
        """Take the largest magnitude of a side for that of rows which had nothing in the first step that was kept."""
        if not self._unknown:
            return
        answers = []
        for side in SIDES:
            magnitudes = self._of(side)
            largest = torch.stack([magnitude.max() for magnitude in magnitudes]).max()
            for magnitude in magnitudes:
                magnitude.copy_(torch.where(magnitude > 0, magnitude, largest))
            answers.append(largest > 0)
        self._learning = Verdict(torch.stack(answers))

    def _of(self, side: Side) -> list[Tensor]:
        return [magnitude for group in self.of_groups for magnitude in group.magnitudes.get(side, [])]
