"""A forecast for readers: as JSON for programs, as tables for a terminal, and as a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_powersgd.forecast import (
    Forecast,
    LinkForecast,
    format_bytes,
    format_rate,
    format_ratio,
    format_seconds,
)
from lightning_powersgd.plan import Slot
from lightning_powersgd.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table

FORMAT_VERSION = 1

LEFT_OUT = (
    "Left out: what of either exchange hides behind the backward pass, congestion, what sending costs the processor,"
    " and waiting for slower processes."
)

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#5F5F5F"
_SLOWEST, _FASTEST = 1e7, 1e11

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def to_json(forecast: Forecast, links: Sequence[LinkForecast], step_seconds: float | None) -> dict[str, Any]:
    """Give everything that is known, in types that JSON has. docs/planner.md describes it."""
    alternate = forecast.config.alternate
    settings = forecast.config.to_dict()
    return {
        "format_version": FORMAT_VERSION,
        "lightning_powersgd": __version__,
        "settings": {name: None if value == math.inf else value for name, value in settings.items()},
        "world_size": forecast.world_size,
        "latency_seconds": forecast.latency,
        "step_seconds": step_seconds,
        "compress_seconds": forecast.compress_seconds,
        "compress_measured_on": forecast.measured_on,
        "break_even_bits_per_second": None if forecast.break_even == math.inf else forecast.break_even,
        "totals": {
            "parameters": len(forecast.parameters),
            "compressed": sum(slot.rank > 0 for slot in forecast.parameters),
            "frozen": forecast.frozen,
            "elements": sum(slot.numel for slot in forecast.parameters),
            "dense_bytes": forecast.dense_bytes,
            "sent_bytes": forecast.sent_bytes,
            "compression_ratio": forecast.compression_ratio,
            "turnaround_steps": forecast.plan.turnaround(alternate=alternate),
            "dense_payloads": list(forecast.dense_payloads),
            "payloads": list(forecast.payloads),
        },
        "parameters": [
            {
                "name": slot.name,
                "shape": list(slot.shape),
                "matrix": [slot.rows, slot.columns] if slot.order else None,
                "dtype": str(slot.dtype).removeprefix("torch."),
                "rank": slot.rank,
                "sent": "compressed" if slot.rank else "whole",
                "dense_bytes": slot.dense_bytes,
                "sent_bytes": slot.sent_bytes(alternate=alternate),
                "compression_ratio": _ratio([slot], alternate),
            }
            for slot in forecast.parameters
        ],
        "links": [
            {
                "name": link.name,
                "bits_per_second": link.bits_per_second,
                "all_reduce_seconds": link.all_reduce_seconds,
                "powersgd_seconds": link.powersgd_seconds,
                "compress_seconds": link.compress_seconds,
                "network_seconds": link.network_seconds,
                "pays": link.pays,
                "exchange_speedup": link.speedup(),
                "step_speedup": None if step_seconds is None else link.speedup(step_seconds),
                "least_step_speedup": None if step_seconds is None else link.least_speedup(step_seconds),
            }
            for link in links
        ],
    }


def print_report(
    console: Console,
    title: str,
    forecast: Forecast,
    links: Sequence[LinkForecast],
    step_seconds: float | None,
    *,
    fold: bool,
) -> None:
    """Print the tables, and what there is to say about them.

    Args:
        console: where.
        title: above all.
        forecast: of the model.
        links: its times.
        step_seconds: of forward and backward, if they are known.
        fold: whether parameters that differ in a number of their names share a row.
    """

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False)

    say(title, "bold")
    console.print(_parameter_table(forecast, fold=fold))
    console.print()
    alternate = forecast.config.alternate
    say(f"{forecast.plan.summary(alternate=alternate)}.")
    if not forecast.break_even:
        say(
            "Nothing is compressed: every parameter is a vector, too small to save anything at this rank, or set to"
            " rank 0. Gradients would be exchanged as plain DDP does it.",
            "yellow",
        )
        return
    say(
        f"Each direction of a gradient has its turn within about {forecast.plan.turnaround(alternate=alternate):,.0f}"
        " steps. Accuracy asks for a training that is many times as long: docs/accuracy.md has figures."
    )
    console.print()
    say(f"Exchange of one step's gradients between {forecast.world_size} processes", "bold")
    console.print(_link_table(links))
    for link in links:
        if not link.pays:
            say(str(link), "yellow")
    if step_seconds is not None:
        console.print()
        say(f"A step that takes {format_seconds(step_seconds)} without any exchange", "bold")
        console.print(_step_table(links, step_seconds))
        say(
            "The speed-up is between what is left if all of the all-reduce that can hides behind the backward pass, and"
            " what there is if nothing overlaps.",
            "dim",
        )
        console.print()
    origin = f"was measured on {forecast.measured_on}" if forecast.measured_on else "was given"
    say(
        f"Computing {origin}. The network is a ring of {forecast.world_size} processes with"
        f" {format_seconds(forecast.latency)} of latency; all-reduce takes {len(forecast.dense_payloads)} collectives,"
        f" PowerSGD {len(forecast.payloads)}. {LEFT_OUT}",
        "dim",
    )


def draw(forecast: Forecast, links: Sequence[LinkForecast], title: str) -> Figure:
    """Draw the time of an exchange over the speed of the link."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    slowest = min([_SLOWEST, *(link.bits_per_second / 2 for link in links)])
    fastest = max([_FASTEST, *(link.bits_per_second * 2 for link in links)])
    rates = np.geomspace(slowest, fastest, 200)
    over = [forecast.over(float(rate)) for rate in rates]
    plain, ours = [f.all_reduce_seconds for f in over], [f.powersgd_seconds for f in over]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(rates, plain, "--", color=_ORANGE, linewidth=2, label="all-reduce (DDP)")
    axes.plot(rates, ours, "-", color=_BLUE, linewidth=2, label="PowerSGD")
    axes.fill_between(rates, plain, ours, where=np.less(ours, plain), color=_BLUE, alpha=0.08, linewidth=0)

    if slowest < forecast.break_even < fastest:
        time = forecast.over(forecast.break_even).all_reduce_seconds
        axes.plot(forecast.break_even, time, "o", color="black", zorder=3)
        axes.annotate(
            f"PowerSGD pays\nbelow {format_rate(forecast.break_even)}",
            (forecast.break_even, time),
            xytext=(24, 70),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": "black", "shrinkB": 4},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )
    for link in links:
        axes.axvline(link.bits_per_second, color=_GREY, linestyle=":", linewidth=1, zorder=0)
        times = ((link.all_reduce_seconds, _ORANGE, "s"), (link.powersgd_seconds, _BLUE, "o"))
        # Both curves fall, so there is room below and to the left of the lower one, and on the other side of the other.
        for (seconds, color, marker), side in zip(sorted(times), (-1, 1), strict=True):
            place = (link.bits_per_second, seconds)
            axes.plot(*place, marker, color=color)
            axes.annotate(
                format_seconds(seconds),
                place,
                xytext=(7 * side, 7 * side),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                va="top" if side < 0 else "bottom",
                color=color,
            )
    axes.set_xlim(slowest, fastest)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_rate(rate)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_seconds(seconds)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel="speed of the link", ylabel="exchange of one step's gradients")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    return figure


