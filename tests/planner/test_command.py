"""Tier one: the program `lightning-powersgd`, called in this process; and once as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from terminal import run
from torch import nn

from lightning_powersgd import PowerSGDConfig, PowerSGDState, forecast_exchange
from lightning_powersgd.planner.command import main

MODELS = """
import lightning.pytorch as pl
import torch
from torch import nn

print("a program may print what it likes")


class Net(nn.Module):
    def __init__(self, width: int, layers: int = 4, bias: bool = True, name="net"):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(layers))
        self.head = nn.Conv2d(64, 32, 3)


class Fixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(100, 50))


class LateModule(pl.LightningModule):
    def configure_model(self):
        self.layer = nn.Linear(100, 50)


class NeedsValues(nn.Linear):
    def __init__(self):
        super().__init__(100, 50)
        self.scale = float(self.weight.abs().max())


class Refuses(nn.Module):
    def __init__(self, width=0):
        raise ValueError(f"a width of {width}\\nis too small")


class Silent(nn.Module):
    def __init__(self):
        raise RuntimeError


def build(width=100, **options):
    assert options in ({}, {"spare": 1})
    return nn.Linear(width, width)


def no_model():
    return {"width": 3}


made = nn.Linear(100, 50)
number = 3
"""
GIVEN = ["--compress-seconds=0.03"]


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A folder with `zoo.py`, in which the program is started."""
    (tmp_path / "zoo.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("zoo", None)


@pytest.fixture
def plan(zoo, capsys):
    """Call the program; give what it printed."""

    def call(*arguments: str) -> str:
        assert main(["plan", *GIVEN, *arguments]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(zoo, capsys):
    """Call the program with what it must refuse; give the one line that it says."""

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(["plan", *GIVEN, *arguments])
        assert left.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = [text for text in said.err.splitlines() if text != "a program may print what it likes"]
        program, _, message = line.partition(": ")
        assert program in ("lightning-powersgd", "lightning-powersgd plan")
        return message

    return call


def names(printed: str) -> list[str]:
    return [entry["name"] for entry in json.loads(printed)["parameters"]]


@pytest.mark.parametrize("target", ["zoo:Net", "zoo.py:Net", "./zoo.py:Net"])
def test_a_table_of_a_class(plan, target):
    printed = plan(target, "--rank=2", "--init", "width=512", "--link", "1gbit", "--link", "100gbit")
    assert printed.startswith("Net, rank 2, 8 processes\n")
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    assert "parameter shape matrix sent before after ratio" in rows
    assert "4 × blocks.*.weight 512×512 512×512 rank 2 4.19 MB 32.8 kB 128×" in rows
    assert "4 × blocks.*.bias 512 whole 8.19 kB 8.19 kB 1×" in rows
    assert "head.weight 32×64×3×3 32×576 rank 2 73.7 kB 4.86 kB 15.2×" in rows
    assert "10 parameters 1,069,088 4.28 MB 46 kB 93.1×" in rows
    assert "PowerSGD compresses 5 of 10 trainable parameters: 4.28 MB" in printed
    assert "1gbit" in printed
    assert "100gbit: PowerSGD would not pay here. It takes 32.8 ms, the bf16 hook 3.1 ms." in printed
    assert "Computing was given, and the hook's casts count as free." in printed
    assert "Left out:" in printed
    assert "\x1b" not in printed


def test_every_parameter_has_a_row_if_asked_for(plan):
    printed = plan("zoo:Net", "--init=width=512", "--all")
    assert all(f"blocks.{layer}.weight " in printed for layer in range(4))
    assert "blocks.*" not in printed


@pytest.mark.parametrize("width", [80, 120])
def test_names_are_whole_at_any_width(plan, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    printed = plan("zoo:Net", "--init=width=512", "--init=layers=2", "--rank=*=2")
    assert max(map(len, printed.splitlines())) <= width
    assert "2 × blocks.{0,1}.weight" in "".join(line[: width - 45].strip() for line in printed.splitlines())


def test_a_terminal_has_colours(plan, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in plan("zoo:Fixed")


def test_the_speed_up_of_a_step(plan):
    printed = plan("zoo:Net", "--rank=2", "--init=width=512", "--step-seconds=0.1", "--link=10gbit", "--link=10mbit")
    rows = {line.split()[0]: line.split()[1:] for line in printed.split("without any exchange")[1].splitlines() if line}
    assert rows["10gbit"][-3:] == ["0.75", "to", "0.80×"]
    assert rows["10mbit"][-1] == "15.7×"


def test_nothing_to_compress_is_said(plan):
    printed = plan("zoo:Fixed", "--rank=*.bias=2")
    assert "Nothing is compressed" in printed
    assert "all-reduce" not in printed


def test_json_is_the_forecast(plan, monkeypatch):
    # What only the tables need may be missing.
    monkeypatch.setattr(importlib.util, "find_spec", _without("rich", "matplotlib"))
    options = ["--link=1gbit", "--world-size=4", "--step-seconds=0.5", "--comm-dtype=bfloat16", "--alternate"]
    content = json.loads(plan("zoo:Fixed", "--json", "--rank=2", *options))
    assert set(content) == {
        "format_version",
        "lightning_powersgd",
        "target",
        "settings",
        "world_size",
        "shards",
        "hierarchy",
        "latency_seconds",
        "step_seconds",
        "compress_seconds",
        "compress_measured_on",
        "cast_seconds",
        "break_even_bits_per_second",
        "totals",
        "parameters",
        "links",
    }
    assert content["format_version"] == 1
    assert content["settings"] == PowerSGDConfig(rank=2, alternate=True, comm_dtype="bfloat16").to_dict()
    expected = forecast_exchange(
        nn.Sequential(nn.Linear(100, 50)),
        PowerSGDConfig(rank=2, alternate=True, comm_dtype="bfloat16"),
        world_size=4,
        compress_seconds=0.03,
    )
    assert content["totals"] == {
        "parameters": 2,
        "compressed": 1,
        "frozen": 0,
        "elements": 5050,
        "dense_bytes": 20_200,
        "sent_bytes": 500,
        "compression_ratio": 20_200 / 500,
        "turnaround_steps": 50,
        "error_bytes": expected.error_bytes,
        "bytes_in_node": 0,
        "sent_bytes_along_longest": None,
        "dense_payloads": [20_200],
        "bf16_payloads": [10_100],
        "payloads": [200, 300],
    }
    assert content["parameters"][0] == {
        "name": "0.weight",
        "shape": [50, 100],
        "matrix": [50, 100],
        "dtype": "float32",
        "rank": 2,
        "sent": "compressed",
        "dense_bytes": 20_000,
        "sent_bytes": 300,
        "compression_ratio": 20_000 / 300,
    }
    assert content["parameters"][1]["matrix"] is None
    assert content["parameters"][1]["sent"] == "whole"
    (link,) = content["links"]
    over = expected.over("1gbit")
    assert link == {
        "name": "1gbit",
        "bits_per_second": 1e9,
        "all_reduce_seconds": over.all_reduce_seconds,
        "bf16_seconds": over.bf16_seconds,
        "powersgd_seconds": over.powersgd_seconds,
        "compress_seconds": 0.03,
        "network_seconds": over.network_seconds,
        "pays": False,
        "exchange_speedup": over.speedup(),
        "step_speedup": over.speedup(0.5),
        "least_step_speedup": over.least_speedup(0.5),
    }


def test_json_has_no_infinity(plan):
    content = json.loads(plan("zoo:Fixed", "--json", "--alternate", "--compress-seconds=0"), parse_constant=pytest.fail)
    assert content["break_even_bits_per_second"] is None
    assert content["step_seconds"] is None
    assert len(content["links"]) == 4
    content = json.loads(plan("zoo:Fixed", "--json", "--min-compression-ratio=inf"), parse_constant=pytest.fail)
    assert content["settings"]["min_compression_ratio"] is None
    assert content["totals"]["compressed"] == 0


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_figure(plan, zoo, ending):
    printed = plan("zoo:Net", "--init=width=512", f"--plot=figure.{ending}", "--link=1gbit", "--link=1tbit")
    assert f"Figure: figure.{ending}" in printed
    assert (zoo / f"figure.{ending}").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["zoo:Fixed"], ["0.weight", "0.bias"]),
        (["zoo:LateModule"], ["layer.weight", "layer.bias"]),
        (["zoo:NeedsValues"], ["weight", "bias"]),
        (["zoo:build", "--init", "spare=1"], ["weight", "bias"]),
        (["zoo:made"], ["weight", "bias"]),
        (
            ["zoo:Net", "--init=width=16", "--init=layers=1", "--init=bias=false", "--init=name=a b"],
            ["blocks.0.weight", "head.weight", "head.bias"],
        ),
    ],
)
def test_what_a_model_may_be(plan, arguments, expected):
    assert names(plan("--json", *arguments)) == expected


def test_a_module_beside_the_file_can_be_imported(plan, zoo):
    (zoo / "sub").mkdir()
    (zoo / "sub" / "layers.py").write_text("from torch import nn\nLayer = nn.Linear\n")
    (zoo / "sub" / "torch.py").write_text("import layers\n\n\ndef build():\n    return layers.Layer(9, 9)\n")
    assert names(plan("--json", "sub/torch.py:build")) == ["weight", "bias"]


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth"])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_checkpoint(plan, zoo, ending, old_format):
    module = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50))
    state = PowerSGDState(module.named_parameters(), PowerSGDConfig(rank=2)).state_dict()
    content = {"state_dict": module.state_dict(), "powersgd": state, "epoch": 3}
    torch.save(content, zoo / f"model.{ending}", _use_new_zipfile_serialization=not old_format)
    assert names(plan("--json", f"model.{ending}")) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_plain_state_dict_with_tied_weights(plan, zoo):
    table = torch.zeros(40, 30)
    torch.save({"embedding.weight": table, "head.weight": table, "steps": 3}, zoo / "state.pt")
    assert names(plan("--json", "state.pt")) == ["embedding.weight"]


