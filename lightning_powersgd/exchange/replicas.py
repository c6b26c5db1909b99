"""Tensors that should be the same on all ranks: compared by a checksum, and repaired."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.view import as_real
from lightning_powersgd.exchange.agreement import in_common
from lightning_powersgd.exchange.averages import distance_between
from lightning_powersgd.exchange.hashing import random_words

# Words in a row of what a checksum adds up by rows and by columns: a prime, so that a matrix's rows lie askew in it.
_COLUMNS = 257
# Bytes up to which tensors are copied side by side.
_SMALL = 2**20


def checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Add up the bits of tensors, so that equal ones give equal sums on any machine. Two passes over memory.

    Each word of 64 bits counts by its place. Otherwise a last bit up here and a last bit down there would cancel out,
    and rounding leaves such differences. The weight of a place is that of its row plus that of its column: so rows and
    columns can be added up first, which takes hardly any memory. It is odd, so that no difference of a single word is
    lost in an overflow.

    Args:
        tensors: by name, all on one device; the order counts.

    Returns:
        An int64 scalar on their device.
    """
    octets = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors.values()]
    small = [each for each in octets if len(each) <= _SMALL]
    parts = []
    # Small ones together, or a device would be busy with beginning.
    for each in [*(each for each in octets if len(each) > _SMALL), *([torch.cat(small)] if small else [])]:
        # What does not begin at a multiple of eight could not be read eight at a time.
        aligned = each.clone() if each.storage_offset() % 8 else each
        grid = 8 * _COLUMNS * (len(aligned) // (8 * _COLUMNS))
        words = aligned[:grid].view(torch.int64).view(-1, _COLUMNS)
        rest = torch.nn.functional.pad(aligned[grid:], (0, -len(aligned) % 8)).view(torch.int64)
        parts += [words.sum(dim=0), 2 * words.sum(dim=1), rest]
    sums = torch.cat(parts)
    # Odd, so that no difference of a single word is lost in an overflow.
    return (sums * (random_words(len(sums), sums.device) | 1)).sum()


def replicas_agree(tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> bool:
    """Whether tensors are the same on all ranks, bit for bit. Costs a checksum and a collective of 16 bytes.

    Args:
        tensors: by name, all on one device. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.
    """
    if not tensors:
        return True
    return bool(_equal_on_all_ranks(checksum(tensors), process_group))


def _equal_on_all_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Say of each integer whether all ranks have the same, a tensor of bools alike, in one collective."""
    largest = torch.stack((values, -values))
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    return largest[0] == -largest[1]


def repair_replicas(tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Give every rank the first rank's tensors, of those that all ranks have alike.

    Args:
        tensors: by name; overwritten. Every rank must call this. Those that some rank lacks or has in another shape, as
            a sharded optimizer's state, are left alone.
        process_group: the ranks; ``None`` is the default group.

    Returns:
        By name, the largest deviation of any rank, relative to the norm; of those only that deviated. The same on every
        rank.
    """
    tensors = in_common(tensors, process_group)
    first = dist.get_global_rank(process_group, 0) if process_group is not None else 0
    device = next((tensor.device for tensor in tensors.values() if not tensor.is_cpu), torch.device("cpu"))
    deviations = torch.zeros(len(tensors), device=device)
    for index, tensor in enumerate(tensors.values()):
        right = tensor.detach().to(device, copy=True).contiguous()
        dist.broadcast(as_real(right), first, group=process_group)
        distance = distance_between(tensor.detach().to(device), right) / distance_between(right).clamp(min=1e-30)
        deviations[index] = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
        tensor.detach().copy_(right)
    dist.all_reduce(deviations, dist.ReduceOp.MAX, group=process_group)
    return {name: value for name, value in zip(tensors, deviations.tolist(), strict=True) if value}


def differing(
    tensors: Mapping[str, Tensor], device: torch.device, process_group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Pick the tensors that are not the same on all ranks, bit for bit. Costs a checksum and one small collective.

    Args:
        tensors: by name. Every rank must call this with the same names, in the same order.
        device: of the collective.
        process_group: the ranks; ``None`` is the default group.
    """
    if not tensors:
        return {}
    sums = torch.stack([checksum({"": tensor}).to(device) for tensor in tensors.values()])
    equal = _equal_on_all_ranks(sums, process_group).tolist()
    return {name: tensor for (name, tensor), same in zip(tensors.items(), equal, strict=True) if not same}
