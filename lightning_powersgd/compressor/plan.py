"""Who is compressed, at which rank, and what travels together.

A plan depends on the configuration and on the parameters' names, shapes, dtypes and order alone. It never depends on
DDP's buckets, which DDP rearranges after the first step and again after a resume, nor on the number of ranks. So the
bytes on the wire, their order and therefore every rounding are the same in a run that resumes as in one that went on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_powersgd.compressor.codec import Format, format_of
from lightning_powersgd.compressor.config import AUTO, CommDtype, PowerSGDConfig, Rank
from lightning_powersgd.compressor.parameters import parameter_name, whole_name
from lightning_powersgd.compressor.turnaround import DEFAULT_TURNAROUND, largest_rank, rank_for
from lightning_powersgd.compressor.view import matrix_order

# Compressed gradients are a hundredth of their size, so a group may be as large as a default DDP bucket: smaller ones
# send more, tinier messages, larger ones start later and overlap less with the backward pass.
DEFAULT_GROUP_BYTES = 25 * 2**20

# What is sent whole and is as large as this travels alone, from where it lies: another message costs less than memory
# for a copy of it.
ALONE_BYTES = 2**20
Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")

# What must be alike for parameters to travel together: their dtypes, and the formats of their factors.
_Kind: TypeAlias = tuple[torch.dtype, tuple[Format, Format]]


def other_side(side: Side) -> Side:
    """Give the other side of a factorisation."""
    return "left" if side == "right" else "right"


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the plan.

    Attributes:
        name: of the parameter, without the prefixes that `torch.compile` adds.
        shape: of the parameter.
        dtype: of its gradient.
        rank: columns kept of each factor; 0 means that the gradient is sent whole.
        order: the dimension order of its matrix view (see `matrix_order`); empty where it has none.
        formats: in which the factors of both sides travel, the left first.
        split: how many dimensions make the rows of the matrix view; the others make its columns.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int
    order: tuple[int, ...]
    formats: tuple[Format, Format]
    split: int = 1

    @property
    def kind(self) -> Slot:
        """What it has in common with parameters that cost the same: all but the name."""
        return replace(self, name="")

    @property
    def numel(self) -> int:
        """Elements of the gradient."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """The n of the matrix view."""
        return math.prod(self.shape[: self.split])

    @property
    def columns(self) -> int:
        """The m of the matrix view."""
        return self.numel // self.rows

    def length(self, side: Side) -> int:
        """Columns of the factor of a side, stored rank first: n for the left one, m for the right one."""
        return self.rows if side == "left" else self.columns

    def format(self, side: Side) -> Format:
        """In which the factor of a side travels."""
        return self.formats[SIDES.index(side)]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the gradient."""
        return self.numel * self.dtype.itemsize

    @property
    def travels_alone(self) -> bool:
        """Whether the gradient travels in a collective of its own."""
        return not self.rank and self.dense_bytes >= ALONE_BYTES

    def factor_bytes(self, side: Side) -> int:
        """Bytes of the factor of a side on the wire; none of what is sent whole."""
        return math.ceil(self.rank * self.length(side) * self.format(side).bits / 8) if self.rank else 0

    def sent_bytes(self, *, alternate: bool) -> float:
        """Bytes handed to collectives in a compressed step; the mean of the two kinds of step when alternating."""
        if not self.rank:
            return self.dense_bytes
        factors = sum(self.factor_bytes(side) for side in SIDES)
        return factors / 2 if alternate else factors


def by_dtype(slots: Iterable[Slot]) -> list[list[Slot]]:
    """Part slots by the dtypes of their parameters; each dtype in the order in which it comes first."""
    slots = list(slots)
    return [[slot for slot in slots if slot.dtype == dtype] for dtype in dict.fromkeys(slot.dtype for slot in slots)]


@dataclass(frozen=True)
class Group:
    """Parameters whose payload travels in the same collective, but for what is sent whole and is large.

    Attributes:
        whole: slots that are sent whole.
        compressed: slots of which factors are sent.
        formats: in which the factors of both sides travel, the left first; what is sent whole has its own dtype.
    """

    whole: tuple[Slot, ...]
    compressed: tuple[Slot, ...]
    formats: tuple[Format, Format]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of the group's slots."""
        return self.whole + self.compressed

    @property
    def dtype(self) -> torch.dtype:
        """In which the payload is packed."""
        return self.formats[0].dtype

    def length(self, side: Side) -> int:
        """Elements of the factors of a side."""
        return sum(slot.rank * slot.length(side) for slot in self.compressed)

    def stacks(self, side: Side) -> list[tuple[Slot, ...]]:
        """Part the compressed slots by the shapes of their factors of a side, which lie on the wire in that order."""
        by_shape: dict[tuple[int, int], list[Slot]] = {}
        for slot in self.compressed:
            by_shape.setdefault((slot.rank, slot.length(side)), []).append(slot)
        return [tuple(slots) for slots in by_shape.values()]

    def block_shapes(self, side: Side) -> list[tuple[int, int, int]]:
        """Give the shapes (b, r, k) of the factors of a side, stacked as in `stacks`."""
        return [(len(slots), slots[0].rank, slots[0].length(side)) for slots in self.stacks(side)]


