"""The ways to exchange gradients or models that are compared, and the measurement of whole training steps with them.

All contestants live in the same processes, each as a DistributedDataParallel around its own replica of the network
(those that gossip need none), and take turns: a round is one step of each, in an order that changes from round to round
and is the same on all ranks.
"""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from common import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    Spread,
    paired_difference,
    paired_ratio,
)
from probes import Probe, probe_step, timed_hooks
from processes import Rank, run_over_link
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from workloads import Network, bf16_hook

if TYPE_CHECKING:
    from lightning_powersgd import GossipExchange, PowerSGDConfig

Family = Literal[
    "no exchange",
    "all-reduce",
    "fp16 hook",
    "bf16 hook",
    "PyTorch's hook",
    "PyTorch's hook, batched",
    "full",
    "alternating",
    "PowerGossip",
]
OURS: tuple[Family, ...] = ("full", "alternating")
# Batched: with `batch_tensors_with_same_shape=True`, which saves launches on a GPU.
BATCHED: Family = "PyTorch's hook, batched"
POWERSGD: tuple[Family, ...] = ("PyTorch's hook", *OURS)

# Colour, line and marker in plots.
STYLES: dict[Family, tuple[str, str, str]] = {
    "no exchange": (BLACK, "-", ""),
    "all-reduce": (GREY, "--", "D"),
    "fp16 hook": (GREEN, "-.", ""),
    "bf16 hook": (PURPLE, ":", ""),
    "PyTorch's hook": (ORANGE, "--", "s"),
    BATCHED: (ORANGE, ":", "D"),
    "full": (BLUE, "-", "o"),
    "alternating": (SKY, "-", "^"),
    "PowerGossip": (AMBER, "-", "v"),
}

# PyTorch's hook averages exactly in its first two steps, and makes its buffers in the third. DDP rearranges its buckets
# after the first.
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Contestant:
    """One way to exchange gradients.

    Args:
        family: which kind it is.
        rank: of PowerSGD or PowerGossip; 0 for the others.
        error_dtype: of the error buffers, for this package's.
        comm_dtype: of its factors on the wire.
    """

    family: Family
    rank: int = 0
    error_dtype: torch.dtype | None = None
    comm_dtype: str | None = None

    @property
    def family_name(self) -> str:
        """The family's name in tables."""
        name = f"PowerSGD {self.family}" if self.family in OURS else self.family
        name += f", {str(self.error_dtype).removeprefix('torch.')} errors" if self.error_dtype else ""
        return name + (f", {self.comm_dtype}" if self.comm_dtype else "")

    @property
    def name(self) -> str:
        """The name with the rank."""
        return self.family_name + (f", rank {self.rank}" if self.rank else "")

    def attach(self, module: nn.Module) -> "Step":
        """Make a replica ready for training steps with this exchange."""
        if self.family != "PowerGossip":
            return Step(self.wrap(module))
        exchange = make_gossip(module, self.rank)
        return Step(module, exchange.step, exchange)

    def wrap(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap a replica in DDP, with what averages its gradients attached."""
        if self.family in ("PyTorch's hook", BATCHED):
            batched = self.family == BATCHED
            ddp = DistributedDataParallel(module, bucket_cap_mb=_bucket_megabytes(module, batched))
            ddp.register_comm_hook(torch_powersgd_state(self.rank, batched), powerSGD_hook.powerSGD_hook)
            return ddp
        ddp = DistributedDataParallel(module)
        if self.family in OURS:
            # Imports Lightning, which takes seconds; only ranks need it.
            from lightning_powersgd import attach_powersgd

            attach_powersgd(ddp, self.config())
        elif self.family == "no exchange":
            ddp.register_comm_hook(None, _no_exchange)
        elif self.family == "fp16 hook":
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.family == "bf16 hook":
            ddp.register_comm_hook(None, bf16_hook)
        return ddp

    def config(self) -> "PowerSGDConfig":
        """Give this package's settings."""
        from lightning_powersgd import PowerSGDConfig

        return PowerSGDConfig(
            rank=self.rank,
            alternate=self.family == "alternating",
            error_dtype=self.error_dtype,
            comm_dtype=self.comm_dtype,
        )


NO_EXCHANGE = Contestant("no exchange")
ALL_REDUCE = Contestant("all-reduce")
BF16_HOOK = Contestant("bf16 hook")


def powersgd_contestants(ranks: Sequence[int], device: str = "cpu") -> list[Contestant]:
    """Give PyTorch's hook (on a GPU also batched) and both ways of this package, at each rank."""
    families = (BATCHED, *POWERSGD) if device == "cuda" else POWERSGD
    return [Contestant(family, rank) for rank in ranks for family in families]


def gossip_contestants(ranks: Sequence[int]) -> list[Contestant]:
    """Give PowerGossip on a ring at each rank."""
    return [Contestant("PowerGossip", rank) for rank in ranks]


def make_gossip(module: nn.Module, rank: int) -> "GossipExchange":
    """Let a module gossip on a ring; at rank 0 all of it travels whole.

    Gossip writes into the weights, which other contestants share: the module gets its own, different on each rank, as
    they are in a training.
    """
    # Imports Lightning, which takes seconds; only ranks need it.
    from lightning_powersgd import GossipExchange, PowerGossipConfig, make_topology

    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.data = parameter.data + 0.01 * noise
    config = PowerGossipConfig(rank=rank or {"*": 0})
    return GossipExchange(module.named_parameters(), make_topology("ring", dist.get_world_size()), config)


@dataclass(frozen=True)
class Step:
    """A replica, and what a training step does with it.

    Attributes:
        module: the replica, in DDP or not.
        afterwards: what follows the backward pass.
        gossip: the exchange, where it is between neighbours.
    """

    module: nn.Module
    afterwards: Callable[[], None] | None = None
    gossip: "GossipExchange | None" = None

    def __call__(self, batch: Tensor) -> None:
        """Go forward and backward, and exchange. A GPU computes in bfloat16, its gradients are float32."""
        with torch.autocast("cuda", torch.bfloat16, enabled=batch.is_cuda):
            loss = self.module(batch).square().mean()
        loss.backward()
        if self.afterwards is not None:
            self.afterwards()


def torch_powersgd_state(rank: int, batched: bool = False) -> powerSGD_hook.PowerSGDState:
    """Make the state of PyTorch's hook: compression from the third step on, the first that it allows."""
    return powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=2,
        orthogonalization_epsilon=1e-8,
        batch_tensors_with_same_shape=batched,
    )


