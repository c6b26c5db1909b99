"""What PowerSGD will bring to a model, found out before it is trained: bytes, and the time of an exchange.

Axis letters: W ranks, b bytes of a collective, α seconds of latency of a message, β bytes that a link carries in a
second. A collective is a ring all-reduce (Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002), in which every
rank sends 2 (W − 1) messages of b / W bytes to its neighbour:

    t = 2 (W − 1) (α + b / (W β))

Plain all-reduce is the sum of this over DDP's buckets, of which the first is smaller than the others. PowerSGD is the
sum over the payloads of its plan, and the time of its arithmetic, which is measured where the forecast is made, or
given.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_powersgd.hook import GradientExchange
from lightning_powersgd.plan import (
    DEFAULT_GROUP_BYTES,
    Group,
    Plan,
    PowerSGDConfig,
    Slot,
    make_plan,
    parameter_name,
    require_int,
)
from lightning_powersgd.state import PowerSGDState

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

# A message of gloo over TCP took 180 to 240 µs on the machine of docs/benchmarks/scale.md, whose cores were busy with
# the ranks themselves. NCCL between machines of their own takes less.
DEFAULT_LATENCY = 1e-4

# Of DDP, unless it is told a size of its own (torch.distributed._DEFAULT_FIRST_BUCKET_BYTES).
_FIRST_BUCKET_BYTES = 2**20

# What measuring may take: gradients and error buffers, arithmetic in one step, and steps.
_MOST_BYTES = 2**30
_MOST_OPERATIONS = 2 * 10**10
_MOST_SECONDS = 5.0
_MOST_SAMPLES = 10

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_RATE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([kKmMgGtT]?)(?:[bB]it(?:/s)?|bps)")

# Beyond these, a number is a slip of the pen, and times may overflow. torch.distributed counts ranks in 32 bits.
_MOST_RANKS = 2**31 - 1
_LONGEST_SECONDS = 1e9
_SLOWEST_LINK, _FASTEST_LINK = 1.0, 1e18

# What processes can average. For floating-point numbers of eight bits, and for complex32, torch has little arithmetic.
_GRADIENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)

# Buffers that a state dict holds beside the parameters, by the last part of their names: those of normalisation layers.
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class LinkForecast:
    """The time of one exchange of gradients over a link, when it does not overlap with anything.

    Attributes:
        name: of the link.
        bits_per_second: that it carries in each direction.
        all_reduce_seconds: that plain all-reduce takes.
        network_seconds: that PowerSGD's collectives take.
        compress_seconds: that PowerSGD's arithmetic takes.
        break_even: bits per second below which PowerSGD is the faster one (see `Forecast.break_even`).
    """

    name: str
    bits_per_second: float
    all_reduce_seconds: float
    network_seconds: float
    compress_seconds: float
    break_even: float

    @property
    def powersgd_seconds(self) -> float:
        """Seconds that PowerSGD takes, arithmetic and collectives."""
        return self.compress_seconds + self.network_seconds

    @property
    def pays(self) -> bool:
        """Whether PowerSGD is faster than plain all-reduce."""
        return self.powersgd_seconds < self.all_reduce_seconds

    def speedup(self, step_seconds: float = 0.0) -> float:
        """Compare a step with plain all-reduce to one with PowerSGD, when nothing overlaps.

        Args:
            step_seconds: of forward and backward without any exchange; 0 compares the exchanges alone.
        """
        return (step_seconds + self.all_reduce_seconds) / (step_seconds + self.powersgd_seconds)

    def least_speedup(self, step_seconds: float) -> float:
        """Compare at PowerSGD's worst: all of the all-reduce that can hides behind the step, and nothing of PowerSGD.

        Args:
            step_seconds: of forward and backward without any exchange.
        """
        return max(step_seconds, self.all_reduce_seconds) / (step_seconds + self.powersgd_seconds)

    def __str__(self) -> str:
        if self.pays:
            return (
                f"{self.name}: {format_seconds(self.powersgd_seconds)} instead of"
                f" {format_seconds(self.all_reduce_seconds)}, {format_ratio(self.speedup())} faster."
            )
        reason = "no parameter is compressed"
        if self.break_even:
            saved = self.all_reduce_seconds - self.network_seconds
            gain = f"saves {format_seconds(saved)} of network time" if saved > 0 else "saves no network time"
            reason = (
                f"computing takes {format_seconds(self.compress_seconds)} and {gain}. It would pay on a link below"
                f" {format_rate(self.break_even)}"
            )
        return f"{self.name}: compression would not pay here: {reason}."


@dataclass(frozen=True)
class Forecast:
    """What PowerSGD will bring to a model; made by `forecast_exchange`.

    Attributes:
        config: the settings.
        parameters: the slots of the trainable parameters, in the model's order.
        frozen: number of parameters that are not trained, and so not exchanged.
        plan: what is compressed, and what travels together.
        dense_payloads: bytes of each collective of plain all-reduce in a step, which are DDP's buckets.
        world_size: number of ranks.
        latency: seconds of a message between neighbours, beside the time of its bytes.
        compress_seconds: that PowerSGD's arithmetic takes in a step.
        measured_on: the device that this was measured on; ``None`` if it was given.
    """

    config: PowerSGDConfig
    parameters: tuple[Slot, ...]
    frozen: int
    plan: Plan
    dense_payloads: tuple[int, ...]
    world_size: int
    latency: float
    compress_seconds: float
    measured_on: str | None

    @property
    def dense_bytes(self) -> int:
        """Bytes that a rank hands to plain all-reduce in a step."""
        return self.plan.dense_bytes

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank hands to PowerSGD's collectives in a step."""
        return self.plan.sent_bytes(alternate=self.config.alternate)

    @property
    def compression_ratio(self) -> float:
        """``dense_bytes / sent_bytes``."""
        return self.dense_bytes / self.sent_bytes

    @property
    def payloads(self) -> tuple[float, ...]:
        """Bytes of each of PowerSGD's collectives in a step."""
        return tuple(self.plan.payloads(alternate=self.config.alternate))

    @property
    def break_even(self) -> float:
        """Bits per second of the link on which both exchanges take the same time: on slower ones PowerSGD pays.

        0 if it never does, since nothing is compressed; infinity if it always does, since computing takes no longer
        than the messages that it saves.
        """
        messages = len(self.payloads) - len(self.dense_payloads)
        lost = self.compress_seconds + 2 * (self.world_size - 1) * self.latency * messages
        saved = 16 * (self.world_size - 1) / self.world_size * (self.dense_bytes - self.sent_bytes)
        if not saved:
            return 0.0
        return saved / lost if lost > 0 else math.inf

    def over(self, link: str | float) -> LinkForecast:
        """Forecast the time of an exchange over a link.

        Args:
            link: bits per second, or a name such as "1gbit" (see `parse_rate`).

        Raises:
            ValueError: if it is not the speed of a link.
        """
        rate = parse_rate(link) if isinstance(link, str) else _require_positive("link", link)
        name = link if isinstance(link, str) else format_rate(rate)
        return LinkForecast(
            name=name,
            bits_per_second=rate,
            all_reduce_seconds=self._ring_seconds(self.dense_payloads, rate),
            network_seconds=self._ring_seconds(self.payloads, rate),
            compress_seconds=self.compress_seconds,
            break_even=self.break_even,
        )

    def __str__(self) -> str:
        lines = [f"{self.plan.summary(alternate=self.config.alternate)}."]
        if self.break_even:
            place = f" (measured on {self.measured_on})" if self.measured_on else ""
            lines.append(f"Its arithmetic takes {format_seconds(self.compress_seconds)} a step{place}.")
            where = "any link" if self.break_even == math.inf else f"links below {format_rate(self.break_even)}"
            lines.append(f"Between {self.world_size} processes it pays on {where}.")
        return "\n".join(lines)

    def _ring_seconds(self, payloads: Sequence[float], bits_per_second: float) -> float:
        messages = 2 * (self.world_size - 1)
        return messages * (len(payloads) * self.latency + 8 * sum(payloads) / (self.world_size * bits_per_second))