@dataclass(frozen=True)
class Plan:
    """Groups in the order of their collectives; the parameters whose gradients come first lead."""

    groups: tuple[Group, ...]

    @property
    def slots(self) -> Iterator[Slot]:
        """The slot of every trainable parameter, in the order of the groups."""
        return (slot for group in self.groups for slot in group.slots)

    @property
    def compressed(self) -> Iterator[Slot]:
        """The slots of which factors are sent."""
        return (slot for group in self.groups for slot in group.compressed)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all gradients: what plain all-reduce would send a step."""
        return sum(slot.dense_bytes for slot in self.slots)

    def sent_bytes(self, *, alternate: bool) -> float:
        """Bytes handed to collectives in a compressed step; the mean of the two kinds of step when alternating."""
        return sum(slot.sent_bytes(alternate=alternate) for slot in self.slots)

    def payloads(self, *, alternate: bool) -> list[float]:
        """Bytes of each collective of a compressed step, in their order; means when alternating.

        The right factors of a group travel with what comes first of the next, or alone if that has another dtype, or
        if there is no next (see `exchange.core`). What is sent whole and is large follows alone. Together they are
        `sent_bytes`.
        """
        payloads: list[float] = []
        waiting, formats = 0, None
        for group in self.groups:
            if group.formats != formats:
                payloads.append(waiting)
                waiting = 0
            right = 0 if alternate else sum(slot.factor_bytes("right") for slot in group.compressed)
            first = sum(slot.sent_bytes(alternate=alternate) for slot in group.slots if not slot.travels_alone) - right
            payloads.append(first + waiting)
            payloads += [slot.dense_bytes for slot in group.whole if slot.travels_alone]
            waiting, formats = right, group.formats
        payloads.append(waiting)
        return [payload for payload in payloads if payload]

    def turnaround(self, *, alternate: bool) -> float:
        """Steps until each direction of a gradient was sent about once, in the matrix where that takes longest.

        0 where nothing is compressed.
        """
        turns = max((min(slot.rows, slot.columns) / slot.rank for slot in self.compressed), default=0.0)
        return 2 * turns if alternate else turns

    def summary(self, *, alternate: bool) -> str:
        """Say in one line how much is compressed, and what that brings."""
        total, compressed = len(list(self.slots)), len(list(self.compressed))
        dense, sent = self.dense_bytes, self.sent_bytes(alternate=alternate)
        if not compressed:
            return f"PowerSGD compresses none of the {total} trainable parameters"
        return (
            f"PowerSGD compresses {compressed} of {total} trainable parameters: {dense / 1e6:,.2f} MB of gradients a"
            f" step become {sent / 1e6:,.3f} MB ({dense / sent:,.1f}×)"
        )


def make_plan(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: PowerSGDConfig,
    group_bytes: int = DEFAULT_GROUP_BYTES,
    arrival: Iterable[str] | None = None,
    among: Container[str] | None = None,
    whole: Container[str] = (),
) -> Plan:
    """Decide for every trainable parameter whether and how it is compressed, and what travels together.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them. Frozen ones take no part.
        config: the settings.
        group_bytes: gradient bytes after which a group is closed.
        arrival: names in the order in which a step makes their gradients, which is that of the groups; ``None``: the
            last registered first.
        among: names of those that the plan is for; ``None``: all. Automatic ranks are decided on as for all.
        whole: names of those that are sent whole, whatever their rank.

    Returns:
        The plan; equal input gives an equal plan on every rank.

    Raises:
        ValueError: if a pattern of ``config.rank`` matches no parameter, frozen ones included, ``arrival`` lacks a
            trainable one, or rank 1 needs more than ``config.max_bytes``.
    """
    named = [(parameter_name(name), parameter) for name, parameter in named_parameters]
    _require_matching_patterns(config.rank, [name for name, _ in named])

    open_groups: dict[_Kind, list[Slot]] = {}
    closed: list[Group] = []

    def close(key: _Kind) -> None:
        slots = open_groups.pop(key)
        whole = tuple(slot for slot in slots if not slot.rank)
        closed.append(Group(whole, tuple(slot for slot in slots if slot.rank), formats=key[1]))

    trainable = {name: parameter for name, parameter in reversed(named) if parameter.requires_grad}
    automatic_rank = _automatic_rank(trainable, config)
    for name in trainable if arrival is None else _complete(arrival, trainable):
        if among is not None and name not in among:
            continue
        slot = _make_slot(name, trainable[name], config, automatic_rank)
        if name in whole:
            slot = _sent_whole(slot)
        key = (slot.dtype, slot.formats)
        members = open_groups.setdefault(key, [])
        members.append(slot)
        if sum(member.dense_bytes for member in members) >= group_bytes:
            close(key)
    for key in list(open_groups):
        close(key)
    return Plan(tuple(closed))


def _complete(arrival: Iterable[str], trainable: Mapping[str, Tensor]) -> list[str]:
    """Give the trainable parameters' names in the order of arrival."""
    names = dict.fromkeys(name for name in map(parameter_name, arrival) if name in trainable)
    for name in trainable:
        if name not in names:
            raise ValueError(
                f"`arrival` has not the trainable parameter {name!r}. Give the names of all, in the order in which"
                " their gradients come."
            )
    return list(names)


