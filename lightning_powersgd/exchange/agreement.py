"""What the ranks must have in common, made sure of before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_REMEDY = "Start every rank with the same code, package versions and arguments."


def require_agreement(settings: Mapping[str, str], process_group: dist.ProcessGroup | None = None) -> None:
    """Compare settings over all ranks, so that a difference ends in one clear error instead of a hang in a collective.

    Args:
        settings: what every rank must have alike, by name, in an order that counts. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.

    Raises:
        RuntimeError: on every rank, naming the first difference.
    """
    require_same(of_all_ranks(settings, process_group))


def require_same(everyone: Sequence[Mapping[str, str]]) -> None:
    """Compare the settings of ranks.

    Args:
        everyone: by rank, what every rank must have alike, by name, in an order that counts.

    Raises:
        RuntimeError: naming the first difference.
    """
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            if everyone[0].get(name) != theirs.get(name):
                raise RuntimeError(
                    f"The ranks disagree on {name}: rank 0 has {everyone[0].get(name, 'none')}, rank {rank} has"
                    f" {theirs.get(name, 'none')}. {_REMEDY}"
                )
        for first, other in zip(everyone[0], theirs, strict=True):
            if first != other:
                raise RuntimeError(
                    f"The ranks disagree on the order: where rank 0 has {first}, rank {rank} has {other}. {_REMEDY}"
                )


def require_alike(text: str, what: str, device: torch.device, process_group: dist.ProcessGroup | None = None) -> None:
    """Compare a text over all ranks by its checksum, which costs a collective of 16 bytes.

    Args:
        text: what every rank must have alike. Every rank must call this.
        what: what it describes, in the plural.
        device: of the collective.
        process_group: the ranks; ``None`` is the default group.

    Raises:
        RuntimeError: on every rank, if it differs.
    """
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    largest = torch.tensor((number, -number), device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    if largest[0] != -largest[1]:
        raise RuntimeError(f"The ranks disagree on the {what}. Change them alike, before the same step of every rank.")


def all_or_none(work: Callable[[], T], process_group: dist.ProcessGroup | None = None) -> list[T]:
    """Do something on every rank, and let none go on where it failed on one. Every rank must call this.

    Args:
        work: what to do, without collectives.
        process_group: the ranks; ``None`` is the default group.

    Returns:
        What it gave, in the order of the ranks.

    Raises:
        ValueError: on every rank, the first that any had.
    """
    result: T | None = None
    refused: str | None = None
    try:
        result = work()
    except ValueError as error:
        refused = str(error)
    everyone = of_all_ranks((result, refused), process_group)
    for _, message in everyone:
        if message is not None:
            raise ValueError(message)
    return [cast("T", given) for given, _ in everyone]


def of_all_ranks(mine: T, process_group: dist.ProcessGroup | None) -> list[T]:
    """Give what every rank has said, in the order of the ranks. Every rank must call this."""
    everyone = [mine] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, mine, group=process_group)
    return everyone


def largest_of_ranks(numbers: Sequence[float], device: torch.device, *groups: dist.ProcessGroup | None) -> list[float]:
    """Give the largest of each number over all ranks of some groups. Every rank must call this.

    Args:
        numbers: as many on every rank.
        device: of the collectives.
        groups: one after another; ``None`` is the default group.
    """
    largest = torch.tensor(numbers, dtype=torch.float64, device=device)
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    given: list[float] = largest.tolist()
    return given


def in_common(tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Pick the tensors that all ranks have, in the same shape and dtype: in the first rank's order, on every rank.

    Without it some ranks would average or broadcast one tensor, and some another.

    Args:
        tensors: by name. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.
    """
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    everyone = of_all_ranks(kinds, process_group)
    common = [name for name, kind in everyone[0].items() if all(theirs.get(name) == kind for theirs in everyone)]
    return {name: tensors[name] for name in common}
