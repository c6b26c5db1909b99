"""What was asked for, and what it comes to for a model: who is compressed, at which rank, and what travels together.

A plan depends on the configuration and on the parameters' names, shapes, dtypes and order alone. It never depends on
DDP's buckets, which DDP rearranges after the first step and again after a resume, nor on the number of ranks. So the
bytes on the wire, their order and therefore every rounding are the same in a run that resumes as in one that went on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_powersgd.linalg import matrix_order

# Compressed gradients are a hundredth of their size, so a group may be as large as a default DDP bucket: smaller ones
# send more, tinier messages, larger ones start later and overlap less with the backward pass.
DEFAULT_GROUP_BYTES = 25 * 2**20

# What is sent whole and is as large as this travels alone, from where it lies: another message costs less than memory
# for a copy of it.
ALONE_BYTES = 2**20

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True)
class PowerSGDConfig:
    """The settings of the compressor, checked on construction.

    Args:
        rank: columns kept of each factor. Higher rank: better approximation, more bytes and more arithmetic, both in
            proportion. A mapping gives parameter-name patterns (`fnmatch`) a rank of their own: the first match wins, 0
            sends a parameter whole, ``"*"`` stands for the rest; a parameter that no pattern matches is sent whole.
        start_step: synchronised backward passes that are averaged exactly before compression starts. Raise it where the
            loss jumps at the beginning, when gradients change direction fastest.
        min_compression_ratio: a matrix whose dense / sent ratio is below this is sent whole. Raise it to spend no
            arithmetic on matrices that save little.
        alternate: send only one of the two factors on each step, in turn: half the bytes and one collective, at a
            slower-moving approximation.
        error_feedback: add what one step did not send to the next step's gradient. Without it low ranks do not converge
            to the same loss; it costs one buffer of the size of the compressed gradients.
        warm_start: start from the last step's factor. Without it a random one is drawn for each step.
        error_dtype: dtype of the error buffers; ``None`` is the gradient's. ``torch.bfloat16`` halves their memory.
        comm_dtype: dtype of the factors on the wire; ``None`` is the gradient's. Parameters that are sent whole keep
            theirs.
        seed: of the first random factors, which depend on it and on the parameter's name alone.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range.
    """

    rank: int | Mapping[str, int] = 2
    start_step: int = 0
    min_compression_ratio: float = 2.0
    alternate: bool = False
    error_feedback: bool = True
    warm_start: bool = True
    error_dtype: torch.dtype | None = None
    comm_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, Mapping):
            if not self.rank:
                raise ValueError("`rank={}` has no pattern. Give at least one, such as `rank={'*': 2}`.")
            for pattern, rank in self.rank.items():
                if not isinstance(pattern, str):
                    raise TypeError(f"`rank` has the pattern {pattern!r}. A pattern is a string, such as 'encoder.*'.")
                require_int(f"rank[{pattern!r}]", rank, minimum=0, remedy="Use 0 to send a parameter whole.")
            object.__setattr__(self, "rank", {str(pattern): int(rank) for pattern, rank in self.rank.items()})
        else:
            remedy = "Use a mapping such as `rank={'embed*': 0, '*': 2}` to send some parameters whole."
            require_int("rank", self.rank, minimum=1, remedy=remedy)
        require_int("start_step", self.start_step, minimum=0, remedy="Use 0 to compress from the first step on.")
        require_int("seed", self.seed, minimum=0, remedy="Use any non-negative integer.")
        ratio = self.min_compression_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float):
            raise TypeError(f"`min_compression_ratio={ratio!r}` is not a number. Use a ratio such as 2.0.")
        if not ratio >= 1:
            raise ValueError(
                f"`min_compression_ratio={ratio!r}` is below 1. A matrix that grows when it is compressed is always"
                " sent whole; use 1.0 to compress everything that shrinks."
            )
        # A number of numpy's is a float, too, but `weights_only=True` would not load it from a checkpoint.
        object.__setattr__(self, "min_compression_ratio", float(ratio))
        for name in ("alternate", "error_feedback", "warm_start"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}={getattr(self, name)!r}` is not a bool. Use True or False.")
        for name in ("error_dtype", "comm_dtype"):
            object.__setattr__(self, name, floating_dtype(name, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as strings, numbers, bools and dicts of them: loadable with ``weights_only=True``."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in settings.items()}


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the plan.

    Attributes:
        name: of the parameter, without the prefixes that `torch.compile` adds.
        shape: of the parameter.
        dtype: of its gradient.
        rank: columns kept of each factor; 0 means that the gradient is sent whole.
        order: the dimension order of its matrix view (see `matrix_order`); empty where it has none.
        wire_dtype: of what is sent: the factors, or the whole gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int
    order: tuple[int, ...]
    wire_dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of the gradient."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """The n of the matrix view."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """The m of the matrix view."""
        return self.numel // self.rows

    def length(self, side: Side) -> int:
        """Columns of the factor of a side, stored rank first: n for the left one, m for the right one."""
        return self.rows if side == "left" else self.columns

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
        return self.rank * self.length(side) * self.wire_dtype.itemsize if self.rank else 0

    def sent_bytes(self, *, alternate: bool) -> float:
        """Bytes handed to collectives in a compressed step; the mean of the two kinds of step when alternating."""
        if not self.rank:
            return self.dense_bytes
        factors = sum(self.factor_bytes(side) for side in SIDES)
        return factors / 2 if alternate else factors


@dataclass(frozen=True)
class Group:
    """Parameters whose payload travels in the same collective, but for what is sent whole and is large.

    Attributes:
        whole: slots that are sent whole.
        compressed: slots of which factors are sent.
        dtype: of the payload on the wire.
    """

    whole: tuple[Slot, ...]
    compressed: tuple[Slot, ...]
    dtype: torch.dtype

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All of the group's slots."""
        return self.whole + self.compressed