class _Name:
    """A parameter's name, broken at its dots where it is too long for its column."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(max(map(len, self._parts())), len(self._name))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        lines = [""]
        for part in self._parts():
            if lines[-1] and len(lines[-1]) + len(part) > options.max_width:
                lines.append("  ")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")

    def _parts(self) -> list[str]:
        return re.findall(r"[^.]*\.?", self._name)[:-1]


def _make_table() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)


def _parameter_table(forecast: Forecast, *, fold: bool) -> Table:
    alternate = forecast.config.alternate
    rows = _folded(forecast.parameters) if fold else [(slot.name, [slot]) for slot in forecast.parameters]
    # A matrix of two dimensions is its own shape.
    with_matrix = any(slot.rank and len(slot.shape) > 2 for slot in forecast.parameters)
    table = _make_table()
    table.add_column("parameter")
    table.add_column("shape", no_wrap=True)
    if with_matrix:
        table.add_column("matrix", no_wrap=True)
    table.add_column("sent", no_wrap=True)
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, slots in rows:
        first = slots[0]
        matrix = [f"{first.rows}×{first.columns}" if first.order else ""] if with_matrix else []
        table.add_row(
            _Name(f"{len(slots)} × {name}" if len(slots) > 1 else name),
            "×".join(map(str, first.shape)) or "scalar",
            *matrix,
            f"rank {first.rank}" if first.rank else "whole",
            *_sizes(slots, alternate),
            style="" if first.rank else "dim",
        )
    table.add_section()
    elements = sum(slot.numel for slot in forecast.parameters)
    frozen = f", {forecast.frozen} frozen" if forecast.frozen else ""
    total = f"{len(forecast.parameters)} parameters{frozen}"
    gap = [""] if with_matrix else []
    table.add_row(total, f"{elements:,}", *gap, "", *_sizes(forecast.parameters, alternate), style="bold")
    return table


def _sizes(slots: Sequence[Slot], alternate: bool) -> tuple[str, str, str]:
    before = sum(slot.dense_bytes for slot in slots)
    after = sum(slot.sent_bytes(alternate=alternate) for slot in slots)
    return format_bytes(before), format_bytes(after), format_ratio(_ratio(slots, alternate))


def _ratio(slots: Sequence[Slot], alternate: bool) -> float:
    sent = sum(slot.sent_bytes(alternate=alternate) for slot in slots)
    return sum(slot.dense_bytes for slot in slots) / sent if sent else 1.0


def _folded(slots: Iterable[Slot]) -> list[tuple[str, list[Slot]]]:
    """Put slots that differ in numbers of their names alone into one row."""
    rows: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        rows.setdefault((_NUMBER.sub("*", slot.name), slot.shape, slot.dtype, slot.rank), []).append(slot)
    return [(_pattern([slot.name for slot in row]), row) for row in rows.values()]


def _pattern(names: Sequence[str]) -> str:
    parts = zip(*(name.split(".") for name in names), strict=True)
    distinct = [list(dict.fromkeys(part)) for part in parts]
    return ".".join(
        part[0] if len(part) == 1 else f"{{{','.join(part)}}}" if len(part) < 4 else "*" for part in distinct
    )


def _link_table(links: Sequence[LinkForecast]) -> Table:
    table = _make_table()
    table.add_column("link", no_wrap=True)
    for heading in ("all-reduce", "PowerSGD", "= computing", "+ network", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for link in links:
        times = (link.all_reduce_seconds, link.powersgd_seconds, link.compress_seconds, link.network_seconds)
        gain = f"[{'green' if link.pays else 'yellow'}]{format_ratio(link.speedup())}"
        table.add_row(link.name, *map(format_seconds, times), gain)
    return table


def _step_table(links: Sequence[LinkForecast], step_seconds: float) -> Table:
    table = _make_table()
    table.add_column("link", no_wrap=True)
    for heading in ("with all-reduce", "with PowerSGD", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for link in links:
        least, most = link.least_speedup(step_seconds), link.speedup(step_seconds)
        color = "green" if least > 1 else "yellow"
        with_exchange = (step_seconds + link.all_reduce_seconds, step_seconds + link.powersgd_seconds)
        range_ = f"{least:.2f} to {most:.2f}×" if most < 10 else f"{format_ratio(least)} to {format_ratio(most)}"
        table.add_row(link.name, *map(format_seconds, with_exchange), f"[{color}]{range_}")
    return table
