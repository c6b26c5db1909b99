"""Runs with gradients that are given instead of computed, so that a property test knows what came in on every rank."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from nets import attach, like_an_accelerator, with_compiled_code, with_triton
from torch import Tensor, nn

from lightning_powersgd import Plan, PowerSGDConfig, PowerSGDState, make_plan
from lightning_powersgd.compressor.plan import Slot


@dataclass(frozen=True)
class Parameter:
    """What a parameter looks like: "channels last" or "transposed" is its layout in memory where it has such a one."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    gradient: str = "dense"
    requires_grad: bool = True

    def make(self) -> nn.Parameter:
        return nn.Parameter(laid_out(torch.zeros(self.shape, dtype=self.dtype), self.layout), self.requires_grad)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Give a tensor another layout in memory, if it has the dimensions for it."""
    if layout == "channels last" and tensor.dim() in (4, 5):
        return tensor.to(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


@dataclass(frozen=True)
class Spot:
    """A gradient's element that is not finite. An element beyond the last one is counted from the first again."""

    step: int
    rank: int
    parameter: int
    element: int
    value: float


@dataclass(frozen=True)
class Case:
    """A run: W ranks exchange given gradients of some parameters for some steps.

    Attributes:
        sizes: of the gradients, by step.
        scales: of the loss, by step, if it is scaled.
        alike: whether all ranks have the gradients of the first.
        spots: elements that are not finite.
        unused: (step, rank, parameter) where a rank, or for ``None`` no rank, uses the parameter. If this itself is
            ``None``, DDP does not look for unused ones.
        compiled: whether to compute with compiled code.
        accelerator: whether to go the way of a device that the host does not wait for.
        triton: whether to compute with Triton's kernels, interpreted.
        gradients_are_views: of DDP's buckets.
        save_after: the number of steps after which the state is saved.
    """

    world_size: int
    parameters: tuple[Parameter, ...]
    config: dict[str, Any]
    sizes: tuple[float, ...]
    seed: int = 0
    bucket_cap_mb: float | None = None
    scales: tuple[float, ...] | None = None
    alike: bool = False
    spots: tuple[Spot, ...] = ()
    unused: frozenset[tuple[int, int | None, int]] | None = None
    compiled: bool = True
    accelerator: bool = False
    triton: bool = False
    gradients_are_views: bool = False
    save_after: int | None = None

    @property
    def steps(self) -> int:
        return len(self.sizes)

    @property
    def names(self) -> list[str]:
        return [f"p{index}" for index in range(len(self.parameters))]

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.module().named_parameters(), PowerSGDConfig(**{"rank": 2, **self.config}))

    @cached_property
    def slots(self) -> list[Slot]:
        """The slots of the parameters, in their order."""
        by_name = {slot.name: slot for slot in self.plan.slots}
        return [by_name[name] for name in self.names]

    def module(self) -> Weights:
        return Weights(dict(zip(self.names, self.parameters, strict=True)))

    def gradient(self, step: int, rank: int, index: int) -> Tensor | None:
        """What one parameter's gradient is on one rank; ``None`` where the rank does not use the parameter."""
        # The first parameter is always used, since a backward pass needs one.
        if index and self.unused and {(step, rank, index), (step, None, index)} & self.unused:
            return None
        parameter = self.parameters[index]
        seed = ((self.seed * 100 + step) * 10 + (0 if self.alike else rank)) * 100 + index
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.gradient == "one row" and gradient.dim() > 1:
            gradient[1:] = 0
        if parameter.gradient == "rank one" and gradient.dim() > 1 and gradient.numel():
            flat = gradient.flatten(1)
            gradient = torch.outer(flat[:, 0], flat[0]).view(parameter.shape)
        gradient *= self.sizes[step] * self.scale(step)
        for spot in self.spots:
            at_home = (spot.step, spot.rank, spot.parameter) == (step, 0 if self.alike else rank, index)
            if at_home and gradient.numel():
                gradient.view(-1)[spot.element % gradient.numel()] = spot.value
        return gradient.to(parameter.dtype)

    def scale(self, step: int) -> float:
        """What the loss is multiplied by."""
        return self.scales[step] if self.scales else 1.0

    def came_in(self, step: int, index: int) -> Tensor:
        """One parameter's gradients on all ranks, (W, elements), in float64 and before the loss is scaled."""
        given = [self.gradient(step, rank, index) for rank in range(self.world_size)]
        nothing = torch.zeros(self.parameters[index].shape)
        rows = [(nothing if gradient is None else gradient).double().flatten() for gradient in given]
        return torch.stack(rows) / self.scale(step)

    def used(self, step: int, index: int) -> bool:
        """Whether any rank uses a parameter in a step."""
        return any(self.gradient(step, rank, index) is not None for rank in range(self.world_size))

    def split(self, row: Tensor) -> tuple[Tensor, ...]:
        """Take a row of elements of all parameters apart."""
        return row.split([math.prod(parameter.shape) for parameter in self.parameters], dim=-1)


