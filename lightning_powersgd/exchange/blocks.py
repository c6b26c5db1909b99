"""Blocks of rows of a parameter that is a large part of its model, such as the embedding of a small language model.

Several ranks can then share the work that there is with it. A block is a matrix of its own. How a parameter is cut
depends on the model alone, so that a checkpoint fits whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_powersgd.compressor.checkpoint import require_shape
from lightning_powersgd.compressor.parameters import block_name, parameter_name

# What has fewer elements than this is little work, whatever part of the model it is.
SMALLEST = 2**22
# Above this part of all elements a parameter is cut, into blocks of about this part.
LARGE, BLOCK = 1 / 8, 1 / 16
# Rows of a block, in units of its columns, at least: each block sends a right factor of its own, a quarter of the
# left one at most.
ROWS = 4


@dataclass(frozen=True)
class Block:
    """A parameter, or some of its rows.

    Attributes:
        name: of the parameter, with the rows unless they are all.
        tensor: the parameter itself, or these of its rows.
        rows: which, unless they are all.
    """

    name: str
    tensor: Tensor
    rows: slice | None = None

    def of(self, whole: Tensor) -> Tensor:
        """Give these rows of a tensor of the parameter's shape."""
        return whole if self.rows is None else whole[self.rows]


def in_blocks(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, list[Block]]:
    """Cut large parameters into blocks of rows.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them.

    Returns:
        By name, the blocks of every parameter; most have one.
    """
    named = [(parameter_name(name), parameter) for name, parameter in named_parameters]
    total = sum(parameter.numel() for _, parameter in named)
    return {name: _cut(name, parameter, total) for name, parameter in named}


def named_tensors(blocks: Mapping[str, Sequence[Block]]) -> list[tuple[str, Tensor]]:
    """Give blocks as `torch.nn.Module.named_parameters` gives parameters."""
    return [(part.name, part.tensor) for parts in blocks.values() for part in parts]


def _cut(name: str, parameter: Tensor, total: int) -> list[Block]:
    numel, rows = parameter.numel(), parameter.shape[0] if parameter.dim() > 1 else 1
    if numel < SMALLEST or numel <= LARGE * total or not parameter.is_contiguous():
        return [Block(name, parameter)]
    count = min(math.ceil(numel / (BLOCK * total)), rows * rows // (ROWS * numel))
    if count < 2:
        return [Block(name, parameter)]
    length = -(-rows // count)
    cuts = [slice(begin, min(begin + length, rows)) for begin in range(0, rows, length)]
    whole = parameter.detach()
    return [Block(block_name(name, cut), whole[cut].requires_grad_(parameter.requires_grad), cut) for cut in cuts]


def joined(entries: Mapping[str, Any], blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """Join the errors of blocks, so that they fit a run without blocks; factors stay with the blocks.

    Args:
        entries: of a checkpoint, by the names of blocks.
        blocks: by the names of their parameters.
    """
    result = dict(entries)
    for name, parts in blocks.items():
        theirs = [entries[part.name] for part in parts if "error" in entries.get(part.name, {})]
        if len(parts) < 2 or len(theirs) < len(parts):
            continue
        error = torch.cat([entry["error"] for entry in theirs])
        result[name] = {"shape": list(error.shape), "rank": theirs[0]["rank"], "factors": {}, "error": error}
        for part in parts:
            result[part.name] = {key: value for key, value in entries[part.name].items() if key != "error"}
    return result


def parted(entries: Mapping[str, Any], blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """Give every block its part of the errors that were saved of its parameter: the reverse of `joined`.

    Raises:
        ValueError: if a parameter was saved with another shape.
    """
    result = dict(entries)
    for name, parts in blocks.items():
        if len(parts) < 2 or name not in entries:
            continue
        whole = result.pop(name)
        rows, columns = parts[-1].rows, parts[0].tensor.shape[1:]
        assert rows is not None
        require_shape(name, tuple(whole["shape"]), (rows.stop, *columns))
        for part in parts:
            shape = {"shape": list(part.tensor.shape)}
            entry = dict(result.get(part.name, {"rank": whole["rank"], "factors": {}, **shape}))
            if "error" in whole:
                entry["error"] = part.of(whole["error"])
            result[part.name] = entry
    return result
