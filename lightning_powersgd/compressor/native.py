"""The passes over matrices that `passes` makes, compiled for the CPU that runs them.

PyTorch has no operation that adds and projects, or that subtracts one product and writes another, in one journey
through memory; made of several, the same arithmetic takes two to three times as long. `native.c` has them for float32,
over many matrices in one call: what Python does around a call takes longer than a pass over a small matrix. The C
compiler of the system (``cc``, or what the environment variable ``CC`` says) builds it in about a second when a process
first asks for it, and nothing is left on disk. Without a compiler `passes` computes with PyTorch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_powersgd.compressor import verdict
from lightning_powersgd.compressor.operands import Decompression, Dtypes, Projection
from lightning_powersgd.compressor.plan import Side

_log = logging.getLogger(__name__)

SWITCH = "LIGHTNING_POWERSGD_NATIVE"

# The first set that a compiler accepts: not all of them know the processor they run on, or OpenMP.
_OPTIMISATIONS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-march=native"], [])

# The kinds of passes, as `native.c` numbers them.
_PROJECT_LEFT, _PROJECT_RIGHT, _DECOMPRESS = range(3)
# Numbers in a row of its table.
_COLUMNS = 10


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Build and load ``native.c``, once a process.

    Returns:
        The library, or ``None`` where the environment variable ``LIGHTNING_POWERSGD_NATIVE`` is ``0`` or the file
        could not be built; the log says why.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "native.so"
        try:
            _build(target)
            loaded = ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            _log.warning(
                "PowerSGD computes with PyTorch's operations, about half as fast, since its C code could not be built."
                " Install a C compiler such as gcc, or set %s=0 to silence this. The reason: %s",
                SWITCH,
                str(reason).strip(),
            )
            return None
    loaded.make_passes.argtypes = [ctypes.c_int, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p]
    loaded.make_passes.restype = None
    return loaded


def _build(target: Path) -> None:
    source = Path(__file__).with_suffix(".c")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for optimisations in _OPTIMISATIONS:
        command = [*compiler, "-O2", "-fPIC", "-shared", *optimisations, "-o", str(target), str(source)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return
    done.check_returncode()


def library_for(matrix: Tensor) -> ctypes.CDLL | None:
    """Give the library if it can work on a matrix: float32, on a CPU."""
    return library() if matrix.is_cpu and matrix.dtype == torch.float32 else None


def project(
    native: ctypes.CDLL, matrix: Tensor, basis: Tensor, out: Tensor, error: Tensor | None, scale: float
) -> None:
    """Do what `passes.project` does. All tensors are float32."""
    _make_passes(native, _projection("right", matrix, error, basis, out), scale)


def decompress(
    native: ctypes.CDLL,
    matrix: Tensor,
    average: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    error: Tensor | None,
) -> None:
    """Do what `passes.decompress` does. All tensors are float32."""
    _make_passes(native, _decompression(matrix, error, average, own))


class NativePasses:
    """The passes over a group's matrices, all in one call, with the methods of `fused.FusedPasses`.

    All tensors are float32, on a CPU.

    Args:
        native: the library.
    """

    def __init__(self, native: ctypes.CDLL) -> None:
        self._native = native

    def takes(self, n: int, m: int, rank: int) -> bool:  # noqa: ARG002
        """Whether it works on a matrix of this shape: on all."""
        return True

    def project(self, side: Side, matrices: Iterable[Projection], scale: float | Tensor = 1.0) -> None:
        """Do what `passes.project` does with each matrix (see `fused.FusedPasses.project`)."""
        table: list[int] = []
        for gradient, error, basis, out, _ in matrices:
            table += _projection(side, gradient, error, basis, out)
        _make_passes(self._native, table, float(scale))

    def decompress(
        self,
        side: Side,
        matrices: Sequence[Decompression],
        scale: float | Tensor = 1.0,  # noqa: ARG002  # M is complete: nothing is added any more
        keep: Tensor | None = None,
    ) -> None:
        """Do what `passes.decompress` does with each matrix (see `fused.FusedPasses.decompress`)."""
        table: list[int] = []
        keep_each = [True] * len(matrices) if keep is None else keep.tolist()
        for (gradient, error, basis, average, own), keep_this in zip(matrices, keep_each, strict=True):
            left = side == "left"
            averages, owns = ((average, basis), (own, basis)) if left else ((basis, average), (basis, own))
            table += _decompression(gradient, error if keep_this else None, averages, owns)
        _make_passes(self._native, table)


def passes_for(device: torch.device, dtypes: Dtypes) -> NativePasses | None:
    """Give the passes over a group's matrices where compiled code makes them, and else ``None``.

    Args:
        device: of the matrices.
        dtypes: of the group.
    """
    waits = device.type == "cpu" and verdict.host_waits_for(device)
    fit = waits and all(dtype in (None, torch.float32) for dtype in dtypes)
    native = library() if fit else None
    return None if native is None else NativePasses(native)


def _projection(side: Side, matrix: Tensor, error: Tensor | None, basis: Tensor, out: Tensor) -> tuple[int, ...]:
    """Give a row of the table that `native.c` reads: of a projection onto a basis, for the factor of a side."""
    n, m = matrix.shape
    left = side == "left"
    if not matrix.is_contiguous():
        # Stored column by column: the transpose lies row by row.
        n, m, left = m, n, not left
    kind, p, q = (_PROJECT_LEFT, out, basis) if left else (_PROJECT_RIGHT, basis, out)
    return kind, basis.shape[0], n, m, *map(_address, (matrix, error, p, q)), 0, 0


def _decompression(
    matrix: Tensor, error: Tensor | None, average: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
) -> tuple[int, ...]:
    """Give a row of the table that `native.c` reads: of a decompression, from factors (r, n) and (r, m)."""
    n, m = matrix.shape
    if not matrix.is_contiguous():
        n, m, average, own = m, n, average[::-1], own[::-1]
    return _DECOMPRESS, average[0].shape[0], n, m, *map(_address, (matrix, error, *average, *own))


def _make_passes(native: ctypes.CDLL, table: Iterable[int], scale: float = 1.0) -> None:
    numbers = array("q", table)
    address, length = numbers.buffer_info()
    native.make_passes(torch.get_num_threads(), scale, length // _COLUMNS, address)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
