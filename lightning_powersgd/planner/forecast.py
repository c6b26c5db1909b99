"""What PowerSGD will bring to a model, found out before it is trained: bytes, and the time of an exchange.

A collective is a ring all-reduce (see `lightning_powersgd.exchange.link`). Plain all-reduce is the sum of its time over
DDP's buckets, of which the first is smaller than the others. The bf16 hook sends the same buckets with two bytes an
element, and casts them twice. PowerSGD is the sum over the payloads of its plan, and the time of its arithmetic.
Arithmetic is measured where the forecast is made; where PowerSGD's is given instead, the casts count as free, in favour
of the rival.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_powersgd.compressor.config import PowerSGDConfig, require_int
from lightning_powersgd.compressor.parameters import parameter_name
from lightning_powersgd.compressor.plan import DEFAULT_GROUP_BYTES, Plan, Slot, make_plan
from lightning_powersgd.exchange.arithmetic import measure_casts, measure_compression
from lightning_powersgd.exchange.blocks import in_blocks, named_tensors
from lightning_powersgd.exchange.hierarchy import owners_of
from lightning_powersgd.exchange.link import ring_seconds
from lightning_powersgd.planner.measure import describe, measuring_device
from lightning_powersgd.planner.parameters import parameters_of
from lightning_powersgd.planner.units import format_rate, format_ratio, format_seconds, parse_rate

# A message of gloo over TCP took 180 to 240 µs on the machine of docs/benchmarks/scale.md, whose cores were busy with
# the ranks themselves. NCCL between machines of their own takes less.
DEFAULT_LATENCY = 1e-4

# Of DDP, unless it is told a size of its own (torch.distributed._DEFAULT_FIRST_BUCKET_BYTES).
_FIRST_BUCKET_BYTES = 2**20

# Beyond these, a number is a slip of the pen, and times may overflow. torch.distributed counts ranks in 32 bits.
_MOST_RANKS = 2**31 - 1
_LONGEST_SECONDS = 1e9

# What processes can average. For floating-point numbers of eight bits, and for complex32, torch has little arithmetic.
_GRADIENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)

# What the bf16 hook makes narrower. Of complex numbers it would drop the imaginary part, so they count as they are.
_WIDE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class LinkForecast:
    """The time of one exchange of gradients over a link, when it does not overlap with anything.

    Attributes:
        name: of the link.
        bits_per_second: that it carries in each direction.
        all_reduce_seconds: that plain all-reduce takes.
        bf16_seconds: that PyTorch's ``bf16_compress_hook`` takes, which sends two bytes an element.
        network_seconds: that PowerSGD's collectives take.
        compress_seconds: that PowerSGD's arithmetic takes.
        break_even: bits per second below which PowerSGD is the fastest (see `Forecast.break_even`).
    """

    name: str
    bits_per_second: float
    all_reduce_seconds: float
    bf16_seconds: float
    network_seconds: float
    compress_seconds: float
    break_even: float

    @property
    def powersgd_seconds(self) -> float:
        """Seconds that PowerSGD takes, arithmetic and collectives."""
        return self.compress_seconds + self.network_seconds

    @property
    def rival(self) -> str:
        """The faster one of plain all-reduce and the bf16 hook; where they are alike, plain all-reduce."""
        return "the bf16 hook" if self.bf16_seconds < self.all_reduce_seconds else "plain all-reduce"

    @property
    def rival_seconds(self) -> float:
        """Seconds that the faster one of plain all-reduce and the bf16 hook takes."""
        return min(self.all_reduce_seconds, self.bf16_seconds)

    @property
    def pays(self) -> bool:
        """Whether PowerSGD is faster than both plain all-reduce and the bf16 hook."""
        return self.powersgd_seconds < self.rival_seconds

    def speedup(self, step_seconds: float = 0.0) -> float:
        """Compare a step with the faster rival to one with PowerSGD, when nothing overlaps.

        Args:
            step_seconds: of forward and backward without any exchange; 0 compares the exchanges alone.
        """
        return (step_seconds + self.rival_seconds) / (step_seconds + self.powersgd_seconds)

    def least_speedup(self, step_seconds: float) -> float:
        """Compare at PowerSGD's worst: all of the rival that can hides behind the step, and nothing of PowerSGD.

        Args:
            step_seconds: of forward and backward without any exchange.
        """
        return max(step_seconds, self.rival_seconds) / (step_seconds + self.powersgd_seconds)

    def __str__(self) -> str:
        if self.pays:
            return (
                f"{self.name}: {format_seconds(self.powersgd_seconds)} instead of {format_seconds(self.rival_seconds)}"
                f" with {self.rival}, {format_ratio(self.speedup())} faster."
            )
        would = f" It would pay on a link below {format_rate(self.break_even)}." if self.break_even else ""
        return (
            f"{self.name}: PowerSGD would not pay here. It takes {format_seconds(self.powersgd_seconds)},"
            f" {self.rival} {format_seconds(self.rival_seconds)}.{would}"
        )


@dataclass(frozen=True)
class Hierarchy:
    """What ``hierarchical=True`` would bring: each device of a machine compresses only the parameters that it owns.

    Attributes:
        devices: of each machine.
        compress_seconds: that the arithmetic of the busiest device takes in a step, in proportion to its elements.
        error_bytes: of the error buffers of the device that has most of them.
        bytes_in_node: that a device sends inside its machine in a step: gradients to their owners, factors from them.
        break_even: bits per second between the devices of a machine above which a step is shorter for it.
    """

    devices: int
    compress_seconds: float
    error_bytes: int
    bytes_in_node: float
    break_even: float


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
        bf16_payloads: bytes of each collective of the bf16 hook in a step.
        cast_seconds: that the bf16 hook's casts take in a step.
        measured_on: the device that times were measured on; ``None`` if PowerSGD's was given, and casts count as free.
        shards: devices that a replica is sharded over. All figures are those of one of them, the first.
        along_longest: what a device sends if each parameter is sharded along its longest dimension, if it can be.
        hierarchy: what averaging inside machines first would bring, where they have several devices.
    """

    config: PowerSGDConfig
    parameters: tuple[Slot, ...]
    frozen: int
    plan: Plan
    dense_payloads: tuple[int, ...]
    world_size: int
    latency: float
    compress_seconds: float
    bf16_payloads: tuple[int, ...]
    cast_seconds: float
    measured_on: str | None
    shards: int = 1
    along_longest: float | None = None
    hierarchy: Hierarchy | None = None

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
    def bytes_in_node(self) -> int:
        """Bytes that a device sends inside its machine in a step: FSDP gathers parameters twice, and reduces once."""
        return 3 * (self.shards - 1) * self.dense_bytes

    @property
    def error_bytes(self) -> int:
        """Bytes of the error buffers of a device."""
        return _error_bytes(self.plan.compressed, self.config)

    @property
    def payloads(self) -> tuple[float, ...]:
        """Bytes of each of PowerSGD's collectives in a step."""
        return tuple(self.plan.payloads(alternate=self.config.alternate))

    @property
    def break_even(self) -> float:
        """Bits per second of the link on which PowerSGD takes as long as its faster rival: on slower ones it pays.

        0 if there is no such link, since a rival sends no more bytes; infinity if it pays on every link, since
        computing takes no longer than the messages that it saves.
        """
        return min(self._break_even(self.dense_payloads, 0.0), self._break_even(self.bf16_payloads, self.cast_seconds))

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
            bf16_seconds=self.cast_seconds + self._ring_seconds(self.bf16_payloads, rate),
            network_seconds=self._ring_seconds(self.payloads, rate),
            compress_seconds=self.compress_seconds,
            break_even=self.break_even,
        )

    def __str__(self) -> str:
        lines = [f"{self.plan.summary(alternate=self.config.alternate)}."]
        if any(self.plan.compressed):
            place = f" (measured on {self.measured_on})" if self.measured_on else ""
            lines.append(f"Its arithmetic takes {format_seconds(self.compress_seconds)} a step{place}.")
            where = f"links below {format_rate(self.break_even)}" if self.break_even else "no link"
            where = "any link" if self.break_even == math.inf else where
            lines.append(
                f"Between {self.world_size} processes it is faster than plain all-reduce and the bf16 hook on {where}."
            )
        return "\n".join(lines)

    def _break_even(self, payloads: Sequence[int], seconds: float) -> float:
        """Compare with an exchange of some payloads that computes for so many seconds."""
        messages = len(self.payloads) - len(payloads)
        lost = self.compress_seconds - seconds + 2 * (self.world_size - 1) * self.latency * messages
        saved = 16 * (self.world_size - 1) / self.world_size * (sum(payloads) - self.sent_bytes)
        if saved <= 0:
            return 0.0
        return saved / lost if lost > 0 else math.inf

    def _ring_seconds(self, payloads: Sequence[float], bits_per_second: float) -> float:
        return ring_seconds(payloads, self.world_size, self.latency, bits_per_second)


