"""Compile the kernels for a GPU of compute capability 9.0, which needs none, and print what the code takes, as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_powersgd.compressor import fused, kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUOBJDUMP, NVDISASM = TOOLS / "cuobjdump", TOOLS / "nvdisasm"
POINTERS = {
    "parts": "*i64",
    "table": "*i64",
    "scale": "*fp32",
    "sums": "*fp32",
    "space": "*fp64",
    "finite": "*i1",
    "flags": "*fp32",
    "keep": "*i1",
}
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(SINGLE, SINGLE, SINGLE), (BRAIN, BRAIN, BRAIN), (HALF, HALF, SINGLE)]


def compiled(kernel: str, **constants: Any) -> dict[str, Any]:
    """Compile a kernel, and say what its code takes and does."""
    function = getattr(kernels, kernel)
    given = {
        name: kernels.dtype(value) if isinstance(value, torch.dtype) else value for name, value in constants.items()
    }
    signature = {name: POINTERS.get(name, "constexpr") for name in function.arg_names}
    code = triton.compile(
        ASTSource(function, signature=signature, constexprs=given),
        target=GPUTarget("cuda", 90, 32),
        options=fused.OPTIONS,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        machine = subprocess.run([NVDISASM, file.name], check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "kernel": kernel,
        "constants": {name: str(value) for name, value in constants.items()},
        "registers": registers,
        "stack": stack,
        "local": local,
        "multiplies": len(re.findall(r"\b[FD]MUL\b", machine)),
        "asked to fuse": re.findall(r"\b(?:fma|mad)\.\w+\.f\d+", code.asm["ptx"]),
        "fused": re.findall(r"\b[FD]FMA\b\S*", machine),
        "tensor cores": re.findall(r"\b(?:[HID]|\w*G)MMA\b\S*", machine),
        "atomics": re.findall(r"\b(?:ATOMG?|REDG?)\b\S*", machine),
        "spills": re.findall(r"\b(?:STL|LDL)\b\S*", machine),
    }


def main() -> None:
    """Print what the code of each kernel takes, for the dtypes and in the directions in which groups use it."""
    found = []
    for gradient, error, matrix in DTYPES:
        dtypes = {"GRADIENT": gradient, "ERROR": error, "MATRIX": matrix, "TILE": fused.TILE}
        of_sent = {"AVERAGE": gradient, "OWN": SINGLE}
        in_place = gradient == matrix
        for axis in (0, 1):
            found += [
                compiled("project", AXIS=axis, ADD=True, STORE=in_place, WIDTH=7, **dtypes),
                compiled(
                    "decompress", AXIS=axis, ADD=not in_place, WRITE=True, KEEP=True, WIDTH=9, **of_sent, **dtypes
                ),
            ]
        of_factors = {"WIRE": gradient, "ENTRIES": fused.ENTRIES, "WIDTH": 6}
        found += [
            compiled("add_up", MATRIX=matrix, OWN=SINGLE, WORLD_SIZE=3, **of_factors),
            compiled("keep_factors", TOGETHER=False, FOLLOW=True, **of_factors),
            compiled("keep_factors", TOGETHER=True, FOLLOW=False, **of_factors),
        ]
    for rows in (4, 8, 16, 32):
        sizes = {"ROWS": rows, "COLUMNS": fused.STRETCH // rows}
        found.append(compiled("orthonormalize", WIRE=SINGLE, MATRIX=SINGLE, WIDTH=6, **sizes))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
