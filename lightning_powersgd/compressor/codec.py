"""How factors travel in few bits: rows are brought into the range of the wire, by a scale that every rank knows.

A factor is multiplied by *gains* on its way, which follow from the *magnitudes* of its rows in the step before: the
averaged factor is the same on all ranks, so no message has to tell them. What is cut off or rounded for the wire stays
in the error buffer, and leaves with the next steps.

| wire | magnitude of a row | gain | then |
|---|---|---|---|
| float16 | its largest entry | a power of two that brings this to about 2^5 | cut to what ranks can sum |
| int8, int4 | its root mean square | see `integer_gain` | rounded to whole levels |

For integers, entries that are small in all rows have finer levels: the *profile* of a factor is how its squares are
spread over the entries of a row, a running mean over the last steps. Without it what is always small would be rounded
to zero, and come late and in bursts, which an optimizer like Adam takes for as much as what is large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_powersgd.compressor.basis import largest_entries

# What the factors of the first step are taken for, when they travel in float16: at 2^4 they go as they are. As integers
# they do not travel before the magnitude is known.
_FIRST_MAGNITUDE = 2.0**4

# Of the averaged factor's root mean square, so many must have room in the range of an integer. The entries of a
# Gaussian row stay below; those of a row with few large ones are cut off, and come later.
_ROOM = {8: 5.0, 4: 3.0}

# How much a step changes the profile, and how small a square it may give an entry, which may be larger in the next.
PROFILE_STEP = 0.2
_LEAST_PROFILE = 1e-3

# Taken for the magnitude of a row that has none, so that its zeros can be divided by it.
_TINY = 1e-30

# A sum of all ranks' integers must fit into the field of one. Where that leaves each of them fewer levels than this on
# either side of zero, factors are added in float32 instead, on one rank for each part of them.
_FEWEST_LEVELS = 31


@dataclass(frozen=True)
class Format:
    """How the factors of a side travel.

    Attributes:
        dtype: in which they are packed.
        bits: of each entry on the wire.
    """

    dtype: torch.dtype
    bits: int

    @property
    def integer(self) -> bool:
        """Whether entries travel as integers."""
        return self.bits in _ROOM

    @property
    def scaled(self) -> bool:
        """Whether rows travel with a gain."""
        return self.integer or self.dtype == torch.float16

    @property
    def first_magnitude(self) -> float:
        """What the magnitude of a row is taken for before it is known; 0 if it has to be known."""
        return 0.0 if self.integer else _FIRST_MAGNITUDE

    def magnitude(self, factor: Tensor) -> Tensor:
        """Give the magnitudes of the rows of factors (…, r, k), (…, r, 1); 0 of a row of zeros."""
        if self.integer:
            norm: Tensor = torch.linalg.vector_norm(factor, dim=-1, keepdim=True)
            return norm / math.sqrt(factor.shape[-1])
        return largest_entries(factor)

    def gain(self, magnitude: Tensor, profile: Tensor | None, world_size: int) -> Tensor:
        """Give what rows of about a magnitude are multiplied by for the wire.

        Args:
            magnitude: (…, r, 1).
            profile: (…, 1, k), for integers.
            world_size: W.

        Returns:
            (…, r, k) for integers, else (…, r, 1); float32.
        """
        return half_gain(magnitude) if profile is None else integer_gain(magnitude, profile, self.bits, world_size)


def format_of(dtype: torch.dtype | str) -> Format:
    """Give the format of a dtype of PyTorch's, or of "int8" or "int4"."""
    if isinstance(dtype, torch.dtype):
        return Format(dtype, 8 * dtype.itemsize)
    return Format(torch.float32, int(dtype.removeprefix("int")))


def saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cut a tensor, in place, to what is finite in a dtype that it is to be written in. Only float16 is that narrow."""
    limit = torch.finfo(torch.float16).max
    return tensor.clamp_(-limit, limit) if dtype == torch.float16 else tensor


# float16 holds magnitudes from 2^-24 to 2^16. On the wire the largest entry of a row is brought to about 2^5, so that
# it may grow a thousandfold from one step to the next, and entries of a millionth of it still arrive.
_HALF_EXPONENT = 5
_HALF_LARGEST = 2.0**15


def half_gain(magnitude: Tensor) -> Tensor:
    """Give the powers of two that bring rows of a factor into the range of float16.

    Args:
        magnitude: (…, r, 1), about the largest magnitude in each row.

    Returns:
        (…, r, 1), float32.
    """
    exponent = (_HALF_EXPONENT - torch.frexp(magnitude.float()).exponent).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def cut(factor: Tensor) -> Tensor:
    """Cut entries that float16, summed over ranks, would make infinite; what was infinite before becomes NaN."""
    return factor.clamp(-_HALF_LARGEST, _HALF_LARGEST) + factor * 0


def sums_fit(bits: int, world_size: int) -> bool:
    """Whether the sum of all ranks' integers fits into the field of one, and leaves each enough levels."""
    return _largest(bits) // world_size >= _FEWEST_LEVELS


def most_levels(bits: int, world_size: int) -> int:
    """Give the largest integer that a rank may send. Two ranks exchange theirs, and no sum has to fit."""
    return _largest(bits) // world_size if world_size > 2 and sums_fit(bits, world_size) else _largest(bits)


def profile_of(factor: Tensor, magnitude: Tensor) -> Tensor:
    """Give the mean over its rows of a factor's squares, (…, 1, k), in units of their mean in each row.

    Args:
        factor: (…, r, k).
        magnitude: (…, r, 1), the root mean square of its rows. One of zeros counts as it is.
    """
    return (factor / magnitude.clamp_min(_TINY)).square_().mean(dim=-2, keepdim=True)


def integer_gain(magnitude: Tensor, profile: Tensor, bits: int, world_size: int) -> Tensor:
    """Give what turns a factor into levels: integers, when they are rounded.

    A rank's own factor is larger than the average by up to √W, where gradients are noise for the most part.

    Args:
        magnitude: (…, r, 1), the root mean square of each row of the averaged factor.
        profile: (…, 1, k), proportional to the mean squares of its entries (see `profile_of`).
        bits: of an integer.
        world_size: W.

    Returns:
        (…, r, k), float32.
    """
    room = _ROOM[bits] * math.sqrt(world_size)
    rows = (most_levels(bits, world_size) / room) / magnitude.clamp_min(_TINY)
    # Its mean falls while there is no gradient, and only its shape counts.
    shape = profile / profile.mean(dim=-1, keepdim=True).clamp_min(_TINY)
    return rows * shape.clamp_min_(_LEAST_PROFILE).rsqrt_()


def refinement(world_size: int) -> float:
    """Give how many times finer than a rank's own levels are those of the average, which needs less room."""
    return math.sqrt(world_size)


def to_levels(part: Tensor, bits: int, world_size: int) -> None:
    """Round to integers that may travel, in place. What is not finite becomes one, too."""
    largest = most_levels(bits, world_size)
    part.nan_to_num_(nan=0.0).round_().clamp_(-largest, largest)


def pack(levels: Tensor, bits: int) -> Tensor:
    """Give integers as bytes.

    Args:
        levels: (…, k), whole numbers in a floating dtype; of an even k where two share a byte.
        bits: of each.

    Returns:
        (…, k · bits / 8), uint8.
    """
    codes = levels.to(torch.int8).view(torch.uint8)
    return codes if bits == 8 else codes[..., ::2] & 15 | codes[..., 1::2] << 4


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Give what `pack` was given, in float32."""
    if bits == 8:
        return packed.view(torch.int8).float()
    # A field's sign is its highest bit.
    fields = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return ((fields ^ 8).view(torch.int8) - 8).float()


def _largest(bits: int) -> int:
    return (1 << bits - 1) - 1
