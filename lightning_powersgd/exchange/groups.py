"""Parameters that travel together: a group's part in a step.

In a step a group will *take* its gradients, *start* its first collective when all are there, and *proceed* when that
has come back. A compressed group will *finish* when all that the step sent is there and has been judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_powersgd.compressor.basis import orthonormal
from lightning_powersgd.compressor.plan import SIDES, Group, Side, Slot, other_side
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.verdict import any_of, finite_each
from lightning_powersgd.exchange.integers import IntegerWire
from lightning_powersgd.exchange.loss_scale import LossScale
from lightning_powersgd.exchange.matrix import Matrix
from lightning_powersgd.exchange.use import ReachedParameters
from lightning_powersgd.exchange.wire import Wire, Wires

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work


class _Group:
    """What both kinds of groups have in common: whose gradients belong to them, and which are there."""

    def __init__(self, group: Group, wires: Wires) -> None:
        self.slots = group.slots
        self._wires = wires
        self._taken: set[str] = set()

    @property
    def complete(self) -> bool:
        """Whether the gradients of all parameters are there."""
        return len(self._taken) == len(self.slots)

    @property
    def missing(self) -> list[str]:
        """Names of the parameters whose gradients are not there."""
        return [slot.name for slot in self.slots if slot.name not in self._taken]


class ExactGroup(_Group):
    """A group in a step that is not compressed: its gradients travel as they are, in one collective.

    Args:
        group: of the plan.
        wires: between the ranks.
    """

    def __init__(self, group: Group, wires: Wires) -> None:
        super().__init__(group, wires)
        self._gradients: list[Tensor] = []
        self._flat = torch.empty(0)
        self._work: Work | None = None

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Take in a gradient, which is overwritten with the average."""
        self._taken.add(slot.name)
        self._gradients.append(gradient)

    def start(self) -> None:
        """Send the gradients."""
        self._flat = torch.cat([gradient.reshape(-1) for gradient in self._gradients]).div_(self._wires.world_size)
        self._work = self._wires.all_reduce(self._flat)

    def proceed(self) -> None:
        """Receive the averages."""
        self._wait()
        parts = torch.split(self._flat, [gradient.numel() for gradient in self._gradients])
        for gradient, part in zip(self._gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def forget(self) -> None:
        """Let go of the step's gradients."""
        self._wait()
        self._taken.clear()
        self._gradients = []
        self._flat = torch.empty(0)

    def _wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.wait()


class CompressedGroup(_Group):
    """One group's part in a step.

    A step starts from the factor that is held, say Q. A full step first turns it into an orthonormal basis P̂ of the
    other side, which takes the first collective; a half step (alternating) orthonormalises the held factor as it is.
    Then M is projected onto the basis, and that projection is what the ranks average, keep as the next warm start, and
    reconstruct the gradient from.

    Args:
        group: of the plan.
        state: what is remembered between steps.
        wires: between the ranks.
        loss_scale: of the steps.
        reached: the parameters that this rank's loss reaches; ``None`` where that is all of them.
        passenger: the group before, whose Q travels with this one's P.
    """

    def __init__(
        self,
        group: Group,
        state: PowerSGDState,
        wires: Wires,
        loss_scale: LossScale,
        reached: ReachedParameters | None,
        passenger: CompressedGroup | None,
    ) -> None:
        super().__init__(group, wires)
        self._state, self._loss_scale, self._reached = state, loss_scale, reached
        self._alternate = state.config.alternate
        self._compressed, self.formats = group.compressed, group.formats
        self._bits = {side: form.bits for side, form in zip(SIDES, group.formats, strict=True)}
        self._matrices = {slot.name: Matrix(slot, state, wires.world_size) for slot in group.compressed}

        # What is sent whole and is large is only borrowed from where its gradient lies.
        packed = [slot for slot in group.whole if not slot.travels_alone]

        # The first collective: [what is sent whole | flags, positive where any rank used a parameter | P | passenger].
        # When alternating there is no other, and it takes either factor, [… | factor | supports of drawn bases].
        whole = [slot.numel for slot in packed]
        flags = 0 if reached is None else len(group.compressed)
        self._lengths = {side: sum(slot.rank * slot.length(side) for slot in group.compressed) for side in SIDES}
        self._start = sum(whole) + flags
        first_sides, last_sides = (SIDES, SIDES) if self._alternate else (SIDES[:1], SIDES[1:])
        factors = max(self._lengths[side] for side in first_sides)
        room = passenger.last_length if passenger is not None and passenger.formats == group.formats else 0
        if self._alternate:
            room = sum(max(slot.rows, slot.columns) for slot in group.compressed)
        self._wire = self._make_wire(self._start + factors + room)
        parts = torch.split(self._wire.flat[: sum(whole)], whole)
        self._first_whole = {slot.name: part.view(slot.shape) for slot, part in zip(packed, parts, strict=True)}
        self._flags = dict(zip(self._matrices, self._wire.flat[sum(whole) : self._start], strict=False))
        self._last_flat = self._wire.flat[self._start :]
        self._payload = {side: self._factors(self._last_flat, side) for side in first_sides}
        self._alone = {slot.name: wires.add(Wire(wires, 0, slot.dtype)) for slot in group.whole if slot.travels_alone}
        if passenger is not None:
            passenger.lay_out_last((self._wire, self._start + factors) if room else None)

        # This rank's own part of the last factors as it was sent, so that the error holds its rounding too.
        own_length = max(self._lengths[side] for side in last_sides)
        own_dtype = torch.promote_types(group.dtype, torch.float32)
        self._own_flat = torch.zeros(own_length, dtype=own_dtype, device=self._state.device)
        self._own = {side: self._factors(self._own_flat, side) for side in last_sides}
        self._last_wire, self._sends_last = self._wire, False
        self._whole: dict[str, Tensor] = {}
        self._supports: dict[str, Tensor] = {}
        self._sent: Side = "right"
        # Of the last step, by name, the factors of which the averaged gradients are products.
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def last_length(self) -> int:
        """Elements of Q, which follow in the next collective; none when alternating."""
        return 0 if self._alternate else self._lengths["right"]

    def lay_out_last(self, place: tuple[Wire, int] | None = None) -> None:
        """Lay out Q in the next group's collective, from a position on, or else in one of its own."""
        if self._alternate:
            return
        self._sends_last = place is None
        self._last_wire, begin = place or (self._make_wire(self.last_length), 0)
        self._last_flat = self._last_wire.flat[begin:]
        self._payload["right"] = self._factors(self._last_flat, "right")

    @property
    def own_factors(self) -> list[Tensor]:
        """The factors that this rank sent last, in the step before."""
        own = self._own[self._sent]
        return [matrix.received(self._sent, own[name]) for name, matrix in self._matrices.items()]

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Put a gradient into the first payload: whole, or its projection after adding the error.

        Args:
            slot: the parameter's.
            gradient: without gaps; of a compressed parameter, laid out in memory as the parameter is.
        """
        self._taken.add(slot.name)
        if not slot.rank:
            self._whole[slot.name] = gradient
            if not slot.travels_alone:
                self._first_whole[slot.name].copy_(gradient)
            return
        if self._reached is not None:
            self._flags[slot.name].fill_(slot.name in self._reached)
        matrix = self._matrices[slot.name]
        factor, side = self._state.start_factor(slot), other_side(self._state.held)
        matrix.basis = orthonormal(factor, matrix.dtype) if self._alternate else factor.to(matrix.dtype)
        matrix.take(gradient, self._loss_scale.ratio, self._wires.encodes)
        matrix.project(side, self._payload[side][slot.name])
        if self._state.held in self._state.drawn[slot.name]:
            # Where nothing is on any rank, nothing may come to be: what was drawn at random must not reach there.
            self._supports[slot.name] = matrix.support(self._state.held)

    def start(self) -> None:
        """Send the first collective: what is sent whole, and P (alternating: the projection). The large ones follow."""
        if self._alternate:
            self._sent = other_side(self._state.held)
            self._wire.share(self._wire.flat[: self._start])
            self._share_last()
            self._wire.send(self._wire.flat[: self._place_supports(self._start + self._lengths[self._sent])])
        else:
            self._wire.share(self._wire.flat[: self._start])
            self._share("left", self._wire, self._wire.flat[self._start :])
            self._wire.send(self._wire.flat)
        for name, wire in self._alone.items():
            wire.send(self._whole[name].view(-1).div_(self._wires.world_size))

    def proceed(self) -> None:
        """Receive the first collective; in a full step, orthonormalise P and compute Q."""
        self._wire.receive()
        for name, part in self._first_whole.items():
            self._whole[name].copy_(part)
        for name, matrix in self._matrices.items():
            if not self._alternate:
                # In M's dtype, since a basis never travels and need not be rounded to the wire's.
                matrix.basis = orthonormal(matrix.received("left", self._payload["left"][name]), matrix.dtype)
            if self._reached is not None:
                # Without a basis the gradient is zero.
                matrix.basis *= self._flags[name] > 0
            if name in self._supports:
                matrix.basis *= self._supports[name] > 0
            if not self._alternate:
                matrix.project("right", self._payload["right"][name])
        if not self._alternate:
            self._share_last()
            if self._sends_last:
                self._last_wire.send(self._last_wire.flat)

    def finish(self, finite: bool | Tensor, *, together: bool) -> bool | Tensor:
        """Write the averaged gradients ĝ = P̂ Qᵀ, and what was not sent, and the averaged factors for the next step.

        Of a gradient whose error is not written no element is finite, or an optimizer would take it, and then again
        what the error still holds.

        Args:
            finite: whether everything that any group received was.
            together: judge each matrix by that, and not by itself.

        Returns:
            Whether errors and factors were kept, of any matrix at least.
        """
        factors = {
            name: {side: matrix.received(side, self._payload[side][name]) for side in self._sides}
            for name, matrix in self._matrices.items()
        }
        keep = [finite] * len(factors)
        if finite is not True and not together:
            keep = finite_each([list(both.values()) for both in factors.values()])
        for (name, matrix), keep_this in zip(self._matrices.items(), keep, strict=True):
            self._finish_matrix(name, matrix, factors[name], keep_this)
        return any_of(keep)

    def _finish_matrix(self, name: str, matrix: Matrix, factors: dict[Side, Tensor], finite: bool | Tensor) -> None:
        own, average = matrix.received(self._sent, self._own[self._sent][name]), factors[self._sent]
        if finite is not True:
            average = torch.where(torch.as_tensor(finite, device=average.device), average, torch.nan)
        keep = finite & self._used(name, finite)
        self.averages[name] = matrix.decompress(self._sent, own, average, keep)
        for side, factor in factors.items():
            self._state.keep_factor(name, side, factor, keep)
        self._follow_loss_scale(name, finite, keep)

    def _follow_loss_scale(self, name: str, finite: bool | Tensor, keep: bool | Tensor) -> None:
        """Let what a step that counts has not written anew refer to its loss scale, too."""
        if not self._loss_scale.changes or not self._loss_scale.may_differ:
            return
        device = self._wire.flat.device
        ratio, kept = (torch.as_tensor(value, device=device) for value in (self._loss_scale.ratio, keep))
        if self._alternate:
            self._state.scales.rescale(name, other_side(self._sent), torch.where(kept, ratio, 1.0))
        if self._reached is not None and keep is not True:
            self._state.rescale(name, torch.where(finite & (self._flags[name] == 0), ratio, 1.0))

    def forget(self) -> None:
        """Let go of the step's gradients."""
        self._taken.clear()
        self.averages = {}
        self._whole.clear()
        self._supports.clear()
        for matrix in self._matrices.values():
            matrix.forget()

    @property
    def _sides(self) -> tuple[Side, ...]:
        """The sides of the factors that a step averages."""
        return (self._sent,) if self._alternate else SIDES

    def _used(self, name: str, keep: bool | Tensor) -> bool | Tensor:
        """Whether any rank used a parameter. If none did, its average is thrown away."""
        if self._reached is None:
            return True
        used = self._flags[name] > 0
        return used if isinstance(keep, Tensor) else bool(used)

    def _place_supports(self, position: int) -> int:
        """Put the supports into the collective, in an order that is the same on all ranks, and give where they end."""
        for name in self._matrices:
            if name in self._supports:
                support, begin = self._supports[name], position
                position += len(support)
                self._supports[name] = self._wire.flat[begin:position].copy_(support)
                self._wire.share(self._supports[name])
        return position

    def _make_wire(self, length: int) -> Wire:
        wires, form = self._wires, self.formats[0]
        bits = list(self._bits.values())
        return wires.add(IntegerWire(wires, length, bits) if form.integer else Wire(wires, length, form.dtype))

    def _share_last(self) -> None:
        """Make the last factors ready to be sent, and keep them as they are after that rounding."""
        self._share(self._sent, self._last_wire, self._last_flat, self._own_flat[: self._lengths[self._sent]])

    def _share(self, side: Side, wire: Wire, flat: Tensor, own: Tensor | None = None) -> None:
        wire.share_factors(flat[: self._lengths[side]], self._payload[side].values(), self._bits[side], own)

    def _factors(self, flat: Tensor, side: Side) -> dict[str, Tensor]:
        """View the beginning of a flat tensor as factors by name, (r, n) or (r, m)."""
        lengths = [slot.rank * slot.length(side) for slot in self._compressed]
        parts = torch.split(flat[: sum(lengths)], lengths)
        return {slot.name: part.view(slot.rank, -1) for slot, part in zip(self._compressed, parts, strict=True)}
