"""Train with ``compress="auto"`` beside plain DDP and PowerSGD, and see that it is as fast as the better of them.

    python examples/benchmarks/never_slower.py --link loopback 10gbit 1gbit 100mbit    # emulated links need root
    python examples/benchmarks/never_slower.py --model resnet18

The contestants take turns within one run of the same processes, some steps at a time. What ``compress="auto"`` measures
before its first step, and its trials, are part of its time. No contestant takes an optimizer's step.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import common
import numpy as np
import torch.distributed as dist
from common import BLUE, GREEN, ORANGE, ResultTable, format_number, positive
from contestants import replica
from matplotlib.figure import Figure
from network import LINKS, over_links
from processes import Rank, run_over_link
from torch.nn.parallel import DistributedDataParallel
from workloads import NETWORKS, Network

DDP, ALWAYS, AUTO = "DDP", "always", "auto"
ROUNDS = 10
# Steps of the contestants in a round that only compare, and of plain DDP on links where one takes seconds.
COMPARED, DDP_COMPARED = 10, {"100mbit": 1}


@dataclass
class Timing:
    """What a rank measured.

    Attributes:
        seconds: of a step, by contestant and round.
        setup_seconds: that measuring took before the first step.
        sent_whole: matrices that are not worth compressing.
        matrices: those and the others.
        exact: steps of "auto" that were exact.
        ratio: of a compressed step to an exact one in its last trial, if there was one.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    setup_seconds: float = 0.0
    sent_whole: int = 0
    matrices: int = 0
    exact: int = 0
    ratio: float | None = None

    def mean(self, name: str, steps: int) -> float:
        """Give the seconds of a step, with what was measured before the first of so many."""
        setup = self.setup_seconds / steps if name == AUTO else 0.0
        return float(np.mean(self.seconds[name])) + setup


def run(network: Network, arguments: argparse.Namespace, link: str) -> Timing:
    """Measure over a link. Steps count as long as they take on the slowest rank.

    Raises:
        NetworkError: if the link cannot be had.
    """
    results: list[Timing] = run_over_link(
        _measure,
        network,
        arguments.rank,
        arguments.steps,
        DDP_COMPARED.get(link, COMPARED),
        link=link,
        world_size=2,
        device=arguments.device,
        place=link,
        reports=3 * ROUNDS + 1,
    )
    slowest = results[0]
    for name in slowest.seconds:
        slowest.seconds[name] = np.max([result.seconds[name] for result in results], axis=0).tolist()
    slowest.setup_seconds = max(result.setup_seconds for result in results)
    return slowest


