"""Time a step of gossip alone, of whole models and low-rank products, beside what its bytes take.

    python examples/benchmarks/gossip.py                                  # loopback: what the arithmetic takes
    python examples/benchmarks/gossip.py --link loopback 1gbit 100mbit    # emulated links need root, `ip` and `tc`

Nothing is trained: ranks whose models differ gossip on a ring, which is one link between two of them. All settings live
in the same processes and take turns, and each is followed by a bare exchange of as many bytes with the same neighbours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import common
import numpy as np
import torch
import torch.distributed as dist
from common import AMBER, BLUE, GREEN, ORANGE, ResultTable, format_bytes, format_number, positive, spread
from contestants import make_gossip
from matplotlib.figure import Figure
from network import LINKS, over_links
from processes import Rank, run_over_link
from workloads import NETWORKS, Network

if TYPE_CHECKING:
    from lightning_powersgd import GossipExchange

# Rounds by link; even, since the factors of two successive steps differ in length.
REPEATS = {"loopback": 20, "10gbit": 20, "1gbit": 10, "100mbit": 4}
COLORS = {"loopback": GREEN, "10gbit": AMBER, "1gbit": BLUE, "100mbit": ORANGE}


@dataclass
class Timing:
    """The rounds of one setting: seconds, those of a bare exchange of as many bytes, and the bytes that a rank sent."""

    seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)

    @property
    def bytes_per_step(self) -> float:
        """The mean of the bytes that a rank sends in a step."""
        return float(np.mean(self.sent_bytes))


def run(network: Network, ranks: Sequence[int], repeats: int, arguments: argparse.Namespace, link: str) -> list[Timing]:
    """Measure gossip over a link, in the order of the ranks of the factors; 0 is whole models.

    A round counts as long as its slowest rank takes.

    Raises:
        NetworkError: if the link cannot be had.
    """
    results: list[list[Timing]] = run_over_link(
        _measure,
        network,
        ranks,
        repeats,
        link=link,
        world_size=arguments.world_size,
        device=arguments.device,
        place=f"{link}, {arguments.world_size} ranks",
        reports=len(ranks) * (1 + repeats),
    )
    slowest = results[0]
    for index, timing in enumerate(slowest):
        timing.seconds = np.max([result[index].seconds for result in results], axis=0).tolist()
        timing.bare_seconds = np.max([result[index].bare_seconds for result in results], axis=0).tolist()
    return slowest


def _measure(rank: Rank, network: Network, ranks: Sequence[int], repeats: int) -> list[Timing]:
    exchanges = []
    for kept in ranks:
        rank.report(f"warming up: {_name(kept)}")
        exchanges.append(make_gossip(network.build(rank.device), kept))
        for _ in range(2):
            exchanges[-1].step()
    rank.limit_link()
    timings = [Timing() for _ in ranks]
    for round_ in range(repeats):
        for kept, exchange, timing in zip(ranks, exchanges, timings, strict=True):
            rank.report(f"round {round_ + 1}: {_name(kept)}")
            timing.seconds.append(rank.seconds(exchange.step))
            timing.sent_bytes.append(exchange.sent_bytes)
            timing.bare_seconds.append(rank.seconds(_bare_exchange(rank, exchange)))
    return timings


def _bare_exchange(rank: Rank, exchange: GossipExchange) -> Callable[[], None]:
    """Give what sends and receives as many bytes as the exchange did, and does nothing else."""
    peers = list(exchange.topology.neighbors(rank.number)[0])
    outgoing, incoming = torch.zeros(2, len(peers), exchange.link_bytes // 4, device=rank.device)

    def send_and_receive() -> None:
        operations = []
        for row, peer in enumerate(peers):
            operations += [dist.P2POp(dist.isend, outgoing[row], peer), dist.P2POp(dist.irecv, incoming[row], peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return send_and_receive


def _name(rank: int) -> str:
    return f"rank {rank}" if rank else "whole models"


def tabulate(link: str, ranks: Sequence[int], timings: Sequence[Timing], arguments: argparse.Namespace) -> ResultTable:
    """Lay one link's figures side by side."""
    megabits = LINKS[link]
    table = ResultTable(
        f"Gossip of {NETWORKS[arguments.model].name} on {arguments.world_size} ranks, {link}",
        ["what is gossiped", "sent", "bytes ÷ rate (ms)", "bare (ms)", "ms", "quartiles", "÷ bare"],
        f"Medians of {len(timings[0].seconds)} rounds. Sent is what each rank sends in a step, in the mean over steps."
        " Bare is an exchange of as many bytes, and nothing else; the ratio to it is taken round by round."
        + (
            f" The link's rate is {megabits:,} Mbit/s each way, headers included."
            if megabits
            else " There is no network: this is arithmetic, copies, and the ranks' waiting for each other."
        ),
    )
    for rank, timing in zip(ranks, timings, strict=True):
        table.rows.append(
            [
                _name(rank),
                format_bytes(timing.bytes_per_step),
                format_number(timing.bytes_per_step * 8e-3 / megabits) if megabits else "",
                format_number(1e3 * spread(timing.bare_seconds).median),
                format_number(1e3 * spread(timing.seconds).median),
                spread(timing.seconds).quartiles(1e3),
                format_number(common.paired_ratio(timing.seconds, timing.bare_seconds).median),
            ]
        )
    return table


