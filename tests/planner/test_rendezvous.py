"""Tier one: where ranks meet, with threads for ranks and a store in memory."""

from __future__ import annotations

import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.distributed import HashStore

from lightning_powersgd.planner import rendezvous
from lightning_powersgd.planner.rendezvous import Meeting, Place, RendezvousError, find_place, open_store

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "node[003-007,010]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
}
SETTINGS = {"backend": "gloo", "argument --seconds": "10"}


def place_of(rank: int, world_size: int = 2, *, serves: bool = False, port: int = 0) -> Place:
    return Place(rank, world_size, rank, world_size, "127.0.0.1", port, serves)


def test_what_torchrun_says():
    assert find_place(TORCHRUN) == Place(3, 4, 1, 2, "node1", 29500, serves=False)
    first = {**TORCHRUN, "RANK": "0"}
    assert find_place(first).serves
    assert not find_place({**first, "TORCHELASTIC_USE_AGENT_STORE": "True"}).serves
    assert find_place({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}).attempt == "2"


@pytest.mark.parametrize(
    "nodes", ["node[003-007,010]", "node003,node010", "node[5,7]", "node1", "node1-eth[02-03],other", "a1"]
)
@pytest.mark.parametrize("job", ["1234567", "98"])
def test_slurm_is_read_as_lightning_reads_it(monkeypatch, nodes, job):
    environment = {**SLURM, "SLURM_NODELIST": nodes, "SLURM_JOB_ID": job}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theirs = SLURMEnvironment(auto_requeue=False)
    place = find_place(environment)
    assert (place.address, place.port) == (theirs.main_address, theirs.main_port)
    assert (place.rank, place.world_size) == (theirs.global_rank(), theirs.world_size()) == (3, 4)
    assert (place.local_rank, place.local_world_size) == (theirs.local_rank(), 2) == (1, 2)


def test_an_address_that_is_given_counts_under_slurm():
    place = find_place({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"})
    assert (place.address, place.port) == ("10.0.0.1", 12345)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {**SLURM, "SLURM_JOB_NAME": "interactive"},
        {**SLURM, "SLURM_JOB_NAME": "bash"},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_who_is_alone_has_no_place(environment):
    assert find_place(environment) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "one"}, "RANK='one' is not a number. Start this with torchrun or srun, which set it."),
        ({"RANK": "-1"}, "RANK='-1' is not a number."),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is not a number."),
        ({"RANK": "4"}, "RANK=4 is not a rank of WORLD_SIZE=4."),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set. Set it to the address of the machine of rank 0"),
        ({"MASTER_PORT": None}, "MASTER_PORT='' is not a number."),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a number."),
    ],
)
def test_variables_that_say_nothing(changed, message):
    environment = {name: value for name, value in {**TORCHRUN, **changed}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        find_place(environment)


def meet(*settings: dict[str, str] | None, timeout: float = 60.0, world_sizes=None) -> list[int | str]:
    """Let ranks meet: give the machines that each has counted, or why it left. ``None`` does not come."""
    store = HashStore()
    world_sizes = world_sizes or [len(settings)] * len(settings)

    def come(rank: int) -> int | str:
        try:
            with Meeting(store, place_of(rank, world_sizes[rank]), timeout) as meeting:
                return meeting.gather(settings[rank])
        except RendezvousError as error:
            return str(error)

    present = [rank for rank, theirs in enumerate(settings) if theirs is not None]
    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(come, present))


def test_ranks_that_agree_meet():
    assert meet(SETTINGS, SETTINGS, SETTINGS) == [1, 1, 1]


def test_machines_are_counted(monkeypatch):
    monkeypatch.setattr(rendezvous.platform, "node", lambda: threading.current_thread().name)
    (machines, _) = meet(SETTINGS, SETTINGS)
    assert machines == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_that_disagree_all_leave_with_one_message(name):
    said = meet(SETTINGS, SETTINGS, {**SETTINGS, name: "another"})
    message = f"The ranks disagree on {name}: rank 0 has {SETTINGS[name]}, rank 2 has another. Start every rank with"
    assert said == [f"{message} the same code, package versions and arguments."] * 3


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_does_not_come_ends_all(missing):
    settings = [None if rank == missing else SETTINGS for rank in range(3)]
    said = meet(*settings, timeout=0.2)
    assert (
        said
        == [f"Rank {missing} of 3 has not come within 0.2 s. Start all ranks within that time, or raise --timeout."] * 2
    )


def test_ranks_that_were_told_of_other_ranks_end_both():
    # The second one waits for a third, and would for long; the first one says why it need not.
    said = meet({**SETTINGS, "world size": "2"}, {**SETTINGS, "world size": "3"}, world_sizes=[2, 3])
    assert said[0] == said[1]
    assert "The ranks disagree on world size: rank 0 has 2, rank 1 has 3." in said[0]


def test_two_of_the_same_rank():
    store = HashStore()
    with Meeting(store, place_of(0), 60.0) as one, Meeting(store, place_of(0), 60.0) as other:
        store.add("taken/0", 1)
        with pytest.raises(RendezvousError, match=r"Two processes have the rank 0\. Give each its own"):
            other.gather(SETTINGS)
        with pytest.raises(RendezvousError, match="Two processes have the rank 0"):
            one.require_peace()


def test_the_first_refusal_counts():
    store = HashStore()
    with Meeting(store, place_of(1), 60.0) as meeting:
        meeting.require_peace()
        for message in ("first", "second"):
            with pytest.raises(RendezvousError, match="first"):
                meeting.refuse(message)
        with pytest.raises(RendezvousError, match="first"):
            meeting.gather(SETTINGS)


def test_who_serves_stays_until_all_have_read_why():
    store = HashStore()
    left = threading.Event()

    def serve() -> None:
        with Meeting(store, place_of(0, serves=True), 60.0):
            pass
        assert left.is_set()

    with Meeting(store, place_of(1), 60.0), ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        store.wait(["left/0"])
        left.set()
        store.set("left/1", "")
        serving.result()


def test_a_store_that_has_gone_is_said():
    class Gone(HashStore):
        def check(self, keys):
            raise RuntimeError("Connection reset by peer\nand a stack")

    meeting = Meeting(Gone(), place_of(1, port=29500), 60.0)
    with pytest.raises(RendezvousError) as refused:
        meeting.gather(SETTINGS)
    assert str(refused.value) == (
        "Rank 1 has lost the store at 127.0.0.1:29500 (Connection reset by peer). See what rank 0 says."
    )


def test_a_store_that_nobody_serves():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RendezvousError) as refused:
        open_store(place_of(1, port=port), timeout=0.1)
    assert f"Rank 1 cannot reach rank 0 at 127.0.0.1:{port} within 0.1 s (" in str(refused.value)
    assert "Start rank 0, check MASTER_ADDR and MASTER_PORT" in str(refused.value)


def test_a_name_that_no_machine_has():
    with pytest.raises(RendezvousError, match=r"Rank 1 cannot reach rank 0 at nowhere\.invalid:1 within 0\.1 s"):
        open_store(Place(1, 2, 1, None, "nowhere.invalid", 1, serves=False), timeout=0.1)


def test_a_port_that_is_taken():
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RendezvousError) as refused:
            open_store(place_of(0, serves=True, port=port), timeout=2)
    assert f"Rank 0 cannot open the store at 127.0.0.1:{port}: " in str(refused.value)
    assert "Set MASTER_PORT to a free one." in str(refused.value)
