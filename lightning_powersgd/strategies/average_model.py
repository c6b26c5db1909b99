"""The average of the ranks' models, where each rank has one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_powersgd.exchange.agreement import in_common
from lightning_powersgd.exchange.averages import mean_over_ranks
from lightning_powersgd.exchange.replicas import differing


class AverageModel:
    """Lets a rank's module hold the average over all ranks, for good or for a while.

    Args:
        module: this rank's.
        device: of the collectives.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._own: dict[str, Tensor] | None = None
        self._average_buffers: dict[str, Tensor] = {}

    @property
    def is_lent(self) -> bool:
        """Whether the module holds the average for a while."""
        return self._own is not None

    def lend(self) -> None:
        """Let the module hold the average until `take_back`. Every rank must call this."""
        tensors = self._differing()
        own = copies(tensors)
        self._adopt(tensors)
        buffers = {name for name, _ in self._module.named_buffers()}
        self._average_buffers = copies({name: tensors[name] for name in tensors if name in buffers})
        # Only now, since a checkpoint on a signal takes the model for the average from here on.
        self._own = own

    def take_back(self) -> None:
        """Give the module back what was its own, if it holds the average for a while."""
        own = dict(self._own or {})
        # What validation wrote to a buffer, such as the best result so far, stays.
        tensors = tensors_of(self._module)
        for name, average in self._average_buffers.items():
            if name not in tensors or not torch.equal(tensors[name], average):
                own.pop(name, None)
        self.forget()
        assign(self._module, own)

    def forget(self) -> None:
        """Let go of what was the module's own, which then is what it holds now."""
        self._own, self._average_buffers = None, {}

    def keep(self) -> None:
        """Let the module hold the average for good. Every rank must call this."""
        self._adopt(self._differing())

    def own_values(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give the entries of a state dict that hold the average, as this rank's own model has them."""
        tensors = tensors_of(self._module)
        own = {tensors[name].data_ptr(): value for name, value in (self._own or {}).items()}
        return {
            name: own[value.data_ptr()]
            for name, value in state_dict.items()
            if isinstance(value, Tensor) and value.data_ptr() in own
        }

    def average_in(self, states: Mapping[Any, dict[str, Any]], *, writes: bool) -> None:
        """Replace the tensors in dicts, which have names themselves, by their means over the ranks if they differ.

        Args:
            states: dicts by name. Every rank must call this.
            writes: whether this rank needs the means.
        """
        tensors = {
            f"{name}/{key}": (state, key)
            for name, state in states.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and _has_mean(value)
        }
        common = in_common({name: state[key] for name, (state, key) in tensors.items()})
        for name, mean in mean_over_ranks(differing(common, self._device), self._device):
            state, key = tensors[name]
            if writes:
                state[key] = mean.cpu()

    def _differing(self) -> dict[str, Tensor]:
        """Give what there is to average: frozen parameters, for one, are the same on all ranks."""
        tensors = {name: tensor for name, tensor in tensors_of(self._module, once=True).items() if _has_mean(tensor)}
        return differing(in_common(tensors), self._device)

    def _adopt(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in mean_over_ranks(tensors, self._device):
            tensors[name].copy_(mean)


def tensors_of(module: nn.Module, *, once: bool = False) -> dict[str, Tensor]:
    """Give all parameters and buffers by name: one that has two names has both, or the first alone."""
    named = (*module.named_parameters(remove_duplicate=once), *module.named_buffers(remove_duplicate=once))
    return {name: tensor.detach() for name, tensor in named}


def assign(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values to a module's parameters and buffers of these names."""
    tensors = tensors_of(module)
    for name, value in values.items():
        tensors[name].copy_(value)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _has_mean(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
