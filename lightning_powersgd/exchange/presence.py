"""Whether all ranks are here, asked without a collective.

For moments such as a checkpoint that some of them may never come to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store


def all_ranks_come(position: str, patience: timedelta, process_group: dist.ProcessGroup | None = None) -> bool:
    """Ask whether every rank is here, without waiting forever for those that are not, and without a collective.

    For moments when some ranks may be stuck elsewhere, or dead. All ranks get the same answer.

    Args:
        position: what the ranks must have reached together. A second question about the same position gets the same
            answer.
        patience: how long the first rank waits for the others; these wait twice as long for its answer.
        process_group: the ranks; ``None`` is the default group.
    """
    store = _store_of(position, process_group)
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


def forget_position(position: str, process_group: dist.ProcessGroup | None = None) -> None:
    """Take out of the store what a question left there, for those that ask thousands of them.

    Args:
        position: of `all_ranks_come`, after which all ranks have come to another one. Only one rank may call this.
        process_group: the ranks; ``None`` is the default group.
    """
    store = _store_of(position, process_group)
    for key in ("answer", *map(str, range(1, dist.get_world_size(process_group)))):
        store.delete_key(key)


class Attendance:
    """Whether all ranks come to save a checkpoint in a run that goes well, asked with the patience that they earn.

    Where one rank saves alone, the others wait for it in their next step, so it must not take long; where all save, one
    may be late by as much as an evaluation takes.
    """

    _FIRST, _ONCE_LOST = timedelta(seconds=30), timedelta(seconds=3)

    def __init__(self) -> None:
        self._patience = self._FIRST

    def all_come(self, moment: str | None, process_group: dist.ProcessGroup | None = None) -> bool:
        """Ask whether every rank is here (see `all_ranks_come`).

        Args:
            moment: what this rank has done so far; ``None`` where the others cannot come.
            process_group: the ranks; ``None`` is the default group.
        """
        came = moment is not None and all_ranks_come(position_of(moment, process_group), self._patience, process_group)
        self._patience = self._FIRST if came else self._ONCE_LOST
        return came


def _store_of(position: str, process_group: dist.ProcessGroup | None) -> Store:
    return PrefixStore(f"lightning_powersgd/{_group(process_group).group_name}/{position}", _get_default_store())


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