def forecast_exchange(
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: PowerSGDConfig | None = None,
    *,
    world_size: int = 8,
    latency: float = DEFAULT_LATENCY,
    compress_seconds: float | None = None,
    device: torch.device | str | None = None,
) -> Forecast:
    """Forecast what PowerSGD will bring to a model, before it is trained.

    >>> forecast = forecast_exchange(nn.Linear(1000, 1000), PowerSGDConfig(rank=2), compress_seconds=0.001)
    >>> print(forecast.over("1gbit"))
    1gbit: 4.08 ms instead of 57.5 ms, 14.1× faster.

    Args:
        model: a module, on any device, the meta device included; its named parameters, of which the frozen ones take no
            part; or a state dict (see `parameters_of`).
        config: the settings; ``None`` is their defaults.
        world_size: number of ranks. Several on one machine count one by one: a ring leaves the machine once.
        latency: seconds of a message between neighbours, beside the time of its bytes. Higher: many small collectives
            cost more.
        compress_seconds: that the arithmetic takes in a step; ``None`` measures it (see `measure_compression`).
        device: where to measure; ``None`` is CUDA if there is a GPU, else the CPU with PyTorch's number of threads.

    Returns:
        The forecast; `Forecast.over` gives the times over a link.

    Raises:
        TypeError: if ``world_size`` is not an integer.
        ValueError: if there is nothing to exchange, shapes are not known yet, a trainable parameter is of a dtype in
            which gradients cannot be averaged, an argument is out of range, a pattern of ``config.rank`` matches no
            parameter, or the device has too little memory left to measure on it.
    """
    config = PowerSGDConfig() if config is None else config
    require_int("world_size", world_size, minimum=2, remedy="A single rank has nobody to exchange gradients with.")
    if world_size > _MOST_RANKS:
        raise ValueError(f"`world_size={world_size}` is above {_MOST_RANKS}. Give the number of processes, such as 16.")
    if not 0 <= latency <= _LONGEST_SECONDS:
        raise ValueError(f"`latency={latency!r}` is not a time. Give seconds, such as 0.0001.")
    if compress_seconds is not None and not 0 <= compress_seconds <= _LONGEST_SECONDS:
        raise ValueError(f"`compress_seconds={compress_seconds!r}` is not a time. Give seconds, or None to measure it.")
    named = parameters_of(model)
    trainable = [parameter_name(name) for name, parameter in named if parameter.requires_grad]
    if not any(parameter.numel() for _, parameter in named if parameter.requires_grad):
        raise ValueError("The model has no trainable parameter, so there are no gradients to exchange.")
    for name, parameter in named:
        if parameter.requires_grad and parameter.dtype not in _GRADIENT_DTYPES:
            raise ValueError(
                f"The parameter {name!r} is of {parameter.dtype}, in which gradients cannot be averaged. Give the model"
                " in the dtype that it is trained in, such as torch.bfloat16."
            )
    plan = make_plan(named, config)
    slots = {slot.name: slot for slot in plan.slots}
    parameters = tuple(slots[name] for name in trainable)
    measured_on = None
    if compress_seconds is None:
        device = _measuring_device(device)
        try:
            compress_seconds = measure_compression(plan, config, device)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                f"`device='{device}'`: its memory is too full to measure on it. Free 2 GiB, or use 'cpu', or give"
                " `compress_seconds`."
            ) from error
        measured_on = _describe(device)
    return Forecast(
        config=config,
        parameters=parameters,
        frozen=len(named) - len(trainable),
        plan=plan,
        dense_payloads=tuple(_bucket_bytes(parameters)),
        world_size=world_size,
        latency=float(latency),
        compress_seconds=float(compress_seconds),
        measured_on=measured_on,
    )


