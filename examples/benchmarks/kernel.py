"""Time compression and decompression alone, without communication, against the fewest memory passes they need.

    python examples/benchmarks/kernel.py
    python examples/benchmarks/kernel.py --ranks 4 --shapes 1024x1024 2048x512 "200 small layers"

One process plays one of two ranks whose all-reduces complete at once (see `processes.pretend_ranks`) and hands buckets
of gradients to the hooks as DistributedDataParallel would. There are so many gradients that neither they nor the error
buffers fit into the caches, as in training, and before every step they are written anew and evicted.

The limit is measured beside, over as much memory, with PyTorch's operations that only move data. For a full step:

| pass | why |
|---|---|
| read g, read e, write M | M = g + e; its product with Q can be taken of each part while that is in the cache |
| read M | Q = Mᵀ P̂ needs P̂, which is known only after all of M was read and P was averaged |
| read M, write e | e = M − P̂ Qᵀ; not before all averages have come and are finite, or a step could not be undone |
| write ĝ | P̂ Qᵀ, over M |

That is 7 passes over the gradient's size; the last is made piece by piece with the one before, while M is in the cache.
An alternating step knows its basis from the start, projects while it adds, and so needs 6. Beside them stands what the
bf16 hook computes: it casts the gradients to bfloat16, divides them, and casts them back.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import ResultTable, format_number, paired_ratio, positive, spread
from contestants import BATCHED, OURS, POWERSGD, STYLES, WARM_UP_STEPS, Contestant, Family, torch_powersgd_state
from matplotlib.figure import Figure
from probes import Probe, probe_work
from processes import pretend_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from workloads import bf16_hook

Shape = tuple[int, int]
BUCKET_BYTES = 25 * 2**20  # DDP's default
_PIECE = 2**17  # elements, 512 KiB: they stay in the cache between two operations
SMALL_LAYERS = "200 small layers"
_SQUARE_AND_OBLONG = ((64, 64), (64, 128), (128, 128), (256, 128), (256, 256))
SHAPES: dict[str, tuple[Shape, ...]] = {
    f"{n}x{m}": ((n, m),)
    for n, m in (
        *((64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 512)),
        *((512, 2048), (2048, 2048), (4096, 1024), (4096, 4096), (8192, 8192)),
    )
}
SHAPES[SMALL_LAYERS] = _SQUARE_AND_OBLONG * 40


class Bucket:
    """Gradients that lie one after the other, with the methods of DDP's ``GradBucket``."""

    def __init__(self, index: int, parameters: list[nn.Parameter], *, last: bool) -> None:
        self._index, self._parameters, self._last = index, parameters, last
        sizes = [parameter.numel() for parameter in parameters]
        self._buffer = torch.empty(sum(sizes), device=parameters[0].device)
        parts = self._buffer.split(sizes)
        self._gradients = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]

    def index(self) -> int:
        """Give the place in the order of buckets."""
        return self._index

    def is_last(self) -> bool:
        """Tell whether it ends the step."""
        return self._last

    def buffer(self) -> Tensor:
        """Give all gradients, flat."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Give the gradients in their shapes."""
        return self._gradients

    def parameters(self) -> list[nn.Parameter]:
        """Give the parameters."""
        return self._parameters


@dataclass
class Sampled:
    """The seconds of every round, for one shape and one rank.

    Attributes:
        shape: its name.
        rank: of PowerSGD.
        units: how many matrices (or sets of small layers) a step went over.
        unit_bytes: of one of them.
        seconds: of whole steps, by family.
        limits: of the passes alone, by the family that needs them.
        probes: what a step asks of a GPU, by family; empty on a CPU.
    """

    shape: str
    rank: int
    units: int
    unit_bytes: int
    seconds: dict[Family, list[float]]
    limits: dict[Family, list[float]]
    probes: dict[Family, Probe] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> dict[Family, float]:
        """Give the gradient bytes of a step over its median time."""
        return {family: self.units * self.unit_bytes / np.median(s) / 1e9 for family, s in self.seconds.items()}

    def ratio(self, family: Family) -> float:
        """Give the multiple of the limit. PyTorch's hook computes what a full step does."""
        limit = self.limits["alternating" if family == "alternating" else "full"]
        return paired_ratio(self.seconds[family], limit).median

    def milliseconds(self, seconds: list[float]) -> float:
        """Give the median for one matrix, or one set of small layers."""
        return 1e3 * spread(seconds).median / self.units


