"""Time whole training steps, forward, backward and exchange, with every way to exchange gradients.

    python examples/benchmarks/step.py                                   # a transformer on two ranks: a few minutes
    python examples/benchmarks/step.py --model resnet18 --ranks 2 4
    python examples/benchmarks/step.py --link loopback 1gbit 100mbit     # emulated links need root, `ip` and `tc`

The contestants take turns within one run of the same processes (see `contestants`), and their ratios are taken round by
round. "No exchange" is DDP with a hook that gives every bucket back as it is: the limit. "PowerGossip" does without
DDP: after the backward pass a rank exchanges products of its model with its neighbours on a ring, which is one link
between two ranks. No contestant takes an optimizer's step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import common
import numpy as np
from common import ResultTable, format_bytes, format_number, positive, spread
from contestants import (
    ALL_REDUCE,
    BF16_HOOK,
    NO_EXCHANGE,
    POWERSGD,
    STYLES,
    Contestant,
    Measurement,
    gossip_contestants,
    powersgd_contestants,
    run_steps,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from network import LINKS, over_links
from workloads import NETWORKS

# Rounds by link: a step of plain DDP takes many seconds over a slow one.
REPEATS = {"loopback": 30, "10gbit": 30, "1gbit": 12, "100mbit": 4}
# Bytes of the all-reduce that measures what a link really carries: half a second's, and on a fast one enough.
PROBE_BYTES = {"loopback": 2**26, "10gbit": 2**26, "1gbit": 2**26, "100mbit": 2**23}
REFERENCES = [NO_EXCHANGE, ALL_REDUCE, Contestant("fp16 hook"), BF16_HOOK]


def tabulate(link: str, measured: Measurement, arguments: argparse.Namespace) -> ResultTable:
    """Lay one link's figures side by side."""
    table = ResultTable(
        f"{NETWORKS[arguments.model].name} on {arguments.world_size} ranks, {link}",
        [
            "exchange",
            "rank",
            "ms",
            "quartiles",
            "added ms",
            "÷ none",
            "÷ all-reduce",
            "PyTorch ÷ this",
            "CPU ms",
            "sent",
        ],
        f"Medians of {len(measured.seconds[NO_EXCHANGE])} rounds. Differences from “no exchange” and ratios are taken"
        " round by round; “PyTorch ÷ this” compares with PyTorch's hook at the same rank. “CPU ms” is processor time"
        " of all ranks together. Sent are the bytes that each rank hands to all-reduce in a step, or with PowerGossip"
        " to its neighbours. A bare all-reduce went at"
        f" {link_rate(measured, arguments.world_size):.3g} Gbit/s each way.",
    )
    for contestant, seconds in measured.seconds.items():
        theirs = Contestant("PyTorch's hook", contestant.rank)
        comparable = contestant.family in POWERSGD and theirs in measured.seconds
        table.rows.append(
            [
                contestant.family_name,
                str(contestant.rank or ""),
                format_number(1e3 * spread(seconds).median),
                spread(seconds).quartiles(1e3),
                format_number(1e3 * measured.added(contestant)),
                format_number(measured.ratio(contestant, NO_EXCHANGE).median),
                format_number(measured.ratio(contestant, ALL_REDUCE).median),
                format_number(measured.ratio(theirs, contestant).median) if comparable else "",
                format_number(1e3 * spread(measured.cpu_seconds[contestant]).median),
                format_bytes(measured.sent_bytes[contestant]),
            ]
        )
    for contestant in measured.failures:
        table.rows.append([contestant.family_name, str(contestant.rank or ""), "failed", *[""] * 7])
    return table


def link_rate(measured: Measurement, world_size: int) -> float:
    """Give the Gbit/s that each rank sends in a bare all-reduce on a ring."""
    ((size, seconds),) = measured.bare_seconds.items()
    return 2 * (world_size - 1) / world_size * size * 8e-9 / float(np.median(seconds))


def to_json(measured: Measurement, world_size: int) -> dict[str, Any]:
    """Give all samples, and their summaries, of one link."""
    return {
        "all_reduce_gbit_per_second": link_rate(measured, world_size),
        "failures": {contestant.name: text for contestant, text in measured.failures.items()},
        "exchanges": [
            {
                "name": contestant.name,
                "family": contestant.family,
                "rank": contestant.rank,
                "seconds": seconds,
                "seconds_spread": spread(seconds),
                "cpu_seconds": measured.cpu_seconds[contestant],
                "cpu_seconds_spread": spread(measured.cpu_seconds[contestant]),
                "ratio_to_no_exchange": measured.ratio(contestant, NO_EXCHANGE),
                "ratio_to_all_reduce": measured.ratio(contestant, ALL_REDUCE),
                "sent_bytes": measured.sent_bytes[contestant],
                "all_reduces": measured.collectives[contestant],
            }
            for contestant, seconds in measured.seconds.items()
        ],
    }