def _measure(rank: Rank, network: Network, kept: int, steps: int, ddp_steps: int) -> Timing:
    from lightning_powersgd import PowerSGDConfig, attach_powersgd
    from lightning_powersgd.exchange.worth import leave_whole_what_is_not_worth_it

    original = network.build(rank.device)
    batches = [network.draw(rank.device, seed=10 * number + rank.number) for number in range(4)]
    models = {name: DistributedDataParallel(replica(original)) for name in (DDP, ALWAYS, AUTO)}
    attach_powersgd(models[ALWAYS], PowerSGDConfig(rank=kept))
    exchange = attach_powersgd(models[AUTO], PowerSGDConfig(rank=kept, compress="auto"))

    hooked = True

    def train(name: str, count: int) -> int:
        nonlocal hooked
        compressed = 0
        for number in range(count):
            if name == AUTO:
                compressed += exchange.compressing
                if hooked == exchange.idle:
                    # As the strategy does: plain DDP, as long as nothing is compressed.
                    assert hooked, "no second trial comes within the steps of a benchmark"
                    models[AUTO].reducer._remove_autograd_hooks()
                    hooked, models[AUTO] = False, DistributedDataParallel(models[AUTO].module)
            models[name](batches[number % len(batches)]).square().mean().backward()
            models[name].zero_grad()
            if name == AUTO and not hooked:
                exchange.pass_step()
        return compressed

    rank.report("warming up")
    for name in (DDP, ALWAYS):
        train(name, 3)
    rank.limit_link()
    result = Timing(seconds={name: [] for name in models}, matrices=len(list(exchange.plan.compressed)))
    dist.barrier()
    start = time.perf_counter()
    leave_whole_what_is_not_worth_it(exchange)
    result.setup_seconds = time.perf_counter() - start
    counts = {AUTO: max(1, steps // ROUNDS), ALWAYS: COMPARED, DDP: ddp_steps}
    for number in range(ROUNDS):
        for name, count in counts.items():
            rank.report(f"round {number + 1}: {name}")
            compressed = 0

            def work(name: str = name, count: int = count) -> None:
                nonlocal compressed
                compressed = train(name, count)

            result.seconds[name].append(rank.seconds(work) / count)
            result.exact += count - compressed if name == AUTO else 0
    result.sent_whole = len(exchange.state.whole)
    result.ratio = None if exchange.state.trial is None else exchange.state.trial.ratio
    return result


def tabulate(results: dict[str, Timing], arguments: argparse.Namespace) -> ResultTable:
    """Lay all links side by side."""
    steps = arguments.steps
    table = ResultTable(
        f"{NETWORKS[arguments.model].name} on 2 ranks, rank {arguments.rank}, {steps} steps",
        ["link", "DDP", "always", "auto", "auto ÷ the better", "before", "sent whole", "exact steps", "ratio"],
        'Milliseconds a step. "auto" includes its trials, and its share of the seconds that it takes before the first'
        ' step. "Sent whole" are matrices that it then found not worth compressing, and "ratio" is what its last trial'
        " found: a compressed step ÷ an exact one.",
    )
    for link, timing in results.items():
        ddp, always, auto = (timing.mean(name, steps) for name in (DDP, ALWAYS, AUTO))
        table.rows.append(
            [
                link,
                *(format_number(1e3 * seconds) for seconds in (ddp, always, auto)),
                f"{auto / min(ddp, always):.3f}",
                f"{timing.setup_seconds:.1f} s",
                f"{timing.sent_whole} of {timing.matrices}",
                f"{timing.exact} of {steps}",
                "" if timing.ratio is None else f"{timing.ratio:.2f}",
            ]
        )
    return table


def draw(results: dict[str, Timing], arguments: argparse.Namespace) -> Figure:
    """Draw three bars for each link."""
    figure = Figure(figsize=(8, 1.0 + 1.4 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axes, (link, timing) in zip(rows, results.items(), strict=True):
        milliseconds = [1e3 * timing.mean(name, arguments.steps) for name in (AUTO, ALWAYS, DDP)]
        labels = [format_number(value) for value in milliseconds]
        common.draw_bars(axes, link, [AUTO, ALWAYS, DDP], milliseconds, labels, [GREEN, BLUE, ORANGE])
    figure.suptitle(f"{NETWORKS[arguments.model].name} on two ranks")
    return figure


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser('Time training with compress="auto" beside plain DDP and PowerSGD.')
    parser.add_argument("--model", choices=tuple(NETWORKS), default="transformer")
    parser.add_argument("--rank", type=positive, default=2, help="PowerSGD's")
    parser.add_argument("--steps", type=positive, default=500, help="of a training")
    parser.add_argument("--link", choices=tuple(LINKS), nargs="+", default=["loopback"], help="one or several")
    arguments = common.parse(parser, quick={"model": "tiny", "steps": 50})
    results, remarks = over_links(arguments.link, lambda link: run(NETWORKS[arguments.model], arguments, link))
    common.write_results(
        "never_slower",
        "Never slower",
        arguments,
        [tabulate(results, arguments)],
        {"links": {link: vars(timing) for link, timing in results.items()}},
        draw(results, arguments),
        remarks,
    )


if __name__ == "__main__":
    main()
