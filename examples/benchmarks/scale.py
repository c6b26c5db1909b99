"""Find how the time of an exchange grows with the number of ranks, and with the size of the model.

    python examples/benchmarks/scale.py
    python examples/benchmarks/scale.py --link loopback --world-sizes 1 2 --sizes 512x6 1024x8

**Ranks.** Steps are measured with as many ranks as ``--world-sizes`` says, on loopback; over an emulated link with as
many as have a core each (two at least). What an exchange adds to a step without one is extrapolated by a model of
ring all-reduce, gloo's default:

    t(W) = 2 (W − 1) / W · bytes / β + all-reduces · 2 (W − 1) · α

α (latency) and β (bandwidth) are fitted by least squares of relative errors to bare all-reduces of many sizes,
measured in the same run with ranks that have a core each. To t comes what the largest of these runs took beyond it
(computing, less what overlaps with the backward pass), which does not depend on W. (With trees, as NCCL has them too, α
would be multiplied by log W instead.)

**Sizes.** Transformers of growing width and depth on two ranks and loopback, with a batch so small that computing does
not drown the exchange.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import numpy as np
from common import ResultTable, format_bytes, format_number, positive
from contestants import (
    ALL_REDUCE,
    BF16_HOOK,
    NO_EXCHANGE,
    STYLES,
    Contestant,
    Measurement,
    powersgd_contestants,
    run_steps,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from network import LINKS, over_links
from workloads import NETWORKS, Network, transformer_of

BARE_SIZES = [2**power for power in (10, 14, 18, 20, 22, 24, 26)]
_LINES = {"-": "measured", "--": "model"}
MODEL_WORLD_SIZES = (4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class RingModel:
    """The time of all-reduces on a ring.

    Args:
        alpha: seconds of latency for each of the 2 (W − 1) messages of an all-reduce.
        beta: bytes that each rank sends in a second.
    """

    alpha: float
    beta: float

    def seconds(self, world_size: int, sent_bytes: float, collectives: float) -> float:
        """Give the time of some all-reduces that carry so many bytes together."""
        rounds = 2 * (world_size - 1)
        return rounds / world_size * sent_bytes / self.beta + collectives * rounds * self.alpha


def fit_ring(samples: list[tuple[int, int, float]]) -> RingModel:
    """Fit the model to bare all-reduces.

    Args:
        samples: world size, bytes and seconds of each.
    """
    world_size, size, seconds = np.array(samples, dtype=float).T
    rounds = 2 * (world_size - 1)
    # Divided by the seconds, so that small messages count as much as large ones.
    terms = np.stack([rounds, rounds / world_size * size], axis=1) / seconds[:, None]
    (alpha, inverse_beta), *_ = np.linalg.lstsq(terms, np.ones(len(seconds)), rcond=None)
    return RingModel(max(0.0, float(alpha)), 1 / float(inverse_beta))


@dataclass
class LinkResult:
    """What was measured over one link.

    Attributes:
        link: its name.
        measured: by world size.
        calibration: the world sizes whose bare all-reduces the model is fitted to.
    """

    link: str
    measured: dict[int, Measurement]
    calibration: list[int]

    @property
    def bare(self) -> list[tuple[int, int, float]]:
        """World size, bytes and seconds of the bare all-reduces that calibrate the model."""
        return [
            (world_size, size, float(np.median(seconds)))
            for world_size in self.calibration
            for size, seconds in self.measured[world_size].bare_seconds.items()
        ]

    @property
    def model(self) -> RingModel:
        """The model of this link."""
        return fit_ring(self.bare)

    def added(self, contestant: Contestant, world_size: int) -> float:
        """Give the seconds that an exchange adds to a step without one, as measured."""
        return self.measured[world_size].added(contestant)

    def modelled(self, contestant: Contestant, world_size: int) -> float:
        """Give the same for any world size, by the model."""
        base = self.calibration[-1]
        run = self.measured[base]
        traffic = run.sent_bytes[contestant], run.collectives[contestant]
        beyond = self.added(contestant, base) - self.model.seconds(base, *traffic)
        return self.model.seconds(world_size, *traffic) + beyond

    def to_json(self, contestants: list[Contestant]) -> dict[str, Any]:
        """Give the samples, the fit, and what the model makes of it."""
        return {
            "link": self.link,
            "alpha_seconds": self.model.alpha,
            "beta_bytes_per_second": self.model.beta,
            "bare_all_reduces": [
                dict(zip(("world_size", "bytes", "seconds"), bare, strict=True)) for bare in self.bare
            ],
            "measured": {world_size: to_json(run, contestants) for world_size, run in self.measured.items()},
            "modelled_added_seconds": {
                world_size: {contestant.name: self.modelled(contestant, world_size) for contestant in contestants}
                for world_size in MODEL_WORLD_SIZES
            },
        }


def to_json(measured: Measurement, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """Give the samples of one run."""
    return [
        {
            "name": contestant.name,
            "rank": contestant.rank,
            "seconds": measured.seconds[contestant],
            "seconds_without_exchange": measured.seconds[NO_EXCHANGE],
            "added_seconds": measured.added(contestant),
            "sent_bytes": measured.sent_bytes[contestant],
            "all_reduces": measured.collectives[contestant],
        }
        for contestant in contestants
    ]


def parse_size(text: str) -> tuple[int, int]:
    """Parse "WIDTHxLAYERS", for argparse."""
    width, layers = text.split("x")
    if int(width) % 64:
        raise argparse.ArgumentTypeError(f"{text}: the width is not a multiple of 64, the width of a head. Use 512x6.")
    return int(width), int(layers)


def tabulate_link(result: LinkResult, contestants: list[Contestant], network: Network) -> ResultTable:
    """Lay one link's figures side by side."""
    measured = sorted(result.measured)
    beyond = [world_size for world_size in MODEL_WORLD_SIZES if world_size > measured[-1]]
    columns = ["added ms a step, by ranks", *map(str, measured), *(f"{world_size} (model)" for world_size in beyond)]
    table = ResultTable(
        f"Ranks: {network.name}, {result.link}",
        columns,
        "Time beyond a step without exchange, median of the rounds. The columns marked “model” are not measured: ring"
        " all-reduce, t(W) = 2 (W − 1) / W · bytes / β + all-reduces · 2 (W − 1) · α, with"
        f" α = {1e6 * result.model.alpha:.0f} µs and β = {8e-9 * result.model.beta:.3g} Gbit/s fitted to the bare"
        f" all-reduces below, and what the run on {result.calibration[-1]} ranks took beyond it. Where there are more"
        f" ranks than cores (here {common.cores()}), ranks wait for each other's computing.",
    )
    for contestant in contestants:
        times = [result.added(contestant, world_size) for world_size in measured]
        times += [result.modelled(contestant, world_size) for world_size in beyond]
        table.rows.append([contestant.name, *(format_number(1e3 * seconds) for seconds in times)])
    return table