def test_sparse_tensors_of_a_checkpoint_are_no_parameters(plan, zoo):
    torch.save({"weight": torch.zeros(40, 30), "neighbours": torch.eye(40).to_sparse()}, zoo / "graph.pt")
    assert names(plan("--json", "graph.pt")) == ["weight"]


def test_automatic_ranks_follow_the_length_of_the_training(plan):
    def rank(*options: str) -> int:
        content = json.loads(plan("--json", "zoo:Net", "--init=width=512", *options))
        return {entry["name"]: entry["rank"] for entry in content["parameters"]}["blocks.0.weight"]

    assert rank() == rank("--steps=10000") == rank("--turnaround=25") == 21
    assert rank("--steps=20000") == 15
    assert rank("--steps=20000", "--optimizer=sgd") == 2
    assert rank("--steps=100") == 0
    assert rank("--steps=20000", "--rank=*.0.*=3", "--rank=*=auto") == 3
    assert rank("--max-bytes=100000") == 4
    assert "Net, rank auto, 20,000 steps, 8 processes" in plan("zoo:Net", "--init=width=512", "--steps=20000")


def test_ranks_by_patterns(plan):
    printed = plan("--json", "zoo:Net", "--init=width=512", "--rank=blocks.1*=0", "--rank", "blocks*=3", "--rank=*=1")
    content = json.loads(printed)
    ranks = {entry["name"]: entry["rank"] for entry in content["parameters"] if entry["matrix"]}
    assert ranks == {
        "blocks.0.weight": 3,
        "blocks.1.weight": 0,
        "blocks.2.weight": 3,
        "blocks.3.weight": 3,
        "head.weight": 1,
    }
    assert content["settings"]["rank"] == {"blocks.1*": 0, "blocks*": 3, "*": 1}


