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

In the topology "all" there are no links: all ranks average in the same directions (see `averaging`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.config import PowerSGDConfig, require_int
from lightning_powersgd.compressor.parameters import common_device, parameter_name
from lightning_powersgd.compressor.plan import Plan, make_plan
from lightning_powersgd.compressor.precision import full_precision
from lightning_powersgd.exchange.averaging import Averaging
from lightning_powersgd.exchange.links import Links
from lightning_powersgd.exchange.topology import ALL, Topology

# Of `comm_dtype`.
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class PowerGossipConfig:
    """The settings of gossip, checked on construction.

    Args:
        rank: columns kept of each factor. Higher: ranks agree more closely, for more bytes and arithmetic, both in
            proportion. A mapping gives parameter-name patterns (``fnmatch``) a rank of their own: the first match wins,
            0 sends a parameter whole, ``"*"`` stands for the rest; a parameter that no pattern matches is sent whole.
        iterations: rounds of gossip a step. Higher: as with ``rank``; each finds what the one before has left, and
            waits for it. Raise it if ``powergossip/consensus_distance`` keeps growing.
        min_compression_ratio: a matrix whose dense / sent ratio of a round is below this is sent whole. At least 1.
        overlap: let the last round of a step travel while the next step computes; it takes effect one step later.
            Hides the network's time, at a disagreement that is one step older.
        comm_dtype: "int8" or "int4": factors travel in so many bits, a quarter or an eighth of their bytes. In the
            topology "all" only. None is the parameter's dtype.
        seed: of the random factors.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range.
    """

    rank: int | Mapping[str, int] = 1
    iterations: int = 1
    min_compression_ratio: float = 2.0
    overlap: bool = False
    comm_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranks: Iterable[object] = self.rank.values() if isinstance(self.rank, Mapping) else (self.rank,)
        for rank in ranks:
            if isinstance(rank, str):
                # Nor "auto": how long a training is says nothing of gossip.
                raise TypeError(f"`rank={rank!r}` is not an integer. Use a number such as 1, or a mapping to numbers.")
        require_int("iterations", self.iterations, minimum=1, remedy="Use 1 for one round of gossip a step.")
        if not isinstance(self.overlap, bool):
            raise TypeError(f"`overlap={self.overlap!r}` is not a bool. Use True or False.")
        if self.comm_dtype not in (None, *_BITS):
            raise ValueError(f"`comm_dtype={self.comm_dtype!r}` is none of 'int8', 'int4' and None.")
        object.__setattr__(self, "rank", self._compression(all_ranks=False).rank)

    @property
    def bits(self) -> int | None:
        """Of a factor's entries on the wire; ``None``: those of its dtype."""
        return None if self.comm_dtype is None else _BITS[self.comm_dtype]

    def require_possible(self, topology: object) -> None:
        """Check that the settings suit a topology, a graph or a name.

        Raises:
            ValueError: if they do not, naming the setting.
        """
        if topology != ALL and self.comm_dtype is not None:
            raise ValueError(
                f"`comm_dtype={self.comm_dtype!r}` is for `topology='all'` only: the ends of a link send their models'"
                " factors as they are. Leave `comm_dtype` out."
            )
        if topology == ALL and self.overlap:
            raise ValueError("`overlap=True` is not possible with `topology='all'`. Leave `overlap` out.")

    def plan(self, named_parameters: Iterable[tuple[str, Tensor]], *, all_ranks: bool = False) -> Plan:
        """Decide which of a model's trainable parameters travel whole, and which as factors.

        Args:
            named_parameters: of the model.
            all_ranks: whether the topology is "all", where a round sends both factors of a matrix, not one.

        Raises:
            ValueError: if a pattern of the rank matches no parameter.
        """
        return make_plan(named_parameters, self._compression(all_ranks))

    def summary(self, named_parameters: Iterable[tuple[str, Tensor]], *, all_ranks: bool = False) -> str:
        """Say in one line how much is compressed, and what that brings. The arguments are those of `plan`."""
        plan = self.plan(named_parameters, all_ranks=all_ranks)
        slots = list(plan.slots)
        sent = plan.sent_bytes(alternate=not all_ranks) * self.iterations
        where = "a rank sends" if all_ranks else "over each link go"
        return (
            f"PowerGossip compresses {len(list(plan.compressed))} of {len(slots)} trainable parameters: {where}"
            f" {sent / 1e6:,.3f} MB a step instead of {plan.dense_bytes / 1e6:,.2f} MB"
            f" ({plan.dense_bytes / max(sent, 1):,.1f}×)"
        )

    def _compression(self, all_ranks: bool) -> PowerSGDConfig:
        return PowerSGDConfig(
            rank=self.rank,
            min_compression_ratio=self.min_compression_ratio,
            alternate=not all_ranks,
            comm_dtype=self.comm_dtype,
            seed=self.seed,
        )


class GossipExchange:
    """Moves the models of neighbouring ranks towards each other.

    With overlap, end with `finish` or `retire`: messages that come when their memory is gone break the process group.

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
        config.require_possible(topology.name)
        plan = config.plan(named, all_ranks=topology.name == ALL)
        self.slots = [slot for slot in plan.slots if slot.name in taking_part]
        self.parameters = {slot.name: by_name[slot.name] for slot in self.slots}
        self.device = common_device(self.parameters)
        self._rounds: Sequence[Any]
        if topology.name == ALL:
            self._rounds = [Averaging(self.slots, self.parameters, config.bits, config.seed, process_group)]
        else:
            neighbors = topology.neighbors(dist.get_rank(process_group))
            self._rounds = [
                Links(self.slots, self.parameters, weights, config.seed, process_group) for weights in neighbors
            ]
        self._under_way: Links | Averaging | None = None
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
            with full_precision(self.device):
                self.total_sent_bytes += links.start()
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
            with full_precision(self.device):
                self.total_sent_bytes += links.finish()

    def state_dict(self) -> dict[str, Any]:
        """Give what a rank needs beside its own model to go on with the same bits, in the topology "all"."""
        return {"rounds": [averaging.state_dict() for averaging in self._rounds]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run was, in the topology "all".

        Raises:
            ValueError: if the state is not one that `state_dict` gave.
        """
        try:
            for averaging, saved in zip(self._rounds, state["rounds"], strict=False):
                averaging.load_state_dict(saved)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"The checkpoint's entry 'powergossip' is damaged ({error!r}). Resume from another one, or delete"
                " the entry to begin with new references."
            ) from error

    def retire(self) -> None:
        """Let go of the memory of factors and mailboxes when a fit ends, however it does.

        What `state_dict` gives stays, since a checkpoint may be saved after the fit.
        """
        for links in self._rounds:
            links.abandon()
        self._rounds = [each for each in self._rounds if isinstance(each, Averaging)]
        self._under_way = None


def _fingerprint(parameters: Iterable[Tensor]) -> dict[int, tuple[int, ...]]:
    return {id(parameter): parameter.stride() for parameter in parameters}
