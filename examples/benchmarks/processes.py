"""Ranks in processes of their own, and a process group that needs only one.

`run_over_link` is for what is measured with communication, `pretend_ranks` for what is measured without.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import progress_bar
from network import INTERFACE, LINKS, emulated_network, enter, limit_rate
from torch import Tensor
from torch._C._distributed_c10d import Work, _create_work_from_future
from torch.futures import Future

_TIMEOUT = timedelta(minutes=3)
_CPU = torch.device("cpu")


class RankError(RuntimeError):
    """An exception on one of the ranks, or its sudden end."""


@dataclass
class Rank:
    """What a rank's function learns about its place.

    Attributes:
        number: of the rank.
        device: its tensors'.
        megabits: per second, of the link that it sends over; ``None`` for loopback.
    """

    number: int
    device: torch.device
    megabits: int | None
    _connection: Connection

    def report(self, message: str) -> None:
        """Tell the main process how far the work is; rank 0 speaks for all."""
        if self.number == 0:
            self._connection.send(("progress", message))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def limit_link(self) -> None:
        """Slow the link down to its rate.

        Not from the beginning, since the copies of the model that are sent around when DDP is set up would take longer
        than the measurement.
        """
        if self.megabits is not None:
            limit_rate(self.megabits)
        dist.barrier()

    def seconds(self, work: Callable[[], object]) -> float:
        """Measure some work that all ranks start together, on this rank."""
        return self.seconds_and_cpu_seconds(work)[0]

    def seconds_and_cpu_seconds(self, work: Callable[[], object]) -> tuple[float, float]:
        """Measure the same, and how long processors worked for this rank meanwhile, in all of its threads."""
        dist.barrier()
        self.synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        work()
        self.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu_start

    def all_reduce_seconds(self, count: int, repeats: int) -> list[float]:
        """Measure a bare all-reduce of so many bytes, after one to warm up."""
        tensor = torch.zeros(count // 4, device=self.device)
        return [self.seconds(lambda: dist.all_reduce(tensor)) for _ in range(repeats + 1)][1:]


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int,
    device: str,
    on_progress: Callable[[str], None],
    namespaces: list[str] | None = None,
    megabits: int | None = None,
) -> list[Any]:
    """Call ``function(rank, *args)`` in one process a rank, each with a single thread; give the results by rank.

    Args:
        function: a function of a module, which other processes can import.
        args: its arguments after the `Rank`.
        world_size: number of ranks.
        device: "cpu", or "cuda" for the GPUs in turn: NCCL where there is one for each rank, gloo where they share. A
            single rank on a GPU is one of two, whose other one sends nothing (see `pretend_ranks`).
        on_progress: is called with what rank 0 reports.
        namespaces: of the emulated network, by rank; ``None`` for loopback.
        megabits: per second, of the emulated links.

    Raises:
        RankError: if a rank fails.
    """
    # Processes are forked from one that has imported what takes long to import.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning_powersgd"])
    processes, connections = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in range(world_size):
                ours, theirs = context.Pipe()
                namespace = namespaces[number] if namespaces else None
                place = (number, world_size, device, str(Path(folder) / "store"), namespace, megabits)
                process = context.Process(target=_serve, args=(theirs, *place, function, args), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            return _collect(connections, on_progress)
        finally:
            for process in processes:
                process.kill()
                process.join()


def run_over_link(
    function: Callable[..., Any],
    *args: Any,
    link: str,
    world_size: int,
    device: str,
    place: str,
    reports: int | None,
    devices: int = 1,
) -> list[Any]:
    """Call a function on ranks as `run_ranks` does, over a link, with a progress bar.

    Args:
        function: as there.
        args: as there.
        link: a key of `network.LINKS`.
        world_size: number of ranks.
        device: as there.
        place: what stands before each report in the bar.
        reports: how many rank 0 makes; ``None`` if that is not known.
        devices: ranks on each machine.

    Raises:
        NetworkError: if the link cannot be had.
        RankError: if a rank fails.
    """
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        task = progress.add_task(place, total=reports)
        namespaces = None
        if LINKS[link]:
            machines = stack.enter_context(emulated_network(world_size // devices))
            namespaces = [name for name in machines for _ in range(devices)]
        return run_ranks(
            function,
            *args,
            world_size=world_size,
            device=device,
            on_progress=lambda text: progress.update(task, advance=1, description=f"{place}, {text}"),
            namespaces=namespaces,
            megabits=LINKS[link],
        )


def _collect(connections: list[Connection], on_progress: Callable[[str], None]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        for ready in wait([connection for rank, connection in enumerate(connections) if rank not in results]):
            rank = connections.index(ready)  # type: ignore[arg-type]
            try:
                kind, content = connections[rank].recv()
            except EOFError:
                raise RankError(
                    f"Rank {rank} ended without a word; a collective aborts so, or a lack of memory."
                ) from None
            if kind == "error":
                raise RankError(f"Rank {rank} failed:\n{content}")
            if kind == "progress":
                on_progress(content)
            else:
                results[rank] = content
    return [results[rank] for rank in range(len(connections))]


def _serve(
    connection: Connection,
    number: int,
    world_size: int,
    device: str,
    store: str,
    namespace: str | None,
    megabits: int | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair, which ends this one
    torch.set_num_threads(1)
    try:
        if namespace is not None:
            enter(namespace)
            # NCCL would else find out that the ranks share a machine, and leave the network alone.
            os.environ |= {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE, "NCCL_IB_DISABLE": "1"}
            os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
        place = _CPU
        if device == "cuda":
            place = torch.device("cuda", number % torch.cuda.device_count())
            torch.cuda.set_device(place)
        with _joined(number, world_size, place, store):
            result = function(Rank(number, place, megabits, connection), *args)
        connection.send(("result", result))
    except Exception:
        connection.send(("error", traceback.format_exc()))


@contextlib.contextmanager
def _joined(number: int, world_size: int, place: torch.device, store: str) -> Iterator[None]:
    """Make this process a rank of the group."""
    if world_size == 1 and place.type == "cuda":
        with pretend_ranks(2, place):
            yield
        return
    backend = "nccl" if place.type == "cuda" and world_size <= torch.cuda.device_count() else "gloo"
    dist.init_process_group(
        backend, store=dist.FileStore(store, world_size), rank=number, world_size=world_size, timeout=_TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


class _InstantGroup(dist.ProcessGroup):
    """One rank of a group whose others send nothing and take no time.

    Args:
        rank: of this process.
        size: of the group.
        alone: a real group of this rank alone that all-reduces are handed to, so that they cost what they cost without
            a network; ``None``: they are done at once.
    """

    def __init__(self, rank: int, size: int, alone: Any = None) -> None:
        super().__init__(rank, size)
        self._alone = alone

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Leave the tensors as they are."""
        if self._alone is not None:
            return self._alone.allreduce(tensors, opts or dist.AllreduceOptions())
        return self._done(tensors)

    def barrier(self, opts: object = None) -> Work:
        """Wait for nobody."""
        return self._done([])

    def broadcast(self, tensors: list[Tensor], opts: object = None) -> Work:
        """Leave the tensors as they are."""
        return self._done(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> Work:
        """Give every rank this one's tensors."""
        for output, tensor in zip(outputs, inputs, strict=True):
            for copy in output:
                copy.copy_(tensor)
        return self._done(outputs)

    def getBackendName(self) -> str:  # noqa: N802
        """Name the backend."""
        return "instant"

    @staticmethod
    def _done(result: list[Any]) -> Work:
        future: Future[list[Any]] = Future()
        future.set_result(result)
        return _create_work_from_future(future)


@contextlib.contextmanager
def pretend_ranks(world_size: int, device: torch.device = _CPU) -> Iterator[None]:
    """Make this process a rank of a group whose collectives change nothing.

    On a CPU they complete at once. On a GPU all-reduces are NCCL's, among this rank alone: its calls, streams and
    events, and no network.

    PyTorch has such a group, "fake", but its futures hold nothing, and PyTorch's PowerSGD hook needs what they hold.
    """

    def make(_: object, rank: int, size: int, __: object) -> dist.ProcessGroup:
        alone = None
        if device.type == "cuda":
            alone = dist.ProcessGroupNCCL(dist.HashStore(), 0, 1, dist.ProcessGroupNCCL.Options())
        return _InstantGroup(rank, size, alone)

    name = f"instant_{device.type}"
    if name.upper() not in dist.Backend.__dict__:
        dist.Backend.register_backend(name, make, devices=["cpu", "cuda"])
    dist.init_process_group(name, store=dist.HashStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
