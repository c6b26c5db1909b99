"""Steps of an exchange to which given gradients are handed, on any device, without DDP and without a backward pass."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_powersgd import GradientExchange, PowerSGDConfig, PowerSGDState
from lightning_powersgd.exchange.lane import Lane

# Two groups of equal shapes, a long one and an odd one, a matrix that is sent whole, and a bias that misaligns others.
SHAPES = [(96, 64), (51,), (96, 64), (33, 51), (37, 300), (33, 51), (4, 4), (64, 3, 3, 3), (64, 32, 3, 3)]


@functools.cache
def group_of(backend: str) -> dist.ProcessGroup:
    """The default group's ranks with another backend, made once in each process."""
    return dist.new_group(backend=backend)


@contextmanager
def one_of(world_size: int, device: str) -> Iterator[dist.ProcessGroup]:
    """Let a rank that is alone be one of several, of which the others' gradients are zero.

    Its collectives are real ones, on a GPU NCCL's, and sum over it alone; an exchange that is made here divides by the
    number of ranks that it takes for given.
    """
    group = group_of("nccl" if device == "cuda" else "gloo")
    assert group.size() == 1
    count = dist.get_world_size

    def counted(asked: dist.ProcessGroup | None = None) -> int:
        return world_size if asked is group else count(asked)

    with mock.patch.object(dist, "get_world_size", counted):
        yield group


def make_exchange(
    device: str,
    process_group: dist.ProcessGroup | None,
    shapes: list[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    group_bytes: int = 2**20,
    scaler: Any = None,
    follow: bool = False,
    **config: Any,
) -> GradientExchange:
    """Make an exchange of parameters of some shapes. With ``follow``, it looks for unused ones."""
    named = {f"p{index}": nn.Parameter(torch.zeros(shape, dtype=dtype)) for index, shape in enumerate(shapes)}
    on_device = {name: nn.Parameter(parameter.to(device)) for name, parameter in named.items()}
    settings = PowerSGDConfig(**{"rank": 2, "min_compression_ratio": 1.0, **config})
    state = PowerSGDState(on_device.items(), settings, group_bytes)
    return GradientExchange(state, process_group, state.parameters if follow else None, scaler)


def draw(exchange: GradientExchange, step: int) -> list[Tensor]:
    """Draw the gradients of a step, on the CPU."""
    generator = torch.Generator().manual_seed(step)
    parameters = exchange.parameters.values()
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


def places(exchange: GradientExchange, offset: int = 0) -> list[Tensor]:
    """Memory for the gradients, each so many elements behind where an allocation begins."""
    flats = [parameter.detach().new_zeros(offset + parameter.numel()) for parameter in exchange.parameters.values()]
    pairs = zip(flats, exchange.parameters.values(), strict=True)
    return [flat[offset:].view(parameter.shape) for flat, parameter in pairs]


def hand_over(
    exchange: GradientExchange,
    gradients: list[Tensor],
    given: list[Tensor],
    pause: Callable[[], object] = lambda: None,
) -> None:
    """Exchange the gradients of a step: as a backward pass does, each is written only when it is asked for."""
    exchange.begin_step()
    for parameter, gradient, values in zip(exchange.parameters.values(), gradients, given, strict=True):
        pause()
        gradient.copy_(values)
        exchange.take(parameter, gradient)
        exchange.advance()
    exchange.end_step()


def bits(
    device: str,
    *,
    world_size: int = 2,
    steps: int = 5,
    offset: int = 0,
    pause: Callable[[], object] = lambda: None,
    **settings: Any,
) -> list[bytes]:
    """The bits of all averaged gradients of some steps, and of the errors and factors at their end."""
    with one_of(world_size, device) as group:
        exchange = make_exchange(device, group, **settings)
        gradients = places(exchange, offset)
        found = []
        for step in range(steps):
            given = [values.to(device) for values in draw(exchange, step)]
            hand_over(exchange, gradients, given, pause)
            averaged = [gradient.clone() for gradient in gradients]
            for gradient in gradients:
                gradient.fill_(torch.nan)  # or what was written too late would go unnoticed
            found += averaged
        state = exchange.state
        found += [state.errors[name] for name in sorted(state.errors)]
        found += [state.factors[name][side] for name in sorted(state.factors) for side in sorted(state.factors[name])]
        return [tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes() for tensor in found]


@contextmanager
def pauses(seed: int) -> Iterator[Callable[[], None]]:
    """Let the device sleep now and then: in the exchange's stream when that is entered, and where it is asked to."""
    chance, apart = random.Random(seed), Lane.apart

    def pause() -> None:
        torch.cuda._sleep(chance.choice((0, 0, 10**5, 2 * 10**6)))  # of a millisecond at most, or so

    @contextmanager
    def late(lane: Lane) -> Iterator[None]:
        with apart(lane):
            pause()
            yield

    with mock.patch.object(Lane, "apart", late):
        yield pause
