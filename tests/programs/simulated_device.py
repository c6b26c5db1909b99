"""Steps of the exchange on a device that only records what it is asked to do, as JSON on stdout.

The device is a backend of PyTorch's own kind whose tensors have shapes and no values, so that the exchange takes the
ways that it takes on an accelerator, and whoever asks for a value gets an error. A process can have one such device.

    python tests/programs/simulated_device.py '[{"rank": 4}, {"rank": 4, "alternate": true}]'
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lightning_powersgd import GradientExchange, PowerSGDConfig, PowerSGDState
from lightning_powersgd.compressor.verdict import Verdict

DEVICE = "simulated"
# What hands out memory, or looks at it in another way.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}


class Event:
    """An event of the device, which has always happened."""

    def record(self, stream: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class Module(_DummyBackendModule):
    """What PyTorch asks of a device."""

    Event = Event

    def current_stream(self, device: Any = None) -> None:
        """Give the only stream."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Give what autocast can do."""
        return [torch.bfloat16]


class Recorder(TorchDispatchMode):
    """Counts launches on the device, and copies to and from it.

    Attributes:
        launches: by operation.
        copies: by the devices that they go from and to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {}, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == DEVICE}
        if DEVICE not in devices or func.namespace != "aten" or func.is_view or name in NO_LAUNCH:
            return result
        self.launches[name] += 1
        if name in ("copy_", "_to_copy") and len(devices) > 1:
            target = (args[0] if name == "copy_" else result).device.type
            self.copies["to the device" if target == DEVICE else "to the host"] += 1
        return result


class Scaler:
    """Scales a loss, by what only the device knows."""

    def scale(self, outputs: Tensor) -> Tensor:
        """Multiply by an unknown number."""
        return outputs * torch.empty((), device=DEVICE)


def layers(count: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The parameters of a transformer, without values."""
    shapes = {"qkv": (384, 128), "out": (128, 128), "up": (512, 128), "down": (128, 512), "norm": (128,)}
    return {
        f"{layer}.{name}": nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE))
        for layer in range(count)
        for name, shape in shapes.items()
    }


def without_value(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a tensor whose value nobody knows; otherwise what is computed from it is, and the device cannot."""
    tensor = make(*args, **kwargs)
    tensor.constant = None
    return tensor


def record(
    config: dict[str, Any], dtype: torch.dtype, group_bytes: int, follow: bool, scaler: Scaler | None
) -> dict[str, Any]:
    """Take some steps, and give what the last one asked of the device."""
    parameters = layers(6, dtype)
    state = PowerSGDState(parameters.items(), PowerSGDConfig(**config), group_bytes)
    exchange = GradientExchange(state, follow_use_of=state.parameters if follow else None, scaler=scaler)
    recorder = Recorder()
    before_last = 0
    for _ in range(4):
        recorder.launches.clear()
        recorder.copies.clear()
        gradients = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}
        with recorder:
            exchange.begin_step()
            for name, parameter in reversed(parameters.items()):
                exchange.take(parameter, gradients[name])
                before_last = recorder.launches.total()
                exchange.advance()
            exchange.end_step()
    return {
        "matrices": len(list(state.plan.compressed)),
        "groups": len(state.plan.groups),
        "shapes": sum(len(group.stacks("left")) for group in state.plan.groups),
        "launches": dict(recorder.launches.most_common()),
        "after the last gradient": recorder.launches.total() - before_last,
        "copies": dict(recorder.copies),
    }


def main() -> None:
    """Print what each of the settings on the command line asks of the device."""
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())
    dist.Backend.register_backend("simulated_group", _create_fake_pg, extended_api=True, devices=[DEVICE, "cpu"])
    dist.init_process_group("simulated_group", rank=0, world_size=2, store=FakeStore())
    results = []
    # What the host learns when it has long arrived. There are no values here, so it is told that all is well.
    answered = mock.patch.object(Verdict, "tolist", lambda self: [True] * self._answers.numel())
    no_constants = mock.patch.object(torch, "tensor", partial(without_value, torch.tensor))
    with FakeTensorMode(), answered, no_constants:
        for settings in json.loads(sys.argv[1]):
            dtype = getattr(torch, settings.pop("dtype", "float32"))
            follow, group_bytes = settings.pop("follow", False), settings.pop("group_bytes", 2**40)
            scaler = Scaler() if settings.pop("scaler", False) else None
            results.append(record({"min_compression_ratio": 1.0, **settings}, dtype, group_bytes, follow, scaler))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
