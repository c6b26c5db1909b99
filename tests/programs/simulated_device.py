"""Steps of the exchange on a device that only records what it is asked to do, as JSON on stdout.

The device is a backend of PyTorch's own kind whose tensors have shapes and no values, so that the exchange takes the
ways that it takes on an accelerator, and whoever asks for a value gets an error. A process can have one such device.

    python tests/programs/simulated_device.py '[{"rank": 4}, {"rank": 4, "alternate": true}]'
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.cuda._sanitizer import EventHandler
from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lightning_powersgd import GradientExchange, PowerSGDConfig, PowerSGDState
from lightning_powersgd.compressor import fused
from lightning_powersgd.compressor.verdict import Verdict
from lightning_powersgd.exchange.lane import Lane

DEVICE = "simulated"
# Of streams and of events, and what finds out whether two streams use the same memory at once.
NUMBERS = count(1)
DETECTOR = EventHandler()
# What hands out memory, or looks at it in another way.
NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}


class Stream:
    """A queue of the device."""

    def __init__(self, device: Any = None) -> None:
        self.number = next(NUMBERS)

    def wait_stream(self, other: Stream) -> None:
        """Come after all that is in another one so far."""
        event = next(NUMBERS)
        DETECTOR._handle_event_record(event, other.number)
        DETECTOR._handle_event_wait(event, self.number)


class Event:
    """An event of the device, which has always happened when somebody asks."""

    def record(self, stream: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class Module(_DummyBackendModule):
    """What PyTorch and the package ask of a device."""

    Event, Stream = Event, Stream

    def __init__(self) -> None:
        super().__init__()
        self.streams = [Stream()]

    def current_stream(self, device: Any = None) -> Stream:
        """Give the stream in use."""
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Use another stream."""
        self.streams.append(stream)
        yield
        self.streams.pop()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Give what autocast can do."""
        return [torch.bfloat16]


def launches_of(name: str, args: Any) -> int:
    """Give the launches that CUDA makes of an operation, as in PyTorch's ``MultiTensorApply.cuh``.

    One works on up to 64 pairs of tensors or 110 single ones, and on up to 320 stretches of 65536 elements.

    That is so for tensors of one dtype and of the same strides. Others are worked on one by one; only copies may change
    the dtype. A norm of several tensors takes a second launch.
    """
    if not name.startswith("_foreach"):
        return 1
    lists = [argument for argument in args if isinstance(argument, (list, tuple)) and isinstance(argument[0], Tensor)]
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors}
    alike = all(len({(one.shape, one.stride()) for one in each}) == 1 for each in zip(*lists, strict=True))
    if not alike or (len(dtypes) > 1 and name != "_foreach_copy_"):
        return len(lists[0])
    chunks = sum(-(-tensor.numel() // 65536) for tensor in lists[0])
    launches = max(math.ceil(len(lists[0]) / {1: 110, 2: 64}[len(lists)]), math.ceil(chunks / 320))
    return launches + (name == "_foreach_norm")


class Recorder(TorchDispatchMode):
    """Counts launches on the device, and copies to and from it, and looks for races between its streams.

    Args:
        module: of the device.

    Attributes:
        launches: by operation.
        copies: by the devices that they go from and to.
        races: operations on memory that another stream may be using.
    """

    def __init__(self, module: Module) -> None:
        super().__init__()
        self._module = module
        # Or other tensors would come to lie where they were.
        self._alive: list[Tensor] = []
        # What the next kernels are told the addresses of, and whether one has been launched since.
        self._told: set[int] = set()
        self._told_before = False
        self.races: list[str] = []
        self.launches: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {}, result)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == DEVICE}
        if DEVICE not in devices or func.namespace != "aten" or func.is_view or name in NO_LAUNCH:
            return result
        self.launches[name] += launches_of(name, args)
        self._look_for_races(func, args, kwargs or {}, result)
        if name in ("copy_", "_to_copy") and len(devices) > 1:
            target = (args[0] if name == "copy_" else result).device.type
            self.copies["to the device" if target == DEVICE else "to the host"] += 1
        return result

    def launch_kernel(self, kernel: str, parts: Tensor, table: Tensor, *others: Any, **constants: Any) -> None:
        """Stand in for `fused.launch`: kernels cannot run here. What they were told the address of, they may write."""
        self.launches[kernel] += 1
        self._told_before = True
        memory = self._told | self._memory((parts, table, others))
        self._detect(set(), memory, kernel)

    def tell_address(self, tensor: Tensor | None) -> int:
        """Stand in for `fused._address`: memory without values has none."""
        if tensor is None:
            return 0
        if self._told_before:
            self._told, self._told_before = set(), False
        (memory,) = self._memory(tensor)
        self._told.add(memory)
        return memory + tensor.storage_offset()

    def _look_for_races(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        written: set[int] = set()
        read: set[int] = set()
        given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            (written if writes else read).update(self._memory(given.get(argument.name)))
        made = self._memory(result) - read
        self._detect(read - written, written | made, str(func), made)

    def _detect(self, read: set[int], written: set[int], name: str, made: set[int] | None = None) -> None:
        stream = self._module.current_stream().number
        found = DETECTOR._handle_kernel_launch(stream, read, written, made or set(), name, defaultdict(list))
        self.races += [name for _ in found]

    def _memory(self, value: Any) -> set[int]:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.device.type == DEVICE]
        self._alive += tensors
        return {tensor.untyped_storage()._cdata for tensor in tensors}


class Scaler:
    """Scales a loss, by what only the device knows."""

    def scale(self, outputs: Tensor) -> Tensor:
        """Multiply by an unknown number."""
        return outputs * torch.empty((), device=DEVICE)


def layers(number: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """The parameters of a transformer, without values."""
    shapes = {"qkv": (384, 128), "out": (128, 128), "up": (512, 128), "down": (128, 512), "norm": (128,)}
    return {
        f"{layer}.{name}": nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE))
        for layer in range(number)
        for name, shape in shapes.items()
    }


def without_value(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Make a tensor whose value nobody knows; otherwise what is computed from it is, and the device cannot."""
    tensor = make(*args, **kwargs)
    tensor.constant = None
    return tensor


