"""The passes of PowerSGD over its matrices, for a GPU, in Triton's language. `fused` launches what is here.

A launch serves all matrices of a group. It finds them in a table, one row of int64 for each:

    0 G   1 E   2 n   3 m   4 r   5 B   and in `project` 6 where its sums begin   7 O
                                        in `decompress` 6 A   7 O   8 its place in `keep`

    G, E       addresses of a gradient and its error, which lie row by row; M = G + s E, written into G or made anew
    n, m       their rows and columns, as they lie in memory
    r          rank; factors lie rank first, as (r, n) or (r, m)
    s          scale of the loss, in units of the one that E was computed at
    B          basis: (r, m) where it is summed over along rows, axis 1, and (r, n) along columns, axis 0
    O          this rank's own projection onto the basis, of the other shape
    A          the average of all ranks' projections, alike

Each program of a launch finds in a list which matrix it is for, and which part of it. The parts depend on shapes alone,
and every sum runs over its terms in one fixed order. No address is taken to be aligned. So a result depends neither on
where a matrix lies, nor on what else is in the group, nor on the number of multiprocessors.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # and so nobody launches anything

    def _kernel(function: Any) -> Any:
        return function
else:
    _kernel = triton.jit


def dtype(of: torch.dtype) -> Any:
    """Give Triton's name of a dtype of PyTorch's."""
    return getattr(tl, str(of).removeprefix("torch."))


@_kernel
def _tile(parts, table, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Find what a program works on.

    Returns:
        The matrix's row of the table; n, m and r; the tile's place, counted down and along; its rows and columns in the
        matrix, and which of its elements are inside; and in memory, where it begins and where its elements are from
        there.
    """
    part = parts + 2 * tl.program_id(0)
    row = table + WIDTH * tl.load(part)
    tile = tl.load(part + 1).to(tl.int32)
    n, m, r = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    down, along = tile // tl.cdiv(m, TILE), tile % tl.cdiv(m, TILE)
    i, j = down * TILE + tl.arange(0, TILE), along * TILE + tl.arange(0, TILE)
    inside = (i < n)[:, None] & (j < m)[None, :]
    begin = down.to(tl.int64) * TILE * m + along * TILE
    at = tl.arange(0, TILE)[:, None] * m + tl.arange(0, TILE)[None, :]
    return row, n, m, r, down, along, i, j, inside, begin, at


