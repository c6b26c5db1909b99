"""Factors of one side, stacked by their shapes, so that what is done with all of them is done once for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_powersgd.compressor.plan import Group, Side, Slot


class Stacks:
    """Factors of one side of a group's matrices in flat memory: those of one shape side by side, as (b, r, k).

    Args:
        group: of the plan.
        side: of the factors.
        flat: memory for `Group.length` elements or more.

    Attributes:
        flat: as much of the memory as the factors take.
        blocks: by shape, (b, r, k).
    """

    def __init__(self, group: Group, side: Side, flat: Tensor) -> None:
        self.flat = flat[: group.length(side)]
        self._slots = group.stacks(side)
        shapes = group.block_shapes(side)
        parts = torch.split(self.flat, [b * r * k for b, r, k in shapes])
        self.blocks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        place_of = {slot.name: place for place, slot in enumerate(group.compressed)}
        places = [place_of[slot.name] for slots in self._slots for slot in slots]
        # Where the matrices of each block are in the group.
        self._places = torch.split(torch.tensor(places, dtype=torch.long).to(flat.device), [b for b, _, _ in shapes])

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The factors by name, (r, k): views, which are made once, since making them takes longer than small passes."""
        return named(self._slots, self.blocks)

    def of_each(self, per_matrix: Tensor) -> list[Tensor]:
        """Give what there is one of for each matrix, in the order of the group, as (b, 1, 1) for each block."""
        return [per_matrix[places].view(-1, 1, 1) for places in self._places]


def named(stacks: Sequence[Sequence[Slot]], blocks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Give blocks of a group by the names of its matrices.

    Args:
        stacks: from `Group.stacks`.
        blocks: (b, …), as many as there are stacks.
    """
    pairs = zip(stacks, blocks, strict=True)
    return {slot.name: one for slots, block in pairs for slot, one in zip(slots, block.unbind(), strict=True)}
