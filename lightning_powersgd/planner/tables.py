"""The tables of a forecast, made with rich."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_powersgd.compressor.plan import Slot
from lightning_powersgd.planner.forecast import Forecast, LinkForecast
from lightning_powersgd.planner.units import format_bytes, format_ratio, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.table import Table


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


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


def make_table() -> Table:
    """Make an empty table in the planner's looks."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)


def parameter_table(forecast: Forecast, *, fold: bool) -> Table:
    """Make the table of what is sent of each parameter; folded, those that differ in a number alone share a row."""
    alternate = forecast.config.alternate
    rows = _folded(forecast.parameters) if fold else [(slot.name, [slot]) for slot in forecast.parameters]
    # A matrix of two dimensions is its own shape.
    with_matrix = any(slot.rank and len(slot.shape) > 2 for slot in forecast.parameters)
    table = make_table()
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
    return format_bytes(before), format_bytes(after), format_ratio(ratio_of(slots, alternate))


def ratio_of(slots: Sequence[Slot], alternate: bool) -> float:
    """Give the compression ratio of some parameters; 1 where nothing is sent."""
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


def link_table(links: Sequence[LinkForecast]) -> Table:
    """Make the table of the time of an exchange over each link."""
    table = make_table()
    table.add_column("link", no_wrap=True)
    for heading in ("all-reduce", "bf16 hook", "PowerSGD", "= computing", "+ network", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for link in links:
        rivals = (link.all_reduce_seconds, link.bf16_seconds)
        times = (*rivals, link.powersgd_seconds, link.compress_seconds, link.network_seconds)
        gain = f"[{'green' if link.pays else 'yellow'}]{format_ratio(link.speedup())}"
        table.add_row(link.name, *map(format_seconds, times), gain)
    return table


def step_table(links: Sequence[LinkForecast], step_seconds: float) -> Table:
    """Make the table of the time of a step over each link."""
    table = make_table()
    table.add_column("link", no_wrap=True)
    for heading in ("with all-reduce", "with bf16 hook", "with PowerSGD", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for link in links:
        least, most = link.least_speedup(step_seconds), link.speedup(step_seconds)
        color = "green" if least > 1 else "yellow"
        exchanges = (link.all_reduce_seconds, link.bf16_seconds, link.powersgd_seconds)
        with_exchange = (step_seconds + seconds for seconds in exchanges)
        range_ = f"{least:.2f} to {most:.2f}×" if most < 10 else f"{format_ratio(least)} to {format_ratio(most)}"
        table.add_row(link.name, *map(format_seconds, with_exchange), f"[{color}]{range_}")
    return table
