"""Compare what the planner's probe says of a link with the link that was set, and its forecast of a step with the step.

    python examples/benchmarks/probe.py                                 # 1 Gbit/s and 100 Mbit/s: a few minutes
    python examples/benchmarks/probe.py --model resnet18 --ranks 2 4 --world-size 4

Everything is done by the same processes over the same emulated link, which needs root, `ip` and `tc`: they probe the
link as `lightning-powersgd probe` does, forecast the steps of plain DDP and of PowerSGD from that, and time the steps.
The forecast takes the time of a step without any exchange from the same rounds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import common
from common import ResultTable, format_number, positive, spread
from contestants import ALL_REDUCE, BF16_HOOK, NO_EXCHANGE, Contestant, Measurement, measure_steps, slowest_of
from matplotlib.figure import Figure
from network import LINKS, over_links
from processes import Rank, run_over_link
from workloads import NETWORKS, Network

from lightning_powersgd.exchange.link import Link, measure_link
from lightning_powersgd.planner.answer import Answer
from lightning_powersgd.planner.probe import answer_for

# Rounds by link: a step of plain DDP takes many seconds over a slow one.
REPEATS = {"loopback": 20, "10gbit": 20, "1gbit": 12, "100mbit": 4}
# An IPv4 packet of 1500 bytes in an Ethernet frame carries 1448 bytes over TCP, and the filter counts 14 of header.
TCP_SHARE = 1448 / 1514


@dataclass
class Comparison:
    """What was probed, forecast and measured over one link.

    Attributes:
        link: that was probed.
        probe_seconds: that probing took.
        answer: the forecast.
        measured: the steps.
    """

    link: Link
    probe_seconds: float
    answer: Answer
    measured: Measurement

    def forecast_seconds(self, contestant: Contestant) -> float:
        """Give the forecast of a step."""
        answer = replace(self.answer, step_seconds=spread(self.measured.seconds[NO_EXCHANGE]).median)
        if contestant == ALL_REDUCE:
            return answer.ddp_seconds
        if contestant == BF16_HOOK:
            return answer.bf16_seconds
        (option,) = (option for option in answer.options if option.rank == str(contestant.rank))
        return answer.seconds(option)


def compare(link: str, network: Network, contestants: list[Contestant], arguments: Any) -> Comparison:
    """Probe, forecast and measure over one link."""
    results: list[Comparison] = run_over_link(
        _compare,
        network,
        contestants,
        arguments.repeats or REPEATS[link],
        arguments.seconds,
        link=link,
        world_size=arguments.world_size,
        device=arguments.device,
        place=link,
        reports=None,
    )
    results[0].measured = slowest_of([result.measured for result in results])
    return results[0]


def _compare(rank: Rank, network: Network, contestants: list[Contestant], repeats: int, seconds: float) -> Comparison:
    measured = measure_steps(rank, network, contestants, repeats, bare_sizes=[])
    rank.report("probing the link")
    start = time.perf_counter()
    link = measure_link(None, rank.device, seconds)
    probe_seconds = time.perf_counter() - start
    rank.report("forecasting")
    answer = answer_for(
        network.build(rank.device),
        {str(contestant.rank): contestant.config() for contestant in contestants if contestant.rank},
        link,
        rank.device,
        compress_seconds=None,
        step_seconds=None,
        on_progress=lambda _, __: None,
    )
    return Comparison(link, probe_seconds, answer, measured)


def tabulate_links(results: dict[str, Comparison]) -> ResultTable:
    """Lay what was set beside what was probed."""
    table = ResultTable(
        "The link",
        ["link", "set, Mbit/s", "for TCP", "probed", "÷ set", "÷ for TCP", "spread", "latency, µs", "took, s"],
        "Probed are bytes of gradients. “For TCP” is what a link carries of them beside the headers of Ethernet, IP and"
        " TCP, in frames of 1514 bytes. The spread is the distance of the largest message's quartiles.",
    )
    for link, result in results.items():
        megabits, probed = LINKS[link], result.link.bits_per_second / 1e6
        table.rows.append(
            [
                link,
                format_number(megabits) if megabits else "",
                format_number(megabits * TCP_SHARE) if megabits else "",
                format_number(probed),
                format_number(probed / megabits) if megabits else "",
                format_number(probed / (megabits * TCP_SHARE)) if megabits else "",
                f"{result.link.spread:.0%}",
                format_number(1e6 * result.link.latency),
                format_number(result.probe_seconds),
            ]
        )
    return table


def tabulate_steps(link: str, result: Comparison, title: str) -> ResultTable:
    """Lay what was forecast of steps beside what was measured."""
    seconds = result.measured.seconds
    table = ResultTable(
        f"{title}, {link}",
        ["step", "forecast, ms", "measured, ms", "quartiles", "forecast ÷ measured"],
        f"Medians of {len(seconds[NO_EXCHANGE])} rounds. The forecast is that of the probe, for a step that takes as"
        " long without any exchange as measured here.",
    )
    for contestant, samples in seconds.items():
        measured = spread(samples)
        forecast = None if contestant == NO_EXCHANGE else result.forecast_seconds(contestant)
        table.rows.append(
            [
                contestant.name,
                format_number(1e3 * forecast) if forecast else "",
                format_number(1e3 * measured.median),
                measured.quartiles(1e3),
                format_number(forecast / measured.median) if forecast else "",
            ]
        )
    return table


def draw(results: dict[str, Comparison]) -> Figure:
    """Draw the all-reduces of the probe over their size, with the ring that was fitted to them."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for link, result in results.items():
        samples = result.link.samples
        sizes = [sample.payload_bytes / 1e6 for sample in samples]
        (points,) = axes.plot(sizes, [1e3 * sample.seconds for sample in samples], "o", label=link)
        fitted = [1e3 * result.link.all_reduce_seconds(sample.payload_bytes) for sample in samples]
        axes.plot(sizes, fitted, color=points.get_color())
    axes.set(xlabel="MB of an all-reduce", ylabel="ms", title="Probed (points) and fitted (lines)")
    common.log_axis(axes.xaxis)
    common.log_axis(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def to_json(result: Comparison) -> dict[str, Any]:
    """Give all samples of one link."""
    from lightning_powersgd.planner.link_file import link_content

    return {
        "link": link_content(result.link),
        "probe_seconds": result.probe_seconds,
        "answer": result.answer.to_json(),
        "steps": [
            {
                "name": contestant.name,
                "rank": contestant.rank,
                "seconds": seconds,
                "forecast_seconds": None if contestant == NO_EXCHANGE else result.forecast_seconds(contestant),
            }
            for contestant, seconds in result.measured.seconds.items()
        ],
    }


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Compare the planner's probe and its forecast with what is set and measured.")
    parser.add_argument("--model", choices=tuple(NETWORKS), default="transformer")
    parser.add_argument("--world-size", type=positive, default=2, help="number of ranks, one process each")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4], help="PowerSGD's ranks")
    parser.add_argument("--link", choices=tuple(LINKS), nargs="+", default=["1gbit", "100mbit"], help="one or several")
    parser.add_argument("--seconds", type=float, default=10.0, help="of probing, as with `lightning-powersgd probe`")
    parser.add_argument("--repeats", type=positive, help=f"rounds; by default {REPEATS}")
    quick = {"model": "tiny", "ranks": [2], "repeats": 3, "seconds": 0.1, "link": ["loopback"]}
    arguments = common.parse(parser, quick=quick)
    if arguments.world_size < 2:
        parser.error(f"--world-size {arguments.world_size}: one rank exchanges nothing. Use 2 or more.")

    network = NETWORKS[arguments.model]
    contestants = [NO_EXCHANGE, ALL_REDUCE, BF16_HOOK, *(Contestant("full", rank) for rank in arguments.ranks)]
    results, remarks = over_links(arguments.link, lambda link: compare(link, network, contestants, arguments))
    title = f"{network.name} on {arguments.world_size} ranks"
    common.write_results(
        "probe",
        "Probe and forecast",
        arguments,
        [tabulate_links(results), *(tabulate_steps(link, result, title) for link, result in results.items())],
        {"links": {link: to_json(result) for link, result in results.items()}},
        draw(results),
        remarks,
    )


if __name__ == "__main__":
    main()
