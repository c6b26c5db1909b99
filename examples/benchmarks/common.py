"""What all benchmarks share: arguments, statistics of paired samples, and the files that they leave behind.

Samples come in rounds. In a round every contestant is measured once, so that a machine which slows down slows down all
of them alike, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_powersgd.planner.units import format_bytes as format_bytes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
BLACK, GREY = "#000000", "#7F7F7F"


@dataclass(frozen=True)
class Spread:
    """The median of samples, and their quartiles."""

    median: float
    low: float
    high: float

    def quartiles(self, scale: float) -> str:
        """Write the quartiles, multiplied by a scale."""
        return f"{format_number(self.low * scale)}–{format_number(self.high * scale)}"


def spread(samples: Sequence[float] | np.ndarray) -> Spread:
    """Summarise samples by their median and quartiles."""
    low, median, high = (float(value) for value in np.percentile(np.asarray(samples, dtype=float), (25, 50, 75)))
    return Spread(median, low, high)


def paired_ratio(samples: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Spread:
    """Divide samples by a reference, round by round, and summarise the ratios.

    Raises:
        ValueError: if the two do not come from the same rounds.
    """
    return spread(np.divide(*_paired(samples, reference)))


def paired_difference(samples: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Spread:
    """Subtract a reference from samples, round by round, and summarise the differences.

    Raises:
        ValueError: if the two do not come from the same rounds.
    """
    return spread(np.subtract(*_paired(samples, reference)))


def _paired(
    samples: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if len(samples) != len(reference):
        raise ValueError(
            f"{len(samples)} samples cannot be paired with {len(reference)} of the reference. Measure both in every"
            " round."
        )
    return np.asarray(samples, dtype=float), np.asarray(reference, dtype=float)


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive. Use 1 or more.")
    return value


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors live")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("benchmark_results"), help="folder of the table, samples and plot"
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it works")
    return parser


def parse(
    parser: argparse.ArgumentParser, quick: dict[str, Any], on_gpu: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Parse the command line.

    Args:
        parser: from `make_parser`.
        quick: the defaults that ``--quick`` replaces.
        on_gpu: the defaults that ``--device cuda`` replaces, also those of ``--quick``.
    """
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch finds no CUDA device. Use --device cpu, or run this on a machine with an NVIDIA GPU,"
            " its driver and a CUDA build of torch."
        )
    if arguments.quick:
        parser.set_defaults(**quick)
    if arguments.device == "cuda":
        parser.set_defaults(**(on_gpu or {}))
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the software, without its name."""
    description = {
        "cpu": _cpu_model(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if device == "cuda":
        description["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return description


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Give the commit that was measured, marked where files were changed since; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty=, changed since", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@dataclass
class ResultTable:
    """A table for the terminal and for a Markdown file. The first column is text, the others are numbers."""

    title: str
    columns: list[str]
    note: str
    rows: list[list[str]] = field(default_factory=list)

    def to_rich(self) -> Table:
        """Lay it out for the terminal."""
        table = Table(
            title=self.title,
            caption=self.note,
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Write it in Markdown."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{table}\n\n{self.note}\n"


def write_results(
    name: str,
    title: str,
    arguments: argparse.Namespace,
    tables: list[ResultTable],
    data: dict[str, Any],
    figure: Figure,
    remarks: Sequence[str] = (),
) -> None:
    """Print the tables, and leave them as Markdown, the data as JSON and the plot as PNG.

    Args:
        name: of the files.
        title: of the Markdown file.
        arguments: of the command line.
        tables: what was found.
        data: what was measured, for JSON.
        figure: the plot.
        remarks: on what was skipped, and other sentences for the reader.
    """
    console = make_console()
    for table in tables:
        console.print(table.to_rich())
    for remark in remarks:
        console.print(remark, style="yellow", highlight=False)

    about = machine(arguments.device)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    content = {"settings": settings, "machine": about, "remarks": list(remarks), **data}
    folder: Path = arguments.output_dir
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1, default=_to_json) + "\n")

    command = shlex.join(["python", f"examples/benchmarks/{name}.py", *sys.argv[1:]])
    facts = ", ".join(f"{key}: {value}" for key, value in about.items())
    parts = [f"# {title}\n", f"`{command}`\n", f"Machine: {facts}\n"]
    parts += [table.to_markdown() for table in tables]
    parts += [f"{remark}\n" for remark in remarks]
    (folder / f"{name}.md").write_text("\n".join(parts))
    figure.savefig(folder / f"{name}.png", dpi=150)
    console.print(
        f"Table: {folder / name}.md\nSamples: {folder / name}.json\nPlot: {folder / name}.png", highlight=False
    )


def make_console() -> Console:
    """Make a console that is as wide as tables need where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def _to_json(value: object) -> object:
    if isinstance(value, Spread):
        return asdict(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written as JSON")


def progress_bar() -> Progress:
    """Make a progress bar with a description, a count and the time; it stays silent where nobody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, transient=True, disable=not Console().is_terminal)


def format_number(value: float) -> str:
    """Write a number with two or three digits that matter, and with all of those before its point."""
    if abs(value) < 0.995:
        return f"{value:#.2g}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def draw_bars(
    axes: Axes, title: str, names: Sequence[str], values: Sequence[float], labels: Sequence[str], colors: Sequence[str]
) -> None:
    """Draw a horizontal bar for each name: milliseconds of a step, with a label at its end."""
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, labels, padding=3)
    axes.set(title=title, xlabel="ms a step")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers at as many ticks as its span needs. Call this after plotting."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    steps = (1, 1.2, 1.5, 2, 3, 4, 5, 7) if high < 6 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())
