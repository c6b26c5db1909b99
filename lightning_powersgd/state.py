"""What the compressor remembers between steps, keyed by parameter name.

| what | shape | dtype | owner |
|---|---|---|---|
| error buffer | the parameter's | ``error_dtype`` | local to the rank; only the mean over ranks affects training |
| left factor P, right factor Q | (r, n), (r, m) | the payload's | the same on all ranks |
| magnitudes of the rows of both, for a float16 payload | (r, 1) | float32 | the same on all ranks |
| loss scale that errors and magnitudes refer to | scalar | float32 | the same on all ranks |
| step, byte counts | numbers | | the same on all ranks |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_powersgd.linalg import assign, normalize_rows, permute_columns, random_factor, saturated
from lightning_powersgd.plan import (
    DEFAULT_GROUP_BYTES,
    SIDES,
    Plan,
    PowerSGDConfig,
    Side,
    Slot,
    make_plan,
    parameter_name,
)

FORMAT_VERSION = 1


class SupportsBool(Protocol):
    """What is true or false: also an answer that is still on its way."""

    def __bool__(self) -> bool:
        """Give the answer."""


# What the factors of the first step are taken for, when they travel in float16: at 2^4 they go as they are.
_FIRST_MAGNITUDE = 2.0**4


class PowerSGDState:
    """Error buffers, factors and step of one model.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them, already on their device.
        config: the settings.
        group_bytes: gradient bytes after which a group of parameters that travel together is closed.

    Attributes:
        config: the settings.
        plan: which parameter is compressed, and how.
        parameters: the trainable parameters by name.
        errors: error buffers by name; empty without error feedback.
        factors: by name, the factors held for the next step, by side.
        magnitudes: by name and side, the largest magnitude in each row of the last averaged factor, (r, 1); only of
            factors that travel in float16.
        loss_scale: that the gradients were multiplied by from which errors and magnitudes came, a scalar.
        averaged: whether the error buffers are the mean over ranks already, and so alike on all of them.
        step: synchronised backward passes so far.
        dense_bytes: gradient bytes of the last step, as plain all-reduce would have sent them.
        sent_bytes: bytes handed to collectives for gradients in the last step.
        total_dense_bytes: ``dense_bytes``, added up over all steps.
        total_sent_bytes: ``sent_bytes``, added up over all steps.

    Raises:
        ValueError: if the parameters lie on several devices or on none, or a pattern of the rank matches nothing.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: PowerSGDConfig,
        group_bytes: int = DEFAULT_GROUP_BYTES,
    ) -> None:
        named = list(named_parameters)
        self.config = config
        self.plan: Plan = make_plan(named, config, group_bytes)
        self.parameters = {parameter_name(name): parameter for name, parameter in named if parameter.requires_grad}
        self._frozen = {
            parameter_name(name): tuple(parameter.shape) for name, parameter in named if not parameter.requires_grad
        }
        # What was loaded for frozen parameters: entries of a state by name, at this scale.
        self._waiting: dict[str, Mapping[str, Any]] = {}
        self._waiting_scale = 1.0
        self.device = common_device(self.parameters)
        self.step = 0
        self.averaged = True
        self._held: Side = "right"
        self._kept: SupportsBool | None = None
        self.dense_bytes = 0
        self.sent_bytes = 0
        self.total_dense_bytes = 0
        self.total_sent_bytes = 0
        self.errors: dict[str, Tensor] = {}
        self.factors: dict[str, dict[Side, Tensor]] = {}
        self.magnitudes: dict[str, dict[Side, Tensor]] = {}
        self.loss_scale = torch.ones((), device=self.device)
        for group in self.plan.groups:
            for slot in group.compressed:
                if config.error_feedback:
                    parameter = self.parameters[slot.name]
                    self.errors[slot.name] = torch.zeros_like(parameter, dtype=config.error_dtype, requires_grad=False)
                self.factors[slot.name] = {
                    side: self.first_factor(slot, side).to(self.device, group.dtype)
                    for side in (SIDES if config.alternate else SIDES[1:])
                }
                if group.dtype == torch.float16:
                    self.magnitudes[slot.name] = {
                        side: torch.full((slot.rank, 1), _FIRST_MAGNITUDE, device=self.device) for side in SIDES
                    }

    @property
    def compressing(self) -> bool:
        """Whether the next synchronised backward pass is compressed."""
        return self.step >= self.config.start_step

    def first_factor(self, slot: Slot, side: Side) -> Tensor:
        """Draw a random factor on the CPU from the seed and the parameter's name (and, without warm start, the step).

        So it does not depend on the device, the rank, the bucket or the order of parameters.

        Returns:
            (r, n) for the left side, (r, m) for the right, float32.
        """
        draw = f"{self.config.seed}/{slot.name}/{side}" + ("" if self.config.warm_start else f"/{self.step}")
        return random_factor(draw, slot.rank, slot.length(side))

    def start_factor(self, slot: Slot) -> Tensor:
        """Give the factor that this step starts from: the last step's, or without warm start a new random one."""
        held = self.factors[slot.name][self.held]
        return held if self.config.warm_start else held.copy_(self.first_factor(slot, self.held))

    def keep_factor(self, name: str, side: Side, factor: Tensor, keep: bool | Tensor = True) -> None:
        """Keep an averaged factor as the next warm start, if it is to be one, and the magnitudes of its rows.

        Args:
            name: of the parameter.
            side: of the factor.
            factor: (r, n) or (r, m).
            keep: as in `assign`.
        """
        if side in self.factors[name]:
            kept = self.factors[name][side]
            assign(kept, normalize_rows(factor, fallback=kept), keep)
        if name in self.magnitudes:
            magnitude = self.magnitudes[name][side]
            largest = factor.abs().amax(dim=1, keepdim=True)
            assign(magnitude, torch.where(largest > 0, largest, magnitude), keep)

    def rescale(self, name: str, ratio: Tensor) -> None:
        """Let what a parameter has kept refer to another loss scale.

        Args:
            name: of the parameter.
            ratio: of the new scale to the old one, a scalar.
        """
        if name in self.errors:
            saturated(self.errors[name].mul_(ratio), self.errors[name].dtype)
        for magnitude in self.magnitudes.get(name, {}).values():
            magnitude.mul_(ratio)

    def matrix_dtype(self, slot: Slot) -> torch.dtype:
        """Give the dtype in which M = g + e is computed: the wider of the gradient's and the error buffer's.

        But never float16, whose range a product with a factor leaves at gradients of a few hundreds.
        """
        error = self.errors.get(slot.name)
        dtype = slot.dtype if error is None else torch.promote_types(slot.dtype, error.dtype)
        return torch.float32 if dtype == torch.float16 else dtype

    def finish_step(self) -> None:
        """Count a synchronised backward pass."""
        self.step += 1
        self.total_dense_bytes += self.dense_bytes
        self.total_sent_bytes += self.sent_bytes

    @property
    def held(self) -> Side:
        """The side of the factors that the next step starts from; always "right" unless alternating."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            if kept:
                self._held = other_side(self._held)
        return self._held

    @held.setter
    def held(self, side: Side) -> None:
        self._held, self._kept = side, None

    def keep_step(self, kept: SupportsBool) -> None:
        """Note whether a compressed step's errors and factors were kept.

        Args:
            kept: true or false; not asked before the next step, and only if that depends on it.
        """
        if kept is not False:  # or not yet known
            self.averaged = False
        if self.config.alternate:
            self._kept = kept

    def state_dict(self, *, error_feedback: bool = True) -> dict[str, Any]:
        """Give the state as tensors, numbers and strings, by parameter name: loadable with ``weights_only=True``.

        The error buffers are this rank's. Average them first (`average_errors`) for a checkpoint that any rank, at any
        world size, can resume from.

        Args:
            error_feedback: whether to include the error buffers.
        """
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
                **{name: self._waiting_state(entry, error_feedback) for name, entry in self._waiting.items()},
                **{slot.name: self._slot_state(slot, error_feedback) for slot in self.plan.compressed},
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over what `state_dict` gave, or nothing at all if that cannot be.

        A buffer whose parameter is still there in its shape is taken over, also under another rank or pattern; a factor
        also needs its rank and side.

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
            found = tuple(saved[name]["shape"]) if name in saved else shape
            if found != shape:
                raise ValueError(
                    f"The PowerSGD state was saved for {name!r} of shape {found}, but the model's has shape {shape}."
                    " Resume with the model that was saved, or delete the checkpoint's 'powersgd' entry."
                )
        self.step = state["step"]
        self.averaged = state["averaged"]
        self.total_dense_bytes = state["total_dense_bytes"]
        self.total_sent_bytes = state["total_sent_bytes"]
        self.held = state["held"] if self.config.alternate else "right"
        # What is frozen now may be unfrozen later, and then finds here what it had.
        self._waiting = {name: entry for name, entry in saved.items() if name in self._frozen}
        self._waiting_scale = state.get("loss_scale", 1.0)
        self.loss_scale.fill_(self._waiting_scale)
        dropped = [
            f"{name}: no longer {'compressed' if name in self.parameters else 'in the model'}"
            for name in saved
            if name not in self.factors and name not in self._waiting
        ]
        for slot in self.plan.compressed:
            dropped += self._load_slot(slot, saved.get(slot.name))
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
        """Move the buffers to a device, as Lightning moves an optimizer's state when a fit ends."""
        self.device = device
        self.loss_scale = self.loss_scale.to(device)

        def move(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(device)

        self.errors = _with_tensors(self.errors, move)
        self.factors = _with_tensors(self.factors, move)
        self.magnitudes = _with_tensors(self.magnitudes, move)
        self._waiting = {name: _with_tensors(entry, move) for name, entry in self._waiting.items()}

    def _slot_state(self, slot: Slot, error_feedback: bool) -> dict[str, Any]:
        factors = {side: factor.clone() for side, factor in self.factors[slot.name].items()}
        factors["right"] = permute_columns(factors["right"], slot.shape, slot.order, to_shape_order=True)
        entry: dict[str, Any] = {"shape": list(slot.shape), "rank": slot.rank, "factors": factors}
        if slot.name in self.magnitudes:
            entry["magnitudes"] = {side: magnitude.clone() for side, magnitude in self.magnitudes[slot.name].items()}
        if error_feedback and self.errors:
            entry["error"] = self.errors[slot.name]
        return entry

    def _waiting_state(self, entry: Mapping[str, Any], error_feedback: bool) -> dict[str, Any]:
        """Give the entry of a frozen parameter, at the present scale."""
        ratio = float(self.loss_scale) / self._waiting_scale
        present = _with_tensors(
            entry, lambda key, tensor: tensor if key == "factors" else saturated(tensor * ratio, tensor.dtype)
        )
        return {key: value for key, value in present.items() if error_feedback or key != "error"}

    def _load_slot(self, slot: Slot, saved: Mapping[str, Any] | None) -> list[str]:
        error = self.errors.get(slot.name)
        if error is not None:
            error.zero_()
        if saved is None:
            return [f"{slot.name}: nothing saved, starts with an empty error buffer"]
        dropped = []
        for side, factor in self.factors[slot.name].items():
            found = saved["factors"].get(side)
            if found is not None and found.shape == factor.shape:
                if side == "right":
                    found = permute_columns(found, slot.shape, slot.order, to_shape_order=False)
                factor.copy_(found)
            elif side == self.held:
                shape = None if found is None else tuple(found.shape)
                dropped.append(f"{slot.name}: {side} factor of shape {shape} where {tuple(factor.shape)} is needed")
        for side, magnitude in self.magnitudes.get(slot.name, {}).items():
            found = saved.get("magnitudes", {}).get(side)
            fits = found is not None and found.shape == magnitude.shape
            magnitude.copy_(found if fits else torch.full_like(magnitude, _FIRST_MAGNITUDE))
        if error is None and "error" in saved:
            dropped.append(f"{slot.name}: an error buffer was saved, but `error_feedback` is off")
        if error is not None:
            if "error" in saved:
                saturated(error.copy_(saved["error"]), error.dtype)
            else:
                dropped.append(f"{slot.name}: no error buffer saved")
        return dropped


def _with_tensors(entry: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Change the tensors of a mapping, by key; those of both sides go by the same one."""
    changed = dict(entry)
    for key, value in entry.items():
        if isinstance(value, Tensor):
            changed[key] = change(key, value)
        elif isinstance(value, Mapping):
            changed[key] = {side: change(key, tensor) for side, tensor in value.items()}
    return changed


def require_readable(state: Mapping[str, Any]) -> None:
    """Check that a state is one that this version of the package, or one that it can read, has written.

    Raises:
        ValueError: if the format is unknown, or what is in it is not what belongs there.
    """
    version = state.get("format_version") if hasattr(state, "get") else None
    if not isinstance(version, int) or version != FORMAT_VERSION:
        raise ValueError(
            f"The PowerSGD state has format version {version!r}; this version of lightning-powersgd reads"
            f" {FORMAT_VERSION}. Use the version that wrote the checkpoint, or delete its 'powersgd' entry to start"
            " with empty error buffers."
        )
    for defect in _defects(state):
        raise ValueError(
            f"The PowerSGD state is damaged: {defect}. Resume from another checkpoint, or delete this one's 'powersgd'"
            " entry to start with empty error buffers."
        )


def _defects(state: Mapping[str, Any]) -> Iterator[str]:
    for key in ("step", "total_dense_bytes", "total_sent_bytes"):
        if type(state.get(key)) is not int or state[key] < 0:
            yield f"{key!r} is {state.get(key)!r:.40}"
    for key, kind in {"averaged": bool, "parameters": Mapping}.items():
        if not isinstance(state.get(key), kind):
            yield f"{key!r} is {state.get(key)!r:.40}"
    if state.get("held") not in SIDES:
        yield f"'held' is {state.get('held')!r:.40}"
    loss_scale, range_ = state.get("loss_scale", 1.0), torch.finfo(torch.float32)
    if not isinstance(loss_scale, float) or not range_.tiny <= loss_scale <= range_.max:
        yield f"'loss_scale' is {loss_scale!r:.40}"
    for name, entry in state["parameters"].items():
        for defect in _slot_defects(entry):
            yield f"{defect} of {name!r}"


def _slot_defects(entry: Any) -> Iterator[str]:
    if not isinstance(entry, Mapping):
        yield f"{entry!r:.40} is the entry"
    shape, rank, factors = entry.get("shape"), entry.get("rank"), entry.get("factors")
    if not isinstance(shape, list) or len(shape) < 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        yield f"{shape!r:.40} is the 'shape'"
    if not isinstance(rank, int) or not 0 < rank <= min(shape[0], math.prod(shape[1:])):
        yield f"{rank!r:.40} is the 'rank'"
    if not isinstance(factors, Mapping) or not set(factors) <= set(SIDES):
        yield f"{factors!r:.40} are the 'factors'"
    magnitudes = entry.get("magnitudes", {})
    if not isinstance(magnitudes, Mapping):
        yield f"{magnitudes!r:.40} are the 'magnitudes'"
    lengths = {"left": shape[0], "right": math.prod(shape[1:])}
    expected = [(f"{side} factor", factor, (rank, lengths[side])) for side, factor in factors.items()]
    expected += [(f"{side} magnitudes", magnitude, (rank, 1)) for side, magnitude in magnitudes.items()]
    if "error" in entry:
        expected.append(("'error'", entry["error"], tuple(shape)))
    for what, tensor, size in expected:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            yield f"{tensor!r:.40} is the {what}"
        if tensor.is_meta or tensor.layout != torch.strided:
            yield f"a tensor without values or with few of them is the {what}"
        if tuple(tensor.shape) != size:
            yield f"{tuple(tensor.shape)} where {size} belongs is the shape of the {what}"
        if not tensor.float().isfinite().all():
            yield f"a value that is not finite, or not in float32, is in the {what}"


def other_side(side: Side) -> Side:
    """Give the other side of a factorisation."""
    return "left" if side == "right" else "right"


def _squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for tensor in tensors:
        total += torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) ** 2
    return total


def require_values(named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that no parameter is on the meta device.

    Raises:
        ValueError: naming the first that is.
    """
    for name, parameter in named_parameters:
        if parameter.is_meta:
            raise ValueError(
                f"The parameter {name!r} is on the meta device and has no values. Materialise the model before"
                " training, for instance in `configure_model`."
            )


def common_device(parameters: Mapping[str, Tensor]) -> torch.device:
    """Find the device that all parameters lie on; the CPU if there are none.

    Raises:
        ValueError: if they lie on several, or on the meta device.
    """
    require_values(parameters.items())
    devices: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        devices.setdefault(parameter.device, name)
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"The parameters lie on several devices: {places}. Move the whole model to one device.")
    return next(iter(devices), torch.device("cpu"))
