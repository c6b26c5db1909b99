"""What is saved of a state, parameter by parameter, and how it is read again.

The entry of a compressed parameter:

| key | what | shape |
|---|---|---|
| ``shape``, ``rank`` | of the parameter, and of its factors | |
| ``split`` | how many dimensions make the rows of its matrix; 1 if it is missing | |
| ``factors`` | by side, with columns in the order of the parameter's indices (not of its memory) | (r, n), (r, m) |
| ``magnitudes`` | by side, if factors travel in float16 or as integers | (r, 1) |
| ``profiles`` | by side, if factors travel as integers; columns as in ``factors`` | (1, n), (1, m) |
| ``drawn`` | sides of factors that hold a row as it was drawn, of alternating steps; none if it is missing | |
| ``error`` | the error buffer, if it is kept | the parameter's |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSet
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_powersgd.compressor.codec import saturated
from lightning_powersgd.compressor.config import AUTO, PowerSGDConfig
from lightning_powersgd.compressor.plan import SIDES, Side, Slot
from lightning_powersgd.compressor.trial import defects_of
from lightning_powersgd.compressor.view import permute_columns

FORMAT_VERSION = 1


def make_entry(
    slot: Slot,
    factors: Mapping[Side, Tensor],
    magnitudes: Mapping[Side, Tensor],
    profiles: Mapping[Side, Tensor],
    error: Tensor | None,
    drawn: Iterable[Side],
) -> dict[str, Any]:
    """Give the entry of a compressed parameter. Its tensors are copies."""
    entry: dict[str, Any] = {"shape": list(slot.shape), "rank": slot.rank, "factors": _in_shape_order(slot, factors)}
    if slot.split != 1:
        entry["split"] = slot.split
    if len(factors) > 1:
        entry["drawn"] = sorted(drawn)
    if magnitudes:
        entry["magnitudes"] = {side: magnitude.clone() for side, magnitude in magnitudes.items()}
    if profiles:
        entry["profiles"] = _in_shape_order(slot, profiles)
    if error is not None:
        entry["error"] = error.clone()
    return entry


def _in_shape_order(slot: Slot, by_side: Mapping[Side, Tensor]) -> dict[Side, Tensor]:
    """Copy what has a column for each row and column of the matrix, in the order of the parameter's indices."""
    copied = {side: tensor.clone() for side, tensor in by_side.items()}
    copied["right"] = permute_columns(copied["right"], slot.shape, slot.order, to_shape_order=True)
    return copied


def load_entry(
    slot: Slot,
    saved: Mapping[str, Any] | None,
    factors: Mapping[Side, Tensor],
    magnitudes: Mapping[Side, Tensor],
    profiles: Mapping[Side, Tensor],
    error: Tensor | None,
    drawn: MutableSet[Side],
    held: Side,
) -> list[str]:
    """Write a saved entry, or as much of it as fits, over a parameter's factors, magnitudes and error buffer.

    Args:
        slot: of the parameter.
        saved: the entry; ``None`` if there is none.
        factors: by side.
        magnitudes: by side; empty if factors travel without gains.
        profiles: by side; empty if factors do not travel as integers.
        error: the error buffer; ``None`` without error feedback.
        drawn: the sides of factors that hold a row as it was drawn; changed in place.
        held: the side that the next step starts from.

    Returns:
        What did not fit, or was missing: one line each.
    """
    if error is not None:
        error.zero_()
    if saved is None:
        return [f"{slot.name}: nothing saved, starts with an empty error buffer"]
    dropped = []
    same_matrix = saved.get("split", 1) == slot.split
    for side, factor in factors.items():
        found = saved["factors"].get(side) if same_matrix else None
        if found is not None and found.shape == factor.shape:
            if side == "right":
                found = permute_columns(found, slot.shape, slot.order, to_shape_order=False)
            factor.copy_(found)
            if side in saved.get("drawn", []):
                drawn.add(side)
            else:
                drawn.discard(side)
        elif side == held:
            shape = None if found is None else tuple(found.shape)
            dropped.append(f"{slot.name}: {side} factor of shape {shape} where {tuple(factor.shape)} is needed")
    for side, magnitude in magnitudes.items():
        found = saved.get("magnitudes", {}).get(side) if same_matrix else None
        if found is not None and found.shape == magnitude.shape:
            magnitude.copy_(found)
        else:
            magnitude.fill_(slot.format(side).first_magnitude)
    for side, profile in profiles.items():
        found = saved.get("profiles", {}).get(side) if same_matrix else None
        if found is None:
            profile.zero_()
            # Without a profile the magnitude is of no use either.
            magnitudes[side].zero_()
        elif side == "right":
            profile.copy_(permute_columns(found, slot.shape, slot.order, to_shape_order=False))
        else:
            profile.copy_(found)
    if error is None and "error" in saved:
        dropped.append(f"{slot.name}: an error buffer was saved, but `error_feedback` is off")
    if error is not None:
        if "error" in saved:
            saturated(error.copy_(saved["error"]), error.dtype)
        else:
            dropped.append(f"{slot.name}: no error buffer saved")
    return dropped


