"""What PowerSGD does with its matrices and factors, for a GPU, in Triton's language. `fused` launches what is here.

A launch serves all matrices of a group. It finds them in a table, one row of int64 for each. Of the passes over
matrices this is

    0 G   1 E   2 n   3 m   4 r   5 B   and in `project` 6 where its sums begin
                                        in `decompress` 6 A   7 O   8 its place in `keep`

    G, E       addresses of a gradient and its error, which lie row by row; M = G + s E, written into G or made anew
    n, m       their rows and columns, as they lie in memory
    r          rank; factors lie rank first, as (r, n) or (r, m)
    s          scale of the loss, in units of the one that E was computed at
    B          basis: (r, m) where it is summed over along rows, axis 1, and (r, n) along columns, axis 0
    O          this rank's own projection onto the basis, of the other shape
    A          the average of all ranks' projections, alike

Kernels that work on factors alone tell in their own words what is in a row.

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
    MATRIX: tl.constexpr,
    WIRE: tl.constexpr,
    OWN: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add up what `project` has left of all tiles, in their order, and make ready what the ranks sum up to a mean.

    A row of the table has

        0 address of a gradient that is sent whole, or 0   1 where sums begin   2 the tiles that they are of   3 entries
          4 address of the share of the mean   5 address of the own share, times W, or 0

    Args:
        parts: (programs, 2), the row of each, and which stretch of its entries.
        table: of the matrices, and of what is sent whole.
        sums: as in `project`.
        MATRIX: dtype of M.
        WIRE: dtype of the shares, and of what is sent whole.
        OWN: dtype of the own share.
        WORLD_SIZE: W.
        WIDTH: of the table.
        ENTRIES: in a stretch.
    """
    part = parts + 2 * tl.program_id(0)
    row = table + WIDTH * tl.load(part)
    tiles, entries, own = tl.load(row + 2), tl.load(row + 3), tl.load(row + 5)
    at = tl.load(part + 1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < entries
    whole = tl.load(row).to(tl.pointer_type(WIRE))
    total = tl.load(whole + at, mask=at < tl.where(tiles == 0, entries, 0), other=0.0).to(tl.float32)
    sums += tl.load(row + 1)
    for tile in range(tiles):
        total += tl.load(sums + tile * entries + at, mask=inside, other=0.0)
    total = total.to(MATRIX).to(WIRE).to(tl.float32)
    share = tl.math.div_rn(total, tl.full((ENTRIES,), WORLD_SIZE, tl.float32)).to(WIRE)
    tl.store(tl.load(row + 4).to(tl.pointer_type(WIRE)) + at, share, mask=inside)
    share = (share.to(tl.float32) * WORLD_SIZE).to(OWN)
    tl.store(own.to(tl.pointer_type(OWN)) + at, share, mask=at < tl.where(own == 0, 0, entries))


@_kernel
def orthonormalize(
    parts,
    table,
    space,
    WIRE: tl.constexpr,
    MATRIX: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Make bases of factors as `basis.orthonormal` does on an accelerator, one in each program.

    A row of the table has

        0 address of a factor   1 r   2 k   3 address of its trace, float64   4 address of its basis
        5 where its space begins

    Args:
        parts: (programs, 2), the factor of each, and 0.
        table: of the factors, (r, k) each.
        space: for each factor r k float64 numbers, and then the square of ROWS.
        WIRE: dtype of the factors.
        MATRIX: dtype of M, and of the bases.
        WIDTH: of the table.
        ROWS: a power of two, r or more.
        COLUMNS: that are worked on at once.
    """
    row = table + WIDTH * tl.load(parts + 2 * tl.program_id(0))
    factor = tl.load(row).to(tl.pointer_type(WIRE))
    r, k = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    trace = tl.load(row + 3).to(tl.pointer_type(tl.float64))
    result = tl.load(row + 4).to(tl.pointer_type(MATRIX))
    basis = space + tl.load(row + 5)
    triangle = basis + r * k
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    columns = tl.arange(0, COLUMNS)[None, :]
    square = tl.zeros((ROWS, ROWS), tl.float64)
    stretch = tl.zeros((ROWS, COLUMNS), tl.float64)

    # Rows scaled to a largest entry of 1. What is not finite spoils the Gram matrix, and so the whole basis.
    largest = stretch
    for begin in range(0, k, COLUMNS):
        inside = (i < r) & (begin + columns < k)
        largest = tl.maximum(
            largest, tl.abs(tl.load(factor + i * k + begin + columns, mask=inside, other=0.0)).to(tl.float64)
        )
    largest = tl.max(largest, axis=1)[:, None]
    # Divisions are few: what a GPU divides float64 with, is a call.
    reciprocal = 1.0 / tl.where(largest > 0, largest, 1.0)
    for begin in range(0, k, COLUMNS):
        inside = (i < r) & (begin + columns < k)
        entries = tl.load(factor + i * k + begin + columns, mask=inside, other=0.0).to(tl.float64)
        entries = entries * reciprocal
        entries += tl.load(trace + i * k + begin + columns, mask=inside, other=0.0)
        tl.store(basis + i * k + begin + columns, entries, mask=inside)
    tl.debug_barrier()

    for _ in range(2):
        # The Gram matrix, column by column.
        gram = square
        for q in range(r):
            products = stretch
            for begin in range(0, k, COLUMNS):
                there = begin + columns < k
                entries = tl.load(basis + i * k + begin + columns, mask=(i < r) & there, other=0.0)
                products += entries * tl.load(basis + q * k + begin + columns, mask=there, other=0.0)
            gram = tl.where(j == q, tl.sum(products, axis=1)[:, None], gram)
        # With D the squares of its pivots, G = L D Lᵀ is eliminated to D Lᵀ, and the identity to L⁻¹.
        inverse = tl.where(i == j, square + 1.0, square)
        for q in range(r):
            pivot = tl.sum(tl.where(i == q, gram, square), axis=0)[None, :]
            multiples = tl.sum(tl.where(j == q, gram, square), axis=1)[:, None]
            multiples = tl.where(i > q, multiples * (1.0 / tl.sum(tl.where(j == q, pivot, 0.0))), 0.0)
            gram -= multiples * pivot
            inverse -= multiples * tl.sum(tl.where(i == q, inverse, square), axis=0)[None, :]
        pivots = tl.where(i < r, tl.sum(tl.where(i == j, gram, square), axis=1)[:, None], 1.0)
        tl.store(triangle + i * ROWS + j, inverse * (1.0 / tl.sqrt(pivots)), mask=i < r)
        tl.debug_barrier()
        for begin in range(0, k, COLUMNS):
            there = begin + columns < k
            entries = stretch
            for q in range(r):
                multiples = tl.load(triangle + i * ROWS + q, mask=i < r, other=0.0)
                entries += multiples * tl.load(basis + q * k + begin + columns, mask=there, other=0.0)
            # Else a thread could write what another one has yet to read.
            tl.debug_barrier()
            tl.store(basis + i * k + begin + columns, entries, mask=(i < r) & there)
        tl.debug_barrier()

    # Columns of zeros stay zero, unless all are.
    none = tl.max(tl.where(largest > 0, 1, 0)) == 0
    for begin in range(0, k, COLUMNS):
        inside = (i < r) & (begin + columns < k)
        entries = tl.load(factor + i * k + begin + columns, mask=inside, other=0.0)
        there = tl.max(tl.where(entries != 0, 1, 0), axis=0)[None, :]
        entries = tl.load(basis + i * k + begin + columns, mask=inside, other=0.0)
        entries *= tl.where(none, 1, there).to(tl.float64)
        tl.store(result + i * k + begin + columns, entries.to(tl.float32).to(MATRIX), mask=inside)


@_kernel
def keep_factors(
    parts,
    table,
    finite,
    flags,
    keep,
    TOGETHER: tl.constexpr,
    FOLLOW: tl.constexpr,
    WIRE: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Judge the averaged factors of a matrix in each program, and keep one of them as the next warm start.

    It is kept with its rows scaled to a largest entry of 1; one of zeros stays as it was before. Where the factors are
    not finite, it is not kept, and becomes NaN itself.

    A row of the table has

        0 address of the factor   1 r   2 k   3 address of the kept one   4 address of the other factor   5 its entries

    Args:
        parts: (programs, 2), the matrix of each, and 0.
        table: of the matrices.
        finite: a bool, whether everything is that was received.
        flags: of each matrix, positive where its parameter was used.
        keep: of each matrix, a bool, to be written: whether it is kept.
        TOGETHER: judge each matrix by `finite`, and not by itself.
        FOLLOW: keep nothing of parameters that were not used.
        WIRE: dtype of the factors, and of the flags.
        WIDTH: of the table.
        ENTRIES: that are worked on at once.
    """
    number = tl.load(parts + 2 * tl.program_id(0))
    row = table + WIDTH * number
    factor, kept = tl.load(row).to(tl.pointer_type(WIRE)), tl.load(row + 3).to(tl.pointer_type(WIRE))
    r, k, others = tl.load(row + 1), tl.load(row + 2), tl.load(row + 5)
    other = tl.load(row + 4).to(tl.pointer_type(WIRE))
    at = tl.arange(0, ENTRIES)
    none = tl.zeros((ENTRIES,), tl.float32)
    if TOGETHER:
        sound = tl.load(finite).to(tl.int32) > 0
    else:
        unsound = at * 0
        for begin in range(0, r * k, ENTRIES):
            entries = tl.load(factor + begin + at, mask=begin + at < r * k, other=0.0).to(tl.float32)
            unsound = tl.where(tl.abs(entries) < float("inf"), unsound, 1)
        for begin in range(0, others, ENTRIES):
            entries = tl.load(other + begin + at, mask=begin + at < others, other=0.0).to(tl.float32)
            unsound = tl.where(tl.abs(entries) < float("inf"), unsound, 1)
        sound = tl.max(unsound) == 0
    keeps = sound
    if FOLLOW:
        keeps = sound & (tl.load(flags + number).to(tl.float32) > 0)
    tl.store(keep + number, keeps)
    if keeps:
        for q in range(r):
            largest = none
            for begin in range(0, k, ENTRIES):
                entries = tl.load(factor + q * k + begin + at, mask=begin + at < k, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(entries))
            largest = none + tl.max(largest)
            for begin in range(0, k, ENTRIES):
                inside = (begin + at < k) & (largest > 0)
                entries = tl.load(factor + q * k + begin + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(kept + q * k + begin + at, tl.math.div_rn(entries, largest).to(WIRE), mask=inside)
    if not sound:
        for begin in range(0, r * k, ENTRIES):
            tl.store(factor + begin + at, (none + float("nan")).to(WIRE), mask=begin + at < r * k)


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
    AVERAGE: tl.constexpr,
    OWN: tl.constexpr,
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
        GRADIENT, ERROR, MATRIX: dtypes of G, of E, and of M and the basis.
        AVERAGE, OWN: dtypes of A and O, which are rounded to that of M.
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
    averages = tl.load(row + 6).to(tl.pointer_type(AVERAGE))
    owns = tl.load(row + 7).to(tl.pointer_type(OWN))
    for q in range(r):
        if AXIS == 1:
            b = tl.load(basis + q * m + j, mask=j < m, other=0.0)[None, :].to(tl.float32)
            average += tl.load(averages + q * n + i, mask=i < n, other=0.0).to(MATRIX)[:, None].to(tl.float32) * b
            if WRITE:
                rest -= tl.load(owns + q * n + i, mask=i < n, other=0.0).to(MATRIX)[:, None].to(tl.float32) * b
        else:
            b = tl.load(basis + q * n + i, mask=i < n, other=0.0)[:, None].to(tl.float32)
            average += tl.load(averages + q * m + j, mask=j < m, other=0.0).to(MATRIX)[None, :].to(tl.float32) * b
            if WRITE:
                rest -= tl.load(owns + q * m + j, mask=j < m, other=0.0).to(MATRIX)[None, :].to(tl.float32) * b

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
