"""A wire on which factors travel as integers of 8 or 4 bits.

Integers are summed exactly, in any order, so all ranks receive the same. How depends on their number W:

- Two ranks gather each other's integers, which sends as much as an all-reduce, and add them.
- While a field of 8 bits has room for the sum of W ranks' levels, an all-reduce adds them.
- Otherwise in two hops, as an all-reduce does inside: each rank receives one W-th of everybody's integers, adds them,
  rounds the average to integers again, and all gather these. What the second rounding leaves out is taken off that
  rank's own share, so that it stays in its error buffer.

Integers have no NaN. A flag for each matrix tells whether its factor was finite on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_powersgd.compressor.codec import pack, refinement, sums_fit, to_levels, unpack
from lightning_powersgd.compressor.verdict import known
from lightning_powersgd.exchange.wire import Wire, Wires


@dataclass
class _Segment:
    """A part of the payload.

    Attributes:
        part: where it lies, flat; levels, or flags that are 0 or 1.
        bits: of each of its entries on the wire.
        own: this rank's share of an average that error buffers are computed from; ``None`` for what they are not.
        is_flags: whether it holds flags, of which is received whether any rank has set them.
    """

    part: Tensor
    bits: int
    own: Tensor | None = None
    is_flags: bool = False


class IntegerWire(Wire):
    """One collective of a step, in which factors travel as integers, once their magnitudes are known.

    In the first steps they are not, and factors travel in bfloat16.

    Args:
        wires: between the ranks.
        length: of the payload.
        bits: of the integers on this wire, of one kind or two.
    """

    def __init__(self, wires: Wires, length: int, bits: Sequence[int]) -> None:
        super().__init__(wires, length, torch.float32)
        world_size = wires.world_size
        self._gathers = world_size == 2
        self._sums = world_size == 1 or all(sums_fit(each, world_size) for each in bits)
        self._segments: list[_Segment] = []
        # Of the segments that are factors: views of each, and the flags that tell whether it was finite.
        self._factors: list[Tensor] = []
        self._flags: list[Tensor] = []

    @override
    def share(self, part: Tensor) -> None:
        if not self._wires.encodes:
            super().share(part)
            part.copy_(part.bfloat16())
        elif part.numel():
            self._segments.append(_Segment(part, 8, is_flags=True))

    @override
    def share_factors(self, part: Tensor, factors: Collection[Tensor], bits: int, own: Tensor | None = None) -> None:
        if not self._wires.encodes:
            super().share_factors(part, factors, bits, own)
            return
        largest = torch.stack(torch._foreach_norm(list(factors), ord=float("inf")))
        flags = largest.isfinite().logical_not_().float()
        self._factors += factors
        self._flags.append(flags)
        to_levels(part, bits, self._wires.world_size)
        if own is not None:
            own.copy_(part)
        self._segments += [_Segment(part, bits, own), _Segment(flags, 8, is_flags=True)]

    @override
    def send(self, payload: Tensor) -> None:
        if not payload.numel():
            return
        if not self._wires.encodes:
            super().send(payload.bfloat16())
        elif self._gathers:
            self._in_flight = self._wires.all_gather(self._packed(rows=1).flatten())
        elif self._sums:
            levels = torch.cat([segment.part for segment in self._segments])
            super().send(levels.to(torch.int8))
        else:
            self._in_flight = self._wires.all_to_all(self._packed(self._wires.world_size))

    @override
    def receive(self) -> None:
        if self._in_flight is None:
            return
        work, received = self._in_flight
        if received.dtype == torch.bfloat16:
            super().receive()
            self.flat[: len(received)] = received
            return
        if work is not None:
            work.wait()
        self._in_flight = None
        if self._gathers:
            for segment, packed in zip(self._segments, self._split(received, rows=1), strict=True):
                self._average(segment, unpack(packed, segment.bits).sum(dim=0))
        elif self._sums:
            totals = torch.split(received, [segment.part.numel() for segment in self._segments])
            for segment, total in zip(self._segments, totals, strict=True):
                self._average(segment, total)
        else:
            self._second_hop(received)
        self._mark_spoilt()
        self.forget()

    @override
    def forget(self) -> None:
        super().forget()
        self._segments, self._factors, self._flags = [], [], []

    def _second_hop(self, received: Tensor) -> None:
        """Average this rank's part of all integers, round that, and gather everybody's."""
        world_size, rank = self._wires.world_size, dist.get_rank(self._wires.process_group)
        finer = refinement(world_size)
        mine = []
        for segment, packed in zip(self._segments, self._split(received, world_size), strict=True):
            total = unpack(packed, segment.bits).sum(dim=0)
            if segment.is_flags:
                mine.append(pack((total > 0).float(), segment.bits))
                continue
            average = total / world_size
            levels = average * finer
            to_levels(levels, segment.bits, world_size)
            if segment.own is not None:
                # The mean of all ranks' shares becomes what all receive.
                begin = rank * len(levels)
                own = segment.own[begin : begin + len(levels)]
                own.sub_((average - levels / finer)[: len(own)], alpha=world_size)
            mine.append(pack(levels, segment.bits))
        # Its bytes are counted with those of the first hop: both send as much as an all-reduce of the payload.
        work, everyones = self._wires.all_gather(torch.cat(mine), counted=False)
        if work is not None:
            work.wait()
        for segment, packed in zip(self._segments, self._split(everyones, world_size), strict=True):
            levels = unpack(packed, segment.bits).flatten()[: segment.part.numel()]
            segment.part.copy_(levels if segment.is_flags else levels / finer)

    def _mark_spoilt(self) -> None:
        """Turn the factors of which a rank's was not finite into NaN, on all ranks."""
        flags = torch.cat(self._flags)
        spoilt = (flags > 0).any()
        self.blemish = torch.where(spoilt, torch.nan, 0.0)
        if known(spoilt) is not False:
            stains = torch.where(flags > 0, torch.nan, 0.0)
            torch._foreach_add_(self._factors, list(stains.unbind()))

    def _average(self, segment: _Segment, total: Tensor) -> None:
        segment.part.copy_(total[: segment.part.numel()])
        if not segment.is_flags:
            segment.part.div_(self._wires.world_size)

    def _packed(self, rows: int) -> Tensor:
        """Give all segments as bytes, each of them cut into so many rows of one length, with zeros at the end."""
        parts = []
        for segment in self._segments:
            padded = segment.part.new_zeros(rows * _columns(segment, rows))
            padded[: segment.part.numel()] = segment.part
            parts.append(pack(padded.view(rows, -1), segment.bits))
        return torch.cat(parts, dim=1)

    def _split(self, packed: Tensor, rows: int) -> tuple[Tensor, ...]:
        """Divide what came of `_packed` by segments."""
        return torch.split(packed, [_columns(segment, rows) * segment.bits // 8 for segment in self._segments], dim=1)


def _columns(segment: _Segment, rows: int) -> int:
    """Give the length of a segment's rows, even so that two numbers may share a byte."""
    each = -(-segment.part.numel() // rows)
    return each + each % 2
