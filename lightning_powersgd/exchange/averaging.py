"""Low-rank averaging: all ranks train models of their own, and average them in a few directions a step.

Rank w has the model θ_w, and all ranks hold one reference ρ, which follows their mean. A round does this for each
matrix, with a fresh random Ω, and signs s_w = ±1, freshly permuted, that sum to zero:

    M_w = θ_w − ρ
    P   = mean of s_w M_w Ω,  P̂ = orth(P)     directions in which the models differ
    Q_w = M_wᵀ P̂,             Q̄ = mean of Q_w
    θ_w ← θ_w + P̂ (Q̄ − Q_w)ᵀ                  in these directions all models become equal
    ρ   ← ρ + P̂ Q̄ᵀ

The mean of the models stays. What is not sent is still in θ_w, and waits for its turn there, so that no error buffer is
needed. Ω is fresh, since the directions of the last round are those in which nothing is left to average. The signs let
what all ranks learnt alike cancel out. ρ has no influence on the mean: it makes what travels small, so that a few bits
are enough for it. Each rank rounds by a scale that it sends along, and takes off what it sent, not what it meant to.

Parameters that are not compressed (see `plan`) are averaged whole, in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.basis import orthonormal, random_factor
from lightning_powersgd.compressor.codec import pack, unpack
from lightning_powersgd.compressor.passes import project, subtract_product
from lightning_powersgd.compressor.plan import Side, Slot, by_dtype
from lightning_powersgd.compressor.view import as_matrix, as_real
from lightning_powersgd.exchange.wire import Wires


class Averaging:
    """What a rank remembers of low-rank averaging, and the rounds of it. Every rank must make it at the same time.

    Args:
        slots: of the parameters that travel, in their order.
        parameters: by name.
        bits: of a factor's entries on the wire, 8 or 4; ``None``: they travel as they are, at least in float32.
        seed: of Ω and of the signs.
        process_group: the ranks; ``None`` is the default group.

    Attributes:
        rounds: of averaging so far.
        references: ρ by the parameters' names, (n, m), at least float32; the same on all ranks.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        parameters: Mapping[str, Tensor],
        bits: int | None,
        seed: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._parameters, self._bits, self._seed, self._process_group = parameters, bits, seed, process_group
        self._rank, self._world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._slots = by_dtype(slot for slot in slots if slot.numel and self._world_size > 1)
        self._on_their_way: list[_Average] = []
        self.rounds = 0
        # Ranks that resume, each with a model of its own, begin with the first one's.
        first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
        self.references: dict[str, Tensor] = {}
        for slot in self._compressed:
            reference = _wide(self._matrix(slot)).clone(memory_format=torch.contiguous_format)
            dist.broadcast(reference, first, group=process_group)
            self.references[slot.name] = reference

    @property
    def degree(self) -> int:
        """How many copies of the model a rank would send, were it to go whole: 0 if the rank is alone."""
        return min(self._world_size - 1, 1)

    def go_on_from(self, previous: Averaging) -> None:
        """Take over the references of the parameters that both have."""
        self.load_state_dict(previous.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Give what a run that resumes needs: the same on all ranks, loadable with ``weights_only=True``."""
        return {"rounds": self.rounds, "references": dict(self.references)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was. References of parameters that are not here, or have changed, are ignored."""
        self.rounds = state["rounds"]
        for name, reference in state["references"].items():
            if name in self.references and self.references[name].shape == reference.shape:
                self.references[name].copy_(reference)

    def start(self) -> int:
        """Send the parameters that travel whole, and P.

        Returns:
            The bytes sent.
        """
        sign = self._sign()
        for slots in self._slots:
            whole = [self._parameters[slot.name].detach() for slot in slots if not slot.rank]
            factors = [self._project(slot, sign * self._draw(slot), "left") for slot in slots if slot.rank]
            self._on_their_way.append(_Average(whole, factors, self._bits, self._process_group))
        self.rounds += 1
        return sum(average.sent_bytes for average in self._on_their_way)

    def finish(self) -> int:
        """Receive P and average in its directions; what travelled whole becomes its mean.

        If any rank's model is not finite, nothing moves on any rank.

        Returns:
            The bytes sent.
        """
        sent_bytes = 0
        received = [average.wait() for average in self._on_their_way]
        self._on_their_way = []
        if not all(mean.isfinite().all() for means, _ in received for mean in means):
            return sent_bytes
        for slots, (means, _) in zip(self._slots, received, strict=True):
            whole = [slot for slot in slots if not slot.rank]
            compressed = [slot for slot in slots if slot.rank]
            for slot, mean in zip(whole, means, strict=False):
                as_real(self._parameters[slot.name].detach()).copy_(mean)
            bases = [orthonormal(factor, factor.dtype) for factor in means[len(whole) :]]
            own = [self._project(slot, basis, "right") for slot, basis in zip(compressed, bases, strict=True)]
            if not own:
                continue
            average_of_own = _Average([], own, self._bits, self._process_group)
            sent_bytes += average_of_own.sent_bytes
            averages, sent = average_of_own.wait()
            for slot, basis, average, mine in zip(compressed, bases, averages, sent, strict=True):
                matrix = self._matrix(slot)
                wide = _wide(matrix)
                subtract_product(wide, basis, mine - average)
                if wide is not matrix:
                    matrix.copy_(wide)
                subtract_product(self.references[slot.name], basis, -average)
        return sent_bytes

    def abandon(self) -> None:
        """Let go of a round that was broken off."""
        self._on_their_way = []

    @property
    def _compressed(self) -> list[Slot]:
        return [slot for slots in self._slots for slot in slots if slot.rank]

    def _sign(self) -> float:
        """Give this rank's s_w. With an odd number of ranks, that of one is 0."""
        order = random_factor(f"{self._seed}/{self.rounds}", 1, self._world_size)[0].argsort()
        place = int(order[self._rank])
        return 0.0 if place == 2 * (self._world_size // 2) else 1.0 - 2.0 * (place % 2)

    def _draw(self, slot: Slot) -> Tensor:
        """Draw Ωᵀ, (r, m)."""
        draw = random_factor(f"{self._seed}/{self.rounds}/{slot.name}", slot.rank, slot.columns)
        return draw.to(self.references[slot.name])

    def _project(self, slot: Slot, basis: Tensor, side: Side) -> Tensor:
        """Project M onto a basis: the factor of that side, (r, n) or (r, m)."""
        difference = _wide(self._matrix(slot)) - self.references[slot.name]
        factor = torch.empty(slot.rank, slot.length(side), dtype=basis.dtype, device=basis.device)
        project(difference.t() if side == "left" else difference, basis, factor)
        return factor

    def _matrix(self, slot: Slot) -> Tensor:
        return as_matrix(self._parameters[slot.name].detach(), slot.order, slot.split)


class _Average:
    """The mean over all ranks of tensors, on its way: of some exactly, of factors in few bits if these are given.

    In few bits each rank sends what it has to all others, and all add it up alike. Otherwise it is an all-reduce.

    Args:
        exact: of any shapes and one dtype.
        factors: (r, k), in the dtype of `exact`, but at least in float32.
        bits: of a factor's entries on the wire; ``None``: those of its dtype.
        process_group: the ranks.

    Attributes:
        sent_bytes: handed to the collective.
    """

    def __init__(
        self,
        exact: Sequence[Tensor],
        factors: Sequence[Tensor],
        bits: int | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._exact = [_wide(as_real(tensor)) for tensor in exact]
        self._factors, self._bits, self._process_group = list(factors), bits, process_group
        values = [tensor.reshape(-1) for tensor in (*self._exact, *(self._factors if bits is None else ()))]
        wires = Wires(process_group, (*self._exact, *self._factors)[0].device)
        if bits is None:
            self._received = torch.cat(values)
            self._work = wires.all_reduce(self._received)
        else:
            octets = [value.view(torch.uint8) for value in values]
            codes = [_encode(factor, bits) for factor in self._factors]
            self._work, self._received = wires.all_gather(torch.cat(octets + codes))
        self.sent_bytes = wires.sent_bytes

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the means, the exact ones first, and what this rank has sent of each factor."""
        if self._work is not None:
            self._work.wait()
        if self._bits is None:
            tensors = [*self._exact, *self._factors]
            means = self._received.div_(dist.get_world_size(self._process_group))
            parts = torch.split(means, [tensor.numel() for tensor in tensors])
            return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)], self._factors
        sizes = [tensor.nbytes for tensor in self._exact]
        sizes += [_code_bytes(factor.shape, self._bits) for factor in self._factors]
        octets = list(torch.split(self._received, sizes, dim=1))
        everyones = [
            _packed(part).view(tensor.dtype).view(len(part), *tensor.shape)
            for part, tensor in zip(octets, self._exact, strict=False)
        ]
        factors = [
            _decode(codes, factor.shape, self._bits).to(factor.dtype)
            for codes, factor in zip(octets[len(everyones) :], self._factors, strict=True)
        ]
        mine = dist.get_rank(self._process_group)
        return [values.mean(dim=0) for values in (*everyones, *factors)], [factor[mine] for factor in factors]


def _encode(factor: Tensor, bits: int) -> Tensor:
    """Round a factor, (r, k), to bytes: first the size of a level in each row, then the levels."""
    level = factor.float().abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = (factor / level).nan_to_num_(0.0, 0.0, 0.0).round_()
    levels = torch.nn.functional.pad(levels, (0, factor.shape[1] % 2))  # since two may share a byte
    return torch.cat((level.flatten().view(torch.uint8), pack(levels, bits).flatten()))


def _decode(codes: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """Give what each rank encoded, (W, r, k), in float32; NaN or zero in rows that were not finite."""
    rank, length = shape
    level, levels = torch.split(codes, [4 * rank, codes.shape[1] - 4 * rank], dim=1)
    values = unpack(_packed(levels).view(len(codes), rank, -1), bits)[..., :length]
    return values * _packed(level).view(torch.float32).unsqueeze(2)


def _packed(part: Tensor) -> Tensor:
    """Copy some columns of bytes, so that they may be viewed in another dtype, wherever they were."""
    return part.clone(memory_format=torch.contiguous_format)


def _code_bytes(shape: Sequence[int], bits: int) -> int:
    rank, length = shape
    return rank * (4 + (length + length % 2) * bits // 8)


def _wide(tensor: Tensor) -> Tensor:
    """Give a tensor in float32, if its dtype is narrower than that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