def parameters_of(model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Give a model's named parameters.

    A state dict does not tell parameters from buffers, nor trainable from frozen ones. There, every floating-point
    tensor counts as a trainable parameter, but for the running statistics of normalisation layers, for sparse tensors,
    which DDP does not train, and for a second name of the same memory, as tied weights have.

    Args:
        model: a module, its named parameters, or its state dict.

    Raises:
        ValueError: if a lazy parameter has no shape yet.
    """
    if isinstance(model, Mapping):
        return _parameters_of_state_dict(model)
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    for name, parameter in named:
        if nn.parameter.is_lazy(parameter):
            raise ValueError(
                f"The parameter {name!r} is lazy: its shape is known only after a forward pass. Run one, then forecast."
            )
    return named


def measure_compression(plan: Plan, config: PowerSGDConfig, device: torch.device) -> float:
    """Measure the arithmetic of a step: the steps that training makes, on random gradients and without a network.

    A model that is too large for 1 GiB or a few seconds is measured in part: with as many of its matrices of each
    shape, or as many of their rows, in proportion.

    Args:
        plan: what is compressed.
        config: the settings.
        device: where.

    Returns:
        Seconds.
    """
    elements = sum(slot.numel for slot in plan.compressed)
    if not elements:
        return 0.0
    operations = sum(6 * slot.rank * slot.numel for slot in plan.compressed)
    share = min(1.0, _MOST_BYTES / (2 * plan.dense_bytes), _MOST_OPERATIONS / operations)
    sample, ranks = _sample(plan, share, alternate=config.alternate)
    config = replace(config, rank=ranks, start_step=0, min_compression_ratio=1.0)
    buckets = [_Bucket(group, device) for group in make_plan(sample, config).groups]
    buckets[0].first, buckets[-1].last = True, True
    parameters = [item for bucket in reversed(buckets) for item in bucket.named_parameters]
    state = PowerSGDState(parameters, config)
    # As if several ranks had begun the run: one that was always alone would not compress.
    state.total_sent_bytes = 1
    exchange = GradientExchange(state, dist.ProcessGroup(0, 1))  # type: ignore[call-arg]  # of two constructors

    def two_steps() -> float:
        """Make two steps, since they differ when alternating, and give the seconds of one."""
        _synchronize(device)
        start = time.perf_counter()
        for bucket in 2 * buckets:
            exchange.reduce_bucket(cast("GradBucket", bucket))
        _synchronize(device)
        return (time.perf_counter() - start) / 2

    two_steps()
    deadline, samples = time.perf_counter() + _MOST_SECONDS, [two_steps()]
    while len(samples) < _MOST_SAMPLES and time.perf_counter() < deadline:
        samples.append(two_steps())
    # The fastest is what the machine can do; what is beyond it belongs to other programs.
    return min(samples) * elements / sum(slot.numel for slot in state.plan.compressed)


def parse_rate(text: str) -> float:
    """Read the speed of a link, such as "100mbit", "1.5gbit", "25 Gbit/s" or "400Gbps".

    Returns:
        Bits per second.

    Raises:
        ValueError: if it is not one.
    """
    found = _RATE.fullmatch(text.strip())
    rate = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not _SLOWEST_LINK <= rate <= _FASTEST_LINK:
        raise ValueError(f"{text!r} is not the speed of a link. Use a number and a unit, such as 100mbit or 1.5gbit.")
    return rate


def format_rate(bits_per_second: float) -> str:
    """Write the speed of a link in a readable unit."""
    return _in_unit(bits_per_second, (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)), "bit/s")


def format_seconds(seconds: float) -> str:
    """Write a time in a readable unit."""
    return _in_unit(seconds, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)), "s")


def format_bytes(count: float) -> str:
    """Write a number of bytes in a readable unit."""
    return _in_unit(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_ratio(ratio: float) -> str:
    """Write how many times more something is."""
    return f"{_three_digits(ratio)}×"


def _in_unit(value: float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    for unit, size in units:
        if value >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.3g} {smallest}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


class _Bucket:
    """Random gradients of a group of parameters, with the methods of DDP's ``GradBucket``."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.first = self.last = False
        sizes = [slot.numel for slot in group.slots]
        self._buffer = torch.randn(sum(sizes), dtype=group.slots[0].dtype, device=device)
        parts = zip(group.slots, torch.split(self._buffer, sizes), strict=True)
        self._gradients = {slot.name: part.view(slot.shape) for slot, part in parts}
        # The exchange asks a parameter for its shape, and for nothing else: it may share the gradient's memory.
        self.named_parameters = [(name, nn.Parameter(gradient)) for name, gradient in self._gradients.items()]

    def index(self) -> int:
        return 0 if self.first else 1

    def is_last(self) -> bool:
        return self.last

    def buffer(self) -> Tensor:
        return self._buffer

    def gradients(self) -> list[Tensor]:
        return list(self._gradients.values())

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters]


