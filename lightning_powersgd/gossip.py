"""PowerGossip: ranks that learn together without a server, by exchanging low-rank differences with their neighbours.

Every rank has a model of its own. A round of gossip takes, for each matrix X of the model and each link (i, j), the
factor that both ends hold, and moves the ends towards each other by a projection of their difference
(Vogels, Karimireddy and Jaggi, NeurIPS 2020, arXiv 2008.01425):

    V̂   = orth(V)                         the same at both ends
    P_i = X_i V̂,  P_j = X_j V̂             what travels, and all that does
    P   = P_i − P_j = (X_i − X_j) V̂
    X_i ← X_i − a P V̂ᵀ,  X_j ← X_j + a P V̂ᵀ

with the weight a of the link. What one end gives up, the other one gains, so that the mean of the models stays. P is
the next round's V on the other side: two rounds are an iteration of the power method on the difference, so that gossip
finds the directions in which neighbours disagree most. The factors of all links of a rank are stacked: a round reads
the model once and writes it once, whatever the number of neighbours.

Parameters that are not compressed (see `plan`) travel whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.agreement import messages_between_ranks
from lightning_powersgd.linalg import (
    as_matrix,
    normalize_rows,
    project,
    random_factor,
    subtract_product,
    unique_basis,
)
from lightning_powersgd.plan import SIDES, Plan, PowerSGDConfig, Side, Slot, make_plan, parameter_name, require_int
from lightning_powersgd.state import common_device, other_side
from lightning_powersgd.topology import Topology

# How long a rank whose fit has failed waits for what neighbours may still send.
_PATIENCE = timedelta(seconds=10)

# Size of the random trace that completes a basis where a difference has fewer directions than the rank, beside factors
# whose largest entry is 1. Rounding in float64 is then to it what rounding in float32 is to 1.
_TRACE = 1e-9


@dataclass(frozen=True)
class PowerGossipConfig:
    """The settings of gossip, checked on construction.

    Args:
        rank: columns of each factor, or patterns with ranks of their own, as in `PowerSGDConfig`. Higher: ranks agree
            more closely, for more bytes and arithmetic, both in proportion.
        iterations: rounds of gossip a step, over the same links. Higher: as with the rank, and each round finds the
            disagreement that the one before has left; but each waits for the one before.
        min_compression_ratio: a matrix whose dense / sent ratio of a round is below this travels whole.
        overlap: let the last round of a step travel while the next step computes, and take effect after it. Hides the
            network's time, at a disagreement that is one step older.
        seed: of the first random factors.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range.
    """

    rank: int | Mapping[str, int] = 1
    iterations: int = 1
    min_compression_ratio: float = 2.0
    overlap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_int("iterations", self.iterations, minimum=1, remedy="Use 1 for one round of gossip a step.")
        if not isinstance(self.overlap, bool):
            raise TypeError(f"`overlap={self.overlap!r}` is not a bool. Use True or False.")
        object.__setattr__(self, "rank", self._compression.rank)

    def plan(self, named_parameters: Iterable[tuple[str, Tensor]]) -> Plan:
        """Decide which of a model's trainable parameters travel whole, and which as factors.

        Raises:
            ValueError: if a pattern of the rank matches no parameter.
        """
        return make_plan(named_parameters, self._compression)

    def summary(self, named_parameters: Iterable[tuple[str, Tensor]]) -> str:
        """Say in one line how much is compressed, and what that brings."""
        plan = self.plan(named_parameters)
        slots = list(plan.slots)
        sent = plan.sent_bytes(alternate=True) * self.iterations
        return (
            f"PowerGossip compresses {len(list(plan.compressed))} of {len(slots)} trainable parameters: over each link"
            f" go {sent / 1e6:,.3f} MB a step instead of {plan.dense_bytes / 1e6:,.2f} MB"
            f" ({plan.dense_bytes / max(sent, 1):,.1f}×)"
        )

    @property
    def _compression(self) -> PowerSGDConfig:
        # A round sends one of a matrix's two factors.
        return PowerSGDConfig(
            rank=self.rank, min_compression_ratio=self.min_compression_ratio, alternate=True, seed=self.seed
        )


class GossipExchange:
    """Moves the models of neighbouring ranks towards each other.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them, already on their device.
        topology: of the ranks.
        config: the settings.
        among: the parameters that take part; ``None`` is all trainable ones.
        process_group: the ranks; ``None`` is the default group.

    Attributes:
        slots: which parameter is compressed, and how, in the order in which they travel.
        parameters: those that take part, by name.
        device: of the parameters.
        step_count: steps so far.
        dense_bytes: bytes that a rank would have sent to its neighbours in the last step, had the model gone whole.
        sent_bytes: bytes that it did send.
        link_bytes: those of one of its links, each of which carries the same; 0 without neighbours.
        total_sent_bytes: ``sent_bytes``, added up over all steps.
        total_link_bytes: ``link_bytes``, likewise.
        exchanging: whether a step is under way.

    Raises:
        ValueError: if the topology has another number of ranks than the group, a pattern of the rank matches nothing,
            or the parameters lie on several devices or on none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        topology: Topology,
        config: PowerGossipConfig,
        among: Iterable[Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.topology, self.config, self.process_group = topology, config, process_group
        self.world_size = dist.get_world_size(process_group)
        if topology.world_size != self.world_size:
            raise ValueError(
                f"The topology {topology.name!r} has {topology.world_size} ranks, but {self.world_size} are running."
                f" Make it for {self.world_size}."
            )
        named = [(parameter_name(name), parameter) for name, parameter in named_parameters]
        by_name = dict(named)
        self._among = _fingerprint(by_name.values() if among is None else among)
        taking_part = {name for name, parameter in named if id(parameter) in self._among}
        self.slots = [slot for slot in config.plan(named).slots if slot.name in taking_part]
        self.parameters = {slot.name: by_name[slot.name] for slot in self.slots}
        self.device = common_device(self.parameters)
        rank = dist.get_rank(process_group)
        self._rounds = [_Links(self, rank, weights) for weights in topology.neighbors(rank)]
        self._under_way: _Links | None = None
        self.step_count = 0
        self.dense_bytes = self.sent_bytes = self.link_bytes = 0
        self.total_sent_bytes = self.total_link_bytes = 0
        self.exchanging = False

    def is_among(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the exchange was made among these parameters, in any order, and they lie in memory as they did."""
        return _fingerprint(parameters) == self._among

    def go_on_from(self, previous: GossipExchange) -> None:
        """Take over another exchange's counts, and the factors of the parameters that both have."""
        previous.finish()
        for count in ("step_count", "total_sent_bytes", "total_link_bytes"):
            setattr(self, count, getattr(self, count) + getattr(previous, count))
        for links, others in zip(self._rounds, previous._rounds, strict=True):
            links.go_on_from(others)
        previous.retire()

    @torch.no_grad()
    def step(self) -> None:
        """Gossip with the neighbours, after the optimizer's step. Every rank must call this.

        Raises:
            RuntimeError: if a neighbour has ended, or does not answer within the group's timeout.
        """
        self.exchanging = True
        links = self._rounds[self.step_count % len(self._rounds)]
        self.step_count += 1
        sent_before = self.total_sent_bytes
        for _ in range(self.config.iterations):
            self.finish()
            links.start()
            self._under_way = links
        if not self.config.overlap:
            self.finish()
        self.sent_bytes = self.total_sent_bytes - sent_before
        self.link_bytes = self.sent_bytes // max(links.degree, 1)
        self.total_link_bytes += self.link_bytes
        self.dense_bytes = links.degree * sum(slot.dense_bytes for slot in self.slots)
        self.exchanging = False

    @torch.no_grad()
    def finish(self) -> None:
        """Receive what is on its way, if anything is, and let it take effect."""
        links, self._under_way = self._under_way, None
        if links is not None:
            links.finish()

    def retire(self) -> None:
        """Let go of the memory of factors and mailboxes when a fit ends, however it does."""
        for links in self._rounds:
            links.abandon()
        self._rounds, self._under_way = [], None


class _Links:
    """The links that a rank uses at the same time, with the factors that both ends of each remember.

    What belongs to the d links is stacked in the order of the neighbours: factors are (d, r, k), and a mailbox has a
    row for each.
    """

    def __init__(self, exchange: GossipExchange, rank: int, weights: Mapping[int, float]) -> None:
        self._exchange = exchange
        self._peers = list(weights)
        self._side: Side = "left"
        self._works: list[dist.Work] = []
        self._mailboxes = [
            _Mailbox([slot for slot in exchange.slots if slot.dtype == dtype], dtype, exchange, rank, weights)
            for dtype in dict.fromkeys(slot.dtype for slot in exchange.slots if weights)
        ]

    def go_on_from(self, previous: _Links) -> None:
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

    def start(self) -> None:
        """Send this rank's products with the factors of this side, and the parameters that travel whole."""
        group = self._exchange.process_group or dist.group.WORLD
        assert group is not None
        operations = []
        for mailbox in self._mailboxes:
            mailbox.fill(self._side)
            for row, peer in enumerate(self._peers):
                end = dist.get_global_rank(group, peer)
                for send_or_receive, box in ((dist.isend, mailbox.outgoing), (dist.irecv, mailbox.incoming)):
                    if box[row].numel():
                        operations.append(dist.P2POp(send_or_receive, box[row], end, group))
            self._exchange.total_sent_bytes += mailbox.outgoing.nbytes
        with self._explained(), messages_between_ranks(group):
            # All at once, so that no order of the neighbours can leave ranks waiting for each other in a circle.
            self._works = dist.batch_isend_irecv(operations) if operations else []

    def finish(self) -> None:
        """Receive the neighbours' products, move the model, and keep the difference as the next factor."""
        with self._explained():
            while self._works:
                self._works[0].wait()
                self._works.pop(0)
        for mailbox in self._mailboxes:
            mailbox.move(self._side)
        self._side = other_side(self._side)

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
                f"Rank {dist.get_rank(self._exchange.process_group)} could not gossip with its neighbours ({peers})."
                " One of them has ended, or has not come within the `timeout`. Look for the first error in the logs of"
                f" all ranks. The reason given here: {error}"
            ) from error


class _Mailbox:
    """What travels over the links at the same time, of parameters of one dtype: [whole | factors of one side].

    Attributes:
        factors: by name and side, those that both ends remember, (d, r, n) or (d, r, m).
    """

    def __init__(
        self, slots: list[Slot], dtype: torch.dtype, exchange: GossipExchange, rank: int, weights: Mapping[int, float]
    ) -> None:
        self._parameters = exchange.parameters
        self._whole = [slot for slot in slots if not slot.rank]
        self._compressed = [slot for slot in slots if slot.rank]
        degree, config, device = len(weights), exchange.config, exchange.device
        self._weights = torch.tensor(list(weights.values()), dtype=dtype, device=device).view(degree, 1)
        # Both ends remember the difference with the sign that it has at the lower rank.
        signs = [1.0 if rank < peer else -1.0 for peer in weights]
        self._signs = torch.tensor(signs, dtype=dtype, device=device).view(degree, 1, 1)
        self.factors: dict[str, dict[Side, Tensor]] = {}
        self._traces: dict[str, dict[Side, Tensor]] = {}
        for slot in self._compressed:
            self.factors[slot.name], self._traces[slot.name] = {}, {}
            for side in SIDES:
                draws = [f"{config.seed}/{min(rank, peer)}-{max(rank, peer)}/{slot.name}/{side}" for peer in weights]
                factors = [random_factor(draw, slot.rank, slot.length(side)) for draw in draws]
                self.factors[slot.name][side] = torch.stack(factors).to(device, dtype)
                trace = random_factor(f"{config.seed}/{slot.name}/{side}", slot.rank, slot.length(side))
                self._traces[slot.name][side] = (_TRACE * trace).to(device)
        self._bases: dict[str, Tensor] = {}
        self._start = sum(slot.numel for slot in self._whole)
        self._lengths = {side: sum(slot.rank * slot.length(side) for slot in self._compressed) for side in SIDES}
        length = self._start + max(self._lengths.values())
        # gloo sends from main memory only.
        on_cpu = dist.get_backend(exchange.process_group) == "gloo"
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
        return as_matrix(self._parameters[slot.name].detach(), slot.order)


def _fingerprint(parameters: Iterable[Tensor]) -> dict[int, tuple[int, ...]]:
    return {id(parameter): parameter.stride() for parameter in parameters}
