"""The scaler of a program that scales its loss itself, in manual optimisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn


def find_scaler(module: nn.Module) -> torch.amp.GradScaler | None:
    """Look for an enabled `GradScaler` among the attributes of a module and of its submodules.

    Warns if there are several, since errors can follow but one.

    Args:
        module: the user's.

    Returns:
        The first that was found, or ``None``.
    """
    found = {
        f"{name}.{key}".removeprefix("."): scaler
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        for scaler in _scalers_in(value)
    }
    by_name = {name: scaler for name, scaler in found.items() if scaler.is_enabled()}
    if len({id(scaler) for scaler in by_name.values()}) > 1:
        rank_zero_warn(
            f"The module has several loss scalers: {', '.join(by_name)}. PowerSGD's error buffers follow the scale of"
            f" {next(iter(by_name))!r} alone, and are wrong where a loss is scaled by another. Use one scaler for all"
            " losses, and name it: `PowerSGDStrategy(scaler=...)`."
        )
    return next(iter(by_name.values()), None)


def _scalers_in(value: Any) -> Iterator[torch.amp.GradScaler]:
    """Give what an attribute holds, also in a list, a tuple or a dict."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    yield from (item for item in values if isinstance(item, torch.amp.GradScaler))
