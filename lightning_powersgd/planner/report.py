"""A forecast for readers: as JSON for programs, and as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_powersgd.planner.forecast import Forecast, LinkForecast
from lightning_powersgd.planner.units import format_bytes, format_rate, format_ratio, format_seconds
from lightning_powersgd.version import __version__

if TYPE_CHECKING:
    from rich.console import Console
from lightning_powersgd.planner.tables import link_table, parameter_table, ratio_of, step_table

FORMAT_VERSION = 1
# Below it a forecast cannot tell which exchange is the faster one, and the report says so in words.
_CLEAR_GAIN = 1.1
LEFT_OUT = (
    "Left out: what of either exchange hides behind the backward pass, congestion, what sending costs the processor,"
    " and waiting for slower processes."
)


def to_json(forecast: Forecast, links: Sequence[LinkForecast], step_seconds: float | None) -> dict[str, Any]:
    """Give everything that is known, in types that JSON has. docs/planner.md describes it."""
    alternate = forecast.config.alternate
    settings = forecast.config.to_dict()
    return {
        "format_version": FORMAT_VERSION,
        "lightning_powersgd": __version__,
        "settings": _finite(settings),
        "world_size": forecast.world_size,
        "shards": forecast.shards,
        "hierarchy": None if forecast.hierarchy is None else _finite(asdict(forecast.hierarchy)),
        "latency_seconds": forecast.latency,
        "step_seconds": step_seconds,
        "compress_seconds": forecast.compress_seconds,
        "compress_measured_on": forecast.measured_on,
        "cast_seconds": forecast.cast_seconds,
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
            "error_bytes": forecast.error_bytes,
            "bytes_in_node": forecast.bytes_in_node,
            "sent_bytes_along_longest": forecast.along_longest,
            "dense_payloads": list(forecast.dense_payloads),
            "bf16_payloads": list(forecast.bf16_payloads),
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
                "compression_ratio": ratio_of([slot], alternate),
            }
            for slot in forecast.parameters
        ],
        "links": [
            {
                "name": link.name,
                "bits_per_second": link.bits_per_second,
                "all_reduce_seconds": link.all_reduce_seconds,
                "bf16_seconds": link.bf16_seconds,
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


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Put null where a number is infinite, which JSON cannot say."""
    return {name: None if value == math.inf else value for name, value in values.items()}


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
    console.print(parameter_table(forecast, fold=fold))
    console.print()
    alternate = forecast.config.alternate
    say(f"{forecast.plan.summary(alternate=alternate)}.")
    if not any(forecast.plan.compressed):
        say(
            "Nothing is compressed: every parameter is a vector, too small to save anything at this rank, or set to"
            " rank 0. Gradients would be exchanged as plain DDP does it.",
            "yellow",
        )
        return
    for line in [*_of_shards(forecast), *_of_machines(forecast)]:
        say(line)
    say(
        f"Each direction of a gradient has its turn within about {forecast.plan.turnaround(alternate=alternate):,.0f}"
        " steps. Accuracy asks for a training that is many times as long: docs/accuracy.md has figures."
    )
    console.print()
    say(f"Exchange of one step's gradients between {forecast.world_size} processes", "bold")
    console.print(link_table(links))
    say("The bf16 hook is PyTorch's bf16_compress_hook. The gain is over the faster of the other two.", "dim")
    for link in links:
        if link.speedup() < _CLEAR_GAIN:
            say(str(link), "yellow")
    if step_seconds is not None:
        console.print()
        say(f"A step that takes {format_seconds(step_seconds)} without any exchange", "bold")
        console.print(step_table(links, step_seconds))
        say(
            "The speed-up is over the faster of the other two. The lower figure lets that one hide behind the backward"
            " pass as far as it can, and PowerSGD not at all; the higher figure hides neither.",
            "dim",
        )
        console.print()
    origin = "was given, and the hook's casts count as free"
    if forecast.measured_on:
        casts = format_seconds(forecast.cast_seconds)
        origin = f"was measured on {forecast.measured_on}, where the hook's casts take {casts}"
    say(
        f"Computing {origin}. The network is a ring of {forecast.world_size} processes with"
        f" {format_seconds(forecast.latency)} of latency; all-reduce and the hook take {len(forecast.dense_payloads)}"
        f" collectives, PowerSGD {len(forecast.payloads)}. {LEFT_OUT}",
        "dim",
    )


def _of_shards(forecast: Forecast) -> Iterator[str]:
    """Say what there is to say of a sharded model."""
    if forecast.shards == 1:
        return
    yield (
        f"That is what a device sends between machines. Inside its machine it sends"
        f" {format_bytes(forecast.bytes_in_node)} a step, as FSDP does without PowerSGD, and its error buffers take"
        f" {format_bytes(forecast.error_bytes)}."
    )
    sent = forecast.along_longest
    if sent is not None and sent < 0.95 * forecast.sent_bytes:
        yield (
            f"Sharded along the longest dimension of each parameter it would send {format_bytes(sent)}"
            f" ({format_ratio(forecast.dense_bytes / sent)}): fully_shard(..., shard_placement_fn=lambda p:"
            " Shard(max(range(p.dim()), key=lambda axis: p.shape[axis]))), where that dimension is divisible by"
            f" {forecast.shards}."
        )


def _of_machines(forecast: Forecast) -> Iterator[str]:
    """Say what averaging inside machines first would bring, and where."""
    inside = forecast.hierarchy
    if inside is None:
        return
    yield (
        f"hierarchical=True, with {inside.devices} devices in each machine: the busiest device computes for"
        f" {format_seconds(inside.compress_seconds)} instead of {format_seconds(forecast.compress_seconds)}, and keeps"
        f" {format_bytes(inside.error_bytes)} of error buffers instead of {format_bytes(forecast.error_bytes)}. Inside"
        f" the machine it sends {format_bytes(inside.bytes_in_node)} a step, which makes the step"
        + (" longer." if inside.break_even == math.inf else f" longer below {format_rate(inside.break_even)}.")
    )
