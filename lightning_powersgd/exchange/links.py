"""The links of a rank that gossips: what travels over them, and what both ends of each remember."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.basis import normalize_rows, random_factor, unique_basis
from lightning_powersgd.compressor.passes import project, subtract_product
from lightning_powersgd.compressor.plan import SIDES, Side, Slot, by_dtype, other_side
from lightning_powersgd.compressor.view import as_matrix
from lightning_powersgd.exchange.presence import messages_between_ranks

# How long a rank whose fit has failed waits for what neighbours may still send.
_PATIENCE = timedelta(seconds=10)

# Size of the random trace that completes a basis where a difference has fewer directions than the rank, beside factors
# whose largest entry is 1. Rounding in float64 is then to it what rounding in float32 is to 1.
_TRACE = 1e-9


class Links:
    """The links that a rank uses at the same time, with the factors that both ends of each remember.

    What belongs to the d links is stacked in the order of the neighbours: factors are (d, r, k), and a mailbox has a
    row for each.

    Args:
        slots: of the parameters that travel, in their order.
        parameters: by name.
        weights: of the links, by neighbour.
        seed: of the first factors.
        process_group: the ranks.
    """

    def __init__(
        self,
        slots: Iterable[Slot],
        parameters: Mapping[str, Tensor],
        weights: Mapping[int, float],
        seed: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._process_group = process_group
        self._peers = list(weights)
        self._side: Side = "left"
        self._works: list[dist.Work] = []
        self._mailboxes = [
            Mailbox(same_dtype, parameters, weights, seed, process_group)
            for same_dtype in (by_dtype(slots) if weights else [])
        ]

    def go_on_from(self, previous: Links) -> None:
        """Take over the factors of other links between the same ranks."""
        self._side = previous._side
        factors = {name: both for mailbox in previous._mailboxes for name, both in mailbox.factors.items()}
        for mailbox in self._mailboxes:
            for name, both in mailbox.factors.items():
                for side, factor in both.items():
                    if name in factors and factors[name][side].shape == factor.shape:
                        factor.copy_(factors[name][side])

    @property
    def degree(self) -> int:
        """The number of neighbours, d."""
        return len(self._peers)

    def start(self) -> int:
        """Send this rank's products with the factors of this side, and the parameters that travel whole.

        Returns:
            The bytes sent, over all links.
        """
        group = self._process_group or dist.group.WORLD
        assert group is not None
        operations = []
        for mailbox in self._mailboxes:
            mailbox.fill(self._side)
            for row, peer in enumerate(self._peers):
                end = dist.get_global_rank(group, peer)
                for send_or_receive, box in ((dist.isend, mailbox.outgoing), (dist.irecv, mailbox.incoming)):
                    if box[row].numel():
                        operations.append(dist.P2POp(send_or_receive, box[row], end, group))
        with self._explained(), messages_between_ranks(group):
            # All at once, so that no order of the neighbours can leave ranks waiting for each other in a circle.
            self._works = dist.batch_isend_irecv(operations) if operations else []
        return sum(mailbox.outgoing.nbytes for mailbox in self._mailboxes)

    def finish(self) -> int:
        """Receive the neighbours' products, move the model, and keep the difference as the next factor.

        Returns:
            The bytes sent: none.
        """
        with self._explained():
            while self._works:
                self._works[0].wait()
                self._works.pop(0)
        for mailbox in self._mailboxes:
            mailbox.move(self._side)
        self._side = other_side(self._side)
        return 0

    def abandon(self) -> None:
        """Let messages that are on their way arrive, without any effect, unless the neighbours do not send theirs."""
        # When memory that gloo is to write to is gone, the whole group cannot be used any more.
        with contextlib.suppress(RuntimeError):
            while self._works:
                self._works.pop(0).wait(_PATIENCE)
        self._works = []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            peers = ", ".join(map(str, self._peers))
            raise RuntimeError(
                f"Rank {dist.get_rank(self._process_group)} could not gossip with its neighbours ({peers})."
                " One of them has ended, or has not come within the `timeout`. Look for the first error in the logs of"
                f" all ranks. The reason given here: {error}"
            ) from error


class Mailbox:
    """What travels over the links at the same time, of parameters of one dtype: [whole | factors of one side].

    Args:
        slots: of the parameters.
        parameters: by name.
        weights: of the links, by neighbour.
        seed: of the first factors.
        process_group: the ranks.

    Attributes:
        factors: by name and side, those that both ends remember, (d, r, n) or (d, r, m).
    """

    def __init__(
        self,
        slots: list[Slot],
        parameters: Mapping[str, Tensor],
        weights: Mapping[int, float],
        seed: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._parameters = parameters
        self._whole = [slot for slot in slots if not slot.rank]
        self._compressed = [slot for slot in slots if slot.rank]
        degree, rank = len(weights), dist.get_rank(process_group)
        dtype, device = slots[0].dtype, parameters[slots[0].name].device
        self._weights = torch.tensor(list(weights.values()), dtype=dtype, device=device).view(degree, 1)
        # Both ends remember the difference with the sign that it has at the lower rank.
        signs = [1.0 if rank < peer else -1.0 for peer in weights]
        self._signs = torch.tensor(signs, dtype=dtype, device=device).view(degree, 1, 1)
        self.factors: dict[str, dict[Side, Tensor]] = {}
        self._traces: dict[str, dict[Side, Tensor]] = {}
        for slot in self._compressed:
            self.factors[slot.name], self._traces[slot.name] = {}, {}
            for side in SIDES:
                draws = [f"{seed}/{min(rank, peer)}-{max(rank, peer)}/{slot.name}/{side}" for peer in weights]
                factors = [random_factor(draw, slot.rank, slot.length(side)) for draw in draws]
                self.factors[slot.name][side] = torch.stack(factors).to(device, dtype)
                trace = random_factor(f"{seed}/{slot.name}/{side}", slot.rank, slot.length(side))
                self._traces[slot.name][side] = (_TRACE * trace).to(device)
        self._bases: dict[str, Tensor] = {}
        self._start = sum(slot.numel for slot in self._whole)
        self._lengths = {side: sum(slot.rank * slot.length(side) for slot in self._compressed) for side in SIDES}
        length = self._start + max(self._lengths.values())
        # gloo sends from main memory only.
        on_cpu = dist.get_backend(process_group) == "gloo"
        wire = torch.device("cpu") if on_cpu else device
        self._outbox, self._inbox = (torch.zeros(degree, length, dtype=dtype, device=wire) for _ in range(2))
        self.outgoing, self.incoming = self._outbox, self._inbox

    def fill(self, side: Side) -> None:
        """Put in the parameters that travel whole, and the products that make the factor of a side."""
        length = self._start + self._lengths[side]
        self.outgoing, self.incoming = self._outbox[:, :length], self._inbox[:, :length]
        if self._whole:
            flat = torch.cat([self._parameters[slot.name].detach().reshape(-1) for slot in self._whole])
            self._outbox[:, : self._start] = flat
        for slot, place in self._places(self._outbox, side):
            # One after the other: in a stack, BLAS rounds by the place there, which is another at the link's other end.
            factors, trace = (of[slot.name][other_side(side)] for of in (self.factors, self._traces))
            basis = torch.stack([unique_basis(factor, trace, slot.dtype) for factor in factors])
            self._bases[slot.name] = basis
            product = torch.empty(place.shape[0] * slot.rank, slot.length(side), dtype=slot.dtype, device=basis.device)
            matrix = self._matrix(slot)
            project(matrix if side == "right" else matrix.t(), basis.flatten(0, 1), product)
            place.copy_(product.view(place.shape))

    def move(self, side: Side) -> None:
        """Move the parameters towards the neighbours', and keep the differences as the next round's factors."""
        difference = self.outgoing.sub_(self.incoming).to(self._weights.device)
        # A model that is not finite stays alone: its neighbours do not take it over, at either end of the link.
        blemish = (difference * 0).sum(dim=1, keepdim=True)
        difference = torch.where(blemish == 0, difference, torch.zeros_like(difference))
        if self._whole:
            moves = (self._weights * difference[:, : self._start]).sum(dim=0)
            for slot, move in zip(self._whole, torch.split(moves, [slot.numel for slot in self._whole]), strict=True):
                self._parameters[slot.name].sub_(move.view(slot.shape))
        for slot, part in self._places(difference, side):
            kept = self.factors[slot.name][side]
            kept.copy_(normalize_rows(part * self._signs, fallback=kept))
            product, basis = (part * self._weights.unsqueeze(2)).flatten(0, 1), self._bases.pop(slot.name).flatten(0, 1)
            left, right = (product, basis) if side == "left" else (basis, product)
            subtract_product(self._matrix(slot), left, right)

    def _places(self, boxes: Tensor, side: Side) -> Iterator[tuple[Slot, Tensor]]:
        """View what follows the whole parameters as factors, (d, r, k), of each compressed parameter."""
        start = self._start
        for slot in self._compressed:
            length = slot.rank * slot.length(side)
            yield slot, boxes[:, start : start + length].view(len(boxes), slot.rank, -1)
            start += length

    def _matrix(self, slot: Slot) -> Tensor:
        return as_matrix(self._parameters[slot.name].detach(), slot.order, slot.split)