def test_of_a_pattern_given_twice_the_first_wins(plan):
    content = json.loads(plan("--json", "zoo:Fixed", "--rank=*.weight=1", "--rank=*.weight=4"))
    assert content["parameters"][0]["rank"] == 1
    assert content["settings"]["rank"] == {"*.weight": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zoo"], "'zoo' names no model. Use package.module:Class, path/to/file.py:Class, or a checkpoint"),
        (["zoo:"], "'zoo:' names no model"),
        (["nowhere:Net"], "There is no module 'nowhere' here. Start where `import nowhere` works, or name the file"),
        (["zoo.deeper:Net"], "There is no module 'zoo.deeper' here"),
        (["gone.py:Net"], "There is no file gone.py."),
        (["needs.py:Net"], "Importing needs.py failed with ModuleNotFoundError: No module named 'not_there'"),
        (["broken.py:Net"], "Importing broken.py failed with SyntaxError: "),
        (["leaves.py:Net"], "Importing leaves.py failed with SystemExit: 3"),
        (["zoo:Nett"], "zoo has no Nett. Did you mean Net?"),
        (["zoo.py:Transformer"], "zoo has no Transformer. Did you mean Net or Fixed or LateModule?"),
        (["empty.py:Net"], "empty has no Net."),
        (["zoo:Net"], "Net needs arguments: width: int. Give them with --init width=..."),
        (["zoo:Fixed", "--init=width=3"], "Fixed has no argument 'width'."),
        (["zoo:Net", "--init=wide=3"], "Net has no argument 'wide'. It has width."),
        (["zoo:Net", "--init", "width"], "argument --init: 'width' is not NAME=VALUE, such as width=512"),
        (["zoo:Net", "--init", "width=many"], "Making Net failed with TypeError: "),
        (["zoo:Refuses", "--init", "width=3"], "Making Refuses failed with ValueError: a width of 3"),
        (["zoo:Silent"], "Making Silent failed with RuntimeError."),
        (["zoo:no_model"], "no_model gives a value of type dict, not a torch.nn.Module."),
        (["zoo:number"], "zoo:number is neither a class nor a function, but a value of type int."),
        (["zoo:made", "--init=width=3"], "zoo:made is a module already, and takes no arguments."),
        (["gone.ckpt"], "There is no file gone.ckpt."),
        (["folder.ckpt"], "folder.ckpt is a folder, not a checkpoint."),
        (["text.ckpt"], "text.ckpt cannot be read as a checkpoint"),
        (["empty.ckpt"], "empty.ckpt cannot be read as a checkpoint"),
        (["cut.ckpt"], "cut.ckpt cannot be read as a checkpoint"),
        (["archive.ckpt"], "archive.ckpt cannot be read as a checkpoint"),
        (["objects.ckpt"], "objects.ckpt holds an object of type types.SimpleNamespace, and is not loaded, since that"),
        (["pickled.pt"], "pickled.pt holds an object of type types.SimpleNamespace, and is not loaded"),
        (["list.pt"], "list.pt holds no state dict, neither under 'state_dict' nor as a whole, but something else."),
        (["other.pt"], "other.pt holds no state dict, neither under 'state_dict' nor as a whole, but the keys 'model'"),
        (["ints.pt"], "ints.pt holds no state dict, neither under 'state_dict' nor as a whole, but the keys 0, 1."),
        (["eight_bits.pt"], "The parameter 'weight' is of torch.float8_e4m3fn, in which gradients cannot be averaged."),
        (["list.pt", "--init=width=3"], "list.pt is a checkpoint, and takes no arguments."),
        (["zoo:Fixed", "--link", "fast"], "argument --link: 'fast' is not the speed of a link. Use a number"),
        (["zoo:Fixed", "--rank", "two"], "--rank two is neither auto nor a number, such as 2, nor PATTERN=NUMBER"),
        (["zoo:Fixed", "--rank", "*=two"], "--rank *=two is neither auto nor a number"),
        (["zoo:Fixed", "--steps=0"], "`steps=0` is not the length of a training."),
        (["zoo:Fixed", "--steps=9", "--rank=2"], "--steps has no effect beside --rank 2. Use --rank auto."),
        (["zoo:Fixed", "--turnaround=0"], "`turnaround=0.0` is not a number of steps."),
        (["zoo:Fixed", "--max-bytes=10"], "`max_bytes=10` is too little"),
        (["zoo:Fixed", "--steps=9", "--max-bytes=10"], "argument --max-bytes: not allowed with argument --steps"),
        (["zoo:Fixed", "--rank", "0"], "`rank=0` is below 1."),
        (["zoo:Fixed", "--rank=-1"], "`rank=-1` is below 1."),
        (["zoo:Fixed", "--rank", "*=-1"], "`rank['*']=-1` is below 0."),
        (["zoo:Fixed", "--rank=2", "--rank=*=1"], "--rank 2 --rank *=1 mixes numbers and patterns."),
        (["zoo:Fixed", "--rank=head*=1"], "`rank` has the pattern 'head*', which matches no parameter."),
        (["zoo:Fixed", "--comm-dtype=int16"], "`comm_dtype='int16'` is not a floating-point dtype"),
        (["zoo:Fixed", "--min-compression-ratio=0.5"], "`min_compression_ratio=0.5` is below 1."),
        (["zoo:Fixed", "--world-size=1"], "`world_size=1` is below 2. A single rank has nobody to exchange"),
        (["zoo:Fixed", f"--world-size={10**400}"], f"`world_size={10**400}` is above 2147483647. Give the number"),
        (["zoo:Fixed", f"--link={10**400}bit"], f"argument --link: '{10**400}bit' is not the speed of a link."),
        (["zoo:Fixed", "--latency=-1"], "`latency=-1.0` is not a time."),
        (["zoo:Fixed", "--latency=1e308"], "`latency=1e+308` is not a time."),
        (["zoo:Fixed", "--step-seconds=0"], "`step_seconds=0.0` is not the time of a step."),
        (["zoo:Fixed", "--step-seconds=some"], "argument --step-seconds: invalid float value: 'some'"),
        (["zoo:Fixed", "--plot=no/folder.png"], "[Errno 2] No such file or directory"),
        (["zoo:Fixed", "--plot=figure.word"], "Format 'word' is not supported"),
        (["zoo:Fixed", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_end_in_one_line(refused, zoo, arguments, message):
    (zoo / "needs.py").write_text("import not_there\n")
    (zoo / "broken.py").write_text("class Net\n")
    (zoo / "leaves.py").write_text("raise SystemExit(3)\n")
    (zoo / "empty.py").write_text("")
    (zoo / "folder.ckpt").mkdir()
    (zoo / "text.ckpt").write_text("no checkpoint")
    (zoo / "empty.ckpt").write_text("")
    with zipfile.ZipFile(zoo / "archive.ckpt", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint either")
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, zoo / "whole.ckpt")
    (zoo / "cut.ckpt").write_bytes((zoo / "whole.ckpt").read_bytes()[:3000])
    torch.save({"state_dict": {}, "settings": SimpleNamespace(a=1)}, zoo / "objects.ckpt")
    (zoo / "pickled.pt").write_bytes(pickle.dumps(SimpleNamespace(a=1), protocol=2))
    torch.save([torch.zeros(3)], zoo / "list.pt")
    torch.save({"model": {"weight": torch.zeros(3)}}, zoo / "other.pt")
    torch.save({0: torch.zeros(3), 1: torch.zeros(3)}, zoo / "ints.pt")
    torch.save({"weight": torch.zeros(9, 9).to(torch.float8_e4m3fn)}, zoo / "eight_bits.pt")
    assert refused(*arguments).startswith(message)


def test_without_a_gpu_cuda_is_refused(refused, zoo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(f"{__name__}.GIVEN", [])
    assert "torch finds no GPU" in refused("zoo:Fixed", "--device=cuda", "--json")


def test_a_sharded_model(plan):
    printed = plan("zoo:Fixed", "--rank=2", "--shards=2", "--nodes=4", "--compress-seconds=0")
    assert "one of 2 devices in each of 4 machines" in printed
    assert "That is what a device sends between machines" in printed


def test_machines_with_several_devices(plan):
    printed = plan("zoo:Fixed", "--rank=2", "--devices=2", "--compress-seconds=0.01")
    assert "hierarchical=True, with 2 devices in each machine: the busiest device computes for" in printed
    free = plan("zoo:Fixed", "--rank=2", "--devices=2", "--compress-seconds=0")
    assert "which makes the step longer." in free


def _without(*packages: str):
    return lambda name: None if name in packages else SimpleNamespace(name=name)


@pytest.mark.parametrize(("missing", "arguments"), [("rich", []), ("matplotlib", ["--json", "--plot=figure.png"])])
def test_a_missing_package_is_named(refused, monkeypatch, missing, arguments):
    monkeypatch.setattr(importlib.util, "find_spec", _without(missing))
    said = refused("zoo:Fixed", *arguments)
    assert said.startswith(f"this output needs {missing}: pip install 'lightning-powersgd[plan]'")


def test_without_a_command_it_says_which_there_are(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert capsys.readouterr().err == "lightning-powersgd: the following arguments are required: COMMAND\n"


def test_the_program_as_a_user_starts_it(zoo):
    command = [sys.executable, "-m", "lightning_powersgd", "plan", "zoo:Fixed", "--device=cpu"]
    printed = run(command, zoo)
    assert "PowerSGD compresses 1 of 2 trainable parameters" in printed
    assert "Computing was measured on this CPU with 1 thread, where the hook's casts take" in printed
    assert "\x1b" not in printed


def test_the_name_of_the_program_leads_to_it():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\nlightning-powersgd = "lightning_powersgd.planner.command:main"\n' in text
