"""What passes over several matrices and factors are given of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dtypes(NamedTuple):
    """Of the gradients of a group, of their errors (``None`` without error feedback), and of M and its factors."""

    gradient: torch.dtype
    error: torch.dtype | None
    matrix: torch.dtype


class Projection(NamedTuple):
    """A matrix to be projected: what `passes.project` takes.

    Attributes:
        gradient: (n, m).
        error: (n, m), if it is yet to be added.
        basis: (r, m) or (r, n).
        out: (r, n) or (r, m), in any of the dtypes; given the share of the mean over the ranks.
        own: alike, given the share times the number of ranks, as it is after its rounding; ``None`` if nobody asks.
    """

    gradient: Tensor
    error: Tensor | None
    basis: Tensor
    out: Tensor
    own: Tensor | None = None


class Judgement(NamedTuple):
    """Averaged factors of a matrix, to be judged and kept.

    Attributes:
        factor: (r, k), turned into NaN if it is not finite, or the other is not.
        kept: (r, k), the one that the next step starts from; overwritten if it is to be kept.
        other: of the other side; ``None`` where there is no other.
    """

    factor: Tensor
    kept: Tensor
    other: Tensor | None


class Decompression(NamedTuple):
    """A matrix to be written from its projections: what `passes.decompress` takes.

    Attributes:
        gradient: (n, m).
        error: (n, m), if it is to be written.
        basis: (r, m) or (r, n), that was projected onto.
        average: (r, n) or (r, m), of all ranks' projections.
        own: this rank's, alike.
    """

    gradient: Tensor
    error: Tensor | None
    basis: Tensor
    average: Tensor
    own: Tensor