def draw(results: dict[str, Measurement], arguments: argparse.Namespace) -> Figure:
    """Draw the time of a step over the rank, one panel a link, two beside each other."""
    columns, rows = min(len(results), 2), (len(results) + 1) // 2
    figure = Figure(figsize=(4.4 * columns, 1.2 + 3.6 * rows), layout="constrained")
    figure.suptitle(f"A training step of {NETWORKS[arguments.model].name} on {arguments.world_size} ranks")
    panels = [figure.add_subplot(rows, columns, number) for number in range(1, len(results) + 1)]
    for axes, (link, measured) in zip(panels, results.items(), strict=True):
        _draw_link(axes, measured)
        axes.set(title=link, xlabel="rank", ylabel="step (× no exchange)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3 if columns > 1 else 2, frameon=False)
    return figure


def _draw_link(axes: Axes, measured: Measurement) -> None:
    for contestant in REFERENCES:
        if contestant in measured.seconds:
            color, line, _ = STYLES[contestant.family]
            ratio = measured.ratio(contestant, NO_EXCHANGE).median
            axes.axhline(ratio, color=color, linestyle=line, label=contestant.name)
    curves: dict[Contestant, list[Contestant]] = {}
    for contestant in measured.seconds:
        if contestant.rank:
            curves.setdefault(replace(contestant, rank=0), []).append(contestant)
    for curve, contestants in curves.items():
        color, line, marker = STYLES[curve.family]
        line = ":" if curve.comm_dtype else line
        present = [contestant.rank for contestant in contestants]
        ratios = [measured.ratio(contestant, NO_EXCHANGE) for contestant in contestants]
        errors = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
        label = curve.family_name
        axes.errorbar(
            present,
            [r.median for r in ratios],
            errors,
            color=color,
            linestyle=line,
            marker=marker,
            capsize=3,
            label=label,
        )
    axes.set_xscale("log", base=2)
    ranks = sorted({contestant.rank for contestant in measured.seconds if contestant.rank})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    common.log_axis(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Time whole training steps with every way to exchange gradients.")
    parser.add_argument("--model", choices=tuple(NETWORKS), default="transformer")
    parser.add_argument("--world-size", type=positive, default=2, help="number of ranks, one process each")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8, 32], help="PowerSGD's ranks")
    parser.add_argument(
        "--gossip-ranks", type=positive, nargs="+", default=[1, 2], help="PowerGossip's ranks, on a ring"
    )
    parser.add_argument(
        "--comm-dtype",
        choices=("bfloat16", "int8", "int4"),
        nargs="*",
        default=["int8"],
        help="of factors on the wire: full steps are timed with each, beside the gradient's own dtype",
    )
    parser.add_argument("--link", choices=tuple(LINKS), nargs="+", default=["loopback"], help="one or several")
    parser.add_argument("--repeats", type=positive, help=f"rounds; by default {REPEATS}")
    arguments = common.parse(parser, quick={"model": "tiny", "ranks": [2], "gossip_ranks": [2], "repeats": 3})
    if arguments.world_size < 2:
        parser.error(f"--world-size {arguments.world_size}: one rank exchanges nothing. Use 2 or more.")

    contestants = [
        *REFERENCES,
        *powersgd_contestants(arguments.ranks),
        *(Contestant("full", rank, comm_dtype=dtype) for dtype in arguments.comm_dtype for rank in arguments.ranks),
        *gossip_contestants(arguments.gossip_ranks),
    ]
    results, remarks = over_links(
        arguments.link,
        lambda link: run_steps(
            NETWORKS[arguments.model],
            contestants,
            repeats=arguments.repeats or REPEATS[link],
            world_size=arguments.world_size,
            device=arguments.device,
            link=link,
            bare_sizes=[PROBE_BYTES[link]],
        ),
    )
    remarks += [
        f"{contestant.name} failed on {link}: {text}"
        for link, measured in results.items()
        for contestant, text in measured.failures.items()
    ]
    common.write_results(
        "step",
        "Training steps",
        arguments,
        [tabulate(link, measured, arguments) for link, measured in results.items()],
        {"links": {link: to_json(measured, arguments.world_size) for link, measured in results.items()}},
        draw(results, arguments),
        remarks,
    )


if __name__ == "__main__":
    main()
