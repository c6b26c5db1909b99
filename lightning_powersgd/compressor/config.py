"""The settings of the compressor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import torch

AUTO: Literal["auto"] = "auto"
Rank: TypeAlias = int | Literal["auto"]
CommDtype: TypeAlias = torch.dtype | str | Mapping[str, str] | None
ALWAYS: Literal["always"] = "always"
Compress: TypeAlias = Literal["always", "auto"]
_INTEGERS = ("int8", "int4")


@dataclass(frozen=True)
class PowerSGDConfig:
    """The settings of the compressor, checked on construction.

    Args:
        rank: columns kept of each factor. Higher: better approximation, but more bytes and more arithmetic, both in
            proportion. ``"auto"`` keeps as many as the length of the training asks for (see ``turnaround``). A mapping
            gives parameter-name patterns (``fnmatch``) a rank of their own: the first match wins, 0 sends a parameter
            whole, ``"*"`` stands for the rest; a parameter that no pattern matches is sent whole.
        turnaround: for ``rank="auto"``: steps within which each direction of a gradient has its turn. The rank is
            ⌈min(n, m) / turnaround⌉ for the matrix where min(n, m) is largest, and twice that when alternating.
            Smaller: more accurate, for more bytes. None is what the length of the training and its optimizers ask for
            (see `turnaround_for`), and 25 where these are not known.
        max_bytes: for ``rank="auto"``, instead of ``turnaround``: bytes that a rank may hand to collectives in a step.
            The highest rank is taken that fits.
        start_step: synchronised backward passes that are averaged exactly before compression starts. Raise it if the
            loss jumps at the beginning of training, when gradients change direction fastest.
        min_compression_ratio: a matrix whose dense / sent ratio is below this is sent whole. Higher: fewer matrices are
            compressed, and less arithmetic is spent on those that save little. At least 1.
        alternate: send only one of the two factors on successive steps, in turn: one all-reduce a step and half the
            bytes, at a slower-moving approximation.
        error_feedback: add what one step did not send to the next step's gradient. Costs one buffer of the size of the
            compressed gradients; without it, low ranks reach a worse loss.
        warm_start: start from the factor of the last step instead of a random one.
        error_dtype: dtype of the error buffers, such as "bfloat16" to halve their memory. None is the gradient's.
        comm_dtype: dtype of the factors on the wire: "bfloat16" halves their bytes, "int8" and "int4" make them a
            quarter and an eighth. What is rounded off stays in the error buffer. ``{"P": "int8", "Q": "int4"}`` gives
            each factor its own. None is the gradient's, which parameters that are sent whole always keep.
        seed: of the first random factors, which depend on it and on the parameters' names alone.
        compress: "always", or "auto" to compress only where that makes a step faster. The ranks then measure the
            network and the arithmetic for a second when training starts, and send a matrix whole where that clearly
            takes less time. In training they time a few compressed and a few exact steps, at the beginning and every
            3,000 steps, and go on with the faster ones. Decisions depend on times: runs with equal seeds may differ.
            None is "auto" beside ``rank="auto"``, unless deterministic algorithms are asked for, and else "always".

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range.
    """

    rank: Rank | Mapping[str, Rank] = AUTO
    turnaround: float | None = None
    max_bytes: int | None = None
    start_step: int = 0
    min_compression_ratio: float = 2.0
    alternate: bool = False
    error_feedback: bool = True
    warm_start: bool = True
    error_dtype: torch.dtype | None = None
    comm_dtype: CommDtype = None
    seed: int = 0
    compress: Compress | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rank, Mapping):
            if not self.rank:
                raise ValueError("`rank={}` has no pattern. Give at least one, such as `rank={'*': 2}`.")
            for pattern, rank in self.rank.items():
                if not isinstance(pattern, str):
                    raise TypeError(f"`rank` has the pattern {pattern!r}. A pattern is a string, such as 'encoder.*'.")
                _require_rank(f"rank[{pattern!r}]", rank, minimum=0, remedy="Use 0 to send a parameter whole.")
            ranks = {str(pattern): AUTO if rank == AUTO else int(rank) for pattern, rank in self.rank.items()}
            object.__setattr__(self, "rank", ranks)
        else:
            remedy = "Use a mapping such as `rank={'embed*': 0, '*': 2}` to send some parameters whole."
            _require_rank("rank", self.rank, minimum=1, remedy=remedy)
        self._check_what_moves_automatic_ranks()
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
        object.__setattr__(self, "error_dtype", floating_dtype("error_dtype", self.error_dtype))
        object.__setattr__(self, "comm_dtype", _comm_dtype(self.comm_dtype))
        if self.compress not in (ALWAYS, AUTO, None):
            raise ValueError(f"`compress={self.compress!r}` is neither 'always' nor 'auto'. Use one of them.")

    @property
    def automatic(self) -> bool:
        """Whether the rank of any parameter follows from the turnaround."""
        return AUTO in (self.rank.values() if isinstance(self.rank, Mapping) else (self.rank,))

    @property
    def compresses_where_faster(self) -> bool:
        """Whether times decide on what is compressed."""
        if self.compress is None:
            return self.automatic and not torch.are_deterministic_algorithms_enabled()
        return self.compress == AUTO

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as strings, numbers, bools and dicts of them: loadable with ``weights_only=True``."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, torch.dtype) else value for name, value in settings.items()}

    def _check_what_moves_automatic_ranks(self) -> None:
        for name, other in (("turnaround", "max_bytes"), ("max_bytes", "turnaround")):
            value = getattr(self, name)
            if value is None:
                continue
            if not self.automatic:
                raise ValueError(f"`{name}={value!r}` has no effect beside `rank={self.rank!r}`. Use `rank='auto'`.")
            if getattr(self, other) is not None:
                raise ValueError("`turnaround` and `max_bytes` each decide on the ranks. Give one of them.")
        if self.max_bytes is not None:
            require_int("max_bytes", self.max_bytes, minimum=1, remedy="Give bytes a step, such as 1_000_000.")
        turnaround = self.turnaround
        if turnaround is None:
            return
        if isinstance(turnaround, bool) or not isinstance(turnaround, int | float):
            raise TypeError(f"`turnaround={turnaround!r}` is not a number. Give steps, such as 25.")
        if not 0 < turnaround < math.inf:
            raise ValueError(f"`turnaround={turnaround!r}` is not a number of steps. Use one such as 25.")
        object.__setattr__(self, "turnaround", float(turnaround))


def _require_rank(name: str, value: object, *, minimum: int, remedy: str) -> None:
    if value == AUTO:
        return
    if isinstance(value, str):
        raise TypeError(f"`{name}={value!r}` is neither an integer nor 'auto'. {remedy}")
    require_int(name, value, minimum=minimum, remedy=remedy)


def _comm_dtype(value: object) -> CommDtype:
    if isinstance(value, Mapping):
        if set(value) != {"P", "Q"} or not all(dtype in _INTEGERS for dtype in value.values()):
            raise ValueError(
                f"`comm_dtype={value!r}` is not a pair of integer dtypes. Use one such as"
                " `comm_dtype={'P': 'int8', 'Q': 'int4'}`."
            )
        return {factor: str(value[factor]) for factor in ("P", "Q")}
    name = str(value).removeprefix("torch.")
    return name if name in _INTEGERS else floating_dtype("comm_dtype", value, also=" Or 'int8' or 'int4'.")


def floating_dtype(name: str, value: object, also: str = "") -> torch.dtype | None:
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
            f" gradient's.{also}"
        )
    return dtype


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