class Weights(nn.Module):
    """Parameters whose gradients are what the module is called with."""

    def __init__(self, parameters: dict[str, Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter.make())

    def forward(self, gradients: list[Tensor | None]) -> Tensor:
        pairs = zip(self.parameters(), gradients, strict=True)
        return torch.stack([(p * gradient).sum().double() for p, gradient in pairs if gradient is not None]).sum()


@dataclass
class Run:
    """What one rank saw; a row for each step, in float64, and in it the elements of all parameters, or of all factors.

    Gradients and errors are those of the loss before it is scaled.

    Attributes:
        averaged: gradients after the exchange; 0 where DDP left none.
        errors: before and after each step; 0 for a parameter that has no error buffer.
        factors: before and after each step, with their magnitudes.
        sent: bytes that the exchange says it sent in each step.
        supports: how many of those tell where a drawn basis may reach.
        saved: the state as a file, saved after averaging the errors.
        dropped: what loading the state reported.
        start: the first step of the run.
        alone: whether the exchange passed gradients through.
    """

    averaged: Any
    errors: Any
    factors: Any
    sent: list[int] = field(default_factory=list)
    supports: list[int] = field(default_factory=list)
    saved: bytes = b""
    dropped: list[str] = field(default_factory=list)
    start: int = 0
    alone: bool = False


def play(case: Case, start: int = 0, saved: bytes | None = None) -> Run:
    """Run the case on this rank, from its first step or from one that a state was saved after."""
    ddp = {"find_unused_parameters": case.unused is not None, "gradient_as_bucket_view": case.gradients_are_views}
    scaler = torch.amp.GradScaler("cpu") if case.scales else None
    run = Run(averaged=[], errors=[], factors=[], start=start)
    with with_compiled_code(case.compiled), like_an_accelerator(case.accelerator), with_triton(case.triton):
        model, exchange = attach(case.module(), case.bucket_cap_mb, ddp, scaler, **case.config)
        state = exchange.state
        if saved is not None:
            run.dropped = state.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        for step in range(start, case.steps):
            model.zero_grad()
            if scaler is not None:
                scaler.load_state_dict({**scaler.state_dict(), "scale": case.scale(step)})
            before = _memory(model.module, state)
            run.supports.append(support_bytes(state))
            model([case.gradient(step, dist.get_rank(), index) for index in range(len(case.parameters))]).backward()
            after = _memory(model.module, state)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.module.parameters()]
            run.averaged.append(_row(grads) / case.scale(step))
            run.errors.append(torch.stack((before[0], after[0])))
            run.factors.append(torch.stack((before[1], after[1])))
            run.sent.append(state.sent_bytes)
            if step + 1 == case.save_after:
                exchange.average_errors()
                file = io.BytesIO()
                torch.save(state.state_dict(), file)
                run.saved = file.getvalue()
        run.alone = exchange.alone
    run.averaged, run.errors, run.factors = (torch.stack(t).numpy() for t in (run.averaged, run.errors, run.factors))
    return run


def support_bytes(state: PowerSGDState) -> int:
    """The bytes that the next step sends so that a drawn basis reaches no zero row or column."""
    return sum(
        slot.length(state.held) * group.dtype.itemsize
        for group in state.plan.groups
        for slot in group.compressed
        if state.held in state.drawn[slot.name]
    )


def _memory(module: nn.Module, state: PowerSGDState) -> tuple[Tensor, Tensor]:
    errors = [state.errors.get(name, torch.zeros_like(p)) for name, p in module.named_parameters()]
    kinds = [state.factors.values(), state.scales.magnitudes.values(), state.scales.profiles.values()]
    factors = [tensor for kind in kinds for sides in kind for tensor in sides.values()]
    return _row(errors) / state.loss_scale, _row(factors)


def _row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(t.detach().double().flatten() for t in tensors)])
