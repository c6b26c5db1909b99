"""The settings of the compressor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class PowerSGDConfig:
    """The settings of the compressor, checked on construction.

    Args:
        rank: columns kept of each factor. Higher: better approximation, but more bytes and more arithmetic, both in
            proportion. A mapping gives parameter-name patterns (``fnmatch``) a rank of their own: the first match
            wins, 0 sends a parameter whole, ``"*"`` stands for the rest; a parameter that no pattern matches is sent
            whole.
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
        comm_dtype: dtype of the factors on the wire, such as "bfloat16" to halve their bytes. None is the gradient's,
            which parameters that are sent whole always keep.
        seed: of the first random factors, which depend on it and on the parameters' names alone.

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