@dataclass(frozen=True)
class Plan:
    """Groups in the order of their collectives; the last registered parameters, whose gradients come first, lead."""

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
        if there is no next (see `hook`). What is sent whole and is large follows alone. Together they are
        `sent_bytes`.
        """
        payloads: list[float] = []
        waiting, dtype = 0, None
        for group in self.groups:
            if group.dtype != dtype:
                payloads.append(waiting)
                waiting = 0
            right = 0 if alternate else sum(slot.factor_bytes("right") for slot in group.compressed)
            first = sum(slot.sent_bytes(alternate=alternate) for slot in group.slots if not slot.travels_alone) - right
            payloads.append(first + waiting)
            payloads += [slot.dense_bytes for slot in group.whole if slot.travels_alone]
            waiting, dtype = right, group.dtype
        payloads.append(waiting)
        return [payload for payload in payloads if payload]

    def turnaround(self, *, alternate: bool) -> float:
        """Steps until each direction of a gradient was sent about once, in the matrix where that takes longest.

        A step sends r of its min(n, m) directions, those in which most has gathered, and half as many when alternating.
        What a step leaves out is about that many steps late. 0 where nothing is compressed.
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
    named_parameters: Iterable[tuple[str, Tensor]], config: PowerSGDConfig, group_bytes: int = DEFAULT_GROUP_BYTES
) -> Plan:
    """Decide for every trainable parameter whether and how it is compressed, and what travels together.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them. Frozen ones take no part.
        config: the settings.
        group_bytes: gradient bytes after which a group is closed.

    Returns:
        The plan; equal input gives an equal plan on every rank.

    Raises:
        ValueError: if a pattern of ``config.rank`` matches no parameter, frozen ones included.
    """
    named = [(parameter_name(name), parameter) for name, parameter in named_parameters]
    _require_matching_patterns(config.rank, [name for name, _ in named])

    open_groups: dict[tuple[torch.dtype, torch.dtype], list[Slot]] = {}
    closed: list[Group] = []

    def close(key: tuple[torch.dtype, torch.dtype]) -> None:
        slots = open_groups.pop(key)
        whole = tuple(slot for slot in slots if not slot.rank)
        closed.append(Group(whole, tuple(slot for slot in slots if slot.rank), dtype=key[1]))

    for name, parameter in reversed(named):
        if not parameter.requires_grad:
            continue
        slot = _make_slot(name, parameter, config)
        key = (slot.dtype, slot.wire_dtype)
        members = open_groups.setdefault(key, [])
        members.append(slot)
        if sum(member.dense_bytes for member in members) >= group_bytes:
            close(key)
    for key in list(open_groups):
        close(key)
    return Plan(tuple(closed))


def parameter_name(name: str) -> str:
    """Strip the prefixes that `torch.compile` adds, so that state fits a module compiled or not."""
    return name.replace("_orig_mod.", "")


def floating_dtype(name: str, value: object) -> torch.dtype | None:
    """Check a dtype, or find it by its name, with or without ``torch.``.

    Raises:
        ValueError: naming the argument, if gradients cannot have that dtype.
    """
    if value is None:
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"`{name}={value!r}` is not a floating-point dtype that gradients can have."
            " Use torch.float16, torch.bfloat16, torch.float32 or torch.float64 (or its name), or None for the"
            " gradient's."
        )
    return dtype


def _make_slot(name: str, parameter: Tensor, config: PowerSGDConfig) -> Slot:
    shape, dtype = tuple(parameter.shape), parameter.dtype
    order = matrix_order(parameter) if dtype.is_floating_point else None
    rank = _rank_of(name, config.rank)
    whole = Slot(name, shape, dtype, rank=0, order=order or (), wire_dtype=dtype)
    if order is None or not 0 < rank < min(whole.rows, whole.columns):
        return whole
    slot = Slot(name, shape, dtype, rank, order, wire_dtype=config.comm_dtype or dtype)
    worth_it = slot.dense_bytes >= config.min_compression_ratio * slot.sent_bytes(alternate=config.alternate)
    return slot if worth_it else whole


def _rank_of(name: str, rank: int | Mapping[str, int]) -> int:
    if isinstance(rank, int):
        return rank
    return next((value for pattern, value in rank.items() if fnmatchcase(name, pattern)), 0)


def _require_matching_patterns(rank: int | Mapping[str, int], names: list[str]) -> None:
    for pattern in rank if isinstance(rank, Mapping) else ():
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"`rank` has the pattern {pattern!r}, which matches no parameter. Names look like {', '.join(close)}."
                " Correct the pattern or remove it."
            )


def require_int(name: str, value: object, *, minimum: int, remedy: str) -> None:
    """Check an integer.

    Raises:
        TypeError: if it is none, naming the argument.
        ValueError: if it is too small, naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}={value!r}` is not an integer. {remedy}")
    if value < minimum:
        raise ValueError(f"`{name}={value}` is below {minimum}. {remedy}")
