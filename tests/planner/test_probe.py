"""Tiers two and four: the program `lightning-powersgd probe`, with real ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
from terminal import run
from torch.distributed import TCPStore

from lightning_powersgd.exchange.link import Link
from lightning_powersgd.planner.command import main
from lightning_powersgd.planner.link_file import read_link, write_link
from lightning_powersgd.planner.probe import Medium, Patience, choose_medium

MODEL = """
import os
from torch import nn


def build(width=300):
    print("a program may print what it likes")
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
"""
# As short as it can be: two sizes.
SHORT = "--seconds=0.001"


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A folder with a model, in which no launcher has started the program."""
    (tmp_path / "zoo.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def refused(zoo, capsys):
    """Call the program with what it must refuse; give the one line that it says."""

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["probe", *arguments])
        assert left.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = [text for text in said.err.splitlines() if text != "a program may print what it likes"]
        assert line.startswith("lightning-powersgd probe: ")
        return line.removeprefix("lightning-powersgd probe: ")

    return call


def test_by_itself_on_one_machine_and_back_into_the_plan(zoo, capsys):
    assert main(["probe", "--seconds=0.2", "--json", "--link-file=link.json"]) == 0
    content = json.loads(capsys.readouterr().out)
    written = json.loads((zoo / "link.json").read_text())
    assert content == {
        **written,
        "machines": 1,
        "backend": "gloo",
        "device": "cpu",
        "target": None,
        "answer": None,
    }
    assert content["world_size"] == 2
    assert content["latency_seconds"] >= 0
    assert content["bits_per_second"] > 0
    sizes = [sample["payload_bytes"] for sample in content["samples"]]
    assert sizes == [4096 * 4**place for place in range(len(sizes))]
    assert set(content["samples"][0]) == {
        "payload_bytes",
        "seconds",
        "low_seconds",
        "high_seconds",
        "repetitions",
        "bits_per_second",
    }

    arguments = ["plan", "zoo.py:build", "--rank=2", "--json", "--compress-seconds=0", "--link-file=link.json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["world_size"] == 2
    assert plan["latency_seconds"] == content["latency_seconds"]
    assert [link["bits_per_second"] for link in plan["links"]] == [content["bits_per_second"]]
    # What the command line says itself counts.
    assert main([*arguments, "--world-size=16", "--latency=0.5", "--link=1gbit"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["world_size"], plan["latency_seconds"]) == (16, 0.5)
    assert [link["bits_per_second"] for link in plan["links"]] == [content["bits_per_second"], 1e9]


def test_a_table_for_a_model(zoo, capsys):
    assert main(["probe", "zoo.py:build", "--init=width=200", SHORT, "--step-seconds=0.1", "--processes=3"]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == "3 processes on 1 machine, gloo, cpu"
    assert "all-reduce of median quartiles each way fitted" in rows
    assert any(row.startswith("4.1 kB ") for row in rows)
    assert any(
        re.match(r"Latency .* bandwidth .* each way \(the quartiles of the largest message are ", row) for row in rows
    )
    assert "exchange sent takes = computing + network step saves" in rows
    exchanges = [row.split(" kB")[0].rpartition(" ")[0] for row in rows if row.startswith(("DDP", "PowerSGD, "))]
    assert exchanges == ["DDP", "DDP, bf16 hook"] + [f"PowerSGD, rank {rank}" for rank in ("auto", 1, 2, 4, 8)]
    assert any(row.startswith(("Best setting: PowerSGDStrategy(", "Stay with DDP")) for row in rows)
    assert any("was measured on this CPU with 1 thread, by all processes at once." in row for row in rows)
    assert any(row.startswith("All processes give their machine the same name") for row in rows)


def test_torchrun(zoo):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    options = ["zoo.py:build", "--rank=2", "--compress-seconds=0.001", SHORT, "--json"]
    said = run([*command, "-m", "lightning_powersgd", "probe", *options], zoo)
    content, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert said.count('"format_version"') == 1
    assert content["world_size"] == 2
    assert content["target"] == "zoo.py:build"
    assert [option["rank"] for option in content["answer"]["options"]] == ["2"]
    assert content["answer"]["options"][0]["compress_seconds"] == 0.001


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["--seconds=2"], "The ranks disagree on argument --seconds: rank 0 has 1, rank 1 has 2."),
        (["gone.py:Net"], "Rank 1: There is no file gone.py."),
    ],
)
def test_ranks_that_disagree_all_end_with_one_line(zoo, second, message):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    processes = []
    for rank, arguments in enumerate([["--seconds=1"], second]):
        variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-m", "lightning_powersgd", "probe", *arguments]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    for process in processes:
        said, complained = process.communicate(timeout=240)
        assert process.returncode == 2
        assert said == ""
        (line,) = complained.splitlines()
        assert line.startswith(f"lightning-powersgd probe: {message}")


