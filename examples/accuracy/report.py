"""Lay the study's results side by side: a table for each task, and a figure of what was learnt against what was sent.

    python examples/accuracy/report.py

Reads ``RESULTS/*.jsonl``, which `study.py` wrote, and writes a table ``RESULTS/TASK.md`` beside each, and two figures:
``accuracy.png``, what was learnt against the bytes, and ``turnaround.png``, what was lost against the delay.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_powersgd import PowerSGDConfig, make_plan

# What the benchmarks share.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from common import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    ResultTable,
    format_bytes,
    log_axis,
    make_console,
)
from study import RESULTS, read
from tasks import TASKS, GossipTask, Task

# Variants that are points of one line, and the colour, line and marker of each line.
LINES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "full steps": (("rank 1", "rank 2", "rank 4", "rank 8", "rank 16", "rank 32"), BLUE, "-o"),
    "full steps, 8 bits": (("rank 8, int8", "rank 16, int8", "rank 32, int8"), AMBER, "-s"),
    "full steps, 4 bits": (("rank 8, int4", "rank 16, int4", "rank 32, int4", "rank 64, int4"), GREEN, "-v"),
    "P in 4 bits, Q in 8": (("rank 32, P int4, Q int8",), PURPLE, "D"),
    "automatic rank": (("auto",), BLACK, "h"),
    "automatic rank, 8 bits": (("auto, int8",), BLACK, "s"),
    "automatic rank, 4 bits": (("auto, int4",), BLACK, "v"),
    "averaging, 8 bits": (("averaging, rank 8, int8", "averaging, rank 32, int8"), SKY, "--s"),
    "averaging, 4 bits": (("averaging, rank 16, int4",), SKY, "v"),
    "averaging": (("averaging, rank 4",), SKY, "o"),
    "bfloat16 all-reduce": (("bfloat16 all-reduce",), BLACK, "D"),
    "alternating": (("alternating, rank 2", "alternating, rank 4"), ORANGE, "--s"),
    "embeddings and head whole": (("rank 2, ends whole", "rank 4, ends whole"), SKY, ":D"),
    "rank 2, first tenth exact": (("rank 2, first tenth exact",), GREEN, "^"),
    "rank 2, bfloat16 errors": (("rank 2, bfloat16 errors",), PURPLE, "P"),
    "rank 2, no warm start": (("rank 2, no warm start",), GREY, "v"),
    "rank 2, no error feedback": (("rank 2, no error feedback",), GREY, "X"),
}

# Sends nothing, and so has no place on an axis of bytes but is a line across it.
ALONE = "one process alone"

# A panel with fewer points than this says no more than its table.
FEWEST_POINTS = 3


@dataclass(frozen=True)
class Outcome:
    """All seeds of a variant.

    Args:
        values: the metric, by seed and precision. Infinite where it diverged.
        bytes_per_step: that a rank handed to all-reduce, in the mean over the steps.
    """

    values: dict[tuple[int, str], float]
    bytes_per_step: float

    @property
    def mean(self) -> float:
        """The metric's mean over the seeds."""
        return float(np.mean(list(self.values.values())))

    @property
    def deviation(self) -> float:
        """The metric's standard deviation over the seeds; 0 with one."""
        values = list(self.values.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 and math.isfinite(self.mean) else 0.0

    def beyond(self, reference: Outcome) -> np.ndarray:
        """Subtract a reference, run by run."""
        return np.array([value - reference.values[pair] for pair, value in self.values.items()])


def comparable(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what cannot be compared: plain DDP has no run with the same seed and precision."""
    plain = {_pair(run) for run in runs if run["variant"] == "DDP"}
    return [run for run in runs if _pair(run) in plain]


def _pair(run: dict[str, Any]) -> tuple[int, str]:
    return run["seed"], run["precision"]


def summarise(task: Task, runs: list[dict[str, Any]]) -> dict[str, Outcome]:
    """Gather the runs of each variant, in the order of the task's."""
    values: dict[str, dict[tuple[int, str], float]] = defaultdict(dict)
    for run in runs:
        value = run[task.metric]
        values[run["variant"]][_pair(run)] = float("inf") if value is None else value
    sent = {run["variant"]: run["bytes_per_step"] for run in runs}
    return {variant: Outcome(values[variant], sent[variant]) for variant in task.variants if variant in values}


def tabulate(name: str, task: Task, runs: list[dict[str, Any]]) -> ResultTable:
    """Make a task's table."""
    outcomes = summarise(task, runs)
    ddp = outcomes["DDP"]
    steps, ranks = runs[0]["steps"], runs[0]["ranks"]
    table = ResultTable(
        task.title,
        ["exchange", task.sent, "saved", task.unit, "minus DDP", "seeds"],
        f"{task.unit.capitalize()} on the test set after {steps} steps on {ranks} processes: mean ± standard deviation"
        " over the seeds. “minus DDP” compares runs with the same seed and precision: mean ± standard error."
        f" `torchrun --standalone --nproc-per-node {ranks} examples/accuracy/study.py {name} {task.options} --seeds"
        f" {' '.join(map(str, sorted({seed for seed, _ in ddp.values})))}` and `python examples/accuracy/report.py`."
        f" Machine: {machines(runs)}.",
    )
    digits = 2 if task.scale == 100 else 3
    for variant, outcome in outcomes.items():
        saved = 100 * (1 - outcome.bytes_per_step / ddp.bytes_per_step)
        difference = outcome.beyond(ddp)
        value, minus = f"{outcome.mean:.{digits}f}", f"{np.mean(difference):+.{digits}f}"
        if len(difference) > 1:
            value += f" ± {outcome.deviation:.{digits}f}"
            minus += f" ± {np.std(difference, ddof=1) / len(difference) ** 0.5:.{digits}f}"
        if not math.isfinite(outcome.mean):
            value, minus = "diverged", ""
        is_ddp = outcome is ddp
        table.rows.append(
            [
                variant,
                format_bytes(outcome.bytes_per_step),
                "" if is_ddp else f"{saved:.1f} %",
                value,
                "" if is_ddp else minus,
                str(len(outcome.values)),
            ]
        )
    return table


def machines(runs: list[dict[str, Any]]) -> str:
    """Name the machines and the revisions that the runs were done with."""
    facts = ("cpu", "cores", "python", "torch", "precision")
    commits = defaultdict(set)
    for run in runs:
        commits[", ".join(f"{fact}: {run[fact]}" for fact in facts)].add(run["commit"])
    return "; ".join(f"{machine}, commit: {', '.join(sorted(commits[machine]))}" for machine in sorted(commits))


def plot(axes: Axes, task: Task, runs: list[dict[str, Any]]) -> None:
    """Draw a task's metric against the bytes."""
    outcomes = summarise(task, runs)
    ddp = outcomes["DDP"]
    alone = outcomes.get(ALONE)
    if alone is not None and math.isfinite(alone.mean):
        axes.axhline(alone.mean, color=GREY, linestyle="--", label=ALONE)
    near = 1 / abs(task.lost(ddp.mean + 1, ddp.mean))
    axes.axhspan(ddp.mean - near, ddp.mean + near, color=GREEN, alpha=0.12, lw=0, label="near enough: 0.3 points, 1 %")
    axes.axvspan(0, ddp.bytes_per_step / 100, color=GREY, alpha=0.12, lw=0, label="99 % saved and more")
    point(axes, [ddp], BLACK, "*", "plain DDP", size=13)
    for label, (variants, colour, style) in LINES.items():
        found = [outcomes[variant] for variant in variants if variant in outcomes]
        found = [outcome for outcome in found if math.isfinite(outcome.mean)]
        if found:
            point(axes, found, colour, style, label, size=7)
    for variant in LINES["full steps"][0]:
        if variant in outcomes:
            axes.annotate(
                variant.removeprefix("rank "),
                (outcomes[variant].bytes_per_step, outcomes[variant].mean),
                xytext=(-9 if task.higher_is_better else 9, 5),  # where the line is not
                textcoords="offset points",
                ha="center",
                color=BLUE,
            )
    log_axis(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.set(title=task.title, xlabel="bytes a step and process", ylabel=f"{task.unit} on the test set")
    axes.grid(alpha=0.3)


def point(axes: Axes, outcomes: list[Outcome], colour: str, style: str, label: str, size: float) -> None:
    """Draw outcomes with their standard deviations."""
    axes.errorbar(
        [outcome.bytes_per_step for outcome in outcomes],
        [outcome.mean for outcome in outcomes],
        [outcome.deviation for outcome in outcomes],
        fmt=style,
        color=colour,
        label=label,
        markersize=size,
        capsize=3,
    )


def _drawn(task: Task, runs: list[dict[str, Any]]) -> list[str]:
    """Name the variants that have a place in a task's panel, beside plain DDP."""
    named = [variant for variants, _, _ in LINES.values() for variant in variants]
    return [name for name, outcome in summarise(task, runs).items() if name in named and math.isfinite(outcome.mean)]


def draw_accuracy(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw what each task learnt against what it sent, where there is enough to draw."""
    points = {name: len(_drawn(TASKS[name], lines)) for name, lines in runs.items()}
    runs = {name: lines for name, lines in runs.items() if points[name] >= FEWEST_POINTS} or runs
    columns = min(2, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows + 0.8), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, lines) in zip(panels, runs.items(), strict=False):
        plot(axes, TASKS[name], lines)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    legends = [dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) for axes in panels[: len(runs)]]
    handles = {label: handle for legend in legends for label, handle in legend.items()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_turnaround(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw what is lost against how late a direction is sent, as a share of the training."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    # A colour for what is learnt, a marker for how long.
    names = [name for name, task in TASKS.items() if "rank 32" in task.variants]
    looks = dict(zip(names, ((colour, marker) for marker in "os^" for colour in (BLUE, ORANGE)), strict=True))
    plain = [variant for label in ("full steps", "alternating") for variant in LINES[label][0]]
    for name, lines in runs.items():
        task, outcomes = TASKS[name], summarise(TASKS[name], lines)
        found = [variant for variant in plain if variant in outcomes and math.isfinite(outcomes[variant].mean)]
        if not found:
            continue
        shares = {variant: turnaround(task, variant) / lines[0]["steps"] for variant in found}
        ddp = outcomes["DDP"]
        lost = [task.lost(ddp.mean + float(np.mean(outcomes[variant].beyond(ddp))), ddp.mean) for variant in shares]
        colour, marker = looks[name]
        what = TASKS[name.split("_")[0]].title
        axes.plot(shares.values(), lost, marker, color=colour, label=f"{what}, {lines[0]['steps']:,} steps")
    axes.axhspan(0, 1, color=GREEN, alpha=0.12, lw=0)
    axes.text(0.01, 0.5, "near enough", transform=axes.get_yaxis_transform(), va="center", color=GREEN)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    log_axis(axes.xaxis)
    axes.set(
        xlabel="steps until each direction was sent once ÷ steps of the training",
        ylabel="lost against DDP\n(in units of 0.3 points, or of 1 % of the bits)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def turnaround(task: Task, variant: str) -> float:
    """Give the steps in which each direction of a gradient was sent about once."""
    config = PowerSGDConfig(**(task.variants[variant] or {}))
    return make_plan(task.module_of(variant).named_parameters(), config).turnaround(alternate=config.alternate)


def main() -> None:
    """Write the tables and the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    folder = parser.parse_args().results
    runs = {name: comparable(read(folder / f"{name}.jsonl")) for name in TASKS}
    runs = {name: lines for name, lines in runs.items() if lines}
    if not runs:
        raise SystemExit(f"There is no run of plain DDP in {folder}. Run examples/accuracy/study.py first.")
    for name, lines in runs.items():
        for fact in ("steps", "ranks"):
            if len({line[fact] for line in lines}) > 1:
                raise SystemExit(f"{folder / name}.jsonl has runs that differ in {fact!r}, which cannot be compared.")
    console = make_console()
    for name, lines in runs.items():
        table = tabulate(name, TASKS[name], lines)
        (folder / f"{name}.md").write_text(table.to_markdown())
        console.print(table.to_rich())
    drawn = {name: lines for name, lines in runs.items() if not isinstance(TASKS[name], GossipTask)}
    if not drawn:
        return
    for name, figure in (("accuracy", draw_accuracy(drawn)), ("turnaround", draw_turnaround(drawn))):
        figure.savefig(folder / f"{name}.png", dpi=150)
        console.print(f"Figure: {folder / name}.png", highlight=False)


if __name__ == "__main__":
    main()
