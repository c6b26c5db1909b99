"""How factors travel in a dtype whose range is narrow.

Only float16 is. Each row of a factor is brought into its range by a power of two, from the magnitude that the row had
in the step before, which every rank knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the factors of the first step are taken for, when they travel in float16: at 2^4 they go as they are.
FIRST_MAGNITUDE = 2.0**4


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
        magnitude: (r, 1), about the largest magnitude in each row.

    Returns:
        (r, 1), float32.
    """
    exponent = (_HALF_EXPONENT - torch.frexp(magnitude.float()).exponent).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def cut(factor: Tensor) -> Tensor:
    """Cut entries that float16, summed over ranks, would make infinite; what was infinite before becomes NaN.

    Like all rounding for the wire, what is cut stays in the error buffer, and leaves with the next steps.
    """
    return factor.clamp(-_HALF_LARGEST, _HALF_LARGEST) + factor * 0
