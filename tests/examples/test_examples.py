"""Tier four: the examples run as printed, in a small setting."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from terminal import run

from lightning_powersgd import PowerSGDStrategy

EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text()
YAML = EXAMPLES / "image_classification.yaml"
# What is added to a command to make it short.
SHORTER = {
    "image_classification.py": "--trainer.fast_dev_run=true",
    "plain_python.py": "",
    "hydra_config.py": "+trainer.fast_dev_run=true",
    "text_transformer.py": "--trainer.fast_dev_run=true --model.width=64 --data.eval_windows=50",
    "sharded_text_transformer.py": "--trainer.fast_dev_run=true --model.width=64 --data.eval_windows=50",
    "decentralized.py": "--trainer.devices=2 --trainer.fast_dev_run=true",
    "gan.py": "--trainer.max_epochs=1 --trainer.limit_train_batches=4",
}


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_dir(tmp_path):
    """A data set in MNIST's format, some of it gzipped: one class is bright above, the other below."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, ending, samples in (("train", ".gz", 200), ("t10k", "", 80)):
        labels = np.arange(samples, dtype=np.uint8) % 2
        images = np.zeros((samples, 28, 28), dtype=np.uint8)
        images[labels == 0, :14] = images[labels == 1, 14:] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
    return folder


def test_the_comparison_of_make_demo(tmp_path, idx_dir):
    command = [sys.executable, str(EXAMPLES / "compare.py"), "--epochs=2", f"--idx-dir={idx_dir}"]
    printed = run([*command, f"--output-dir={tmp_path}"], tmp_path)
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert {"DDP", "PowerSGD, rank 2"} <= set(rows)
    assert "1×" in rows["DDP"]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a command as it is printed: in a folder with the examples in it, and with this Python's programs."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return lambda command: run(["bash", "-c", command], tmp_path)


def commands(program: str) -> list[str]:
    """The commands of the README that begin so and start a program in the examples' folder."""
    begins = program if "examples/" in program else f"{program} examples/"
    return re.findall(rf"`({begins}[^`]*)`", README)


def test_the_readme_has_every_example():
    linked = [EXAMPLES / link for link in re.findall(r"\]\(([^)]+)\)", README)]
    assert {*linked} >= {*EXAMPLES.glob("*.*")} - {EXAMPLES / "README.md"}
    assert all(path.exists() for path in linked)


LOOPS = [*commands("python examples/fabric_loop.py"), *commands("torchrun --standalone --nproc-per-node=2")]


@pytest.mark.parametrize("command", LOOPS)
def test_a_loop_goes_on_where_the_first_run_stopped(shell, command):
    losses = []
    for run_number in (1, 2):
        printed = shell(command)
        assert "PowerSGD compresses 4 of 8" in printed
        assert f"epoch {run_number}:" in printed or f"step {55 * run_number}:" in printed
        losses.append(float(re.search(r"loss ([\d.]+)", printed)[1]))
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    "command", [command for command in commands("python") if not re.search("compare.py|_loop.py", command)]
)
def test_a_command_of_the_readme(shell, tmp_path, command):
    printed = shell(f"{command} {SHORTER[Path(command.split()[1]).name]}")
    assert ("PowerGossip" if "decentralized.py" in command else "PowerSGD") + " compresses" in printed
    if "gan.py" in command:
        from matplotlib.image import imread

        picture = imread(tmp_path / "digits.png")[..., 0]
        assert picture.shape == (8 * 28, 8 * 28)
        assert picture.std() > 0.01
    if "plain_python.py" in command:
        assert float(re.search(r"test_accuracy\W+([\d.]+)", printed)[1]) > 0.9


def test_the_commands_for_two_machines(shell, namespaces):
    from network import enter

    def on_machine(namespace: str, command: str) -> str:
        enter(namespace)  # only this thread, and what it starts
        return shell(f"{command} --trainer.fast_dev_run=true")

    typed = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    with ThreadPoolExecutor(max_workers=2) as machines:
        printed = list(machines.map(on_machine, namespaces, typed))
    assert "GLOBAL_RANK: 0, MEMBER: 1/2" in printed[0]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in printed[1]
    assert "PowerSGD compresses" in printed[0]


