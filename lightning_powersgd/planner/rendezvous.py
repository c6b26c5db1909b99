"""Where the ranks of a probe meet before they are a process group: whatever starts them, and whoever does not come.

All of it goes through a key-value store that rank 0 or a launcher serves. Nothing here is a collective, which would
hang where a rank is missing, or fail obscurely where two of them disagree.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from typing_extensions import Self

from lightning_powersgd.exchange.agreement import require_same

# How long who serves the store stays for those that have not read yet why all of them leave.
_FAREWELL_SECONDS = 5.0
_GLANCE_SECONDS = 0.05

_LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
_PREFIX = "lightning_powersgd/probe"

# Of SLURM's jobs in which a shell is what runs, with the variables of its tasks around it.
_SHELLS = ("bash", "interactive")


class RendezvousError(RuntimeError):
    """The ranks did not come together; the message says why, in one line, and is the same on every rank that came."""


@dataclass(frozen=True)
class Place:
    """What a launcher has told this process.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        local_rank: of this process among those of its machine.
        local_world_size: ranks of this machine, if they are known.
        address: of the machine that serves the store.
        port: of the store.
        serves: whether this process makes the store.
        attempt: how often the launcher has started the ranks before.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None
    address: str
    port: int
    serves: bool
    attempt: str = "0"


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Find what torchrun, or SLURM in the way that Lightning reads it, has said.

    Args:
        environment: variables of this process.

    Returns:
        ``None`` if no launcher started this process, or one that started it alone.

    Raises:
        ValueError: if a variable is missing, or is no number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _place(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in _SHELLS:
        return _place(_as_lightning_does(environment), "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    return None


def _place(environment: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> Place | None:
    number, count = _number(environment, rank), _number(environment, world_size)
    if number >= count:
        raise ValueError(f"{rank}={number} is not a rank of {world_size}={count}. Start this with torchrun or srun.")
    if count == 1:
        return None
    if "MASTER_ADDR" not in environment:
        raise ValueError("MASTER_ADDR is not set. Set it to the address of the machine of rank 0, as torchrun does.")
    return Place(
        rank=number,
        world_size=count,
        local_rank=_number(environment, local_rank) if local_rank in environment else 0,
        local_world_size=_number(environment, _LOCAL_WORLD_SIZE) if _LOCAL_WORLD_SIZE in environment else None,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        serves=number == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _as_lightning_does(environment: Mapping[str, str]) -> dict[str, str]:
    """Add the address and the port that Lightning takes under SLURM: the first machine, and a port of the job's own."""
    # node[003-007,010] begins with node003, and so does node003,node010.
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", environment.get("SLURM_NODELIST", "127.0.0.1")).split(",")[0]
    port = 15000 + int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", ""))[-4:] or 0)
    added = {"MASTER_ADDR": first, "MASTER_PORT": str(port)}
    if "SLURM_NTASKS_PER_NODE" in environment:
        added[_LOCAL_WORLD_SIZE] = environment["SLURM_NTASKS_PER_NODE"]
    return {**added, **environment}


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r} is not a number. Start this with torchrun or srun, which set it.")
    return int(value)


@contextlib.contextmanager
def start_ranks(processes: int, arguments: Sequence[str], timeout: float) -> Iterator[tuple[Place, Store]]:
    """Start this program once more for every other rank on this machine, and end them at the end.

    Args:
        processes: number of ranks, this process among them.
        arguments: of the program.
        timeout: seconds for which the others are waited for when all is done.

    Yields:
        The place of this process, and the store.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    place = Place(0, processes, 0, processes, "127.0.0.1", store.port, serves=True)
    others = []
    try:
        for rank in range(1, processes):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {_LOCAL_WORLD_SIZE: str(processes), "TORCHELASTIC_RESTART_COUNT": place.attempt}
            variables |= {"MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
            command = [sys.executable, "-m", "lightning_powersgd", *arguments]
            # Rank 0 speaks for all, since they hear the same.
            nowhere = subprocess.DEVNULL
            others.append(subprocess.Popen(command, env=os.environ | variables, stdout=nowhere, stderr=nowhere))
        yield place, PrefixStore(f"{_PREFIX}/{place.attempt}", store)
    finally:
        for other in others:
            other.kill()
            other.wait()


def open_store(place: Place, timeout: float) -> Store:
    """Serve the store, or connect to it.

    Args:
        place: of this process.
        timeout: seconds.

    Raises:
        RendezvousError: if that cannot be done in time.
    """
    where, deadline = f"{place.address}:{place.port}", time.monotonic() + timeout
    while not place.serves:
        # TCPStore waits as well, and writes a line on stderr for each attempt.
        try:
            with socket.create_connection((place.address, place.port), max(deadline - time.monotonic(), 0.01)):
                break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"Rank {place.rank} cannot reach rank 0 at {where} within {timeout:g} s ({error}). Start rank 0,"
                    " check MASTER_ADDR and MASTER_PORT, and open that port between the machines."
                ) from error
            time.sleep(_GLANCE_SECONDS)
    try:
        store = TCPStore(
            place.address,
            place.port,
            is_master=place.serves,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(deadline - time.monotonic(), 1.0)),
        )
    except RuntimeError as error:
        remedy = "Set MASTER_PORT to a free one" if place.serves else "Check MASTER_ADDR and MASTER_PORT"
        raise RendezvousError(
            f"Rank {place.rank} cannot open the store at {where}: {first_line(error)}. {remedy}."
        ) from error
    return PrefixStore(f"{_PREFIX}/{place.attempt}", store)


class Meeting:
    """The ranks, from the moment that they look for each other until they part.

    Args:
        store: that all of them reach.
        place: of this process.
        timeout: seconds for which a rank waits for the others.
    """

    def __init__(self, store: Store, place: Place, timeout: float) -> None:
        self.store = store
        self.place = place
        self._timeout = timeout

    def __enter__(self) -> Self:
        with self._connected():
            self.store.set(f"came/{self.place.rank}", "")
        return self

    def __exit__(self, *error: object) -> None:
        """Leave; who serves the store waits a moment for the others that came."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.place.rank}", "")
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while self.place.serves and time.monotonic() < deadline and not self._all_have_left():
                time.sleep(_GLANCE_SECONDS)

    def gather(self, settings: Mapping[str, str]) -> int:
        """Wait for all ranks, and compare what they were started with.

        Args:
            settings: what every rank must have alike, by name.

        Returns:
            The number of machines.

        Raises:
            RendezvousError: on every rank that came: if one does not come, refuses, or has other settings.
        """
        with self._connected():
            if self.store.add(f"taken/{self.place.rank}", 1) > 1:
                self.refuse(
                    f"Two processes have the rank {self.place.rank}. Give each its own, as torchrun and srun do."
                )
            self.store.set(f"rank/{self.place.rank}", json.dumps({"settings": settings, "machine": platform.node()}))
            deadline = time.monotonic() + self._timeout
            everyone: list[dict[str, Any]] = []
            for rank in range(self.place.world_size):
                everyone.append(self._hear(rank, deadline))
                try:
                    require_same([theirs["settings"] for theirs in everyone])
                except RuntimeError as error:
                    self.refuse(str(error))
            return len({theirs["machine"] for theirs in everyone})

    def refuse(self, message: str) -> NoReturn:
        """Let every rank leave with this message, or with an earlier one.

        Raises:
            RendezvousError: always.
        """
        with self._connected():
            said: bytes = self.store.compare_set("refused", "", message)
        raise RendezvousError(said.decode())

    def require_peace(self) -> None:
        """Make sure that no rank has refused.

        Raises:
            RendezvousError: if one has.
        """
        with self._connected():
            if self.store.check(["refused"]):
                raise RendezvousError(self.store.get("refused").decode())

    def _all_have_left(self) -> bool:
        came = [rank for rank in range(self.place.world_size) if self.store.check([f"came/{rank}"])]
        return all(self.store.check([f"left/{rank}"]) for rank in came)

    def _hear(self, rank: int, deadline: float) -> dict[str, Any]:
        while not self.store.check([f"rank/{rank}"]):
            self.require_peace()
            if time.monotonic() > deadline:
                self.refuse(
                    f"Rank {rank} of {self.place.world_size} has not come within {self._timeout:g} s. Start all ranks"
                    " within that time, or raise --timeout."
                )
            time.sleep(_GLANCE_SECONDS)
        said: dict[str, Any] = json.loads(self.store.get(f"rank/{rank}"))
        return said

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Tell from other errors that the store has gone, with the process that served it."""
        try:
            yield
        except RendezvousError:
            raise
        except RuntimeError as error:
            raise RendezvousError(
                f"Rank {self.place.rank} has lost the store at {self.place.address}:{self.place.port}"
                f" ({first_line(error)}). See what rank 0 says."
            ) from error


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