def draw(results: dict[str, list[Timing]], arguments: argparse.Namespace) -> Figure:
    """Draw the time of a step over its bytes, one colour a link, and dashed what the bytes alone take."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    for link, timings in results.items():
        sizes = np.array([timing.bytes_per_step for timing in timings])
        order = np.argsort(sizes)
        spreads = [spread(timings[index].seconds) for index in order]
        medians = np.array([1e3 * each.median for each in spreads])
        errors = [
            [1e3 * (each.median - each.low) for each in spreads],
            [1e3 * (each.high - each.median) for each in spreads],
        ]
        axes.errorbar(sizes[order] / 1e6, medians, errors, color=COLORS[link], marker="o", capsize=3, label=link)
        megabits = LINKS[link]
        if megabits:
            axes.plot(sizes[order] / 1e6, sizes[order] * 8e-3 / megabits, color=COLORS[link], linestyle="--")
    common.log_axis(axes.xaxis)
    common.log_axis(axes.yaxis)
    axes.set(xlabel="sent by each rank in a step (MB)", ylabel="step of gossip (ms)")
    axes.set_title(f"Gossip of {NETWORKS[arguments.model].name}; dashed: bytes ÷ the link's rate")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def to_json(ranks: Sequence[int], timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Give all samples of one link."""
    return [
        {
            "name": _name(rank),
            "rank": rank,
            "seconds": timing.seconds,
            "seconds_spread": spread(timing.seconds),
            "bare_seconds": timing.bare_seconds,
            "sent_bytes": timing.sent_bytes,
        }
        for rank, timing in zip(ranks, timings, strict=True)
    ]


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Time a step of gossip beside what its bytes take at the link's rate.")
    parser.add_argument("--model", choices=tuple(NETWORKS), default="transformer")
    parser.add_argument("--world-size", type=positive, default=2, help="number of ranks, one process each")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8], help="of the factors")
    parser.add_argument("--link", choices=tuple(LINKS), nargs="+", default=["loopback"], help="one or several")
    parser.add_argument("--repeats", type=positive, help=f"rounds; by default {REPEATS}")
    arguments = common.parse(parser, quick={"model": "tiny", "ranks": [2], "repeats": 4})
    if arguments.world_size < 2:
        parser.error(f"--world-size {arguments.world_size}: one rank has no neighbours. Use 2 or more.")

    ranks = [0, *arguments.ranks]
    results, remarks = over_links(
        arguments.link,
        lambda link: run(NETWORKS[arguments.model], ranks, arguments.repeats or REPEATS[link], arguments, link),
    )
    common.write_results(
        "gossip",
        "Gossip over a link",
        arguments,
        [tabulate(link, ranks, timings, arguments) for link, timings in results.items()],
        {"links": {link: to_json(ranks, timings) for link, timings in results.items()}},
        draw(results, arguments),
        remarks,
    )


if __name__ == "__main__":
    main()
