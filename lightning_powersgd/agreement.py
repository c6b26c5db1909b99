"""What the ranks must have in common, made sure of outside the exchange of gradients.

Their settings, before the first step; their parameters, now and then; and their presence, before a checkpoint that some
of them may never come to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from lightning_powersgd.linalg import as_real

T = TypeVar("T")


def require_agreement(settings: Mapping[str, str], process_group: dist.ProcessGroup | None = None) -> None:
    """Compare settings over all ranks, so that a difference ends in one clear error instead of a hang in a collective.

    Args:
        settings: what every rank must have alike, by name. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.

    Raises:
        RuntimeError: on every rank, naming the first difference.
    """
    everyone = _of_all_ranks(settings, process_group)
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            if everyone[0].get(name) != theirs.get(name):
                raise RuntimeError(
                    f"The ranks disagree on {name}: rank 0 has {everyone[0].get(name, 'none')}, rank {rank} has"
                    f" {theirs.get(name, 'none')}. Start every rank with the same code, package versions and arguments."
                )


def _of_all_ranks(mine: Mapping[str, T], process_group: dist.ProcessGroup | None) -> list[Mapping[str, T]]:
    everyone: list[Mapping[str, T]] = [mine] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, mine, group=process_group)
    return everyone


# Words in a row of what a checksum adds up by rows and by columns: a prime, so that a matrix's rows lie askew in it.
_COLUMNS = 257


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
    parts = []
    for tensor in tensors.values():
        octets = tensor.detach().contiguous().flatten().view(torch.uint8)
        if octets.storage_offset() % 8:
            octets = octets.clone()  # or it could not be read eight at a time
        grid = 8 * _COLUMNS * (len(octets) // (8 * _COLUMNS))
        words = octets[:grid].view(torch.int64).view(-1, _COLUMNS)
        rest = torch.nn.functional.pad(octets[grid:], (0, -len(octets) % 8)).view(torch.int64)
        parts += [words.sum(dim=0), 2 * words.sum(dim=1), rest]
    sums = torch.cat(parts)
    return (sums * _weights(len(sums), sums.device)).sum()


def _weights(count: int, device: torch.device) -> Tensor:
    """Give odd integers that look random, the same everywhere (SplitMix64's, Steele et al., 2014, with signs)."""
    x = torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) | 1


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
        distance = _distance(tensor.detach().to(device), right) / _distance(right).clamp(min=1e-30)
        deviations[index] = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
        tensor.detach().copy_(right)
    dist.all_reduce(deviations, dist.ReduceOp.MAX, group=process_group)
    return {name: value for name, value in zip(tensors, deviations.tolist(), strict=True) if value}


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
        squared += _distance(wide, mean) ** 2
    ((_, mean),) = mean_over_ranks({"": squared}, device, process_group)
    return mean.sqrt()


def _sketch(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    sketch = torch.zeros(_SKETCH, dtype=torch.float64, device=device)
    for tensor in tensors:
        for chunk in torch.split(tensor.detach().reshape(-1), _SKETCH * 1024):
            padded = torch.nn.functional.pad(chunk, (0, -len(chunk) % _SKETCH))
            signs = torch.randint(0, 2, padded.shape, generator=generator, device=device, dtype=torch.int8)
            sketch += (padded * (2 * signs - 1)).view(-1, _SKETCH).sum(dim=0, dtype=torch.float64)
    return sketch


def in_common(tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Pick the tensors that all ranks have, in the same shape and dtype: in the first rank's order, on every rank.

    Without it some ranks would average or broadcast one tensor, and some another.

    Args:
        tensors: by name. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.
    """
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    everyone = _of_all_ranks(kinds, process_group)
    common = [name for name, kind in everyone[0].items() if all(theirs.get(name) == kind for theirs in everyone)]
    return {name: tensors[name] for name in common}


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


def _distance(a: Tensor, b: Tensor | float = 0.0) -> Tensor:
    difference = (a if a.is_floating_point() or a.is_complex() else a.double()) - b
    distance: Tensor = torch.linalg.vector_norm(as_real(difference), dtype=torch.float64)
    return distance


def all_ranks_come(position: str, patience: timedelta, process_group: dist.ProcessGroup | None = None) -> bool:
    """Ask whether every rank is here, without waiting forever for those that are not, and without a collective.

    For moments when some ranks may be stuck elsewhere, or dead. All ranks get the same answer.

    Args:
        position: what the ranks must have reached together. A second question about the same position gets the same
            answer.
        patience: how long the first rank waits for the others; these wait twice as long for its answer.
        process_group: the ranks; ``None`` is the default group.
    """
    store = PrefixStore(f"lightning_powersgd/{_group(process_group).group_name}/{position}", _get_default_store())
    rank, others = dist.get_rank(process_group), range(1, dist.get_world_size(process_group))
    # The store is gone with the process that held it; whoever asks then is alone.
    with contextlib.suppress(RuntimeError):
        if rank > 0:
            # A rank that gives up must say so before the first one has counted it, and be held to its word after.
            store.compare_set(str(rank), "", "here")
            try:
                store.wait(["answer"], 2 * patience)
            except RuntimeError:
                if store.compare_set(str(rank), "here", "gone") == b"gone":
                    return False
        elif not store.check(["answer"]):
            store.set("answer", "all" if _came(store, [str(other) for other in others], patience) else "not all")
        store.wait(["answer"], patience)
        return store.get("answer") == b"all"
    return False


def _came(store: Store, ranks: list[str], patience: timedelta) -> bool:
    try:
        store.wait(ranks, patience)
    except RuntimeError:
        return False
    return all(store.compare_set(rank, "here", "counted") == b"counted" for rank in ranks)


# By group, what its sequence number has counted that is no collective. Never set back: a group outlives a fit.
_messages: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def position_of(moment: str, process_group: dist.ProcessGroup | None = None) -> str:
    """Name a point of a run: its moment, and how many collectives came before. No two points have the same name.

    Args:
        moment: the step, and whatever else decides on the collectives that follow.
        process_group: the ranks; ``None`` is the default group.
    """
    group = _group(process_group)
    return f"{moment}/{_sequence_number(group) - _messages.get(group, 0)}"


@contextlib.contextmanager
def messages_between_ranks(process_group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Keep `position_of` the same on all ranks though some send more messages to each other than others.

    With gloo each raises the sequence number of the group, at the ranks that it concerns alone.

    Args:
        process_group: the ranks; ``None`` is the default group.
    """
    group = _group(process_group)
    before = _sequence_number(group)
    try:
        yield
    finally:
        _messages[group] = _messages.get(group, 0) + _sequence_number(group) - before


def _group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = process_group or dist.group.WORLD
    assert group is not None
    return group


def _sequence_number(group: dist.ProcessGroup) -> int:
    number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return number
