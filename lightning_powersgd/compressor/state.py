"""What the compressor remembers between steps, keyed by parameter name.

| what | shape | dtype | owner |
|---|---|---|---|
| error buffer | the parameter's | ``error_dtype`` | local to the rank; only the mean over ranks affects training |
| left factor P, right factor Q | (r, n), (r, m) | the payload's | the same on all ranks |
| magnitudes of the rows of both, for a float16 or integer payload | (r, 1) | float32 | the same on all ranks |
| profiles of both, for an integer payload | (1, n), (1, m) | float32 | the same on all ranks |
| loss scale that errors and magnitudes refer to | scalar | float32 | the same on all ranks |
| step, byte counts | numbers | | the same on all ranks |
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_powersgd.compressor.basis import normalize_rows, random_factor
from lightning_powersgd.compressor.checkpoint import (
    FORMAT_VERSION,
    as_saved,
    load_entry,
    make_entry,
    require_readable,
    require_shape,
    rescaled_entry,
    with_tensors,
)
from lightning_powersgd.compressor.codec import saturated
from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.parameters import common_device, parameter_name
from lightning_powersgd.compressor.passes import assign
from lightning_powersgd.compressor.plan import (
    DEFAULT_GROUP_BYTES,
    SIDES,
    Group,
    Plan,
    Side,
    Slot,
    make_plan,
    other_side,
)
from lightning_powersgd.compressor.scales import Scales
from lightning_powersgd.compressor.stacks import Stacks
from lightning_powersgd.compressor.trial import Trial
from lightning_powersgd.compressor.verdict import Verdict, any_of


class PowerSGDState:
    """Error buffers, factors and step of one model.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them, already on their device.
        config: the settings.
        group_bytes: gradient bytes after which a group of parameters that travel together is closed.
        arrival: names in the order in which a step makes their gradients; ``None``: the last registered first.
        among: names of the parameters that the state is of; ``None``: all. Other ranks look after the others.

    Attributes:
        config: the settings in use.
        given: the settings that were given, of which `configure` and a loaded state may have filled in the ranks.
        whole: names of parameters that are sent whole, whatever their rank.
        plan: which parameter is compressed, and how.
        parameters: the trainable parameters by name.
        errors: error buffers by name; empty without error feedback.
        factors: by name, the factors held for the next step, by side.
        held_factors: the same by group and side, stacked by shape.
        scales: the sizes of factors that travel with a gain.
        drawn: by name, the sides of factors that hold a row as it was drawn, not yet computed from gradients; only of
            alternating steps, since a full step holds nothing but what it makes of such a row.
        loss_scale: that the gradients were multiplied by from which errors and magnitudes came, a scalar.
        averaged: whether the error buffers are the mean over ranks already, and so alike on all of them.
        exact: set this to send gradients whole, whatever the step, until it is unset.
        trial: finds out whether compressed steps are the faster ones; ``None`` where that is not asked.
        owing: whether errors may be other than zero.
        step: synchronised backward passes so far.
        dense_bytes: gradient bytes of the last step, as plain all-reduce would have sent them.
        sent_bytes: bytes handed to collectives for gradients in the last step.
        total_dense_bytes: ``dense_bytes``, added up over all steps.
        total_sent_bytes: ``sent_bytes``, added up over all steps, and what averaging the errors has sent.

    Raises:
        ValueError: if the parameters lie on several devices or on none, a pattern of the rank matches nothing,
            or ``arrival`` lacks a trainable parameter.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: PowerSGDConfig,
        group_bytes: int = DEFAULT_GROUP_BYTES,
        arrival: Iterable[str] | None = None,
        among: Container[str] | None = None,
    ) -> None:
        named = [(parameter_name(name), parameter) for name, parameter in named_parameters]
        order = None if arrival is None else list(arrival)
        self._make_plan = partial(make_plan, named, group_bytes=group_bytes, arrival=order, among=among)
        self.given = self.config = config
        self.whole: frozenset[str] = frozenset()
        self.plan: Plan = self._make_plan(config)
        ours = [(name, parameter) for name, parameter in named if among is None or name in among]
        self.parameters = {name: parameter for name, parameter in ours if parameter.requires_grad}
        self._frozen = {name: tuple(parameter.shape) for name, parameter in ours if not parameter.requires_grad}
        # What was loaded for frozen parameters: entries of a state by name, at the loss scale that was loaded.
        self._waiting: dict[str, Mapping[str, Any]] = {}
        self._loaded_scale = 1.0
        self.device = common_device(self.parameters)
        self.exact = False
        self.trial: Trial | None = None
        self.owing = False
        self.step = 0
        self.averaged = True
        self._held: Side = "right"
        # What a device will have answered when the next step begins: whether the last one was kept, and which of its
        # factors hold nothing drawn any more.
        self._verdict: Verdict | None = None
        self._asked: list[tuple[list[str], Side, Tensor]] = []
        self.dense_bytes = 0
        self.sent_bytes = 0
        self.total_dense_bytes = 0
        self.total_sent_bytes = 0
        self.errors: dict[str, Tensor] = {}
        self.factors: dict[str, dict[Side, Tensor]] = {}
        self.held_factors: list[dict[Side, Stacks]] = []
        self.drawn: dict[str, set[Side]] = {}
        self.loss_scale = torch.ones((), device=self.device)
        self._make_buffers()

    @property
    def compressing(self) -> bool:
        """Whether the next synchronised backward pass is compressed."""
        return self.may_compress and (self.trial is None or self.trial.compressing)

    @property
    def may_compress(self) -> bool:
        """Whether it could be, as far as the training is concerned."""
        return self.step >= self.config.start_step and not self.exact

    @property
    def all_errors(self) -> dict[str, Tensor]:
        """The error buffers by name, also those that wait for frozen parameters."""
        return self.errors | {name: entry["error"] for name, entry in self._waiting.items() if "error" in entry}

    def configure(self, config: PowerSGDConfig, whole: Iterable[str] = ()) -> None:
        """Take other settings, before the first step.

        Args:
            config: the settings.
            whole: names of parameters that are sent whole, whatever their rank.

        Raises:
            ValueError: if the parameters do not fit them.
        """
        self.whole = frozenset(whole)
        self.plan = self._make_plan(config, whole=self.whole)
        self.config = config
        for buffers in (self.errors, self.factors, self.drawn):
            buffers.clear()
        self._make_buffers()

    def _make_buffers(self) -> None:
        self.scales = Scales(self.plan.groups, self.device)
        self.held_factors = []
        for group in self.plan.groups:
            held: dict[Side, Stacks] = {}
            for side in SIDES if self.config.alternate else SIDES[1:]:
                flat = torch.empty(group.length(side), dtype=group.dtype, device=self.device)
                held[side] = Stacks(group, side, flat)
                self._draw(group, side, held[side])
            self.held_factors.append(held)
            factors = {side: stacks.named for side, stacks in held.items()}
            for slot in group.compressed:
                if self.config.error_feedback:
                    parameter, dtype = self.parameters[slot.name], self.config.error_dtype
                    self.errors[slot.name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
                self.factors[slot.name] = {side: by_name[slot.name] for side, by_name in factors.items()}
                self.drawn[slot.name] = set(SIDES if self.config.alternate else ())

    def first_factor(self, slot: Slot, side: Side) -> Tensor:
        """Draw a random factor on the CPU from the seed and the parameter's name (and, without warm start, the step).

        So it does not depend on the device, the rank, the bucket or the order of parameters.

        Returns:
            (r, n) for the left side, (r, m) for the right, float32.
        """
        draw = f"{self.config.seed}/{slot.name}/{side}" + ("" if self.config.warm_start else f"/{self.step}")
        return random_factor(draw, slot.rank, slot.length(side))

    def start_factors(self, group: int) -> Stacks:
        """Give the factors that this step starts from: the last step's, or without warm start new random ones.

        Args:
            group: its place in the plan.
        """
        held = self.held_factors[group][self.held]
        if not self.config.warm_start:
            self._draw(self.plan.groups[group], self.held, held)
        return held

    def _draw(self, group: Group, side: Side, stacks: Stacks) -> None:
        """Draw the first factors of a group, in one journey to the device."""
        slots = [slot for alike in group.stacks(side) for slot in alike]
        if slots:
            drawn = torch.cat([self.first_factor(slot, side).flatten() for slot in slots])
            stacks.flat.copy_(drawn, non_blocking=True)

    def keeps(self, group: int, side: Side) -> bool:
        """Whether anything is kept of a group's averaged factors of a side."""
        return side in self.held_factors[group] or side in self.scales.of_groups[group].magnitudes

    def keep_factors(self, group: int, side: Side, factors: Sequence[Tensor], keep: Sequence[bool | Tensor]) -> None:
        """Keep averaged factors as the next warm start, if they are to be one, and the magnitudes of their rows.

        Args:
            group: its place in the plan.
            side: of the factors.
            factors: by shape, (b, r, n) or (b, r, m).
            keep: by shape, whether to; of each matrix as a tensor (b, 1, 1), which stays on its device.
        """
        if side in self.held_factors[group]:
            held = self.held_factors[group][side].blocks
            for kept, factor, keep_these in zip(held, factors, keep, strict=True):
                assign(kept, normalize_rows(factor, fallback=kept), keep_these)
            if self.holds_drawn(group, side):
                self.ask_whether_computed(group, side, factors, keep)
        self.scales.of_groups[group].keep(side, factors, keep)

    def holds_drawn(self, group: int, side: Side) -> bool:
        """Whether a group's factors of a side may hold something drawn, and not yet computed from gradients."""
        slots = self.plan.groups[group].compressed
        return self.config.warm_start and any(side in self.drawn[slot.name] for slot in slots)

    def ask_whether_computed(
        self, group: int, side: Side, factors: Sequence[Tensor], keep: Sequence[bool | Tensor]
    ) -> None:
        """Let the device find out which factors hold nothing drawn any more: arguments as in `keep_factors`."""
        for slots, factor, keep_these in zip(self.plan.groups[group].stacks(side), factors, keep, strict=True):
            names = [slot.name for slot in slots]
            if any(side in self.drawn[name] for name in names):
                kept = keep_these.flatten() if isinstance(keep_these, Tensor) else keep_these
                self._asked.append((names, side, factor.any(dim=2).all(dim=1) & kept))

    @property
    def encodes(self) -> bool:
        """Whether the factors of the next compressed step can travel as integers, if they are to."""
        return self.scales.known((other_side(self.held),) if self.config.alternate else SIDES)

    def rescale(self, name: str, ratio: Tensor) -> None:
        """Let what a parameter has kept refer to another loss scale.

        Args:
            name: of the parameter.
            ratio: of the new scale to the old one, a scalar.
        """
        if name in self.errors:
            saturated(self.errors[name].mul_(ratio), self.errors[name].dtype)
        for side in SIDES:
            self.scales.rescale(name, side, ratio)

    def unscale(self) -> None:
        """Let what was loaded refer to a loss that is not scaled, before the first step with it."""
        if self._loaded_scale == 1.0:
            return
        ratio = 1 / self._loaded_scale
        for name in self.factors:
            self.rescale(name, torch.full_like(self.loss_scale, ratio))
        self._waiting = {name: rescaled_entry(entry, ratio) for name, entry in self._waiting.items()}
        self.loss_scale.fill_(1.0)
        self._loaded_scale = 1.0

    def matrix_dtype(self, slot: Slot) -> torch.dtype:
        """Give the dtype in which M = g + e is computed: the wider of the gradient's and the error buffer's.

        But never float16, whose range a product with a factor leaves at gradients of a few hundreds.
        """
        dtype = slot.dtype
        if self.config.error_feedback and self.config.error_dtype is not None:
            dtype = torch.promote_types(dtype, self.config.error_dtype)
        return torch.float32 if dtype == torch.float16 else dtype

    def finish_step(self, dense_bytes: int, sent_bytes: int) -> None:
        """Count a synchronised backward pass, and its bytes."""
        self.step += 1
        self.dense_bytes, self.sent_bytes = dense_bytes, sent_bytes
        self.total_dense_bytes += dense_bytes
        self.total_sent_bytes += sent_bytes

    @property
    def held(self) -> Side:
        """The side of the factors that the next step starts from; always "right" unless alternating."""
        if self._verdict is not None:
            (kept, *computed), asked = self._verdict.tolist(), self._asked
            self._verdict, self._asked = None, []
            places = [(name, side) for names, side, _ in asked for name in names]
            for (name, side), whole in zip(places, computed, strict=True):
                self.drawn[name] -= {side} if whole else set()
            if kept:
                self._held = other_side(self._held)
        return self._held

    @held.setter
    def held(self, side: Side) -> None:
        self._held, self._verdict, self._asked = side, None, []

    def keep_step(self, kept: Sequence[bool | Tensor]) -> None:
        """Note whether any of a compressed step's errors and factors were kept.

        Args:
            kept: of each group, or of all; a tensor is not read before the next step, and only if that depends on it.
        """
        if any(answer is not False for answer in kept):  # or not yet known
            self.averaged = False
            self.owing = True
        self.scales.learn()
        if self.config.alternate:
            any_kept = torch.as_tensor(any_of(kept), device=self.device)
            answers = [any_kept.view(1), *(whole for _, _, whole in self._asked)]
            self._verdict = Verdict(torch.cat(answers))

    def state_dict(self, *, error_feedback: bool = True) -> dict[str, Any]:
        """Give the state as tensors, numbers and strings, by parameter name: loadable with ``weights_only=True``.

        All tensors are copies. The error buffers are this rank's. Average them first (`average_errors`) for a
        checkpoint that any rank, at any world size, can resume from.

        Args:
            error_feedback: whether to include the error buffers.
        """
        decided = {} if self.trial is None else {"whole": sorted(self.whole), "trial": self.trial.to_dict()}
        return {
            "format_version": FORMAT_VERSION,
            "settings": self.config.to_dict(),
            "step": self.step,
            "averaged": self.averaged,
            "held": self.held,
            "loss_scale": float(self.loss_scale),
            "total_dense_bytes": self.total_dense_bytes,
            "total_sent_bytes": self.total_sent_bytes,
            "parameters": {
                **{name: self._waiting_entry(entry, error_feedback) for name, entry in self._waiting.items()},
                **{slot.name: self._slot_entry(slot, error_feedback) for slot in self.plan.compressed},
            },
            **decided,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over what `state_dict` gave, or nothing at all if that cannot be.

        An automatic rank for which nothing else was given becomes what it was in the saved run. A buffer whose
        parameter is still there in its shape is taken over, also under another rank or pattern; a factor also needs its
        rank and side.

        Args:
            state: from `state_dict`.

        Returns:
            What was saved and could not be taken over, or is needed and was not saved: one line each, empty if all
            fits.

        Raises:
            ValueError: if the format is unknown, an entry is missing or is not what `state_dict` writes, or a
                parameter's shape differs from the saved one.
        """
        require_readable(state)
        saved: Mapping[str, Any] = state["parameters"]
        for name, shape in (self._frozen | {slot.name: slot.shape for slot in self.plan.slots}).items():
            if name in saved:
                require_shape(name, tuple(saved[name]["shape"]), shape)
        config = as_saved(self.given, state["settings"])
        whole = frozenset(state.get("whole", []) if self.trial is not None else [])
        if (config, whole) != (self.config, self.whole):
            self.configure(config, whole)
        trial = state.get("trial")
        if self.trial is not None and trial is not None and trial["world_size"] == self.trial.world_size:
            self.trial = Trial(**trial)
        self.step = state["step"]
        self.averaged, self.owing = state["averaged"], True
        self.total_dense_bytes = state["total_dense_bytes"]
        self.total_sent_bytes = state["total_sent_bytes"]
        self.held = state["held"] if self.config.alternate else "right"
        # What is frozen now may be unfrozen later, and then finds here what it had.
        self._waiting = {
            name: with_tensors(entry, lambda _, tensor: tensor.clone())
            for name, entry in saved.items()
            if name in self._frozen
        }
        self._loaded_scale = state.get("loss_scale", 1.0)
        self.loss_scale.fill_(self._loaded_scale)
        dropped = [
            f"{name}: no longer {'compressed' if name in self.parameters else 'in the model'}"
            for name in saved
            if name not in self.factors and name not in self._waiting
        ]
        for slot in self.plan.compressed:
            name, entry = slot.name, saved.get(slot.name)
            scales = (self.scales.magnitudes.get(name, {}), self.scales.profiles.get(name, {}))
            error, drawn = self.errors.get(name), self.drawn[name]
            dropped += load_entry(slot, entry, self.factors[name], *scales, error, drawn, self.held)
        self.scales.look()
        return dropped

    def residual_norms(self, projections: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Measure what the last step left behind.

        The residual e = M − P̂ Qᵀ is orthogonal to P̂, so ‖M‖² = ‖e‖² + ‖Q‖² and M itself is not needed.

        Args:
            projections: this rank's own factors that the last step sent.

        Returns:
            ‖e‖² and ‖M‖² over all compressed parameters of this rank, as scalars on the state's device.
        """
        error = _squared_norm(self.errors.values(), self.device)
        return error, error + _squared_norm(projections, self.device)

    def to(self, device: torch.device) -> None:
        """Move what a checkpoint needs to a device, as Lightning moves an optimizer's state when a fit ends."""
        self.device = device
        self.loss_scale = self.loss_scale.to(device)

        def move(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(device)

        self.errors = with_tensors(self.errors, move)
        self.factors = with_tensors(self.factors, move)
        self.scales.magnitudes = with_tensors(self.scales.magnitudes, move)
        self.scales.profiles = with_tensors(self.scales.profiles, move)
        self.held_factors, self.scales.of_groups = [], []
        self._waiting = {name: with_tensors(entry, move) for name, entry in self._waiting.items()}

    def _slot_entry(self, slot: Slot, error_feedback: bool) -> dict[str, Any]:
        error = self.errors.get(slot.name) if error_feedback else None
        name = slot.name
        scales = (self.scales.magnitudes.get(name, {}), self.scales.profiles.get(name, {}))
        return make_entry(slot, self.factors[name], *scales, error, self.drawn[name])

    def _waiting_entry(self, entry: Mapping[str, Any], error_feedback: bool) -> dict[str, Any]:
        """Give the entry of a frozen parameter, at the present scale."""
        present = rescaled_entry(entry, float(self.loss_scale) / self._loaded_scale)
        return {key: value for key, value in present.items() if error_feedback or key != "error"}


def _squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) ** 2
    return total
