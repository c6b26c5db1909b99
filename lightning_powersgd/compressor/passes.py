"""The passes over the big matrices; where they can, they leave the work to `native`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_powersgd.compressor import native
from lightning_powersgd.compressor.codec import saturated

# Up to this rank, writing P Qᵀ as one elementwise pass a column is faster on a CPU than a matrix product whose inner
# dimension is so short.
_OUTER_PRODUCTS_UP_TO = 4


def project(
    matrix: Tensor,
    basis: Tensor,
    out: Tensor,
    error: Tensor | None = None,
    scale: float | Tensor = 1.0,
) -> None:
    """Write ``out = basis @ (matrix + scale · error)``, and leave the sum M in the matrix.

    With the basis P̂ (r, n) and M (n, m) this is the (r, m) form of ``Q = Mᵀ P̂``. The mirror image, ``P = M Q``, is the
    same call on transposed matrices.

    Args:
        matrix: the gradient, (k, l), or M itself where there is no error to add; without gaps.
        basis: (r, k), of the matrix's dtype.
        out: (r, l), of any floating dtype.
        error: (k, l), of the matrix's dtype or a narrower one.
        scale: of the loss, in units of the one that the error was computed at. A scalar tensor stays on its device.
    """
    library = native.library_for(matrix)
    if error is not None and not (library and error.dtype == matrix.dtype and isinstance(scale, float)):
        add_scaled(matrix, error, scale)
        error = None
    # BLAS on a CPU also rounds by where its result lies, and that is elsewhere in other groups.
    direct = out.dtype == matrix.dtype and (library or not matrix.is_cpu)
    product = out if direct else torch.empty_like(out, dtype=matrix.dtype)
    if library:
        native.project(library, matrix, basis, product, error, 1.0 if error is None else float(scale))
    elif len(basis) == 1 and matrix.is_cpu:
        # A single row is a matrix-vector product, and BLAS rounds that differently at other memory alignments. DDP
        # moves gradients when it rebuilds its buckets, so a resumed run would drift from an uninterrupted one by the
        # last bit. Matrix-matrix products copy their operands into aligned panels first.
        product.copy_(torch.mm(torch.cat((basis, torch.zeros_like(basis))), matrix)[:1])
    else:
        torch.mm(basis, matrix, out=product)
    if product is not out:
        out.copy_(product)


def decompress(
    matrix: Tensor,
    average: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    error: Tensor | None = None,
    keep: bool | Tensor = True,
) -> None:
    """Write ``error = M − P Q_wᵀ``, what this rank's own projection left behind, and then ``ĝ = P Qᵀ`` over M.

    Args:
        matrix: M, (n, m), without gaps.
        average: the factors of ĝ, (r, n) and (r, m).
        own: the factors of this rank's own projection, alike.
        error: (n, m), of the matrix's dtype or a narrower one.
        keep: whether to write the error; a scalar tensor stays on its device.
    """
    if keep is False:
        error = None
    if not matrix.is_contiguous():
        # Stored column by column, as a transposed parameter is: Mᵀ = Q Pᵀ lies row by row.
        matrix, error = matrix.t(), None if error is None else error.t()
        average, own = average[::-1], own[::-1]
    average, own = _in_dtype(matrix, average), _in_dtype(matrix, own)
    library = native.library_for(matrix)
    if error is not None and not (library and keep is True and error.dtype == matrix.dtype):
        _subtract_product(matrix, *own, out=error, keep=keep)
        error = None
    if library:
        native.decompress(library, matrix, average, own, error)
    else:
        _write_product(*average, out=matrix)


def subtract_product(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract ``P Qᵀ`` from a matrix, in place.

    Args:
        matrix: (n, m), without gaps.
        left: P, (r, n), of the matrix's dtype.
        right: Q, (r, m), alike.
    """
    if not matrix.is_contiguous():
        matrix, left, right = matrix.t(), right, left
    _subtract_product(matrix, left, right, out=matrix, keep=True)


def add_scaled(matrix: Tensor, error: Tensor, scale: float | Tensor) -> None:
    """Add ``scale · error`` to a matrix, in place. A scalar tensor stays on its device."""
    if isinstance(scale, Tensor):
        matrix.addcmul_(error, scale)
    else:
        matrix.add_(error, alpha=scale)


def assign(target: Tensor, value: Tensor, keep: bool | Tensor = True) -> None:
    """Write a value to a tensor if it is to be kept. A scalar tensor stays on its device."""
    if isinstance(keep, Tensor):
        torch.where(keep, value.to(target.dtype), target, out=target)
    elif keep:
        target.copy_(value)


def _in_dtype(matrix: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    left, right = factors
    return left.to(matrix.dtype), right.to(matrix.dtype)


def _write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    if _by_columns(out, left):
        torch.mul(left[0].unsqueeze(1), right[0], out=out)
        for p, q in zip(left[1:], right[1:], strict=True):
            out.addr_(p, q)
    else:
        torch.mm(left.t(), right, out=out)


def _subtract_product(matrix: Tensor, left: Tensor, right: Tensor, out: Tensor, keep: bool | Tensor) -> None:
    """Write ``out = matrix − P Qᵀ`` if it is to be kept. Unless that can be done at once, the matrix is overwritten."""
    rest = out if keep is True and out.dtype == matrix.dtype else matrix
    if _by_columns(matrix, left):
        torch.addr(matrix, left[0], right[0], alpha=-1, out=rest)
        for p, q in zip(left[1:], right[1:], strict=True):
            rest.addr_(p, q, alpha=-1)
    else:
        torch.addmm(matrix, left.t(), right, alpha=-1, out=rest)
    if rest is not out:
        assign(out, saturated(rest, out.dtype), keep)


def _by_columns(matrix: Tensor, factor: Tensor) -> bool:
    # In half precision each column would round the sum anew.
    return matrix.is_cpu and matrix.itemsize >= 4 and len(factor) <= _OUTER_PRODUCTS_UP_TO