@contextmanager
def in_stream_at_once(lane: Lane) -> Iterator[None]:
    """Work in the lane without waiting for what was asked of the device before."""
    with lane._accelerator.stream(lane._stream):
        yield


# What keeps the exchange's stream and that of the backward pass in order.
LEFT_OUT: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "wait": lambda: mock.patch.object(Lane, "_in_stream", in_stream_at_once),
    "join": lambda: mock.patch.object(Lane, "join"),
}


@contextmanager
def kernels_recorded(recorder: Recorder) -> Iterator[None]:
    """Go the way of a device that Triton makes code for, but record launches of kernels instead of making them."""
    with (
        mock.patch.object(fused, "runs_on", return_value=True),
        mock.patch.object(fused, "_works", return_value=True),
        mock.patch.object(fused, "launch", recorder.launch_kernel),
        mock.patch.object(fused, "_address", recorder.tell_address),
    ):
        yield


def taken(recorder: Recorder) -> Counter[str]:
    """Take the launches since the last time."""
    launches = Counter(recorder.launches)
    recorder.launches.clear()
    return launches


def record(
    config: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    group_bytes: int,
    follow: bool,
    scaler: Scaler | None,
    recorder: Recorder,
) -> dict[str, Any]:
    """Take some steps, and give what the last one asked of the device, and the races in all of them."""
    state = PowerSGDState(parameters.items(), PowerSGDConfig(**config), group_bytes)
    exchange = GradientExchange(state, follow_use_of=state.parameters if follow else None, scaler=scaler)
    # Of this exchange alone: memory of others is used anew.
    DETECTOR.__init__()  # type: ignore[misc]
    before_last = 0
    # In the same memory in every step, as in DDP's buckets.
    gradients = {name: torch.empty_like(parameter) for name, parameter in parameters.items()}
    for _ in range(4):
        recorder.copies.clear()
        of_exchange: Counter[str] = Counter()
        with recorder:
            exchange.begin_step()
            of_exchange += taken(recorder)
            for name, parameter in reversed(parameters.items()):
                gradients[name].zero_()  # the backward pass
                recorder.launches.clear()
                exchange.take(parameter, gradients[name])
                of_exchange += taken(recorder)
                before_last = of_exchange.total()
                exchange.advance()
                of_exchange += taken(recorder)
            exchange.end_step()
            of_exchange += taken(recorder)
            for gradient in gradients.values():
                gradient.add_(1)  # the optimizer
            recorder.launches.clear()
    return {
        "matrices": len(list(state.plan.compressed)),
        "groups": len(state.plan.groups),
        "shapes": sum(len(group.stacks("left")) for group in state.plan.groups),
        "launches": dict(of_exchange.most_common()),
        "after the last gradient": of_exchange.total() - before_last,
        "copies": dict(recorder.copies),
        "races": recorder.races,
    }


def main() -> None:
    """Print what each of the settings on the command line asks of the device."""
    module = Module()
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=module)
    dist.Backend.register_backend("simulated_group", _create_fake_pg, extended_api=True, devices=[DEVICE, "cpu"])
    dist.init_process_group("simulated_group", rank=0, world_size=2, store=FakeStore())
    results = []
    # What the host learns when it has long arrived. There are no values here, so it is told that all is well.
    answered = mock.patch.object(Verdict, "tolist", lambda self: [True] * self._answers.numel())
    no_constants = mock.patch.object(torch, "tensor", partial(without_value, torch.tensor))
    with FakeTensorMode(), answered, no_constants:
        for settings in json.loads(sys.argv[1]):
            parameters = layers(settings.pop("layers", 6), getattr(torch, settings.pop("dtype", "float32")))
            follow, group_bytes = settings.pop("follow", False), settings.pop("group_bytes", 2**40)
            scaler = Scaler() if settings.pop("scaler", False) else None
            without = LEFT_OUT[settings.pop("left_out", "nothing")]
            recorder = Recorder(module)
            with_kernels = kernels_recorded(recorder) if settings.pop("triton", False) else nullcontext()
            config = {"min_compression_ratio": 1.0, **settings}
            with without(), with_kernels:
                result = record(config, parameters, group_bytes, follow, scaler, recorder)
            results.append(result)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