def _bucket_bytes(parameters: Sequence[Slot]) -> list[int]:
    """Give the bytes of the buckets that DDP makes of parameters, whose gradients come in reverse order.

    Of each dtype the first is closed after 1 MiB, so that sending begins early, and the others after 25.
    """
    open_buckets: dict[torch.dtype, int] = {}
    closed: list[int] = []
    begun: set[torch.dtype] = set()
    for slot in reversed(parameters):
        filled = open_buckets.pop(slot.dtype, 0) + slot.dense_bytes
        if filled >= (DEFAULT_GROUP_BYTES if slot.dtype in begun else _FIRST_BUCKET_BYTES):
            begun.add(slot.dtype)
            closed.append(filled)
        else:
            open_buckets[slot.dtype] = filled
    return closed + [filled for filled in open_buckets.values() if filled]


def _sample(plan: Plan, share: float, *, alternate: bool) -> tuple[list[tuple[str, Tensor]], dict[str, int]]:
    """Give named parameters, on the meta device, that are a share of a plan's, and their ranks."""
    sample: list[tuple[str, Tensor]] = []
    ranks: dict[str, int] = {}
    for kind, count in Counter(replace(slot, name="") for slot in plan.slots).items():
        shape = kind.shape
        if shape and count * share < 1:
            shape = _shortened(kind, max(4 * kind.rank, round(kind.rows * count * share), 1), alternate=alternate)
        for _ in range(max(1, round(count * share))):
            name = str(len(sample))
            ranks[name] = kind.rank
            sample.append((name, torch.empty(shape, dtype=kind.dtype, device="meta", requires_grad=True)))
    return sample, ranks


def _shortened(slot: Slot, rows: int, *, alternate: bool) -> tuple[int, ...]:
    """Give the shape of a parameter cut to its first rows, or to as many more as it takes to be compressed still."""
    while rows < slot.rows:
        shorter = replace(slot, shape=(rows, *slot.shape[1:]))
        if shorter.dense_bytes >= shorter.sent_bytes(alternate=alternate):
            return shorter.shape
        rows *= 2
    return slot.shape


def _parameters_of_state_dict(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    named: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        if name.rpartition(".")[2] in _STATISTICS or value.layout != torch.strided:
            continue
        # Two empty tensors, and two on the meta device, have the same address.
        address = value.data_ptr() or name
        key = (address, value.shape, value.stride())
        named.setdefault(key, (name, torch.empty_like(value, device="meta", requires_grad=True)))
    return list(named.values())


def _require_positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(
            f"`{name}={value!r}` is not the speed of a link. Give bits per second, or text such as '1gbit'."
        )
    return float(value)


def _measuring_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device='cuda'`: torch finds no GPU. Use 'cpu', or give `compress_seconds`.")
    return device


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"this {device.type.upper()} with {threads} thread{'s' if threads > 1 else ''}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