def tabulate_bare(results: list[LinkResult]) -> ResultTable:
    """Lay bare all-reduces beside what the model makes of them."""
    table = ResultTable(
        "Bare all-reduces",
        ["link", "ranks", "size", "measured ms", "fitted ms"],
        "What the model of each link was fitted to.",
    )
    for result in results:
        for world_size, size, seconds in result.bare:
            fitted = result.model.seconds(world_size, size, collectives=1)
            cells = [format_bytes(size), f"{1e3 * seconds:.3g}", f"{1e3 * fitted:.3g}"]
            table.rows.append([result.link, str(world_size), *cells])
    return table


def tabulate_sizes(sizes: dict[Network, Measurement], contestants: list[Contestant]) -> ResultTable:
    """Lay networks of growing size side by side."""
    table = ResultTable(
        "Sizes: two ranks, loopback",
        ["transformer", "parameters", *(contestant.name for contestant in contestants)],
        "Nanoseconds for each parameter beyond a step without exchange, median of the rounds.",
    )
    for network, measured in sizes.items():
        parameters = network.gradient_bytes // 4
        each = [format_number(1e9 * measured.added(key) / parameters) for key in contestants]
        table.rows.append([network.name.removeprefix("transformer "), f"{parameters / 1e6:.3g} M", *each])
    return table


