"""The passes over matrices that `passes` makes, compiled for the CPU that runs them.

PyTorch has no operation that adds and projects, or that subtracts one product and writes another, in one journey
through memory; made of several, the same arithmetic takes two to three times as long. `native.c` has them for
float32. The C compiler of the system (``cc``, or what the environment variable ``CC`` says) builds it in about a second
when a process first asks for it, and nothing is left on disk. Without a compiler `passes` computes with PyTorch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

SWITCH = "LIGHTNING_POWERSGD_NATIVE"

# The first set that a compiler accepts: not all of them know the processor they run on, or OpenMP.
_OPTIMISATIONS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-march=native"], [])

# Below this many elements a matrix is not worth waking other threads for.
_ELEMENTS_PER_THREAD = 32_768

# By function: what it takes after the number of threads and r, n, m.
_ARGUMENTS: dict[str, list[Any]] = {
    "project_left": [ctypes.c_float, *[ctypes.c_void_p] * 4],
    "project_right": [ctypes.c_float, *[ctypes.c_void_p] * 4],
    "decompress": [ctypes.c_void_p] * 6,
}


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
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes = [ctypes.c_int, *[ctypes.c_long] * 3, *arguments]
        function.restype = None
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
    transposed = not matrix.is_contiguous()
    n, m = reversed(matrix.shape) if transposed else matrix.shape
    function = native.project_left if transposed else native.project_right
    function(_threads(matrix), len(basis), n, m, scale, *map(_address, (matrix, error, basis, out)))


def decompress(
    native: ctypes.CDLL,
    matrix: Tensor,
    average: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    error: Tensor | None,
) -> None:
    """Do what `passes.decompress` does. All tensors are float32."""
    n, m = matrix.shape
    native.decompress(_threads(matrix), len(own[0]), n, m, *map(_address, (matrix, error, *average, *own)))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(matrix: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), matrix.numel() // _ELEMENTS_PER_THREAD))
