"""What is done with matrices and factors one by one, done for all of a group in one launch, on a GPU.

`kernels` has them in Triton's language, and Triton compiles them when they are first used. CUDA's builds of PyTorch
bring Triton along. Before the first use on a device they are compared with PyTorch's operations there. Where Triton is
missing, or they disagree, PyTorch computes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_powersgd.compressor import passes
from lightning_powersgd.compressor.basis import normalize_rows, orthonormal_by_gram, trace
from lightning_powersgd.compressor.codec import saturated
from lightning_powersgd.compressor.operands import Decompression, Dtypes, Judgement, Projection
from lightning_powersgd.compressor.plan import SIDES, Side
from lightning_powersgd.compressor.precision import full_precision

_log = logging.getLogger(__name__)

SWITCH = "LIGHTNING_POWERSGD_TRITON"

# The sums of a projection are stored for each tile of a matrix. Above this rank they would take more than half of the
# matrix's memory, and a matrix product has enough to do for each element that it reads.
LARGEST_RANK = 32
# Inside a tile, elements are counted in 32 bits.
_LARGEST_LENGTH = 2**24

# Of each program: rows and columns of a matrix, or entries of a factor.
TILE = 64
ENTRIES = 512
# Of a factor, numbers that a program makes a basis of at once: eight in a thread.
STRETCH = 2048
# A thread has 16 elements of a tile, and nothing that it works on leaves its registers. Products and sums are rounded
# one by one: fused, they would round otherwise where a compiler chooses to fuse them.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

_MATRICES = (torch.float32, torch.bfloat16)
_STORED = (torch.float32, torch.bfloat16, torch.float16)


class FusedPasses:
    """What is done with a group's matrices and factors.

    Kernels are told addresses, in a table for each pass. A table is made anew when an address has changed, as when DDP
    rebuilds its buckets.

    Args:
        device: of the matrices.
        dtypes: of the group.
    """

    def __init__(self, device: torch.device, dtypes: Dtypes) -> None:
        self._device, self._dtypes = device, dtypes
        self._in_place = dtypes.gradient == dtypes.matrix
        self._tables: dict[Hashable, tuple[Any, Tensor]] = {}

    def takes(self, n: int, m: int, rank: int) -> bool:
        """Whether kernels work on a matrix of this shape; else it is left to PyTorch's operations."""
        return rank <= LARGEST_RANK and max(n, m) <= _LARGEST_LENGTH

    def project(
        self,
        side: Side,
        matrices: Sequence[Projection],
        scale: float | Tensor = 1.0,
        world_size: int = 1,
        whole: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        """Form M = gradient + scale · error, in the gradient if it has M's dtype, and project it onto each basis.

        Args:
            side: of the results: (r, n) for the left one, (r, m) for the right one.
            matrices: with errors all, or none; results of one dtype, and own shares, too.
            scale: of the loss, in units of the one that the errors were computed at.
            world_size: W, by which results are divided.
            whole: gradients that are sent whole, and where their shares are to lie, in the dtype of the results.
        """
        sums: list[tuple[int, ...]] = []
        begin = 0
        passes_of: list[tuple[int, list[Projection], int]] = []
        for axis in (0, 1):
            alike = [one for one in matrices if _axis(side, one.gradient) == axis]
            if alike:
                passes_of.append((axis, alike, begin))
            for one in alike:
                tiles = _parts(_as_it_lies(one.gradient).shape[axis], TILE)
                sums.append((0, begin, tiles, one.out.numel(), _address(one.out), _address(one.own)))
                begin += tiles * one.out.numel()
        memory = torch.empty(begin, device=self._device)
        for axis, alike, first in passes_of:
            self._project(axis, alike, scale, memory, first)
        sums += [(_address(one), 0, 0, one.numel(), _address(place), 0) for one, place in whole]
        own = matrices[0].own
        launch(
            "add_up",
            self._list(("add up", side), [_parts(row[3], ENTRIES) for row in sums]),
            self._table(("add up", side), sums),
            memory,
            MATRIX=self._dtypes.matrix,
            WIRE=matrices[0].out.dtype,
            OWN=torch.float32 if own is None else own.dtype,
            WORLD_SIZE=world_size,
            WIDTH=len(sums[0]),
            ENTRIES=ENTRIES,
        )

    def _project(
        self, axis: int, matrices: Sequence[Projection], scale: float | Tensor, sums: Tensor, begin: int
    ) -> None:
        adds = matrices[0].error is not None
        rows, shapes = [], []
        for gradient, error, basis, out, _ in matrices:
            n, m = shape = _as_it_lies(gradient).shape
            shapes.append(shape)
            rows.append((_address(gradient), _address(error), n, m, len(basis), _address(basis), begin))
            begin += _parts(shape[axis], TILE) * out.numel()
        launch(
            "project",
            self._tiles(("project", axis), shapes),
            self._table(("project", axis, adds), rows),
            self._on_device(scale) if adds else None,
            sums,
            AXIS=axis,
            ADD=adds,
            STORE=self._in_place,
            GRADIENT=self._dtypes.gradient,
            ERROR=self._dtypes.error,
            MATRIX=self._dtypes.matrix,
            TILE=TILE,
            WIDTH=len(rows[0]),
        )

    def orthonormalize(self, side: Side, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make a basis of each factor, as `basis.orthonormal` does on an accelerator.

        Args:
            side: of the factors.
            factors: (r, k) of one dtype, and where their bases go, (r, k) of M's dtype.
        """
        for rows in sorted({_rows_for(len(factor)) for factor, _ in factors}):
            table, space, traces = [], 0, []
            for factor, basis in factors:
                r, k = factor.shape
                if _rows_for(r) == rows:
                    traces.append(trace(r, k, self._device))
                    table.append((_address(factor), r, k, _address(traces[-1]), _address(basis), space))
                    space += r * k + rows * rows
            launch(
                "orthonormalize",
                self._list(("bases", side, rows), [1] * len(table)),
                self._table(("bases", side, rows), table),
                torch.empty(space, dtype=torch.float64, device=self._device),
                WIRE=factors[0][0].dtype,
                MATRIX=self._dtypes.matrix,
                WIDTH=len(table[0]),
                ROWS=rows,
                COLUMNS=STRETCH // rows,
            )

    def keep(
        self,
        side: Side,
        matrices: Sequence[Judgement],
        finite: Tensor | None = None,
        flags: Tensor | None = None,
    ) -> Tensor:
        """Judge averaged factors, and keep those of a side for the next step, as `basis.normalize_rows` scales them.

        Args:
            side: of the factors that are kept.
            matrices: whose factors have one dtype.
            finite: a bool to judge all of them by; ``None``: judge each by itself.
            flags: (b,) of that dtype, positive where a parameter was used; of the others nothing is kept.

        Returns:
            (b,) bools, whether each was kept.
        """
        rows = [
            (_address(factor), *factor.shape, _address(kept), _address(other), 0 if other is None else other.numel())
            for factor, kept, other in matrices
        ]
        keep = torch.empty(len(matrices), dtype=torch.bool, device=self._device)
        launch(
            "keep_factors",
            self._list("keep", [1] * len(rows)),
            self._table(("keep", side), rows),
            finite,
            flags,
            keep,
            TOGETHER=finite is not None,
            FOLLOW=flags is not None,
            WIRE=matrices[0].factor.dtype,
            WIDTH=len(rows[0]),
            ENTRIES=ENTRIES,
        )
        return keep

    def decompress(
        self, side: Side, matrices: Sequence[Decompression], scale: float | Tensor = 1.0, keep: Tensor | None = None
    ) -> None:
        """Write what each own projection left behind into the error, and the averaged gradient over M.

        Args:
            side: of the projections: (r, n) for the left one, (r, m) for the right one.
            matrices: whose gradients hold M if they have its dtype; with errors all, or none; averages of one dtype,
                and own projections, too.
            scale: as in `project`.
            keep: (b,) bools, whether to write the error of each; ``None``: all of them.
        """
        numbered = list(enumerate(matrices))
        keep = None if keep is None else keep.contiguous()  # one answer for all may be expanded
        for axis in (0, 1):
            alike = [(number, one) for number, one in numbered if _axis(side, one.gradient) == axis]
            if alike:
                self._decompress(axis, alike, scale, keep)

    def _decompress(
        self, axis: int, matrices: Sequence[tuple[int, Decompression]], scale: float | Tensor, keep: Tensor | None
    ) -> None:
        writes = matrices[0][1].error is not None
        adds = writes and not self._in_place
        rows, shapes = [], []
        for number, (gradient, error, basis, average, own) in matrices:
            n, m = shape = _as_it_lies(gradient).shape
            shapes.append(shape)
            addresses = (_address(gradient), _address(error), *map(_address, (basis, average, own)))
            rows.append((*addresses[:2], n, m, len(basis), *addresses[2:], number))
        launch(
            "decompress",
            self._tiles(("decompress", axis), shapes),
            self._table(("decompress", axis, writes), rows),
            self._on_device(scale) if adds else None,
            keep,
            AXIS=axis,
            ADD=adds,
            WRITE=writes,
            KEEP=keep is not None,
            GRADIENT=self._dtypes.gradient,
            ERROR=self._dtypes.error,
            MATRIX=self._dtypes.matrix,
            AVERAGE=matrices[0][1].average.dtype,
            OWN=matrices[0][1].own.dtype,
            TILE=TILE,
            WIDTH=len(rows[0]),
        )

    def _on_device(self, scale: float | Tensor) -> Tensor:
        return scale.float() if isinstance(scale, Tensor) else _constant(scale, self._device)

    def _tiles(self, use: Hashable, shapes: Sequence[Sequence[int]]) -> Tensor:
        return self._list(use, [_parts(n, TILE) * _parts(m, TILE) for n, m in shapes])

    def _list(self, use: Hashable, counts: list[int]) -> Tensor:
        """List the parts of all matrices, (parts, 2): the number of the matrix, and that of the part in it."""

        def rows() -> list[tuple[int, ...]]:
            return [(number, part) for number, count in enumerate(counts) for part in range(count)]

        return self._kept(("parts of", use), counts, rows)

    def _table(self, use: Hashable, rows: Sequence[tuple[int, ...]]) -> Tensor:
        return self._kept(use, rows, lambda: rows)

    def _kept(self, use: Hashable, content: Any, rows: Callable[[], Sequence[tuple[int, ...]]]) -> Tensor:
        """Give what lies on the device for a use, made anew if its content is another one."""
        before = self._tables.get(use)
        if before is None or before[0] != content:
            before = content, torch.tensor(rows(), dtype=torch.int64).to(self._device, non_blocking=True)
            self._tables[use] = before
        return before[1]


def launch(kernel: str, parts: Tensor, table: Tensor, *others: Tensor | None, **constants: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: its name in `kernels`.
        parts: one for each of its programs.
        table: of the matrices.
        others: its other arguments, in their order.
        constants: what it is compiled for.
    """
    from lightning_powersgd.compressor import kernels  # loads Triton

    given = {
        name: kernels.dtype(value) if isinstance(value, torch.dtype) else value for name, value in constants.items()
    }
    getattr(kernels, kernel)[(len(parts),)](parts, table, *others, **given, **OPTIONS)


def passes_for(device: torch.device, dtypes: Dtypes) -> FusedPasses | None:
    """Give the passes over a group's matrices where Triton makes them, and else ``None``.

    Args:
        device: of the matrices.
        dtypes: of the group.
    """
    fit = dtypes.matrix in _MATRICES and dtypes.gradient in _STORED and dtypes.error in (None, *_STORED)
    return FusedPasses(device, dtypes) if fit and runs_on(device) and _works(device, dtypes) else None


def travels(dtype: torch.dtype) -> bool:
    """Whether kernels read and write factors in the dtype that they travel in."""
    return dtype in _STORED


def runs_on(device: torch.device) -> bool:
    """Whether a device is one that Triton makes code for here, unless it is switched off."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "0"


def arithmetic(device: torch.device) -> str:
    """Say what computes on a device. Where ranks differ in it, they may round an averaged gradient differently."""
    dtypes = Dtypes(torch.float32, torch.float32, torch.float32)
    if passes_for(device, dtypes) is None:
        return "PyTorch's operations"
    import triton

    return f"Triton {triton.__version__}"


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Launch kernels on a device, where there are several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=16)
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


@lru_cache(maxsize=64)
def _works(device: torch.device, dtypes: Dtypes) -> bool:
    """Whether the passes agree with PyTorch's operations on a device; else a warning says why not."""
    try:
        import triton  # noqa: F401  # or it says what is missing

        with _current(device), full_precision(device):
            _compare(device, dtypes)
            _compare_factors(device, dtypes)
    except Exception as error:  # whatever a compiler or a driver raises
        _log.warning(
            "PowerSGD computes with PyTorch's operations on %s, in more launches, since its Triton kernels do not work"
            " there. Install the `triton` that your build of PyTorch asks for, or set %s=0 to silence this. The reason:"
            " %s",
            device,
            SWITCH,
            str(error).strip() or type(error).__name__,
        )
        return False
    return True


# Rows, columns, rank; those of every second one are stored column by column.
_COMPARED = ((70, 130, 1), (20, 66, 5), (20, 33, LARGEST_RANK))


def _compare(device: torch.device, dtypes: Dtypes) -> None:
    """Take a step of either kind with a few matrices.

    Raises:
        ArithmeticError: if PyTorch's operations give something else.
    """
    generator = torch.Generator().manual_seed(0)
    fused, scale = FusedPasses(device, dtypes), torch.full((), 0.5, device=device)
    keep = torch.tensor([number != 1 for number in range(len(_COMPARED))]).to(device)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for side in SIDES:
        projections, decompressions, expected = [], [], []
        for number, (n, m, r) in enumerate(_COMPARED):
            shape = (m, n) if number % 2 else (n, m)
            gradient = random(*shape, dtype=dtypes.gradient)
            error = random(*shape, dtype=dtypes.error or dtypes.gradient)
            if number % 2:
                gradient, error = gradient.t(), error.t()
            own, average = (random(r, n if side == "left" else m, dtype=dtypes.matrix) for _ in range(2))
            basis = random(r, m if side == "left" else n, dtype=dtypes.matrix)
            its_error = None if dtypes.error is None else error
            projections.append(Projection(gradient, its_error, basis, own))
            decompressions.append(Decompression(gradient, its_error, basis, average, own))
            expected.append(_with_pytorch(side, decompressions[-1], scale, number != 1))
        fused.project(side, projections, scale)
        fused.decompress(side, decompressions, scale, keep)
        for theirs, (gradient, error_or_none, _, _, own) in zip(expected, decompressions, strict=True):
            ours = [own, gradient, *([] if error_or_none is None else [error_or_none])]
            _require_close(ours, theirs, dtypes)


def _compare_factors(device: torch.device, dtypes: Dtypes) -> None:
    """Make bases of a few factors, and judge and keep them.

    Raises:
        ArithmeticError: if PyTorch's operations give something else.
    """
    generator, fused = torch.Generator().manual_seed(1), FusedPasses(device, dtypes)
    for number, (_, k, r) in enumerate(_COMPARED):
        factors = torch.randn(3, r, k, generator=generator).to(device, dtypes.matrix)
        basis, kept = torch.empty_like(factors[0]), factors[2].clone()
        fused.orthonormalize("left", [(factors[0], basis)])
        expected = [orthonormal_by_gram(factors[0], dtypes.matrix), normalize_rows(factors[0], factors[2])]
        if number == 1:
            factors[1, 0, 0] = torch.inf
            expected[1] = factors[2]
        keep = fused.keep("left", [Judgement(factors[0], kept, factors[1])])
        _require_close([basis, kept], expected, dtypes)
        if bool(keep) != (number != 1) or bool(factors[0].isnan().all()) == bool(keep):
            raise ArithmeticError(f"with {dtypes} factors are not judged as they should be")


def _with_pytorch(side: Side, matrix: Decompression, scale: Tensor, keep: bool) -> list[Tensor]:
    """Give what PyTorch's operations make of a matrix: its projection, its gradient, and its error if it has one."""
    gradient, error, basis, average, own = matrix
    summed, own = gradient.to(basis.dtype, copy=True), own.clone()
    error = None if error is None else error.clone()
    left = side == "left"
    if error is not None:
        passes.add_scaled(summed, error, scale)
    passes.project(summed.t() if left else summed, basis, own)
    factors = [(one, basis) if left else (basis, one) for one in (average, own)]
    passes.decompress(summed, factors[0], factors[1], error, keep)
    return [own, saturated(summed, gradient.dtype).to(gradient.dtype), *([] if error is None else [error])]


def _require_close(ours: list[Tensor], theirs: list[Tensor], dtypes: Dtypes) -> None:
    eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype is not None)
    for one, other in zip(ours, theirs, strict=True):
        difference = float((one.double() - other.double()).abs().max() / other.double().abs().max())
        if not difference <= 16 * eps:
            raise ArithmeticError(f"with {dtypes} a result differs by {difference:.1e} of its largest entry")


def _axis(side: Side, matrix: Tensor) -> int:
    """Give the axis that is summed over of a matrix as it lies, for projections of a side."""
    return int((side == "left") == matrix.is_contiguous())


def _parts(length: int, size: int) -> int:
    return -(-length // size)


def _rows_for(rank: int) -> int:
    """Give the rows that a program has, which makes a basis: a power of two, and 4 or more."""
    return max(4, 1 << (rank - 1).bit_length())


def _as_it_lies(matrix: Tensor) -> Tensor:
    """Give a matrix, or its transpose if that is the one that lies row by row."""
    return matrix if matrix.is_contiguous() else matrix.t()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