def as_saved(config: PowerSGDConfig, settings: Mapping[str, Any]) -> PowerSGDConfig:
    """Give settings with the ranks of a saved run, where they leave these to the length of the training.

    Args:
        config: of this run.
        settings: saved, from `PowerSGDConfig.to_dict`.
    """
    if not config.automatic or config.turnaround is not None or config.max_bytes is not None:
        return config
    if config.rank == AUTO:
        config = replace(config, rank=settings["rank"])
    if not config.automatic:
        return config
    return replace(config, turnaround=settings.get("turnaround"), max_bytes=settings.get("max_bytes"))


def rescaled_entry(entry: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Give an entry as it is at another loss scale: errors and magnitudes times the ratio of that to the old one."""
    return with_tensors(
        entry,
        lambda key, tensor: (
            saturated(tensor * ratio, tensor.dtype) if key in ("error", "magnitudes") else tensor.clone()
        ),
    )


def with_tensors(entry: Mapping[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """Change the tensors of a mapping, by key; those of both sides go by the same one."""
    changed = dict(entry)
    for key, value in entry.items():
        if isinstance(value, Tensor):
            changed[key] = change(key, value)
        elif isinstance(value, Mapping):
            changed[key] = {side: change(key, tensor) for side, tensor in value.items()}
    return changed


def require_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Check that a parameter has the shape with which it was saved.

    Raises:
        ValueError: if it has not.
    """
    if found != shape:
        raise ValueError(
            f"The PowerSGD state was saved for {name!r} of shape {found}, but the model's has shape {shape}."
            " Resume with the model that was saved, or delete the checkpoint's 'powersgd' entry."
        )


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
    settings = state.get("settings", {})
    try:
        PowerSGDConfig(settings["rank"], settings.get("turnaround"), settings.get("max_bytes"))
    except (AttributeError, KeyError, TypeError, ValueError):
        yield f"'settings' is {settings!r:.40}"
    whole, trial = state.get("whole", []), state.get("trial")
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        yield f"'whole' is {whole!r:.40}"
    for defect in [] if trial is None else defects_of(trial):
        yield f"{defect} of the 'trial'"
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
    split = entry.get("split", 1)
    if not isinstance(split, int) or not 0 < split < len(shape):
        yield f"{split!r:.40} is the 'split'"
    drawn = entry.get("drawn", [])
    if not isinstance(drawn, list) or not all(side in SIDES for side in drawn):
        yield f"{drawn!r:.40} are the 'drawn'"
    rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
    if not isinstance(rank, int) or not 0 < rank <= min(rows, columns):
        yield f"{rank!r:.40} is the 'rank'"
    if not isinstance(factors, Mapping) or not set(factors) <= set(SIDES):
        yield f"{factors!r:.40} are the 'factors'"
    magnitudes, profiles = entry.get("magnitudes", {}), entry.get("profiles", {})
    for key, by_side in (("magnitudes", magnitudes), ("profiles", profiles)):
        if not isinstance(by_side, Mapping):
            yield f"{by_side!r:.40} are the {key!r}"
    lengths = {"left": rows, "right": columns}
    expected = [(f"{side} factor", factor, (rank, lengths[side])) for side, factor in factors.items()]
    expected += [(f"{side} magnitudes", magnitude, (rank, 1)) for side, magnitude in magnitudes.items()]
    expected += [(f"{side} profile", profile, (1, lengths[side])) for side, profile in profiles.items()]
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
