"""Parameters as the compressor knows them: their names, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def parameter_name(name: str) -> str:
    """Strip the prefixes that `torch.compile` adds, so that state fits a module compiled or not."""
    return name.replace("_orig_mod.", "")


def block_name(name: str, rows: slice) -> str:
    """Name some rows of a parameter."""
    return f"{name}[{rows.start}:{rows.stop}]"


def whole_name(name: str) -> str:
    """Give the name of a parameter, of which it may be that of some rows."""
    return re.sub(r"\[\d+:\d+\]$", "", name)


def require_values(named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that no parameter is on the meta device, or without a shape yet.

    Raises:
        ValueError: naming the first that is.
    """
    for name, parameter in named_parameters:
        if is_lazy(parameter):
            raise ValueError(
                f"The parameter {name!r} belongs to a lazy module and has no shape yet. Run a batch through the model"
                " before training, for instance in `configure_model`."
            )
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