def forecast_exchange(
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: PowerSGDConfig | None = None,
    *,
    world_size: int = 8,
    latency: float = DEFAULT_LATENCY,
    compress_seconds: float | None = None,
    device: torch.device | str | None = None,
    shards: int = 1,
    devices: int = 1,
) -> Forecast:
    """Forecast what PowerSGD will bring to a model, before it is trained.

    >>> forecast = forecast_exchange(nn.Linear(1000, 1000), PowerSGDConfig(rank=2), compress_seconds=0.001)
    >>> print(forecast.over("1gbit"))
    1gbit: 4.08 ms instead of 29.4 ms with the bf16 hook, 7.21× faster.

    Args:
        model: a module, on any device, the meta device included; its named parameters, of which the frozen ones take no
            part; or a state dict (see `parameters_of`).
        config: the settings; ``None`` is their defaults.
        world_size: number of ranks. Several on one machine count one by one: a ring leaves the machine once. Of a
            sharded model, the number of replicas.
        latency: seconds of a message between neighbours, beside the time of its bytes. Higher: many small collectives
            cost more.
        compress_seconds: that the arithmetic takes in a step; ``None`` measures it (see `measure_compression`), and
            beside it the casts of the bf16 hook, which otherwise count as free.
        device: where to measure; ``None`` is CUDA if there is a GPU, else the CPU with PyTorch's number of threads.
        shards: devices that a replica is sharded over by FSDP, along the first dimension of each parameter.
        devices: of each machine, where the model is not sharded: adds what averaging inside machines first would bring.

    Returns:
        The forecast; `Forecast.over` gives the times over a link.

    Raises:
        TypeError: if ``world_size``, ``shards`` or ``devices`` is not an integer.
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
    require_int("shards", shards, minimum=1, remedy="Use 1 if the model is not sharded.")
    require_int("devices", devices, minimum=1, remedy="Use 1 if every machine has one device.")
    if devices > 1 and (shards > 1 or world_size % devices or world_size == devices):
        raise ValueError(
            f"`devices={devices}` cannot be with `world_size={world_size}` and `shards={shards}`. Give the devices of"
            " each of several equal machines, of which the processes are a multiple, and a model that is not sharded."
        )
    whole = parameters_of(model)
    named = [(name, _shard(parameter, shards)) for name, parameter in whole]
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
    measured_on, cast_seconds = None, 0.0
    if compress_seconds is None:
        device = measuring_device(device)
        try:
            compress_seconds = measure_compression(plan, config, device)
            cast_seconds = measure_casts([slot for slot in parameters if slot.dtype in _WIDE_DTYPES], device)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                f"`device='{device}'`: its memory is too full to measure on it. Free 2 GiB, or use 'cpu', or give"
                " `compress_seconds`."
            ) from error
        measured_on = describe(device)
    buckets = _buckets(parameters)
    return Forecast(
        config=config,
        parameters=parameters,
        frozen=len(named) - len(trainable),
        plan=plan,
        dense_payloads=tuple(filled for _, filled in buckets),
        world_size=world_size,
        latency=float(latency),
        compress_seconds=float(compress_seconds),
        bf16_payloads=tuple(filled * _bf16_itemsize(dtype) // dtype.itemsize for dtype, filled in buckets),
        cast_seconds=cast_seconds,
        measured_on=measured_on,
        shards=shards,
        along_longest=None if shards == 1 else _sent_along_longest(whole, config, shards),
        hierarchy=None if devices == 1 else _hierarchy(named, config, compress_seconds, devices),
    )


def _hierarchy(
    named: Iterable[tuple[str, Tensor]], config: PowerSGDConfig, compress_seconds: float, devices: int
) -> Hierarchy:
    blocks = named_tensors(in_blocks(named))
    plan, owners = make_plan(blocks, config), owners_of(blocks, devices)
    owned = [[slot for slot in plan.compressed if owners[slot.name] == owner] for owner in range(devices)]
    most, all_of_it = max(_elements(slots) for slots in owned), _elements(plan.compressed)
    share = most / all_of_it if all_of_it else 1.0
    sent = (devices - 1) / devices * (plan.dense_bytes + plan.sent_bytes(alternate=config.alternate))
    saved = (1 - share) * compress_seconds
    return Hierarchy(
        devices=devices,
        compress_seconds=share * compress_seconds,
        error_bytes=max(_error_bytes(slots, config) for slots in owned),
        bytes_in_node=sent,
        break_even=8 * sent / saved if saved else math.inf,
    )


def _elements(slots: Iterable[Slot]) -> int:
    return sum(slot.numel for slot in slots)


def _error_bytes(slots: Iterable[Slot], config: PowerSGDConfig) -> int:
    if not config.error_feedback:
        return 0
    return sum(slot.numel * (config.error_dtype or slot.dtype).itemsize for slot in slots)


def _shard(parameter: Tensor, shards: int, dimension: int = 0) -> Tensor:
    """Give what the first of several devices holds of a parameter, on the meta device."""
    if shards == 1 or not parameter.dim():
        return parameter
    shape = list(parameter.shape)
    shape[dimension] = -(-shape[dimension] // shards)
    return torch.empty(shape, dtype=parameter.dtype, device="meta", requires_grad=parameter.requires_grad)


def _sent_along_longest(named: Iterable[tuple[str, Tensor]], config: PowerSGDConfig, shards: int) -> float:
    placed = []
    for name, parameter in named:
        longest = max(range(parameter.dim()), key=lambda axis: parameter.shape[axis], default=0)
        # FSDP2 pads the first dimension only.
        fits = parameter.dim() and parameter.shape[longest] % shards == 0
        placed.append((name, _shard(parameter, shards, longest if fits else 0)))
    return make_plan(placed, config).sent_bytes(alternate=config.alternate)


def _bf16_itemsize(dtype: torch.dtype) -> int:
    return (torch.bfloat16 if dtype in _WIDE_DTYPES else dtype).itemsize


def _buckets(parameters: Sequence[Slot]) -> list[tuple[torch.dtype, int]]:
    """Give dtype and bytes of the buckets that DDP makes of parameters, whose gradients come in reverse order.

    Of each dtype the first is closed after 1 MiB, so that sending begins early, and the others after 25.
    """
    open_buckets: dict[torch.dtype, int] = {}
    closed: list[tuple[torch.dtype, int]] = []
    begun: set[torch.dtype] = set()
    for slot in reversed(parameters):
        filled = open_buckets.pop(slot.dtype, 0) + slot.dense_bytes
        if filled >= (DEFAULT_GROUP_BYTES if slot.dtype in begun else _FIRST_BUCKET_BYTES):
            begun.add(slot.dtype)
            closed.append((slot.dtype, filled))
        else:
            open_buckets[slot.dtype] = filled
    return closed + [(dtype, filled) for dtype, filled in open_buckets.items() if filled]


def _require_positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(
            f"`{name}={value!r}` is not the speed of a link. Give bits per second, or text such as '1gbit'."
        )
    return float(value)
