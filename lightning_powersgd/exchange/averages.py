"""Means over the ranks, and how far their models are from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.view import as_real
from lightning_powersgd.exchange.hashing import random_signs


def mean_over_ranks(
    tensors: Mapping[str, Tensor], device: torch.device, process_group: dist.ProcessGroup | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Average tensors over all ranks, one after the other, in float32 at least.

    Args:
        tensors: by name, floating or complex. Every rank must call this with the same names and shapes, in one order.
        device: of the collectives.
        process_group: the ranks; ``None`` is the default group.

    Yields:
        The name and the mean of each, on the device and in the dtype of the tensor given.
    """
    world_size = dist.get_world_size(process_group)
    for name, tensor in tensors.items():
        # In half precision the sum would round at every rank; and an optimizer's count of steps, which is a float,
        # should remain a whole number.
        wide = torch.promote_types(tensor.dtype, torch.float64 if tensor.numel() == 1 else torch.float32)
        mean = tensor.detach().to(device, wide, copy=True).contiguous()
        dist.all_reduce(mean.div_(world_size), group=process_group)
        yield name, mean.to(tensor.device, tensor.dtype)


# Entries of the sketch of a model: its squared length is right to about √(2 / that), 4 %.
_SKETCH = 1024


def consensus_distance(
    tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None, *, exact: bool = True
) -> Tensor:
    """Measure how far the ranks' models are apart: the root mean square of their distances to the average model.

    Args:
        tensors: of this rank's model, by name, all on one device. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.
        exact: average whole models. Otherwise each rank sends but a random sketch of its model, 8 kB, and the result is
            right to a few per cent: a sum of entries with random signs, the same on all ranks, has the squared length
            of what is summed in the mean (Charikar, Chen and Farach-Colton, 2002).

    Returns:
        A float64 scalar on the tensors' device; 0 if there are none.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    device = next(iter(tensors.values())).device
    values = [as_real(tensor) for tensor in tensors.values()]
    if not exact:
        values = [_sketch(values, device)]
    squared = torch.zeros((), dtype=torch.float64, device=device)
    for value in values:
        # A mean in the tensor's own dtype would round by as much as models that nearly agree are apart.
        wide = value.detach().double()
        ((_, mean),) = mean_over_ranks({"": wide}, device, process_group)
        squared += distance_between(wide, mean) ** 2
    ((_, mean),) = mean_over_ranks({"": squared}, device, process_group)
    return mean.sqrt()


def _sketch(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    sketch, place = torch.zeros(_SKETCH, dtype=torch.float64, device=device), 0
    for tensor in tensors:
        for chunk in torch.split(tensor.detach().reshape(-1), _SKETCH * 1024):
            padded = torch.nn.functional.pad(chunk, (0, -len(chunk) % _SKETCH))
            signs = random_signs(len(padded), device, place)
            place += len(padded)
            sketch += (padded * signs).view(-1, _SKETCH).sum(dim=0, dtype=torch.float64)
    return sketch


def distance_between(a: Tensor, b: Tensor | float = 0.0) -> Tensor:
    """Give the Euclidean distance of two tensors, or the length of one, as a float64 scalar."""
    difference = (a if a.is_floating_point() or a.is_complex() else a.double()) - b
    distance: Tensor = torch.linalg.vector_norm(as_real(difference), dtype=torch.float64)
    return distance