def draw(results: list[LinkResult], sizes: dict[Network, Measurement], contestants: list[Contestant]) -> Figure:
    """Draw added time over ranks, one panel a link, and over the model's size."""
    figure = Figure(figsize=(2.2 + 4.4 * (len(results) + 1), 4.8), layout="constrained")
    figure.suptitle("What an exchange adds to a step without one")
    *left, right = figure.subplots(1, len(results) + 1, squeeze=False)[0]
    for axes, result in zip(left, results, strict=True):
        _draw_link(axes, result, contestants)
    for contestant in contestants:
        color, _, marker = STYLES[contestant.family]
        parameters = [network.gradient_bytes / 4e6 for network in sizes]
        each = [1e3 * measured.added(contestant) for measured in sizes.values()]
        right.plot(parameters, _positive(np.divide(each, parameters)), color=color, marker=marker)
    right.set(title="two ranks, loopback", xlabel="parameters (millions)", ylabel="added time a parameter (ns)")
    common.log_axis(right.xaxis)
    common.log_axis(right.yaxis)
    for axes in (*left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=STYLES[key.family][0], marker=STYLES[key.family][2], label=key.name) for key in contestants
    ]
    handles += [Line2D([], [], color=common.BLACK, linestyle=line, label=label) for line, label in _LINES.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def _positive(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Leave out what a logarithmic axis cannot show: differences within the noise of nothing."""
    return np.where(np.asarray(values) > 0, values, np.nan)


def _draw_link(axes: Axes, result: LinkResult, contestants: list[Contestant]) -> None:
    world_sizes = sorted(result.measured)
    beyond = [2**power for power in range(1, 11) if 2**power >= result.calibration[-1]]
    for contestant in contestants:
        color, _, marker = STYLES[contestant.family]
        measured = [1e3 * result.added(contestant, world_size) for world_size in world_sizes]
        axes.plot(world_sizes, _positive(measured), color=color, marker=marker)
        modelled = [1e3 * result.modelled(contestant, world_size) for world_size in beyond]
        axes.plot(beyond, _positive(modelled), "--", color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks([4**power for power in range(6)], [str(4**power) for power in range(6)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title=result.link, xlabel="ranks", ylabel="added time (ms)")
    common.log_axis(axes.yaxis)


def measure(
    network: Network, contestants: list[Contestant], arguments: argparse.Namespace, link: str, world_sizes: list[int]
) -> LinkResult:
    """Measure steps over one link, and bare all-reduces where every rank has a core.

    Raises:
        NetworkError: if the link cannot be had.
    """
    calibration = with_cores(world_sizes)
    measured = {
        world_size: run_steps(
            network,
            contestants,
            repeats=arguments.repeats,
            world_size=world_size,
            device=arguments.device,
            link=link,
            bare_sizes=BARE_SIZES if world_size in calibration else [],
        )
        for world_size in world_sizes
    }
    return LinkResult(link, measured, calibration)


def with_cores(world_sizes: list[int]) -> list[int]:
    """Select the numbers of ranks, from two on, that have a core for each rank; two pass in any case."""
    return [world_size for world_size in world_sizes if 2 <= world_size <= max(2, common.cores())]


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Find how the time of an exchange grows with the number of ranks and the model's size.")
    parser.add_argument("--rank", type=positive, default=4, help="PowerSGD's rank")
    parser.add_argument("--model", choices=tuple(NETWORKS), default="transformer", help="for growing numbers of ranks")
    parser.add_argument("--world-sizes", type=positive, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks")
    parser.add_argument("--link", choices=tuple(LINKS), nargs="+", default=["loopback", "1gbit"], help="one or several")
    sizes = [(256, 1), (384, 2), (512, 3), (512, 6), (768, 7), (1024, 8)]
    parser.add_argument(
        "--sizes", type=parse_size, nargs="+", default=sizes, metavar="WIDTHxLAYERS", help="of the growing transformers"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="rounds")
    quick = {"rank": 2, "model": "tiny", "world_sizes": [1, 2], "link": ["loopback"], "sizes": [(64, 1), (64, 2)]}
    arguments = common.parse(parser, {**quick, "repeats": 3})
    arguments.world_sizes.sort()
    if not with_cores(arguments.world_sizes):
        parser.error(
            f"--world-sizes {' '.join(map(str, arguments.world_sizes))}: the model is fitted to ranks that have a core"
            " each, two at least. Add 2."
        )

    contestants = [NO_EXCHANGE, ALL_REDUCE, BF16_HOOK, *powersgd_contestants([arguments.rank])]
    network = NETWORKS[arguments.model]

    def measure_link(link: str) -> LinkResult:
        world_sizes = arguments.world_sizes if LINKS[link] is None else with_cores(arguments.world_sizes)
        return measure(network, contestants, arguments, link, world_sizes)

    by_link, remarks = over_links(arguments.link, measure_link)
    results = list(by_link.values())
    sizes = {
        network: measure(network, contestants, arguments, "loopback", [2]).measured[2]
        for network in (transformer_of(width, layers, batch=1, tokens=16) for width, layers in arguments.sizes)
    }

    runs = [run for result in results for run in result.measured.values()] + list(sizes.values())
    failures = {contestant: text for run in runs for contestant, text in run.failures.items()}
    remarks += [f"{contestant.name} failed: {text}" for contestant, text in failures.items()]
    compared = [contestant for contestant in contestants[1:] if contestant not in failures]
    tables = [tabulate_link(result, compared, network) for result in results]
    tables += [tabulate_bare(results), tabulate_sizes(sizes, compared)]
    data = {
        "links": [result.to_json(compared) for result in results],
        "sizes": [
            {
                "network": network.name,
                "parameters": network.gradient_bytes // 4,
                "exchanges": to_json(measured, compared),
            }
            for network, measured in sizes.items()
        ],
    }
    common.write_results("scale", "Scale", arguments, tables, data, draw(results, sizes, compared), remarks)


if __name__ == "__main__":
    main()
