"""Factors as bases: orthonormal, scaled, or random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_powersgd.compressor import verdict


def orthonormal(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormalise factors: the rows of the result are orthonormal and span the rows of the input.

    On a CPU by Householder reflections. They keep ``‖P̂ P̂ᵀ − I‖`` at rounding level whatever the condition of the input,
    and complete the basis where the input is zero or rank-deficient. On an accelerator, where each matrix would be a
    call of its own, by Cholesky's factor of the Gram matrix, twice (see `_from_gram_matrix`).

    Columns of zeros stay exactly zero, unless all are: a row or column that no rank's gradient has must not move, such
    as an embedding's for padding. From a basis of full rank this takes rounding only. What completes another is
    shortened, and P̂ P̂ᵀ projects a little less than all the way.

    Args:
        factor: (r, k) with r ≤ k, or several of them, (…, r, k).
        dtype: of the result.

    Returns:
        Of the factor's shape, contiguous.
    """
    if not verdict.host_waits_for(factor.device):
        return orthonormal_by_gram(factor, dtype)
    wide = factor.to(torch.promote_types(dtype, torch.float32))
    basis: Tensor = torch.linalg.qr(wide.mT, mode="reduced").Q.mT
    return _keep_zero_columns(basis.to(dtype).contiguous(), factor)


def _keep_zero_columns(basis: Tensor, factor: Tensor) -> Tensor:
    """Zero a basis in place where columns of its factor are zero, unless all are."""
    there = factor.any(dim=-2, keepdim=True)
    # As nearly always: many small factors spend their time in such small operations.
    if verdict.host_waits_for(factor.device) and there.all():
        return basis
    return basis.mul_(there | ~there.any(dim=-1, keepdim=True))


# Factors are padded with zeros to the longest of them, up to so many times their length.
_PADDING = 4


def orthonormal_each(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Orthonormalise factors of several shapes, as `orthonormal` does; on an accelerator in as few launches as it can.

    Args:
        factors: (b, r, k) each.
        dtype: of the results.
    """
    if not factors or verdict.host_waits_for(factors[0].device):
        return [orthonormal(factor, dtype) for factor in factors]
    bases = [torch.empty_like(factor, dtype=dtype) for factor in factors]
    shapes = [tuple(factor.shape) for factor in factors]
    longest_first = sorted(range(len(factors)), key=lambda index: shapes[index][1:], reverse=True)
    while longest_first:
        _, rank, longest = shapes[longest_first[0]]
        batch = [i for i in longest_first if shapes[i][1] == rank and shapes[i][2] * _PADDING >= longest]
        longest_first = [index for index in longest_first if index not in batch]
        rows = [shapes[index][0] for index in batch]
        padded = torch.zeros(sum(rows), rank, longest, dtype=torch.float64, device=factors[0].device)
        for index, place in zip(batch, torch.split(padded, rows), strict=True):
            place[..., : shapes[index][2]].copy_(factors[index])
        traces = _padded_traces(tuple(shapes[index] for index in batch), padded.device)
        for index, basis in zip(batch, torch.split(_orthonormal_by_gram(padded, traces), rows), strict=True):
            bases[index].copy_(basis[..., : shapes[index][2]])
    return bases


def orthonormal_by_gram(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthonormalise factors as `orthonormal` does on an accelerator."""
    of_shape = trace(*factor.shape[-2:], factor.device)
    return _orthonormal_by_gram(factor, of_shape).to(dtype, memory_format=torch.contiguous_format)


def _orthonormal_by_gram(factor: Tensor, traces: Tensor) -> Tensor:
    return _keep_zero_columns(_from_gram_matrix(factor, traces), factor)


# Of a row's largest entry. It makes independent what is not, and moves the span by no more than float32's rounding. A
# hundredth of it is too little: factors of rank 1 or 0 came out as NaN.
_TRACE = 1e-7


def _from_gram_matrix(factor: Tensor, traces: Tensor) -> Tensor:
    """Orthonormalise factors by Cholesky's factor of their Gram matrix, with no answer that the host has to wait for.

    In float64, on rows scaled to a largest entry of 1, to which a small random trace is added. Twice, since once leaves
    what the condition of the input has magnified.

    Args:
        factor: (…, r, k).
        traces: (…, r, k), float64, that are added.

    Returns:
        (…, r, k), float64.
    """
    wide = factor.double()
    largest = largest_entries(wide)
    basis = torch.addcdiv(traces, wide, largest.clamp_min_(torch.finfo(torch.float64).tiny))
    for _ in range(2):
        triangle, _ = torch.linalg.cholesky_ex(basis @ basis.mT)
        basis = torch.linalg.solve_triangular(triangle, basis, upper=False)
    return basis


@lru_cache(maxsize=256)
def trace(rank: int, length: int, device: torch.device) -> Tensor:
    """Give the trace that is added to a factor before a basis is made of its Gram matrix, (r, k), float64."""
    return _TRACE * random_factor(f"trace/{rank}/{length}", rank, length).double().to(device)


@lru_cache(maxsize=64)
def _padded_traces(shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """Give the traces of factors (b, r, k) that are padded with zeros to the longest. They must not reach there."""
    longest = max(k for _, _, k in shapes)
    each = [(b, torch.nn.functional.pad(trace(r, k, device), (0, longest - k))) for b, r, k in shapes]
    return torch.cat([padded.expand(b, -1, -1) for b, padded in each])


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
    largest = largest_entries(factor)
    return torch.where(largest > 0, factor / largest, fallback).to(fallback.dtype)


def largest_entries(factor: Tensor) -> Tensor:
    """Give the largest magnitude in each row of factors (…, r, k), (…, r, 1); NaN where one is."""
    if verdict.host_waits_for(factor.device):
        return factor.abs().amax(dim=-1, keepdim=True)  # a norm takes a CPU longer
    largest: Tensor = torch.linalg.vector_norm(factor, torch.inf, dim=-1, keepdim=True)
    return largest


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