def test_the_batch_file_fits_together(shell, tmp_path):
    lines = (EXAMPLES / "slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"--[a-z-]+(=[\w:@%./-]+)?", directive) for directive in directives)
    options = dict(directive.partition("=")[::2] for directive in directives)
    # A stand-in for srun: the command itself, which says what it would do.
    (tmp_path / "srun").write_text('while [[ $1 == --* ]]; do shift; done\nexec "$@" --print_config\n')
    (tmp_path / "srun").chmod(0o755)
    cpus = options["--cpus-per-task"]
    printed = shell(f"SLURM_CPUS_PER_TASK={cpus} PATH=$PWD:$PATH bash -eu examples/slurm.sbatch")
    trainer = yaml.safe_load(printed)["trainer"]
    assert str(trainer["num_nodes"]) == options["--nodes"]
    assert str(trainer["devices"]) == options["--ntasks-per-node"] == options["--gpus-per-node"]
    assert trainer["strategy"]["class_path"] == "lightning_powersgd.PowerSGDStrategy"
    assert options["--signal"].startswith("SIGUSR1@")


@pytest.fixture
def configuration(monkeypatch, capsys):
    """Give the settings that the command line of `image_classification.py` makes of options."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import image_classification

    def parse(*options: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["image_classification.py", "fit", *options, "--print_config"])
        with pytest.raises(SystemExit) as left:
            image_classification.main()
        assert left.value.code in (0, None)
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_what_the_yaml_file_offers_works(configuration, tmp_path):
    plain = configuration("--config", str(YAML))
    assert plain["trainer"]["strategy"]["init_args"]["rank"] == 2
    # With every setting that is commented out.
    (tmp_path / "all.yaml").write_text(re.sub(r"^( +)# (\w+: )", r"\1\2", YAML.read_text(), flags=re.MULTILINE))
    settings = configuration("--config", str(tmp_path / "all.yaml"))
    changed = settings["trainer"]["strategy"]["init_args"] | settings["data"]
    assert (changed["start_step"], changed["alternate"]) == (100, True)
    assert changed["idx_dir"].endswith("fashion-mnist")


@pytest.mark.parametrize(
    "options",
    [
        "--trainer.strategy.init_args.rank 4 --trainer.max_epochs 2",
        "--trainer.strategy.rank 4 --trainer.max_epochs 2",
        "--trainer.strategy.rank=4 --trainer.max_epochs=2",
        "--trainer.strategy=PowerSGDStrategy --trainer.strategy.rank=4 --trainer.max_epochs=2",
        "--trainer.strategy=lightning_powersgd.PowerSGDStrategy --trainer.strategy.rank=4 --trainer.max_epochs=2",
    ],
)
def test_options_overrule_the_yaml_file_however_they_are_spelt(configuration, options):
    trainer = configuration("--config", str(YAML), *shlex.split(options))["trainer"]
    assert trainer["strategy"]["class_path"] == "lightning_powersgd.PowerSGDStrategy"
    assert (trainer["strategy"]["init_args"]["rank"], trainer["max_epochs"]) == (4, 2)


@pytest.mark.parametrize("name", ["powersgd", "ddp"])
def test_a_strategys_name_overrules_the_yaml_file(configuration, name):
    assert configuration("--config", str(YAML), "--trainer.strategy", name)["trainer"]["strategy"] == name


def test_hydra_passes_patterns_on():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    text = (EXAMPLES / "hydra_config.yaml").read_text()
    [patterns] = re.findall(r"# or by patterns of parameter names: (.*)", text)
    config = OmegaConf.create(re.sub("rank: .*", f"rank: {patterns}", text))
    expected = PowerSGDStrategy(rank=yaml.safe_load(patterns)).config
    assert instantiate(config.trainer.strategy).config == expected


def test_what_is_not_a_data_set_is_refused_by_name(tmp_path, idx_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from image_classification import load_idx, read_idx

    train, val, test = load_idx(idx_dir)
    assert (len(train), len(val), len(test)) == (180, 20, 80)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz.*dataset-fashion-mnist"):
        load_idx(tmp_path)
    for name, content in (("empty", b""), ("text", b"no idx file"), ("short", b"\0\0\x08\x01\0\0\0\x09")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is not an idx file of bytes, or it is incomplete"):
            read_idx(tmp_path / name)
    (tmp_path / "damaged.gz").write_bytes(gzip.compress(bytes(range(256)))[:50])
    with pytest.raises(ValueError, match="is not a gzip file, or it is damaged"):
        read_idx(tmp_path / "damaged")
