"""Train the same network with plain DDP and with PowerSGD, and compare accuracy, bytes and time.

    python examples/compare.py                                    # MNIST, one to two minutes on two CPU cores
    python examples/compare.py --idx-dir FOLDER --epochs 3        # Fashion-MNIST, or another set in MNIST's format

Each training is a run of `image_classification.py` on two processes; they differ in nothing but the strategy.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from image_classification import ImageClassifier
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

EXAMPLE = Path(__file__).with_name("image_classification.py")
# Colour, line and marker of each run. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
STYLES = (("#0072B2", "-", "o"), ("#D55E00", "--", "s"))

Curve = tuple[np.ndarray, np.ndarray]


@dataclass
class Run:
    """What one training logged. Curves are over steps done."""

    name: str
    train_loss: Curve
    val_accuracy: Curve
    test_accuracy: float
    train_seconds: float
    dense_bytes: float
    bytes_per_step: float


def train(name: str, strategy: list[str], arguments: argparse.Namespace, console: Console) -> Run:
    """Train once through the example's command line, and read what it logged.

    Raises:
        SystemExit: if the training fails.
    """
    folder = arguments.output_dir / name.split(",")[0].lower()
    folder.mkdir(parents=True, exist_ok=True)
    messages = folder / "messages.txt"
    command = [sys.executable, str(EXAMPLE), "fit", *strategy]
    command += [
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        f"--trainer.max_epochs={arguments.epochs}",
        f"--trainer.limit_train_batches={arguments.limit_train_batches}",
        "--trainer.log_every_n_steps=2",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_model_summary=false",
        # Rich's bar, the default, stays silent where the output is not a terminal.
        "--trainer.callbacks+=TQDMProgressBar",
        "--trainer.callbacks.refresh_rate=5",
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.save_dir={folder.parent}",
        f"--trainer.logger.name={folder.name}",
        "--trainer.logger.version=",
    ]
    if arguments.idx_dir is not None:
        command.append(f"--data.idx_dir={arguments.idx_dir}")
    console.rule(f"Training with {name}")
    # The progress bar comes on stdout; Lightning's messages, on stderr, are of interest only when something goes wrong.
    with messages.open("w") as stderr:
        code = subprocess.run(command, stderr=stderr, check=False).returncode
    if code != 0:
        sys.stderr.write("".join(messages.read_text().splitlines(keepends=True)[-20:]))
        raise SystemExit(f"Training with {name} failed with exit status {code}. All of its messages: {messages}")
    return read_run(name, folder / "metrics.csv")


def read_run(name: str, path: Path) -> Run:
    """Read the metrics that a run left in ``path``."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def curve(metric: str) -> Curve:
        points = [(int(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
        return np.array([step for step, _ in points]), np.array([value for _, value in points])

    # Plain DDP all-reduces every trainable gradient whole, and logs nothing of it: its bytes come from the model.
    parameters = [parameter for parameter in ImageClassifier().parameters() if parameter.requires_grad]
    dense_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    steps, saved = curve("powersgd/bytes_saved")  # since training began; no point with plain DDP
    return Run(
        name=name,
        train_loss=curve("train_loss"),
        val_accuracy=curve("val_accuracy"),
        test_accuracy=curve("test_accuracy")[1][-1],
        train_seconds=curve("train_seconds")[1][-1],
        dense_bytes=dense_bytes,
        bytes_per_step=dense_bytes - saved[-1] / steps[-1] if len(steps) else dense_bytes,
    )


def make_table(runs: list[Run]) -> Table:
    """Lay the figures side by side."""
    table = Table(
        caption="Bytes are those that each process hands to all-reduce. "
        "Within one machine they cost little time, over a network much."
    )
    table.add_column("strategy", no_wrap=True)
    for heading in ("test accuracy", "gradient bytes a step", "compression ratio", "seconds of training"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.test_accuracy:.1%}",
            f"{run.bytes_per_step / 1e3:,.1f} kB",
            f"{run.dense_bytes / run.bytes_per_step:,.0f}×",
            f"{run.train_seconds:.1f}",
        )
    return table


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Draw the loss by steps, and the validation accuracy by bytes sent."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for run, (color, line, marker) in zip(runs, STYLES, strict=True):
        steps, loss = run.train_loss
        width = max(1, len(loss) // 25)
        window = np.full(width, 1 / width)
        mean_steps, mean_loss = np.convolve(steps, window, mode="valid"), np.convolve(loss, window, mode="valid")
        left.plot(mean_steps, mean_loss, line, color=color, label=run.name)
        steps, accuracy = run.val_accuracy
        megabytes = steps * run.bytes_per_step / 1e6
        right.plot(megabytes, 100 * accuracy, line, marker=marker, color=color, label=run.name)
    left.set(title="Loss over steps", xlabel="step", ylabel="training loss (moving average)", yscale="log")
    right.set(title="Accuracy over bytes", ylabel="validation accuracy after each epoch (%)", xscale="log")
    # Plain DDP logs no bytes: its points are the steps times the size of all gradients.
    right.set_xlabel("gradient bytes handed to all-reduce by each process (MB)")
    right.xaxis.set_major_formatter("{x:,g}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Compare plain DDP with PowerSGD on two CPU processes.")
    parser.add_argument("--idx-dir", type=Path, help="folder of Fashion-MNIST's files; without it, MNIST")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rank", type=int, default=2, help="PowerSGD's rank: higher is more exact, and more bytes")
    parser.add_argument("--output-dir", type=Path, default=Path("demo_results"))
    parser.add_argument("--limit-train-batches", default="1.0", help="batches an epoch: a number, or a fraction")
    arguments = parser.parse_args()

    console = Console()
    powersgd = ["--trainer.strategy=PowerSGDStrategy", f"--trainer.strategy.rank={arguments.rank}"]
    runs = [
        train("DDP", ["--trainer.strategy=ddp"], arguments, console),
        train(f"PowerSGD, rank {arguments.rank}", powersgd, arguments, console),
    ]
    picture = arguments.output_dir / "comparison.png"
    data = "MNIST, 5,000 images" if arguments.idx_dir is None else arguments.idx_dir.name
    draw(runs, f"{data}: DDP and PowerSGD on two processes", picture)
    console.rule("Result")
    console.print(make_table(runs))
    console.print(f"Picture: {picture}\nLogs: {arguments.output_dir}/ddp and {arguments.output_dir}/powersgd")


if __name__ == "__main__":
    main()