class WorkingSet:
    """Gradients of one shape, too many for the caches, and what a step over them takes.

    Args:
        shapes: of the matrices that are repeated.
        size: bytes that gradients and error buffers together have at least.
        device: where they live.
        cache: bytes of the last-level cache.
    """

    def __init__(self, shapes: tuple[Shape, ...], size: int, device: torch.device, cache: int) -> None:
        self.unit_bytes = sum(4 * n * m for n, m in shapes)
        self.units = math.ceil(size / (2 * self.unit_bytes))
        self.parameters = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes * self.units]
        groups: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(self.parameters):  # as DDP does
            if sum(member.nbytes for member in groups[-1]) >= BUCKET_BYTES:
                groups.append([])
            groups[-1].append(parameter)
        self.buckets = [Bucket(index, group, last=group is groups[-1]) for index, group in enumerate(groups)]
        self._errors = [torch.zeros_like(bucket.buffer()) for bucket in self.buckets]
        self._source = torch.randn(max(bucket.buffer().numel() for bucket in self.buckets)).to(device)
        self._evict = torch.zeros(2 * cache // 4, device=device)
        self.device = device

    def seconds(self, work: Callable[[], object]) -> float:
        """Measure some work on fresh gradients."""
        for bucket in self.buckets:
            buffer = bucket.buffer()
            buffer.copy_(self._source[: buffer.numel()])
        self._evict.add_(1)
        self._synchronize()
        start = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - start

    def probe(self, work: Callable[[], None]) -> Probe:
        """Look at what a step asks of the device, and of the host before it waits for the device."""
        found = probe_work(work, self.device)
        self._synchronize()
        start = time.perf_counter()
        work()
        found.host_seconds = time.perf_counter() - start
        self._synchronize()
        return found

    def step(self, hook: Callable[[Any], torch.futures.Future[Tensor]]) -> None:
        """Hand all buckets to a hook and wait for the averages."""
        for future in [hook(bucket) for bucket in self.buckets]:
            future.wait()

    def passes(self, *, alternating: bool) -> None:
        """Make the memory passes of a step (see above) and no arithmetic to speak of."""
        buffers = [bucket.buffer() for bucket in self.buckets]
        for gradient, error in zip(buffers, self._errors, strict=True):
            gradient.add_(error)
        if not alternating:
            for gradient in buffers:
                gradient.sum()
        for gradient, error in zip(buffers, self._errors, strict=True):
            for piece, error_piece in zip(gradient.split(_PIECE), error.split(_PIECE), strict=True):
                error_piece.copy_(piece)
                piece.fill_(1.0)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(name: str, rank: int, working_set: WorkingSet, repeats: int) -> Sampled:
    """Measure one shape at one rank: all hooks and limits take turns, in an order that changes."""
    # Imports Lightning, which takes seconds that `--help` need not wait.
    from lightning_powersgd import GradientExchange, PowerSGDState
    from lightning_powersgd.exchange.ddp import DDPBuckets

    named = [(str(index), parameter) for index, parameter in enumerate(working_set.parameters)]
    work: dict[tuple[str, Family], Callable[[], None]] = {
        ("hook", "bf16 hook"): lambda: working_set.step(lambda bucket: bf16_hook(None, bucket))
    }
    for family in ("PyTorch's hook", BATCHED) if working_set.device.type == "cuda" else ("PyTorch's hook",):
        theirs = torch_powersgd_state(rank, batched=family == BATCHED)
        work["hook", family] = lambda theirs=theirs: working_set.step(lambda bucket: powerSGD_hook(theirs, bucket))
    for family in OURS:
        buckets = DDPBuckets(GradientExchange(PowerSGDState(named, Contestant(family, rank).config(), BUCKET_BYTES)))
        work["hook", family] = lambda buckets=buckets: working_set.step(buckets.reduce)
        alternating = family == "alternating"
        work["limit", family] = lambda alternating=alternating: working_set.passes(alternating=alternating)
    for (kind, _), task in work.items():
        for _ in range(WARM_UP_STEPS if kind == "hook" else 1):
            working_set.seconds(task)

    samples: dict[tuple[str, Family], list[float]] = {key: [] for key in work}
    shuffled, order = random.Random(0), list(work)
    for _ in range(repeats):
        shuffled.shuffle(order)
        for key in order:
            samples[key].append(working_set.seconds(work[key]))
    seconds, limits = ({family: samples[k, family] for k, family in work if k == kind} for kind in ("hook", "limit"))
    sampled = Sampled(name, rank, working_set.units, working_set.unit_bytes, seconds, limits)
    if working_set.device.type == "cuda":
        sampled.probes = {family: working_set.probe(task) for (kind, family), task in work.items() if kind == "hook"}
    return sampled


def worth_compressing(shapes: tuple[Shape, ...], rank: int) -> bool:
    """Whether every hook compresses matrices of these shapes, rather than send all of them whole."""
    return any(2 * rank * (n + m) < n * m for n, m in shapes)


def last_level_cache(device: torch.device) -> int:
    """Give the bytes of the last-level cache, or 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26))
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(size.read_text().strip().removesuffix("K")) for size in sizes), default=2**26)


def tabulate(results: list[Sampled], size: int, threads: int) -> ResultTable:
    """Lay the figures side by side."""
    columns = ["matrix", "rank", "limit ms", "bf16 ms", "PyTorch ms", "full ms", "altern. ms", "full GB/s"]
    columns += ["PyTorch ÷ limit", "full ÷ limit", "altern. ÷ limit", "PyTorch ÷ full"]
    table = ResultTable(
        "Compression and decompression alone",
        columns,
        f"Medians of {len(results[0].seconds['full'])} rounds; ratios are taken round by round. Milliseconds are for"
        " one matrix (or the 200 layers), GB/s are gradient bytes over time. The limit is the time of the memory passes"
        " that the algorithm cannot do without, made by plain operations: 7 in a full step (read g, e, write M; read M;"
        " read M, write e; write ĝ), 6 in an alternating one, against which that is held. M must be complete before P"
        " is averaged, P̂ known before Q, and e is written only when all averages have come and are finite. Writing past"
        " the caches, as PyTorch's operations do not always, can win a few per cent against it. “bf16” is what the bf16"
        " hook computes, two casts and a division, whatever the rank. Gradients and error"
        f" buffers of a step have at least {size / 2**20:,.0f} MiB, so that they come from memory; {threads}"
        f" thread{'s' if threads > 1 else ''}.",
    )
    for result in results:
        theirs, full, alternating = (result.seconds[family] for family in POWERSGD)
        steps = (result.limits["full"], result.seconds["bf16 hook"], theirs, full, alternating)
        milliseconds = [result.milliseconds(seconds) for seconds in steps]
        rate = result.gigabytes_per_second["full"]
        ratios = [result.ratio(family) for family in POWERSGD]
        cells = [*milliseconds, rate, *ratios, paired_ratio(theirs, full).median]
        table.rows.append([result.shape, str(result.rank), *(format_number(value) for value in cells)])
    return table


def tabulate_device(results: list[Sampled]) -> ResultTable:
    """Lay side by side what steps ask of a GPU."""
    table = ResultTable(
        "What a step asks of the GPU",
        ["matrix, exchange", "rank", "ms", "full ÷ this", "launches", "host ms", "device ms"],
        "All for one matrix (or the 200 layers). Launches are kernels, copies and fills, device ms what they take"
        " together, and host ms what the host does before it waits for the device.",
    )
    for result in results:
        for family, probe in result.probes.items():
            seconds = result.seconds[family]
            cells = [result.milliseconds(seconds), paired_ratio(result.seconds["full"], seconds).median]
            asked = [probe.launches, 1e3 * probe.host_seconds, 1e3 * probe.device_seconds]
            cells += [value / result.units for value in asked]
            name = f"{result.shape}, {Contestant(family).family_name}"
            table.rows.append([name, str(result.rank), *(format_number(value) for value in cells)])
    return table


def draw(results: list[Sampled]) -> Figure:
    """Draw the multiples of the limit by shape, one panel a rank."""
    ranks = sorted({result.rank for result in results})
    shapes = list(dict.fromkeys(result.shape for result in results))
    columns = min(3, len(ranks))
    rows = math.ceil(len(ranks) / columns)
    figure = Figure(figsize=(3 + 4 * columns, 1 + 4 * rows), layout="constrained")
    figure.suptitle("Compression and decompression, as a multiple of the memory passes they need")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, rank in zip(panels.flat, ranks, strict=False):
        of_rank = [result for result in results if result.rank == rank]
        places = [shapes.index(result.shape) for result in of_rank]
        for family in POWERSGD:
            color, line, marker = STYLES[family]
            ratios = [result.ratio(family) for result in of_rank]
            label = Contestant(family).family_name
            axes.plot(places, ratios, line, color=color, marker=marker, markersize=4, label=label)
        axes.axhline(1, color=common.BLACK, label="the passes alone")
        axes.set_title(f"rank {rank}")
        axes.set_xticks(range(len(shapes)), shapes, rotation=60, ha="right", rotation_mode="anchor")
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    common.log_axis(panels[0, 0].yaxis)
    for axes in panels[:, 0]:
        axes.set_ylabel("time ÷ limit")
    for axes in panels.flat[len(ranks) :]:
        axes.set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _to_json(result: Sampled) -> dict[str, Any]:
    content = dict(vars(result))
    probes = content.pop("probes")
    return content | ({"probes": {family: vars(probe) for family, probe in probes.items()}} if probes else {})


def main() -> None:
    """Run the benchmark."""
    parser = common.make_parser("Time compression and decompression alone, without communication.")
    parser.add_argument("--shapes", choices=tuple(SHAPES), nargs="+", default=list(SHAPES), metavar="NxM")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8, 32], help="PowerSGD's ranks")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds")
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch on a CPU")
    parser.add_argument("--working-set", type=positive, metavar="MIB", help="by default what the caches need, and 256")
    quick = {"shapes": ["256x256", SMALL_LAYERS], "ranks": [2], "repeats": 3, "working_set": 8}
    arguments = common.parse(parser, quick)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    cache = last_level_cache(device)
    size = arguments.working_set * 2**20 if arguments.working_set else max(4 * cache, 256 * 2**20)

    results = []
    with common.progress_bar() as progress, pretend_ranks(2, device):
        task = progress.add_task("", total=len(arguments.shapes) * len(arguments.ranks))
        for name in arguments.shapes:
            working_set = WorkingSet(SHAPES[name], size, device, cache)
            for rank in arguments.ranks:
                progress.update(task, description=f"{name}, rank {rank}")
                if worth_compressing(SHAPES[name], rank):
                    results.append(measure(name, rank, working_set, arguments.repeats))
                progress.advance(task)
    if not results:
        raise SystemExit(
            f"--ranks {arguments.ranks}: no hook compresses matrices of {arguments.shapes}. Use lower ranks."
        )
    common.write_results(
        "kernel",
        "Compression and decompression alone",
        arguments,
        [tabulate(results, size, arguments.threads), *([tabulate_device(results)] if device.type == "cuda" else [])],
        {"cache_bytes": cache, "working_set_bytes": size, "results": [_to_json(result) for result in results]},
        draw(results),
    )


if __name__ == "__main__":
    main()