def test_a_rank_that_does_not_come(refused, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert refused("--timeout=0.2").startswith("Rank 1 of 2 has not come within 0.2 s. Start all ranks")


def test_a_first_rank_that_cannot_be_reached(refused, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert refused("--timeout=0.2").startswith("Rank 1 cannot reach rank 0 at 127.0.0.1:1 within 0.2 s (")


def test_ranks_that_meet_but_do_not_hear_each_other(zoo, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "not-there")
    # In a process of its own: PyTorch counts process groups, also those that it could not make.
    said = run([sys.executable, "-m", "lightning_powersgd", "probe", SHORT], zoo, fails=True).splitlines()[-1]
    assert said.startswith("lightning-powersgd probe: Rank 0 has met the others, but not heard them over gloo: ")
    assert said.endswith(
        "Name the network interface with GLOO_SOCKET_IFNAME, and open the ports between the machines. If a rank has"
        " failed, see what it says."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds=0"], "`seconds=0.0` is not a time. Give seconds, such as 10."),
        (["--seconds=inf"], "`seconds=inf` is not a time."),
        (["--seconds=some"], "argument --seconds: invalid float value: 'some'"),
        (["--timeout=-1"], "`timeout=-1.0` is not a time."),
        (["--timeout=nan"], "`timeout=nan` is not a time."),
        (["--processes=1"], "`processes=1` is below 2. A single rank has nobody to send to."),
        (["--processes=two"], "argument --processes: invalid int value: 'two'"),
        (["--backend=mpi"], "argument --backend: invalid choice: 'mpi'"),
        (
            ["--device=cpu", "--backend=nccl"],
            "--backend nccl sends from GPUs only. Use --device cuda, or --backend gloo.",
        ),
        (["--rank=2"], "--rank, --init and --step-seconds are about a model. Name one"),
        (["--init=width=2"], "--rank, --init and --step-seconds are about a model."),
        (["--step-seconds=1"], "--rank, --init and --step-seconds are about a model."),
        (["zoo.py:build", "--step-seconds=0"], "`step_seconds=0.0` is not the time of a step."),
        (["zoo.py:build", "--rank=0"], "`rank=0` is below 1."),
        (["zoo.py:built"], "zoo has no built. Did you mean build?"),
        (["gone.py:Net"], "There is no file gone.py."),
        (["--link-file=no/link.json"], "--link-file no/link.json: there is no such folder. Make it first."),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_end_in_one_line(refused, arguments, message):
    if "--colour" in arguments:
        with pytest.raises(SystemExit):
            main(["probe", *arguments])
        return
    assert refused(*arguments).startswith(message)


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, [], "RANK=2 is not a rank of WORLD_SIZE=2."),
        ({"RANK": "0", "WORLD_SIZE": "2"}, [], "MASTER_ADDR is not set."),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
            ["--processes=3"],
            "--processes 3: a launcher has started 2. Leave it out.",
        ),
    ],
)
def test_a_launcher_that_says_something_else(refused, monkeypatch, environment, arguments, message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refused(*arguments).startswith(message)


def test_a_model_that_cannot_be_forecast_ends_all(refused, zoo):
    (zoo / "zoo.py").write_text("import torch\nfrom torch import nn\nfrozen = nn.Linear(3, 3).requires_grad_(False)\n")
    assert refused("zoo.py:frozen", SHORT).startswith("The model has no trainable parameter")


@pytest.mark.parametrize(
    ("gpus", "given", "local_ranks", "chosen"),
    [
        (0, (None, None), 2, ("gloo", "cpu")),
        (2, (None, None), 2, ("nccl", "cuda")),
        (2, (None, None), None, ("nccl", "cuda")),
        (1, (None, None), 2, ("gloo", "cuda")),
        (1, (None, "cpu"), 2, ("gloo", "cpu")),
        (1, ("nccl", None), 2, ("nccl", "cuda")),
        (2, ("gloo", None), 2, ("gloo", "cuda")),
    ],
)
def test_what_training_would_send_through(monkeypatch, gpus, given, local_ranks, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert choose_medium(*given, local_ranks) == Medium(*chosen)


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda: torch finds no GPU\. Use --device cpu\."):
        choose_medium(None, "cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match=r"--backend nccl: this build of torch lacks it\."):
        choose_medium("nccl", "cuda", 2)


def test_patience_ends_what_is_stuck(monkeypatch, capsys):
    over = threading.Event()
    monkeypatch.setattr("lightning_powersgd.planner.probe._GRACE_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: over.set())
    with Patience(0.0, "Rank 0 has heard nothing.") as patience:
        assert over.wait(60)
        assert capsys.readouterr().err == "lightning-powersgd probe: Rank 0 has heard nothing.\n"
        patience.renew()
    with Patience(1000.0, "never"):
        pass


def test_the_file_of_a_link(tmp_path):
    link = Link(4, 1e-4, 9.5e8)
    write_link(tmp_path / "link.json", link)
    assert read_link(tmp_path / "link.json") == link


GOOD = {"format_version": 1, "world_size": 2, "latency_seconds": 1e-4, "bits_per_second": 1e9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "link.json is not the file of a link. Write one with `lightning-powersgd probe`."),
        ("[1]", "link.json is not the file of a link."),
        ({}, "link.json is not the file of a link."),
        ({**GOOD, "latency_seconds": None}, "link.json is not the file of a link."),
        ({**GOOD, "format_version": 2}, "link.json has the format 2, not 1. Write it anew"),
        ({**GOOD, "world_size": 1}, "link.json holds figures that no link has."),
        ({**GOOD, "latency_seconds": -1}, "link.json holds figures that no link has."),
        ({**GOOD, "bits_per_second": 0}, "link.json holds figures that no link has."),
        ({**GOOD, "bits_per_second": float("inf")}, "link.json holds figures that no link has."),
        (None, "[Errno 2] No such file or directory: 'link.json'"),
    ],
)
def test_files_that_are_no_link(zoo, capsys, content, message):
    if content is not None:
        (zoo / "link.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(SystemExit) as left:
        main(["plan", "zoo.py:build", "--link-file=link.json"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-powersgd plan: {message}")