def _automatic_rank(trainable: Mapping[str, Tensor], config: PowerSGDConfig) -> int:
    """Give the rank of all parameters that are to have an automatic one."""
    names = [name for name in trainable if _rank_of(name, config.rank) == AUTO]
    # Of each parameter in the view that it is compressed in.
    views = [slot for name in names for slot in _matrices(name, trainable[name], config, rank=1)[:1]]
    directions = max((min(slot.rows, slot.columns) for slot in views), default=1)
    if config.max_bytes is None:
        return rank_for(config.turnaround or DEFAULT_TURNAROUND, directions, alternate=config.alternate)

    def sent_bytes(rank: int) -> float:
        slots = (_make_slot(name, parameter, config, rank) for name, parameter in trainable.items())
        return sum(slot.sent_bytes(alternate=config.alternate) for slot in slots)

    return largest_rank(sent_bytes, config.max_bytes, directions)


def _make_slot(name: str, parameter: Tensor, config: PowerSGDConfig, automatic_rank: int) -> Slot:
    shape, dtype, given = tuple(parameter.shape), parameter.dtype, _rank_of(name, config.rank)
    rank = automatic_rank if given == AUTO else given
    slots = _matrices(name, parameter, config, rank)
    for slot in slots:
        worth_it = slot.dense_bytes >= config.min_compression_ratio * slot.sent_bytes(alternate=config.alternate)
        if 0 < rank < min(slot.rows, slot.columns) and worth_it:
            return slot
    return _sent_whole(slots[0] if slots else Slot(name, shape, dtype, rank, (), _formats(dtype, None)))


def _sent_whole(slot: Slot) -> Slot:
    return replace(slot, rank=0, formats=_formats(slot.dtype, None))


def _matrices(name: str, parameter: Tensor, config: PowerSGDConfig, rank: int) -> list[Slot]:
    """Give a slot for every view of a parameter as a matrix; the one that sends least leads."""
    shape, dtype = tuple(parameter.shape), parameter.dtype
    views = _matrix_views(parameter) if dtype.is_floating_point else []
    formats = _formats(dtype, config.comm_dtype)
    slots = [Slot(name, shape, dtype, rank, order, formats, split) for order, split in views]
    # Several are possible of experts' weights, say, that are stacked in one tensor.
    return sorted(slots, key=lambda slot: slot.rows + slot.columns)


def _formats(dtype: torch.dtype, comm_dtype: CommDtype) -> tuple[Format, Format]:
    """Give the formats of P and Q, of a gradient's dtype."""
    if isinstance(comm_dtype, Mapping):
        return format_of(comm_dtype["P"]), format_of(comm_dtype["Q"])
    one = format_of(dtype if comm_dtype is None else comm_dtype)
    return one, one


def _matrix_views(parameter: Tensor) -> list[tuple[tuple[int, ...], int]]:
    """Give the orders and the splits of the dimensions with which a tensor can be seen as a matrix."""
    orders = {split: matrix_order(parameter, split) for split in range(1, parameter.dim())}
    return [(order, split) for split, order in orders.items() if order is not None]


def _rank_of(name: str, rank: Rank | Mapping[str, Rank]) -> Rank:
    if not isinstance(rank, Mapping):
        return rank
    return next((value for pattern, value in rank.items() if fnmatchcase(whole_name(name), pattern)), 0)


def _require_matching_patterns(rank: Rank | Mapping[str, Rank], names: list[str]) -> None:
    for pattern in rank if isinstance(rank, Mapping) else ():
        if pattern != "*" and not any(fnmatchcase(whole_name(name), pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"`rank` has the pattern {pattern!r}, which matches no parameter. Names look like {', '.join(close)}."
                " Correct the pattern or remove it."
            )
