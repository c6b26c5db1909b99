"""Real gloo ranks for tests: processes that start once and then run one function after another.

Starting a process costs seconds, most of them for importing torch; running a function in one that is there costs
nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Each process group of gloo has a thread that wakes up a hundred times a second as long as the process lives. With many
# of them nothing else is done, so that ranks with more than these are ended, and new ones started.
MOST_GROUPS = 32

# Longer than any test, and shorter than a user's patience with a hanging one.
TIMEOUT_S = 240


class RankError(RuntimeError):
    """An exception on one of the ranks."""


class Ranks:
    """A group of ranks, restarted after a failure."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank; give the results in the order of the ranks."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args, kwargs))
        try:
            answers = [self._answer(rank) for rank in range(self.world_size)]
        except BaseException:
            self.stop()
            raise
        failures = [f"rank {rank}:\n{error}" for rank, (error, _, _) in enumerate(answers) if error]
        if failures or any(groups > MOST_GROUPS for _, _, groups in answers):
            self.stop()
        if failures:
            raise RankError("\n".join(failures))
        return [value for _, value, _ in answers]

    def run_to_errors(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
        """Call a function that must raise on every rank; give the tracebacks."""
        results = self.run(_catch, function, args, kwargs)
        assert all(results), f"ranks that did not raise: {[rank for rank, text in enumerate(results) if not text]}"
        return results

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        # Forked from a process that has imported Lightning: most of the seconds that a rank takes to start.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["lightning.pytorch"])
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, str(store), theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)

    def _answer(self, rank: int) -> tuple[str | None, Any, int]:
        if not self._connections[rank].poll(TIMEOUT_S):
            raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S} s")
        answer: tuple[str | None, Any, int] = self._connections[rank].recv()
        return answer


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    # As torchrun sets them, so that a Trainer takes these processes for its own.
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
        "TORCHELASTIC_RUN_ID": "tests",
    }.items():
        os.environ[name] = str(value)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    while True:
        function, args, kwargs = connection.recv()
        try:
            # The main process turns warnings into errors; what Lightning has to say on every rank is of no interest.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error, value = None, function(*args, **kwargs)
        except Exception:
            error, value = traceback.format_exc(), None
        connection.send((error, value, len(dist.distributed_c10d._world.pg_map)))


def _catch(function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except Exception:
        return traceback.format_exc()
    return ""


def gather_equal(tensors: list[torch.Tensor]) -> bool:
    """Whether tensors are bitwise equal on all ranks. Every rank must call this."""
    mine = torch.cat([tensor.detach().cpu().flatten().double() for tensor in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return all(torch.equal(everyone[0], theirs) for theirs in everyone)


@contextlib.contextmanager
def counted_all_reduce():
    """Count the bytes that go into `all_reduce` of the process group while gradients are exchanged."""
    sent: list[int] = []
    original = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counting):
        yield sent


@contextlib.contextmanager
def counted_sends():
    """Count the bytes that this rank sends to each other one, by the other's rank."""
    sent: dict[int, int] = {}
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                sent[operation.peer] = sent.get(operation.peer, 0) + operation.tensor.nbytes
        return original(operations)

    with mock.patch.object(dist, "batch_isend_irecv", counting):
        yield sent
