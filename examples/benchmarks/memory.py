"""Measure the memory that an exchange holds and needs beyond plain DDP.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --models resnet18 --ranks 1 4 32

One process plays one of two ranks whose all-reduces complete at once (see `processes.pretend_ranks`). On a CPU,
PyTorch's profiler reports every allocation; on a GPU its allocator keeps the books.

"Held" is what is there between two steps, "peak" the most that there is at any moment of a step. Both are given beyond
what plain DDP holds and needs with the same network, for which error buffers of the gradients' size are the least that
error feedback can do with.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass

import common
import numpy as np
import torch
from common import ResultTable, format_bytes, positive
from contestants import ALL_REDUCE, BF16_HOOK, STYLES, WARM_UP_STEPS, Contestant, powersgd_contestants
from matplotlib.figure import Figure
from processes import pretend_ranks
from torch import nn
from workloads import NETWORKS, Network


@dataclass
class Usage:
    """Bytes of one contestant with one network.

    Attributes:
        held: between two steps, beyond the network itself.
        peak: at most during a step, beyond the network itself.
    """

    held: int
    peak: int


def follow_allocations(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Do some work, and give the bytes that it left allocated and the most at any moment, beyond the beginning."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) - before, torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(allocated[-1]), int(allocated.max())


def measure(network: Network, contestant: Contestant, device: torch.device) -> Usage:
    """Measure one contestant on a network of its own."""
    module = network.build(device)
    # A small batch on any device: it is the gradients that count, not the activations.
    batch = network.draw(torch.device("cpu"), seed=0).to(device)
    wrapped: list[nn.Module] = []

    def step() -> None:
        wrapped[0](batch).square().mean().backward()

    def set_up() -> None:
        wrapped.append(contestant.wrap(module))
        for _ in range(WARM_UP_STEPS):
            step()
            module.zero_grad()

    held, _ = follow_allocations(set_up, device)
    _, peak = follow_allocations(step, device)
    return Usage(held, held + peak)


def tabulate(network: Network, usages: dict[Contestant, Usage]) -> ResultTable:
    """Lay one network's figures side by side."""
    plain, gradients = usages[ALL_REDUCE], network.gradient_bytes
    table = ResultTable(
        f"{network.name}: {format_bytes(gradients)} of gradients",
        ["exchange", "rank", "held", "peak", "held ÷ gradients", "peak ÷ gradients"],
        "Bytes beyond plain DDP: held between two steps, and at the peak of a step. Error buffers of the gradients'"
        " dtype come to 1 ÷ gradients, less what is sent whole. Plain DDP itself holds"
        f" {format_bytes(plain.held)} of buckets, and needs {format_bytes(plain.peak)} at the peak.",
    )
    for contestant, usage in usages.items():
        if contestant == ALL_REDUCE:
            continue
        beyond = usage.held - plain.held, usage.peak - plain.peak
        ratios = [f"{value / gradients:.2f}" for value in beyond]
        cells = [contestant.family_name, str(contestant.rank or ""), *map(format_bytes, beyond), *ratios]
        table.rows.append(cells)
    return table


def draw(results: dict[Network, dict[Contestant, Usage]]) -> Figure:
    """Draw the peaks as bars, and what of them is held."""
    figure = Figure(figsize=(10, 1.5 + 0.45 * sum(map(len, results.values()))), layout="constrained")
    figure.suptitle("Memory beyond plain DDP: held between steps (filled), and at the peak of a step (outlined)")
    heights = [len(usages) for usages in results.values()]
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (network, usages) in zip(panels, results.items(), strict=True):
        plain = usages[ALL_REDUCE]
        contestants = [contestant for contestant in usages if contestant != ALL_REDUCE]
        places = range(len(contestants))
        colors = [STYLES[contestant.family][0] for contestant in contestants]
        held = [(usages[contestant].held - plain.held) / 1e6 for contestant in contestants]
        peak = [(usages[contestant].peak - plain.peak) / 1e6 for contestant in contestants]
        axes.barh(places, held, color=colors, alpha=0.8)
        axes.barh(places, peak, color="none", edgecolor=common.BLACK)
        axes.axvline(network.gradient_bytes / 1e6, color=common.BLACK, linestyle=":", label="all gradients")
        axes.set_yticks(places, [contestant.name for contestant in contestants])
        axes.invert_yaxis()
        axes.set(title=network.name, xlabel="MB")
        axes.grid(alpha=0.3, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Measure the memory that an exchange holds and needs beyond plain DDP.")
    parser.add_argument("--models", choices=tuple(NETWORKS), nargs="+", default=["transformer", "resnet18"])
    parser.add_argument("--ranks", type=positive, nargs="+", default=[4], help="PowerSGD's ranks")
    arguments = common.parse(parser, quick={"models": ["tiny"], "ranks": [2]})
    device = torch.device(arguments.device)
    # The profiler's library else writes a line whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    torch.set_num_threads(1)

    contestants = [ALL_REDUCE, BF16_HOOK]
    for rank in arguments.ranks:
        contestants += [*powersgd_contestants([rank], arguments.device), Contestant("full", rank, torch.bfloat16)]
    results: dict[Network, dict[Contestant, Usage]] = {}
    with common.progress_bar() as progress, pretend_ranks(2, device):
        task = progress.add_task("", total=len(arguments.models) * len(contestants))
        for network in (NETWORKS[name] for name in arguments.models):
            results[network] = {}
            for contestant in contestants:
                progress.update(task, description=f"{network.name}, {contestant.name}")
                results[network][contestant] = measure(network, contestant, device)
                progress.advance(task)
    data = [
        {
            "network": network.name,
            "gradient_bytes": network.gradient_bytes,
            "exchanges": [
                {"name": contestant.name, "rank": contestant.rank, **vars(usage)}
                for contestant, usage in usages.items()
            ],
        }
        for network, usages in results.items()
    ]
    tables = [tabulate(network, usages) for network, usages in results.items()]
    common.write_results("memory", "Memory", arguments, tables, {"networks": data}, draw(results))


if __name__ == "__main__":
    main()
