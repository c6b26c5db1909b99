"""The named parameters of what a user has: a module, or a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Buffers that a state dict holds beside the parameters, by the last part of their names: those of normalisation layers.
_STATISTICS = ("running_mean", "running_var")


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