@_kernel
def project(
    parts,
    table,
    scale,
    sums,
    AXIS: tl.constexpr,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ERROR: tl.constexpr,
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sum up a tile's part of ``P = M Q``, along its rows (axis 1), or of ``Q = Mᵀ P̂``, along its columns (axis 0).

    Args:
        parts: (programs, 2), the matrix and the tile of each, counted along rows.
        table: of the matrices.
        scale: s, float32.
        sums: for each matrix (tiles along the axis, r, n or m), float32.
        AXIS: that is summed over.
        ADD: whether E is yet to be added to G.
        STORE: whether to leave M in G.
        GRADIENT, ERROR, MATRIX: dtypes of G, E and M.
        TILE: rows and columns of a tile.
        WIDTH: of the table.
    """
    row, n, m, r, down, along, i, j, inside, begin, at = _tile(parts, table, TILE, WIDTH)

    # M = G + s E
    gradient = tl.load(row).to(tl.pointer_type(GRADIENT)) + begin
    matrix = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        error = tl.load(row + 1).to(tl.pointer_type(ERROR)) + begin
        matrix += tl.load(scale) * tl.load(error + at, mask=inside, other=0.0).to(tl.float32)
        matrix = matrix.to(MATRIX)
        if STORE:
            tl.store(gradient + at, matrix, mask=inside)
        matrix = matrix.to(tl.float32)

    # A row of the basis, which is summed over, and one of the result.
    basis = tl.load(row + 5).to(tl.pointer_type(MATRIX))
    sums += tl.load(row + 6)
    for q in range(r):
        if AXIS == 1:
            b = tl.load(basis + q * m + j, mask=j < m, other=0.0).to(tl.float32)
            tl.store(sums + (along * r + q) * n + i, tl.sum(matrix * b[None, :], axis=1), mask=i < n)
        else:
            b = tl.load(basis + q * n + i, mask=i < n, other=0.0).to(tl.float32)
            tl.store(sums + (down * r + q) * m + j, tl.sum(matrix * b[:, None], axis=0), mask=j < m)


@_kernel
def add_up(
    parts,
    table,
    sums,
    AXIS: tl.constexpr,
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add up what `project` has left of all tiles, in their order.

    Args:
        parts: (programs, 2), the matrix of each, and which of its stretches of entries.
        table: of the matrices.
        sums: as there.
        AXIS: that was summed over.
        MATRIX: dtype of M and of the result.
        TILE: as there.
        WIDTH: of the table.
        ENTRIES: in a stretch.
    """
    part = parts + 2 * tl.program_id(0)
    row = table + WIDTH * tl.load(part)
    n, m, r = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32), tl.load(row + 4)
    entries = r * n if AXIS == 1 else r * m
    at = tl.load(part + 1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < entries
    sums += tl.load(row + 6)
    total = tl.zeros((ENTRIES,), tl.float32)
    for tile in range(tl.cdiv(m, TILE) if AXIS == 1 else tl.cdiv(n, TILE)):
        total += tl.load(sums + tile * entries + at, mask=inside, other=0.0)
    tl.store(tl.load(row + 7).to(tl.pointer_type(MATRIX)) + at, total.to(MATRIX), mask=inside)


@_kernel
def decompress(
    parts,
    table,
    scale,
    keep,
    AXIS: tl.constexpr,
    ADD: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ERROR: tl.constexpr,
    MATRIX: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write a tile of what the own projection left behind, and of the averaged gradient.

    That is ``E = M − Oᵀ B`` and ``G = Aᵀ B`` along axis 1, and ``E = M − Bᵀ O`` and ``G = Bᵀ A`` along axis 0.

    Args:
        parts: (programs, 2), the matrix and the tile of each, counted along rows.
        table: of the matrices.
        scale: s, float32.
        keep: bools, whether to write the E of each matrix.
        AXIS: that was summed over.
        ADD: whether E is yet to be added to G.
        WRITE: whether to write E.
        KEEP: whether `keep` is to be asked.
        GRADIENT, ERROR, MATRIX: dtypes of G, of E, and of M and the factors.
        TILE: rows and columns of a tile.
        WIDTH: of the table.
    """
    row, n, m, r, _, _, i, j, inside, begin, at = _tile(parts, table, TILE, WIDTH)

    gradient = tl.load(row).to(tl.pointer_type(GRADIENT)) + begin
    average = tl.zeros((TILE, TILE), tl.float32)
    rest = average
    if WRITE:
        error = tl.load(row + 1).to(tl.pointer_type(ERROR)) + begin
        rest = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            rest += tl.load(scale) * tl.load(error + at, mask=inside, other=0.0).to(tl.float32)
    basis = tl.load(row + 5).to(tl.pointer_type(MATRIX))
    averages = tl.load(row + 6).to(tl.pointer_type(MATRIX))
    owns = tl.load(row + 7).to(tl.pointer_type(MATRIX))
    for q in range(r):
        if AXIS == 1:
            b = tl.load(basis + q * m + j, mask=j < m, other=0.0)[None, :].to(tl.float32)
            average += tl.load(averages + q * n + i, mask=i < n, other=0.0)[:, None].to(tl.float32) * b
            if WRITE:
                rest -= tl.load(owns + q * n + i, mask=i < n, other=0.0)[:, None].to(tl.float32) * b
        else:
            b = tl.load(basis + q * n + i, mask=i < n, other=0.0)[:, None].to(tl.float32)
            average += tl.load(averages + q * m + j, mask=j < m, other=0.0)[None, :].to(tl.float32) * b
            if WRITE:
                rest -= tl.load(owns + q * m + j, mask=j < m, other=0.0)[None, :].to(tl.float32) * b

    if GRADIENT == tl.float16:
        average = tl.clamp(average, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    if WRITE:
        # Else a thread could write G where another one has yet to read it.
        tl.debug_barrier()
    tl.store(gradient + at, average.to(GRADIENT), mask=inside)
    if WRITE:
        if ERROR == tl.float16:
            rest = tl.clamp(rest, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        if KEEP:
            if tl.load(keep + tl.load(row + 8)):
                tl.store(error + at, rest.to(ERROR), mask=inside)
        else:
            tl.store(error + at, rest.to(ERROR), mask=inside)
