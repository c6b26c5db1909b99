"""Parameters that travel together: a group's part in a step.

In a step a group will *take* its gradients, *put* them *in* its payload when all are there, *start* its first
collective, and *proceed* when that has come back. A compressed group will *finish* when all that the step sent is there
and has been judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_powersgd.compressor import verdict
from lightning_powersgd.compressor.basis import orthonormal_each
from lightning_powersgd.compressor.codec import cut
from lightning_powersgd.compressor.fused import FusedPasses, travels
from lightning_powersgd.compressor.operands import Judgement
from lightning_powersgd.compressor.plan import SIDES, Group, Side, Slot, other_side
from lightning_powersgd.compressor.stacks import Stacks, named
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.exchange.integers import IntegerWire
from lightning_powersgd.exchange.loss_scale import LossScale
from lightning_powersgd.exchange.matrix import Matrix, decompress_each, passes_for, project_each
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

    def put_in(self) -> None:
        """Put the gradients into the payload."""
        self._flat = self._wires.share(torch.cat([gradient.reshape(-1) for gradient in self._gradients]))

    def start(self) -> None:
        """Send the gradients."""
        self._work = self._wires.all_reduce(self._flat)

    def proceed(self) -> None:
        """Receive the averages."""
        self._wait()
        parts = torch.split(self._flat, [gradient.numel() for gradient in self._gradients])
        views = [part.view(gradient.shape) for gradient, part in zip(self._gradients, parts, strict=True)]
        torch._foreach_copy_(self._gradients, views)

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

    Matrices are worked on all at once where there is code for that, and else one by one; their factors, once for each
    shape of them.

    Args:
        index: of the group in the plan.
        state: what is remembered between steps.
        wires: between the ranks.
        loss_scale: of the steps.
        reached: the parameters that this rank's loss reaches; ``None`` where that is all of them.
        passenger: the group before, whose Q travels with this one's P.
    """

    def __init__(
        self,
        index: int,
        state: PowerSGDState,
        wires: Wires,
        loss_scale: LossScale,
        reached: ReachedParameters | None,
        passenger: CompressedGroup | None,
    ) -> None:
        group = state.plan.groups[index]
        super().__init__(group, wires)
        self._index, self._group, self.formats = index, group, group.formats
        self._state, self._loss_scale, self._reached = state, loss_scale, reached
        self._alternate = state.config.alternate
        self._bits = {side: form.bits for side, form in zip(SIDES, group.formats, strict=True)}
        self._matrices = {slot.name: Matrix(slot, state) for slot in group.compressed}
        # Of all matrices of the group, whose gradients have one dtype.
        dtypes = next((matrix.dtypes for matrix in self._matrices.values()), None)
        self._dtype = group.dtype if dtypes is None else dtypes.matrix
        self._fused = None if dtypes is None else passes_for(state.device, dtypes)

        # What is sent whole and is large is only borrowed from where its gradient lies.
        packed = [slot for slot in group.whole if not slot.travels_alone]

        # The first collective: [what is sent whole | flags, positive where any rank used a parameter | P | passenger].
        # When alternating there is no other, and it takes either factor, [… | factor | supports of drawn bases].
        whole = [slot.numel for slot in packed]
        flags = 0 if reached is None else len(group.compressed)
        self._start = sum(whole) + flags
        first_sides, last_sides = (SIDES, SIDES) if self._alternate else (SIDES[:1], SIDES[1:])
        factors = max(group.length(side) for side in first_sides)
        room = passenger.last_length if passenger is not None and passenger.formats == group.formats else 0
        if self._alternate:
            room = sum(max(slot.rows, slot.columns) for slot in group.compressed)
        self._wire = self._make_wire(self._start + factors + room)
        parts = torch.split(self._wire.flat[: sum(whole)], whole)
        self._first_whole = {slot.name: part.view(slot.shape) for slot, part in zip(packed, parts, strict=True)}
        self._flags = self._wire.flat[sum(whole) : self._start]
        self._payload = {side: Stacks(group, side, self._wire.flat[self._start :]) for side in first_sides}
        self._alone = {slot.name: wires.add(Wire(wires, 0, slot.dtype)) for slot in group.whole if slot.travels_alone}
        if passenger is not None:
            passenger.lay_out_last((self._wire, self._start + factors) if room else None)

        # This rank's own part of the last factors as it was sent, so that the error holds its rounding too.
        self._own = self._make_stacks(last_sides, torch.promote_types(group.dtype, torch.float32))
        # Kernels that work on all factors where they lie, and make ready what is sent.
        self._direct = self._fused if isinstance(self._fused, FusedPasses) and self._may_be_direct() else None
        # Projections as they are computed, where they do not travel in that dtype.
        own_memory = self._dtype != group.dtype and self._direct is None
        self._computed = self._make_stacks(SIDES, self._dtype) if own_memory else None
        self._last_wire, self._sends_last = self._wire, False
        self._nan = torch.full((), torch.nan, dtype=group.dtype, device=state.device)
        # Memory for what passes find by its address (see `_settled`).
        self._places: dict[str, dict[Side, Stacks]] = {}
        # Of this step: what matrices are projected onto, and its side; the gains; and where projections go.
        self._side_of_basis: Side = "left"
        self._basis: list[Tensor] = []
        self._gains: dict[Side, list[Tensor]] = {}
        self._projections: dict[str, Tensor] = {}
        # Of the gradients taken: those that are sent whole, and the supports.
        self._whole: dict[str, Tensor] = {}
        self._supports: dict[str, Tensor] = {}
        self._sent: Side = "right"
        # Of the last step, by name, the factors of which the averaged gradients are products.
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def last_length(self) -> int:
        """Elements of Q, which follow in the next collective; none when alternating."""
        return 0 if self._alternate else self._group.length("right")

    def lay_out_last(self, place: tuple[Wire, int] | None = None) -> None:
        """Lay out Q in the next group's collective, from a position on, or else in one of its own."""
        if self._alternate:
            return
        self._sends_last = place is None
        self._last_wire, begin = place or (self._make_wire(self.last_length), 0)
        self._payload["right"] = Stacks(self._group, "right", self._last_wire.flat[begin:])

    @property
    def own_factors(self) -> list[Tensor]:
        """The factors that this rank sent last, in the step before."""
        return self._received(self._sent, self._own[self._sent].blocks)

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Take in a gradient, which is overwritten with the average.

        Args:
            slot: the parameter's.
            gradient: without gaps; of a compressed parameter, laid out in memory as the parameter is.
        """
        self._taken.add(slot.name)
        if slot.rank:
            self._matrices[slot.name].take(gradient, self._loss_scale.ratio)
        else:
            self._whole[slot.name] = gradient

    def put_in(self) -> None:
        """Put all gradients into the first payload: whole, or their projections after adding the errors."""
        if self._first_whole and self._direct is None:
            torch._foreach_copy_(list(self._first_whole.values()), [self._whole[name] for name in self._first_whole])
        if not self._matrices:
            return
        self._begin_step()
        held = self._state.held
        if self._direct is not None:
            whole = [(self._whole[name], place) for name, place in self._first_whole.items()]
            self._project_and_share(self._direct, other_side(held), last=self._alternate, whole=whole)
        else:
            project_each(self._matrices, other_side(held), self._projections, self._fused)
        for name, matrix in self._matrices.items():
            if held in self._state.drawn[name]:
                # Where nothing is on any rank, nothing may come to be: what was drawn at random must not reach there.
                self._supports[name] = matrix.support(held)

    def start(self) -> None:
        """Send the first collective: what is sent whole, and P (alternating: the projection). The large ones follow."""
        if self._reached is not None:
            reached = [slot.name in self._reached for slot in self._group.compressed]
            self._flags.copy_(torch.tensor(reached, dtype=self._flags.dtype), non_blocking=True)
        if self._alternate:
            self._sent = other_side(self._state.held)
        if self._direct is None:
            self._wire.share(self._wire.flat[: self._start])
            if self._alternate:
                self._share_last()
            else:
                self._share("left", self._wire)
        elif self._reached is not None:
            self._wire.share(self._flags)
        length = len(self._wire.flat)
        if self._alternate:
            length = self._place_supports(self._start + self._group.length(self._sent))
        self._wire.send(self._wire.flat[:length])
        for name, wire in self._alone.items():
            wire.send(self._wires.share(self._whole[name].view(-1)))

    def proceed(self) -> None:
        """Receive the first collective; in a full step, orthonormalise P and compute Q."""
        self._wire.receive()
        if self._first_whole:
            torch._foreach_copy_([self._whole[name] for name in self._first_whole], list(self._first_whole.values()))
        if not self._alternate:
            self._set_orthonormal("left", self._payload["left"])
        if self._reached is not None:
            # Without a basis the gradient is zero.
            used = self._payload[self._side_of_basis].of_each(self._flags > 0)
            for basis, there in zip(self._basis, used, strict=True):
                basis *= there
        for name, support in self._supports.items():
            self._matrices[name].basis *= support > 0
        if self._alternate:
            return
        self._projections = self._computed_by_name("right")
        if self._direct is not None:
            self._project_and_share(self._direct, "right", last=True)
        else:
            project_each(self._matrices, "right", self._projections, self._fused)
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
            Whether errors and factors were kept, of any matrix at least; (b,) of each, where that stays on its device.
        """
        if not self._matrices:
            return False
        if self._direct is not None:
            return self._finish_direct(self._direct, finite, together)
        sides = (self._sent,) if self._alternate else SIDES
        factors = {side: self._received(side, self._payload[side].blocks) for side in sides}
        finite_each, keep_each = self._judge(finite, together, factors)
        averages, own = factors[self._sent], self._received(self._sent, self._own[self._sent].blocks)
        of_blocks: list[Tensor] = []
        if finite_each is not None:
            of_blocks = self._payload[self._sent].of_each(finite_each)
            averages = [torch.where(ok, block, self._nan) for ok, block in zip(of_blocks, averages, strict=True)]
        self._decompress(averages, own, keep_each)
        for side, blocks in factors.items():
            if not self._state.keeps(self._index, side):
                continue
            keep: list[bool] | list[Tensor] = [True] * len(blocks)
            if keep_each is not None:
                same = side == self._sent and keep_each is finite_each
                keep = of_blocks if same else self._payload[side].of_each(keep_each)
            self._state.keep_factors(self._index, side, blocks, keep)
        self._follow_loss_scale(finite_each, keep_each)
        if keep_each is None:
            return True
        return bool(keep_each.any()) if verdict.host_waits_for(keep_each.device) else keep_each

    def _finish_direct(self, direct: FusedPasses, finite: bool | Tensor, together: bool) -> Tensor:
        """Do as `finish` does, with kernels that judge and keep factors where they lie."""
        side, payload = self._sent, self._payload[self._sent]
        kept = self._state.held_factors[self._index][side].named
        others = {} if self._alternate else self._payload[other_side(side)].named
        judgements = [Judgement(payload.named[name], kept[name], others.get(name)) for name in self._matrices]
        all_finite = torch.as_tensor(finite, device=self._wire.flat.device) if together else None
        keep_each = direct.keep(side, judgements, all_finite, None if self._reached is None else self._flags)
        if self._state.holds_drawn(self._index, side):
            self._state.ask_whether_computed(self._index, side, payload.blocks, payload.of_each(keep_each))
        decompress_each(self._matrices, side, self._own[side].named, payload.named, keep_each, direct)
        _, average_of = self._settled("average", side, payload.blocks, payload)
        self.averages = self._factors(average_of)
        self._follow_loss_scale(None if all_finite is None else all_finite.expand(len(self._matrices)), keep_each)
        return keep_each

    def _judge(
        self, finite: bool | Tensor, together: bool, factors: Mapping[Side, list[Tensor]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Say of each matrix whether its factors are finite, and whether to keep them; ``None``: all of them."""
        finite_each: Tensor | None = None
        if finite is not True and together:
            finite_each = torch.as_tensor(finite, device=self._wire.flat.device).expand(len(self._matrices))
        elif finite is not True:
            by_side = [named(self._group.stacks(side), blocks) for side, blocks in factors.items()]
            # The largest magnitude is infinite, or NaN, if any is.
            largest = torch._foreach_norm([by_name[name] for by_name in by_side for name in self._matrices], torch.inf)
            finite_each = (torch.stack(largest) < torch.inf).view(len(by_side), -1).all(dim=0)
        if self._reached is None:
            return finite_each, finite_each
        # If no rank used a parameter, its average is thrown away.
        used = self._flags > 0
        if finite_each is None and verdict.known(used.all()) is True:
            return None, None
        return finite_each, used if finite_each is None else finite_each & used

    def _decompress(self, averages: list[Tensor], own: list[Tensor], keep_each: Tensor | None) -> None:
        """Write the averaged gradients, and the local residuals into the errors."""
        side = self._sent
        _, average_of = self._settled("average", side, averages, self._payload[side])
        _, own_of = self._settled("own", side, own, self._own[side])
        decompress_each(self._matrices, side, own_of, average_of, keep_each, self._fused)
        self.averages = self._factors(average_of)

    def _factors(self, average_of: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Give the factors of which averaged gradients are products."""
        return {name: matrix.factors(self._sent, average_of[name]) for name, matrix in self._matrices.items()}

    def _settled(
        self, use: str, side: Side, blocks: list[Tensor], source: Stacks | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Give factors in M's dtype, and by their names: where they lie, if they have it there.

        Passes over all matrices find them by address, and get them in memory that is the same in every step.
        """
        if source is not None and blocks is source.blocks and source.flat.dtype == self._dtype:
            return source.blocks, source.named
        if self._fused is None:
            blocks = [block.to(self._dtype) for block in blocks]
            return blocks, named(self._group.stacks(side), blocks)
        place = self._place_for(use, side)
        if blocks:
            torch._foreach_copy_(place.blocks, blocks)
        return place.blocks, place.named

    def _place_for(self, use: str, side: Side) -> Stacks:
        """Give memory for factors in M's dtype, the same in every step."""
        if use not in self._places:
            self._places[use] = self._make_stacks(SIDES, self._dtype)
        return self._places[use][side]

    def _project_and_share(
        self, direct: FusedPasses, side: Side, *, last: bool, whole: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        """Compute projections where they travel, and make them ready to be sent, with what is sent whole.

        Args:
            direct: the kernels.
            side: of the projections.
            last: whether to keep them as they are after their rounding.
            whole: gradients, and where they travel.
        """
        own = self._own[side].named if last else {}
        matrices = [
            matrix.to_be_projected(self._projections[name], own.get(name)) for name, matrix in self._matrices.items()
        ]
        direct.project(side, matrices, self._loss_scale.ratio, self._wires.world_size, whole)

    def _follow_loss_scale(self, finite_each: Tensor | None, keep_each: Tensor | None) -> None:
        """Let what a step that counts has not written anew refer to its loss scale, too."""
        if not self._loss_scale.changes or not self._loss_scale.may_differ:
            return
        ratio = torch.as_tensor(self._loss_scale.ratio, device=self._wire.flat.device)
        everywhere = torch.ones(len(self._matrices), dtype=torch.bool, device=ratio.device)
        finite, kept = (everywhere if each is None else each for each in (finite_each, keep_each))
        if self._alternate:
            side = other_side(self._sent)
            ratios = self._payload[side].of_each(torch.where(kept, ratio, 1.0))
            self._state.scales.of_groups[self._index].rescale(side, ratios)
        if self._reached is not None and keep_each is not None:
            unused = torch.where(finite & (self._flags == 0), ratio, 1.0)
            for name, its_ratio in zip(self._matrices, unused.unbind(), strict=True):
                self._state.rescale(name, its_ratio)

    def forget(self) -> None:
        """Let go of the step's gradients."""
        self._taken.clear()
        self.averages = {}
        self._whole.clear()
        self._supports.clear()
        self._basis, self._projections = [], {}
        for matrix in self._matrices.values():
            matrix.forget()

    def _begin_step(self) -> None:
        """Make ready what all matrices are projected onto, and where to."""
        held = self._state.held
        scales, ratio, world_size = (
            self._state.scales.of_groups[self._index],
            self._loss_scale.ratio,
            self._wires.world_size,
        )
        sides = (other_side(held),) if self._alternate else SIDES
        self._gains = {side: scales.gains(side, ratio, world_size) if self._wires.encodes else [] for side in sides}
        factors = self._state.start_factors(self._index)
        if self._alternate:
            self._set_orthonormal(held, factors)
        else:
            self._set_basis(held, factors.blocks, factors)
        self._projections = self._computed_by_name(other_side(held))

    def _set_orthonormal(self, side: Side, factors: Stacks) -> None:
        """Let matrices be projected onto bases of factors: in M's dtype, since a basis never travels."""
        if self._direct is not None:
            place = self._place_for("basis", side)
            pairs = [(factor, place.named[name]) for name, factor in factors.named.items()]
            self._direct.orthonormalize(side, pairs)
            self._set_basis(side, place.blocks, place)
        else:
            self._set_basis(side, orthonormal_each(self._received(side, factors.blocks), self._dtype))

    def _set_basis(self, side: Side, blocks: list[Tensor], source: Stacks | None = None) -> None:
        self._side_of_basis = side
        self._basis, by_name = self._settled("basis", side, blocks, source)
        for name, basis in by_name.items():
            self._matrices[name].basis = basis

    def _computed_by_name(self, side: Side) -> dict[str, Tensor]:
        """Give the memory that projections are computed into."""
        return (self._payload if self._computed is None else self._computed)[side].named

    def _share(self, side: Side, wire: Wire, own: Tensor | None = None) -> None:
        """Make the factors that were computed ready to be sent."""
        payload, gains = self._payload[side], self._gains.get(side, [])
        if self._computed is not None:
            factors = self._computed[side].blocks
            if gains:
                factors = [cut(block * gain) for block, gain in zip(factors, gains, strict=True)]
            for block, factor in zip(payload.blocks, factors, strict=True):
                block.copy_(factor)
        else:
            for block, gain in zip(payload.blocks, gains, strict=False):
                block.mul_(gain)
        wire.share_factors(payload.flat, list(payload.named.values()), self._bits[side], own)

    def _share_last(self) -> None:
        """Make the last factors ready to be sent, and keep them as they are after that rounding."""
        self._share(self._sent, self._last_wire, self._own[self._sent].flat)

    def _received(self, side: Side, blocks: list[Tensor]) -> list[Tensor]:
        """Give factors in units of M, as they were before they travelled."""
        gains = self._gains.get(side)
        return [block / gain for block, gain in zip(blocks, gains, strict=True)] if gains else blocks

    def _place_supports(self, position: int) -> int:
        """Put the supports into the collective, in an order that is the same on all ranks, and give where they end."""
        for name in self._matrices:
            if name in self._supports:
                support, begin = self._supports[name], position
                position += len(support)
                self._supports[name] = self._wire.flat[begin:position].copy_(support)
                self._wire.share(self._supports[name])
        return position

    def _may_be_direct(self) -> bool:
        """Whether kernels take all matrices, and factors travel as they are computed, but for rounding."""
        fit = all(matrix.fits(self._fused) for matrix in self._matrices.values())
        return fit and travels(self._group.dtype) and not any(form.scaled for form in self._group.formats)

    def _make_wire(self, length: int) -> Wire:
        wires, form = self._wires, self.formats[0]
        bits = list(self._bits.values())
        return wires.add(IntegerWire(wires, length, bits) if form.integer else Wire(wires, length, form.dtype))

    def _make_stacks(self, sides: Sequence[Side], dtype: torch.dtype) -> dict[Side, Stacks]:
        """Make memory for factors, of which a step needs those of one side at a time."""
        longest = max(self._group.length(side) for side in sides)
        flat = torch.zeros(longest, dtype=dtype, device=self._state.device)
        return {side: Stacks(self._group, side, flat) for side in sides}
