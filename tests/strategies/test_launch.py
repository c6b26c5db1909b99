"""Tier four: programs started as a user starts them, and the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from models import Classifier
from terminal import run

from lightning_powersgd import PowerGossipStrategy, PowerSGDModelParallelStrategy, PowerSGDStrategy

# LightningCLI itself uses what jsonargparse has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROGRAM = Path(__file__).parents[1] / "programs" / "fit.py"


def check(root: Path) -> None:
    left = [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["world_size"] for rank in left] == [2, 2]
    assert [rank["step"] for rank in left] == [6, 6]
    assert left[0]["ratio"] == left[1]["ratio"] > 5
    for name, parameter in left[0]["parameters"].items():
        assert torch.equal(parameter, left[1]["parameters"][name])


@pytest.mark.lost_by_pytorchs_hook('`start_method="spawn"` crashes')
@pytest.mark.parametrize("strategy", ["powersgd", "powersgd_spawn", "powersgd_fork", "powersgd_notebook"])
def test_start_methods(tmp_path, strategy):
    run([sys.executable, str(PROGRAM), strategy, str(tmp_path)], tmp_path)
    check(tmp_path)
    assert (tmp_path / "after.ckpt").exists() == (strategy != "powersgd")


def test_torchrun(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run([*launch, str(PROGRAM), "powersgd", str(tmp_path)], tmp_path)
    check(tmp_path)


@pytest.fixture
def strategy_of(monkeypatch):
    """Give the strategy that a LightningCLI makes of a command line."""

    def make(args: list[str]) -> PowerSGDStrategy | PowerGossipStrategy | PowerSGDModelParallelStrategy:
        common = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]
        monkeypatch.setattr(sys, "argv", ["train.py", *common, *args])
        cli = LightningCLI(Classifier, run=False, save_config_callback=None, seed_everything_default=0)
        strategy = cli.trainer.strategy
        assert isinstance(strategy, PowerSGDStrategy | PowerGossipStrategy | PowerSGDModelParallelStrategy)
        return strategy

    return make


def write_yaml(root: Path, strategy: Any) -> list[str]:
    (root / "config.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    return ["--config", str(root / "config.yaml")]


def test_name_flag_and_yaml_give_the_same_strategy(strategy_of, tmp_path):
    forms = [
        ["--trainer.strategy", "powersgd"],
        ["--trainer.strategy", "PowerSGDStrategy"],
        ["--trainer.strategy", "PowerSGDStrategy", "--trainer.strategy.rank", "auto"],
        ["--trainer.strategy", "lightning_powersgd.PowerSGDStrategy", "--trainer.strategy.rank", "auto"],
        write_yaml(tmp_path, "powersgd"),
    ]
    for form in forms:
        assert strategy_of(form).config == PowerSGDStrategy().config, form


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 4},
        {"rank": {"net.0.*": 0, "*": 1}, "start_step": 100},
        {"alternate": True, "error_feedback": False, "warm_start": False, "seed": 7, "min_compression_ratio": 4.0},
        {"error_dtype": "bfloat16", "comm_dtype": "float16"},
        {"comm_dtype": "int8"},
        {"comm_dtype": {"P": "int4", "Q": "int8"}},
        {"turnaround": 12.5},
        {"max_bytes": 100_000},
        {"rank": {"net.0.*": "auto", "*": 1}},
    ],
    ids=str,
)
def test_arguments_arrive_from_flags_and_yaml_alike(strategy_of, tmp_path, arguments):
    flags = ["--trainer.strategy", "PowerSGDStrategy"]
    for name, value in arguments.items():
        flags += [f"--trainer.strategy.{name}", value if isinstance(value, str) else json.dumps(value)]
    expected = PowerSGDStrategy(**arguments).config
    assert strategy_of(flags).config == expected
    in_yaml = {"class_path": "lightning_powersgd.PowerSGDStrategy", "init_args": arguments}
    assert strategy_of(write_yaml(tmp_path, in_yaml)).config == expected


def test_arguments_of_ddp_arrive_too(strategy_of):
    flags = ["--trainer.strategy=PowerSGDStrategy", "--trainer.strategy.find_unused_parameters=true"]
    strategy = strategy_of([*flags, "--trainer.strategy.bucket_cap_mb=5", "--trainer.strategy.timeout=0:10:00"])
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 5


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="sharded models need torch 2.6")
def test_the_strategy_for_sharded_models_is_made_by_name_flag_and_yaml(strategy_of, tmp_path):
    for form in (["--trainer.strategy=powersgd_model_parallel"], write_yaml(tmp_path, "powersgd_model_parallel")):
        assert strategy_of(form).config == PowerSGDModelParallelStrategy().config
    name = "PowerSGDModelParallelStrategy"
    flags = [f"--trainer.strategy={name}", "--trainer.strategy.rank=4", "--trainer.strategy.replicas=2"]
    in_yaml = {"class_path": f"lightning_powersgd.{name}", "init_args": {"rank": 4, "replicas": 2}}
    for form in (flags, write_yaml(tmp_path, in_yaml)):
        strategy = strategy_of(form)
        assert (strategy.config.rank, strategy.replicas) == (4, 2)


@pytest.mark.parametrize(("flag", "message"), [("rank=0", "below 1"), ("no_such=1", "no_such"), ("rank=x", "rank")])
def test_bad_flags_end_the_program_with_a_message(strategy_of, capsys, flag, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        strategy_of(["--trainer.strategy=PowerSGDStrategy", f"--trainer.strategy.{flag}"])
    assert message in capsys.readouterr().err + str(caught.value)


def test_help_lists_every_argument_with_its_text(strategy_of, capsys):
    with pytest.raises(SystemExit) as caught:
        strategy_of(["--trainer.strategy.help=PowerSGDStrategy"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "rank": "columns kept of each factor",
        "start_step": "averaged exactly before compression starts",
        "min_compression_ratio": "dense / sent ratio is below this",
        "alternate": "only one of the two factors",
        "error_feedback": "what one step did not send",
        "warm_start": "instead of a random one",
        "error_dtype": "dtype of the error buffers",
        "comm_dtype": "dtype of the factors on the wire",
        "seed": "of the first random factors",
        "log_metrics": "without any callback being added",
        "prog_bar": "in the progress bar",
        "checkpoint_error_feedback": "put the error buffers into checkpoints",
        "find_unused_parameters": "that the loss does not depend on",
        "timeout": "of collectives",
    }.items():
        assert f"--trainer.strategy.{name} " in text, name
        assert words in text, name


def test_every_form_gives_the_same_gossip(strategy_of, tmp_path):
    forms = [
        ["--trainer.strategy", "powergossip"],
        ["--trainer.strategy", "PowerGossipStrategy"],
        ["--trainer.strategy", "lightning_powersgd.PowerGossipStrategy", "--trainer.strategy.rank", "1"],
        write_yaml(tmp_path, "powergossip"),
    ]
    for form in forms:
        strategy = strategy_of(form)
        assert type(strategy) is PowerGossipStrategy, form
        assert settings(strategy) == settings(PowerGossipStrategy()), form


def settings(strategy: PowerGossipStrategy) -> tuple[Any, ...]:
    return strategy.config, strategy._graph, strategy._weights, strategy.average_model


@pytest.mark.parametrize(
    "arguments",
    [
        {"topology": "star", "rank": 2},
        {"topology": [[0, 1], [1, 2]], "iterations": 2, "overlap": True},
        {"topology": [[0, 1]], "weights": [[0.75, 0.25], [0.25, 0.75]], "average_model": False},
        {"rank": {"net.0.*": 0, "*": 1}, "min_compression_ratio": 4.0, "seed": 7},
    ],
    ids=str,
)
def test_arguments_of_gossip_arrive_from_flags_and_yaml_alike(strategy_of, tmp_path, arguments):
    flags = ["--trainer.strategy", "PowerGossipStrategy"]
    for name, value in arguments.items():
        flags += [f"--trainer.strategy.{name}", value if isinstance(value, str) else json.dumps(value)]
    expected = settings(PowerGossipStrategy(**arguments))
    assert settings(strategy_of(flags)) == expected
    in_yaml = {"class_path": "lightning_powersgd.PowerGossipStrategy", "init_args": arguments}
    assert settings(strategy_of(write_yaml(tmp_path, in_yaml))) == expected


@pytest.mark.parametrize(
    ("flag", "message"), [("rank=0", "below 1"), ("no_such=1", "no_such"), ("topology=rnig", "Did you mean 'ring'?")]
)
def test_bad_flags_of_gossip_end_the_program_with_a_message(strategy_of, capsys, flag, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        strategy_of(["--trainer.strategy=PowerGossipStrategy", f"--trainer.strategy.{flag}"])
    assert message in capsys.readouterr().err + str(caught.value)


def test_help_lists_every_argument_of_gossip_with_its_text(strategy_of, capsys):
    with pytest.raises(SystemExit) as caught:
        strategy_of(["--trainer.strategy.help=PowerGossipStrategy"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, words in {
        "topology": "who talks to whom",
        "rank": "columns kept of each factor",
        "iterations": "rounds of gossip a step",
        "min_compression_ratio": "dense / sent ratio of a round is below this",
        "overlap": "travel while the next step computes",
        "weights": "the mixing matrix",
        "average_model": "the average of the ranks' models",
        "comm_dtype": "factors travel in so many bits",
        "seed": "of the random factors",
        "log_metrics": "without any callback being added",
        "prog_bar": "in the progress bar",
        "timeout": "how long a rank waits for a neighbour",
    }.items():
        assert f"--trainer.strategy.{name} " in text, name
        assert words in text, name
