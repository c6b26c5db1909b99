"""Tier four: processes that die, disks that fill, and signals, in the middle of training."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from packaging.version import Version
from programs import faulty_fit
from programs.faulty_fit import STEPS, After, fit
from terminal import run

# Most of a program's first seconds go into importing Lightning. This server does it once, and every rank is forked off.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning.pytorch"])


def by_hand(rank: int) -> dict[str, str]:
    return {"LOCAL_RANK": str(rank)}


def by_slurm(rank: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "test",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def start(root: Path, fault: str, launched: Callable[[int], dict[str, str]] = by_hand) -> list[tuple[int | None, str]]:
    """Run the program on two ranks; give the exit code of each, None if it hangs, and what it printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PATH": f"{root}{os.pathsep}{os.environ['PATH']}"}
    logs = [root / f"rank{rank}.txt" for rank in range(2)]
    processes = [
        SERVER.Process(target=_rank, args=(common | launched(rank), str(logs[rank]), str(root), fault))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _rank(environment: dict[str, str], log: str, root: str, fault: str) -> None:
    os.environ |= environment
    with open(log, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    faulty_fit.main(root, fault)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def errors(path: Path) -> dict[str, torch.Tensor]:
    """Give the error buffers of a checkpoint: all of them, or none."""
    saved = load(path)["powersgd"]["parameters"]
    found = {name: entry["error"] for name, entry in saved.items() if "error" in entry}
    assert len(found) in (0, len(saved))
    return found


def check_equal(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


def check_run(root: Path, expected: Path, first_step: int) -> None:
    """Check that a run started from a step, and came to the parameters of another, bit for bit."""
    for rank in range(2):
        left = load(root / f"rank{rank}.pt")
        assert left["first_step"] == first_step
        assert left["last_step"] == STEPS
        check_equal(left["parameters"], load(expected / f"rank{rank}.pt")["parameters"])


@pytest.fixture(scope="module")
def undisturbed(two_ranks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    two_ranks.run(fit, str(root))
    return root


# Processes that die


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_and_the_run_resumes(two_ranks, undisturbed, tmp_path, killed):
    ended = start(tmp_path, f"kill rank {killed}")
    code, said = ended[1 - killed]
    assert ended[killed][0] == -signal.SIGKILL
    assert code == 1, said
    assert "RuntimeError" in said
    two_ranks.run(fit, str(tmp_path))
    check_run(tmp_path, undisturbed, first_step=6)


def test_torchrun_restarts_and_the_run_ends_as_if_nothing_had_happened(undisturbed, tmp_path, monkeypatch):
    # Or else torchrun keeps its store over a restart, and a rank may find there where another was before it.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run([*launch, faulty_fit.__file__, str(tmp_path), "kill rank 1"], tmp_path)
    assert (tmp_path / "killed").exists()
    check_run(tmp_path, undisturbed, first_step=6)


# Checkpoints under difficulties


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(two_ranks, undisturbed, tmp_path):
    (code, said), (other_code, other_said) = start(tmp_path, "full disk")
    assert code == 1, said
    assert "OSError: [Errno 27]" in said
    assert other_code == 1, other_said
    assert (tmp_path / "last.ckpt").read_bytes() == (tmp_path / "before.ckpt").read_bytes()
    two_ranks.run(fit, str(tmp_path))
    check_run(tmp_path, undisturbed, first_step=3)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Give a directory on a filesystem of its own, of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root, to mount a filesystem that can be filled")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_elsewhere_than_temporary_files_leaves_the_checkpoint_before(ranks, small_disk):
    ranks[1].run(_save_twice, str(small_disk))
    assert load(small_disk / "kept.ckpt")["state_dict"]["net.2.weight"].count_nonzero() > 0


def _save_twice(root: str) -> None:
    class SaveAndFill(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(f"{root}/kept.ckpt")
            free = shutil.disk_usage(root).free
            other = Path(root, "other")
            other.write_bytes(bytes(free - Path(root, "kept.ckpt").stat().st_size // 2))
            pl_module.net[2].weight.data.zero_()
            with pytest.raises(OSError, match="No space left on device"):
                trainer.save_checkpoint(f"{root}/kept.ckpt")
            other.unlink()

    fit(root, SaveAndFill(), every=100, ckpt_path=None, devices=1)


def test_a_checkpoint_waits_for_a_rank_that_comes_late(two_ranks, undisturbed, tmp_path):
    two_ranks.run(_save_late, str(tmp_path))
    ours, theirs = (load(tmp_path / f"errors{rank}.pt") for rank in range(2))
    assert not torch.equal(ours["net.2.weight"], theirs["net.2.weight"])
    check_equal(errors(tmp_path / "last.ckpt"), {name: (ours[name] + theirs[name]) / 2 for name in ours})
    check_run(tmp_path, undisturbed, first_step=0)


def _save_late(root: str) -> None:
    store = dist.distributed_c10d._get_default_store()

    class ComeLate(Callback):
        def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
            torch.save(trainer.strategy.exchange.state.errors, f"{root}/errors{trainer.global_rank}.pt")
            key = f"{root}: rank 0 saves step {trainer.global_step}"
            if trainer.is_global_zero:
                store.set(key, "")
            else:
                store.wait([key])

    fit(root, ComeLate())


@pytest.mark.skipif(Version(lightning.__version__) < Version("2.5.4"), reason="Lightning writes tensors that change")
def test_a_checkpoint_written_while_training_goes_on_is_of_the_step_that_saved_it(two_ranks, undisturbed, tmp_path):
    two_ranks.run(_save_in_the_background, str(tmp_path))
    check_run(tmp_path, undisturbed, first_step=0)
    check_equal(errors(tmp_path / "last.ckpt"), errors(undisturbed / "last.ckpt"))
    two_ranks.run(fit, str(tmp_path))
    check_run(tmp_path, undisturbed, first_step=6)


def _save_in_the_background(root: str) -> None:
    trained = threading.Event()

    class SlowDisk(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            assert trained.wait(60)
            super().save_checkpoint(*args, **kwargs)

    fit(root, After(STEPS, lambda _: trained.set()), checkpoint_io=AsyncCheckpointIO(SlowDisk()))


# Signals


@pytest.fixture
def requeued(tmp_path) -> Callable[[], str]:
    """Note what SLURM is asked to do, in a program that stands in for SLURM's own."""
    notes = tmp_path / "scontrol.txt"
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{notes}"\n')
    program.chmod(0o755)
    return lambda: notes.read_text()


def test_a_requeued_job_goes_on_where_it_was(undisturbed, tmp_path, requeued):
    for first_step in (0, 3):
        ended = start(tmp_path, "requeue", by_slurm)
        assert [code for code, _ in ended] == [0, 0], ended
        check_run(tmp_path, undisturbed, first_step)
        assert requeued() == "requeue 4711\n"
        assert errors(tmp_path / "hpc_ckpt_1.ckpt")


def test_a_terminated_run_leaves_a_complete_checkpoint(two_ranks, tmp_path):
    expected = tmp_path / "expected"
    two_ranks.run(fit, str(expected), every=4)
    ended = start(tmp_path, "terminate")
    assert [code for code, _ in ended] == [0, 0], ended
    saved = tmp_path / "on_exception.ckpt"
    assert load(saved)["global_step"] == 4
    assert errors(saved)
    two_ranks.run(fit, str(tmp_path), every=4, ckpt_path=str(saved))
    check_run(tmp_path, expected, first_step=4)


def test_a_checkpoint_that_one_rank_saves_alone_holds_nobody_up(undisturbed, tmp_path, requeued):
    ended = start(tmp_path, "requeue by rank 0 alone", by_slurm)
    assert [code for code, _ in ended] == [0, 0], ended
    saved = tmp_path / "hpc_ckpt_1.ckpt"
    assert load(saved)["global_step"] == 4
    assert not errors(saved)
    assert requeued() == "requeue 4711\n"
    # The next checkpoint, to which both ranks come, is complete.
    check_equal(errors(tmp_path / "last.ckpt"), errors(undisturbed / "last.ckpt"))
    check_run(tmp_path, undisturbed, first_step=0)
