"""Time whole training steps, forward, backward and exchange, with every way to exchange gradients.

    python examples/benchmarks/step.py                                   # a transformer on two ranks: a few minutes
    python examples/benchmarks/step.py --model resnet18 --ranks 2 4
    python examples/benchmarks/step.py --link loopback 1gbit 100mbit     # emulated links need root, `ip` and `tc`

The contestants take turns within one run of the same processes (see `contestants`), and their ratios are taken round by
round. "No exchange" is DDP with a hook that gives every bucket back as it is: the limit. "PowerGossip" does without
DDP: after the backward pass a rank exchanges products of its model with its neighbours on a ring, which is one link
between two ranks. No contestant takes an optimizer's step.

    python examples/benchmarks/step.py --device cuda --model gpt2        # one rank on each GPU, with NCCL

On a GPU the table also says what a step asks of it and of its host (see `probes`). With one GPU there is one process,
which plays one of two ranks, whose other one sends nothing: its all-reduces are NCCL's, among itself alone. So the
table says what every exchange adds on the GPU and on its host, and nothing of the network. Two ranks of gloo on one GPU
would not say it: they take turns with the GPU, and gloo copies all payloads through the host, which NCCL does not.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch
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


ON_GPU = ["launches", "hook ms", "device ms", "tail ms", "held", "peak"]
ABOUT_GPU = (
    " Launches are the kernels, copies and fills of a step, and device ms what they take together, beyond “no exchange”"
    " (NCCL's kernels wait for other ranks, if there are any); hook ms what the host spends in the communication hook;"
    " tail ms from the last gradient to the last average. Held are the bytes between two steps, beyond the network's,"
    " and peak at most during a step. Forward passes are computed in bfloat16, and gradients are float32."
)
ABOUT_ONE_GPU = (
    " One rank of two, whose other one sends nothing: all-reduces are NCCL's, among this rank alone, and no network is"
    " in these figures."
)


def tabulate(link: str, measured: Measurement, arguments: argparse.Namespace) -> ResultTable:
    """Lay one link's figures side by side."""
    about = "" if measured.bare_seconds else ABOUT_ONE_GPU
    if measured.bare_seconds:
        rate = link_rate(measured, arguments.world_size)
        about = f" A bare all-reduce went at {rate:.3g} Gbit/s each way."
    about += ABOUT_GPU if measured.probes else ""
    ranks = f"{arguments.world_size} ranks" if arguments.world_size > 1 else "one GPU"
    place = f"{ranks}, {link}" if arguments.world_size > 1 else ranks
    table = ResultTable(
        f"{NETWORKS[arguments.model].name} on {place}",
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
            *(ON_GPU if measured.probes else []),
        ],
        f"Medians of {len(measured.seconds[NO_EXCHANGE])} rounds. Differences from “no exchange” and ratios are taken"
        " round by round; “PyTorch ÷ this” compares with PyTorch's hook at the same rank. “CPU ms” is processor time"
        " of all ranks together. Sent are the bytes that each rank hands to all-reduce in a step, or with PowerGossip"
        f" to its neighbours.{about}",
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
                *_on_gpu(contestant, measured),
            ]
        )
    for contestant in measured.failures:
        cells = [contestant.family_name, str(contestant.rank or ""), "failed"]
        table.rows.append(cells + [""] * (len(table.columns) - len(cells)))
    return table


def _on_gpu(contestant: Contestant, measured: Measurement) -> list[str]:
    if not measured.probes:
        return []
    probe, none = measured.probes[contestant], measured.probes[NO_EXCHANGE]
    return [
        format_number(probe.launches - none.launches),
        format_number(1e3 * probe.host_seconds),
        format_number(1e3 * (probe.device_seconds - none.device_seconds)),
        format_number(1e3 * probe.tail_seconds),
        format_bytes(probe.held_bytes),
        format_bytes(probe.peak_bytes),
    ]


def link_rate(measured: Measurement, world_size: int) -> float:
    """Give the Gbit/s that each rank sends in a bare all-reduce on a ring."""
    ((size, seconds),) = measured.bare_seconds.items()
    return 2 * (world_size - 1) / world_size * size * 8e-9 / float(np.median(seconds))


def to_json(measured: Measurement, world_size: int) -> dict[str, Any]:
    """Give all samples, and their summaries, of one link."""
    return {
        "all_reduce_gbit_per_second": link_rate(measured, world_size) if measured.bare_seconds else None,
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
                **({"probe": vars(measured.probes[contestant])} if measured.probes else {}),
            }
            for contestant, seconds in measured.seconds.items()
        ],
    }


def draw(results: dict[str, Measurement], arguments: argparse.Namespace) -> Figure:
    """Draw the time of a step over the rank, one panel a link, two beside each other."""
    columns, rows = min(len(results), 2), (len(results) + 1) // 2
    figure = Figure(figsize=(4.4 * columns, 1.2 + 3.6 * rows), layout="constrained")
    place = f"{arguments.world_size} ranks" if arguments.world_size > 1 else "one GPU"
    figure.suptitle(f"A training step of {NETWORKS[arguments.model].name} on {place}")
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
    # Gossip has no all-reduces, and integers take other collectives, which one GPU alone does not have.
    on_gpu = {"world_size": max(1, torch.cuda.device_count()), "gossip_ranks": [], "comm_dtype": []}
    quick = {"model": "tiny", "ranks": [2], "gossip_ranks": [2], "repeats": 3}
    arguments = common.parse(parser, quick, on_gpu)
    if arguments.world_size < 2 and arguments.device == "cpu":
        parser.error(f"--world-size {arguments.world_size}: one rank exchanges nothing. Use 2 or more.")

    contestants = [
        *REFERENCES,
        *powersgd_contestants(arguments.ranks, arguments.device),
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
            bare_sizes=[PROBE_BYTES[link]] if arguments.world_size > 1 else [],
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
