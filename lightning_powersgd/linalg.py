"""The matrix arithmetic of PowerSGD, as pure functions on tensors.

Axis letters, here and in the other rooms below the Lightning line:

    n   rows of a gradient seen as a matrix: ``shape[0]``
    m   its columns: the product of the other dimensions
    r   rank: columns kept of each factor

A factor is stored **rank first**: the ``P`` of the paper, an (n, r) matrix, is a tensor of shape (r, n) here, and its
``Q`` is (r, m). Stored (n, r), the product ``M.T @ P`` runs some twenty times slower on a CPU, since it strides
through the factor.

`project` and `decompress` are the passes over the big matrices; where they can, they leave the work to `native`.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_powersgd import native

# Up to this rank, writing P Qᵀ as one elementwise pass a column is faster on a CPU than a matrix product whose inner
# dimension is so short.
_OUTER_PRODUCTS_UP_TO = 4


def matrix_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Find the order of dimensions in which a tensor can be seen as an (n, m) matrix without a copy.

    Dimension 0 always comes first. The others come in memory order, so that a convolution's weight in ``channels_last``
    has a matrix view too; its columns are then permuted, which changes nothing in the algorithm.

    Args:
        tensor: a parameter or its gradient, of at least two dimensions.

    Returns:
        A permutation of the dimensions, or ``None`` where no such view exists (fewer than two dimensions, or a memory
        layout that has gaps or interleaves rows and columns).
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span != tensor.numel():
        return None
    in_shape_order = tuple(range(tensor.dim()))
    in_memory_order = (0, *sorted(range(1, tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True))
    for order in (in_shape_order, in_memory_order):
        try:
            as_matrix(tensor, order)
        except RuntimeError:
            continue
        return order
    return None


def as_matrix(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """View a tensor as its (n, m) matrix, in the order that `matrix_order` found. Shares the tensor's memory."""
    return tensor.permute(order).view(tensor.shape[0], -1)


def permute_columns(factor: Tensor, shape: tuple[int, ...], order: tuple[int, ...], *, to_shape_order: bool) -> Tensor:
    """Reorder the columns of a right factor between memory order and the order of the parameter's shape.

    Checkpoints hold factors in the order of the shape, so that they fit a model in any memory format.

    Args:
        factor: (r, m).
        shape: of the parameter, (n, ...).
        order: as `matrix_order` gave it.
        to_shape_order: the direction.

    Returns:
        (r, m), contiguous.
    """
    rank = factor.shape[0]
    if to_shape_order:
        columns = factor.view(rank, *(shape[axis] for axis in order[1:]))
        inverse = sorted(range(len(order)), key=lambda axis: order[axis])
        return columns.permute(inverse).reshape(rank, -1)
    return factor.view(rank, *shape[1:]).permute(order).reshape(rank, -1)


def as_real(tensor: Tensor) -> Tensor:
    """View complex numbers as pairs of real ones; give real ones back as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def orthonormal(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormalise a factor: the rows of the result are orthonormal and span the rows of the input.

    Householder reflections keep ``‖P̂ P̂ᵀ − I‖`` at rounding level whatever the condition of the input, and complete
    the basis where the input is zero or rank-deficient. Half precision is computed in float32.

    Args:
        factor: (r, k) with r ≤ k, or several of them, (…, r, k).
        dtype: of the result.

    Returns:
        Of the factor's shape, contiguous.
    """
    wide = factor.to(torch.promote_types(dtype, torch.float32))
    basis: Tensor = torch.linalg.qr(wide.mT, mode="reduced").Q.mT
    return basis.to(dtype).contiguous()


def unique_basis(factor: Tensor, trace: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormalise a factor to the same basis on unlike processors, but for the last bits.

    Computed in float64. Of the signs that a basis may have, it has those of Gram and Schmidt's. Where the factor's rows
    are dependent, the trace chooses what completes the basis, where `orthonormal` leaves that to rounding.

    Args:
        factor: (r, k) with r ≤ k.
        trace: (r, k), random, and small beside the factor; the same wherever the basis is to be the same.
        dtype: of the result.

    Returns:
        (r, k), contiguous.
    """
    wide = factor.double() + trace
    if len(wide) == 1:
        basis: Tensor = wide / torch.linalg.vector_norm(wide)
    else:
        columns, triangle = torch.linalg.qr(wide.mT, mode="reduced")
        basis = (columns * triangle.diagonal().sign()).mT
    return basis.to(dtype, memory_format=torch.contiguous_format)


def normalize_rows(factor: Tensor, fallback: Tensor) -> Tensor:
    """Scale each row of a warm-start factor to a largest entry of 1; a row of zeros gives way to the fallback's.

    The span is what a factor carries, not its length, and ``M Q`` with a Q as small as the gradient would underflow. A
    row of zeros (a gradient that was zero, or of lower rank than r) would lock its direction out of every later step.

    Args:
        factor: (…, r, k).
        fallback: (…, r, k), rows already scaled.

    Returns:
        (…, r, k), of the fallback's dtype.
    """
    largest = factor.abs().amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, factor / largest, fallback).to(fallback.dtype)


def project(
    matrix: Tensor,
    basis: Tensor,
    out: Tensor,
    error: Tensor | None = None,
    scale: float | Tensor = 1.0,
    gain: Tensor | None = None,
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
        gain: (r, 1), for a float16 `out`: what its rows are multiplied by (see `half_gain`).
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
        out.copy_(product if gain is None else _cut(product * gain))


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


def random_factor(draw: str, rank: int, length: int) -> Tensor:
    """Draw a random factor on the CPU, the same wherever the same is to be drawn.

    Args:
        draw: what it is for, and the seed.
        rank: r.
        length: k.

    Returns:
        (r, k), float32.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "little"))
    return torch.randn(rank, length, generator=generator, device="cpu", dtype=torch.float32)


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


def _cut(factor: Tensor) -> Tensor:
    """Cut entries that float16, summed over ranks, would make infinite; what was infinite before becomes NaN.

    Like all rounding for the wire, what is cut stays in the error buffer, and leaves with the next steps.
    """
    return factor.clamp(-_HALF_LARGEST, _HALF_LARGEST) + factor * 0


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