def _bucket_megabytes(module: nn.Module, batched: bool) -> float:
    """Give the size of DDP's buckets that is best for PyTorch's hook.

    All gradients in one bucket, where gloo averages them: with more than one it aborts or hangs, since PyTorch's hook
    issues collectives from the callbacks of futures, whose order differs between ranks. Also where matrices of one
    shape are batched, as PyTorch advises. Otherwise DDP's default, so that collectives overlap with the backward pass.
    """
    parameters = list(module.parameters())
    if parameters[0].is_cuda and dist.get_backend() != "gloo" and not batched:
        return 25
    return math.ceil(sum(parameter.nbytes for parameter in parameters) / 2**20) + 1


# DDP checks the types of a hook's arguments and result, which is why this file does not postpone annotations.
def _no_exchange(_: object, bucket: dist.GradBucket) -> Future[Tensor]:
    """Give the bucket back as it is: the time that no exchange can undercut."""
    buffer = bucket.buffer()
    future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future


@dataclass
class Measurement:
    """What a run of steps gave.

    Attributes:
        seconds: of every round's step, by contestant.
        cpu_seconds: that processors worked in it, for all ranks together, by contestant.
        sent_bytes: handed to all-reduce in a step, or sent to neighbours, by contestant.
        collectives: all-reduces of a step, by contestant.
        failures: why a contestant could not be measured.
        bare_seconds: of a bare all-reduce of some bytes over the same link, several times, by bytes.
        probes: what a step asks of a GPU, by contestant; empty on a CPU.
    """

    seconds: dict[Contestant, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[Contestant, list[float]] = field(default_factory=dict)
    sent_bytes: dict[Contestant, float] = field(default_factory=dict)
    collectives: dict[Contestant, float] = field(default_factory=dict)
    failures: dict[Contestant, str] = field(default_factory=dict)
    bare_seconds: dict[int, list[float]] = field(default_factory=dict)
    probes: dict[Contestant, Probe] = field(default_factory=dict)

    def added(self, contestant: Contestant) -> float:
        """Give the seconds that an exchange adds to a step without one: the median of the rounds' differences."""
        return paired_difference(self.seconds[contestant], self.seconds[NO_EXCHANGE]).median

    def ratio(self, contestant: Contestant, reference: Contestant) -> Spread:
        """Compare the times of two contestants, round by round."""
        return paired_ratio(self.seconds[contestant], self.seconds[reference])


def run_steps(
    network: Network,
    contestants: Sequence[Contestant],
    *,
    repeats: int,
    world_size: int,
    device: str,
    link: str,
    bare_sizes: Sequence[int],
) -> Measurement:
    """Measure training steps on ranks in processes of their own, with a progress bar.

    A round counts as long as its slowest rank takes.

    Args:
        network: what is trained.
        contestants: what is compared.
        repeats: rounds.
        world_size: number of ranks.
        device: "cpu" or "cuda".
        link: a key of `network.LINKS`.
        bare_sizes: bytes of the bare all-reduces that are measured beside.

    Raises:
        NetworkError: if the link cannot be had.
    """
    results: list[Measurement] = run_over_link(
        measure_steps,
        network,
        contestants,
        repeats,
        bare_sizes,
        link=link,
        world_size=world_size,
        device=device,
        place=f"{link}, {world_size} ranks",
        reports=len(contestants) * (1 + repeats) + 1,
    )
    return slowest_of(results)


def slowest_of(results: Sequence[Measurement]) -> Measurement:
    """Take from the ranks' measurements the times of the slowest one."""
    slowest = results[0]
    slowest.seconds = {key: np.max([result.seconds[key] for result in results], 0).tolist() for key in slowest.seconds}
    slowest.cpu_seconds = {
        key: np.sum([result.cpu_seconds[key] for result in results], 0).tolist() for key in slowest.cpu_seconds
    }
    slowest.bare_seconds = {
        size: np.max([result.bare_seconds[size] for result in results], 0).tolist() for size in slowest.bare_seconds
    }
    return slowest


def measure_steps(
    rank: Rank, network: Network, contestants: Sequence[Contestant], repeats: int, bare_sizes: Sequence[int]
) -> Measurement:
    """Measure training steps on this rank; all ranks call it."""
    result = Measurement()
    original = network.build(rank.device)
    batches = [network.draw(rank.device, seed=10 * number + rank.number) for number in range(4)]
    steps: dict[Contestant, Step] = {}
    on_gpu = rank.device.type == "cuda"
    hooks: dict[Contestant, list[float]] = {}
    held: dict[Contestant, int] = {}
    for contestant in contestants:
        rank.report(f"warming up: {contestant.name}")
        failure = ""
        before = torch.cuda.memory_allocated(rank.device) if on_gpu else 0
        try:
            with timed_hooks() if on_gpu else contextlib.nullcontext([]) as hooks[contestant]:
                steps[contestant] = _warmed_up(contestant, replica(original), batches, result)
            held[contestant] = torch.cuda.memory_allocated(rank.device) - before if on_gpu else 0
        except (RuntimeError, TypeError) as error:
            failure = str(error).strip().splitlines()[0]
        failures = [failure] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        if any(failures):
            result.failures[contestant] = next(text for text in failures if text)
            steps.pop(contestant, None)

    rank.report("measuring the link")
    rank.limit_link()
    result.bare_seconds = {size: rank.all_reduce_seconds(size, repeats=7) for size in bare_sizes}

    result.seconds = {contestant: [] for contestant in steps}
    result.cpu_seconds = {contestant: [] for contestant in steps}
    order = list(steps)
    shuffled = random.Random(0)
    for round_ in range(repeats):
        shuffled.shuffle(order)
        for contestant in order:
            rank.report(f"round {round_ + 1}: {contestant.name}")
            step, batch = steps[contestant], batches[round_ % len(batches)]
            seconds, cpu_seconds = rank.seconds_and_cpu_seconds(lambda step=step, batch=batch: step(batch))
            result.seconds[contestant].append(seconds)
            result.cpu_seconds[contestant].append(cpu_seconds)
            step.module.zero_grad()
    for contestant, step in steps.items() if on_gpu else ():
        rank.report(f"looking at: {contestant.name}")
        result.probes[contestant] = probe_step(
            lambda step=step: step(batches[0]), step.module, hooks[contestant], held[contestant], rank.device
        )
    return result


def replica(original: nn.Module) -> nn.Module:
    """Copy a module, but share the memory of its weights, which nobody changes."""
    replica = copy.deepcopy(original)
    for theirs, ours in zip(original.parameters(), replica.parameters(), strict=True):
        ours.data = theirs.data
    return replica


def _warmed_up(contestant: Contestant, module: nn.Module, batches: Sequence[Tensor], result: Measurement) -> Step:
    """Make the first steps, and count what is sent in the last two (alternating, the two differ)."""
    step = contestant.attach(module)
    for batch in batches[: WARM_UP_STEPS - 2]:
        step(batch)
        step.module.zero_grad()
    gossiped = step.gossip.total_sent_bytes if step.gossip else 0
    with _counted_collectives() as sent:
        for batch in batches[-2:]:
            step(batch)
            step.module.zero_grad()
    if contestant.family == "all-reduce":  # DDP itself sends whole buckets, without Python
        sizes = step.module._get_ddp_logging_data()["rebuilt_bucket_sizes"]
        sent = [int(size) for size in sizes.split(",")] * 2
    result.sent_bytes[contestant], result.collectives[contestant] = sum(sent) / 2, len(sent) / 2
    if step.gossip:
        result.sent_bytes[contestant] += (step.gossip.total_sent_bytes - gossiped) / 2
    return step


@contextlib.contextmanager
def _counted_collectives() -> Iterator[list[int]]:
    """Collect the bytes of each collective that is not DDP's own, of those that average gradients."""
    sent: list[int] = []

    def counting(name: str, position: int) -> contextlib.AbstractContextManager[object]:
        collective = getattr(dist, name)

        def counted(*args: Tensor, **kwargs: object) -> object:
            if args[position].nbytes:  # PyTorch's hook sends an empty tensor where nothing travels whole
                sent.append(args[position].nbytes)
            return collective(*args, **kwargs)

        return mock.patch.object(dist, name, counted)

    with counting("all_reduce", 0), counting("all_gather_into_tensor", 1), counting("all_to_all_single", 1):
        yield sent
