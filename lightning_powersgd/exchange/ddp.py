"""DDP as a source of gradients: its communication hook, buckets and futures."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.hierarchy import Gathering, OwnedExchange
from lightning_powersgd.exchange.loss_scale import Scaler

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
else:
    GradBucket = dist.GradBucket


def attach_powersgd(
    ddp: DistributedDataParallel,
    config: PowerSGDConfig,
    scaler: Scaler | None = None,
    *,
    guard_layouts: bool = True,
    devices: int | None = None,
) -> GradientExchange:
    """Make a DDP module exchange its gradients with PowerSGD. Works without Lightning.

    Args:
        ddp: the module; it must not have a communication hook yet.
        config: the settings.
        scaler: what the loss is scaled with, if it is: error buffers must follow its scale.
        guard_layouts: raise an error in the first step in which a compressed parameter has another dtype or layout in
            memory than now. Without it, the caller makes a new `DistributedDataParallel` before the step after.
        devices: give the number of ranks on each machine to average exactly inside machines and compressed between
            them (see `hierarchy`). Ranks must be numbered machine by machine. ``None``: all ranks average compressed.

    Returns:
        The exchange; its ``state`` is what a checkpoint needs.

    Raises:
        ValueError: if the parameters do not fit the settings (see `PowerSGDState`), or the model has sparse gradients.
        RuntimeError: if the module does not accept the hook.
    """
    if getattr(ddp, "_use_python_reducer", False):
        raise ValueError(
            "`torch._dynamo.config.optimize_ddp` asks for DDP's Python reducer, which calls no communication hook as"
            " PowerSGD needs it. Set it to True before DDP is made, which is its default."
        )
    for name, module in ddp.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            raise ValueError(
                f"The embedding {name!r} has `sparse=True`, and PowerSGD needs dense gradients. Use `sparse=False`."
            )
    named = [item for item in ddp.module.named_parameters() if item[0] not in ddp.parameters_to_ignore]
    looks_for_unused = ddp.find_unused_parameters and not ddp.static_graph
    buckets: DDPBuckets
    if devices is not None:
        if looks_for_unused:
            raise ValueError(
                "`find_unused_parameters=True` is not possible where machines average inside first: which parameters a"
                " machine uses is not followed. Leave it out, or `hierarchical`."
            )
        owned = OwnedExchange(named, config, ddp.bucket_bytes_cap, scaler, devices)
        buckets = HierarchicalBuckets(owned, guard_layouts)
    else:
        state = PowerSGDState(named, config, group_bytes=ddp.bucket_bytes_cap)
        followed = state.parameters if looks_for_unused else None
        buckets = DDPBuckets(
            GradientExchange(state, ddp.process_group, follow_use_of=followed, scaler=scaler), guard_layouts
        )
    exchange = buckets.exchange
    ddp.register_comm_hook(buckets, powersgd_hook)
    held = ddp._get_ddp_logging_data().get("comm_hook")  # type: ignore[no-untyped-call]
    if held != powersgd_hook.__qualname__:
        raise RuntimeError(
            f"DistributedDataParallel holds the communication hook {held!r} instead of PowerSGD's; gradients would"
            " not be compressed. Remove the other hook."
        )
    return exchange


class DDPBuckets:
    """Hands the gradients in DDP's buckets to an exchange, and gives DDP its futures.

    Args:
        exchange: of the module's gradients.
        guard_layouts: as in `attach_powersgd`.

    Attributes:
        exchange: of the module's gradients.
    """

    def __init__(self, exchange: GradientExchange, guard_layouts: bool = True) -> None:
        self.exchange = exchange
        self._guard_layouts = guard_layouts
        self._names = {parameter: name for name, parameter in exchange.parameters.items()}
        self._layouts = {parameter: _layout(parameter) for parameter in self._names}
        self._futures: list[tuple[Future[Tensor], Tensor]] = []

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Take one bucket; the future will hold it with averaged gradients, in place, when the last one has come.

        Raises:
            RuntimeError: if the bucket holds a parameter that the exchange does not know, or one whose dtype or layout
                in memory is no longer that to which PowerSGD was attached.
        """
        if bucket.index() == 0:
            self._futures = []
            self.exchange.begin_step()
        self.take(bucket)
        device = bucket.buffer().device
        future: Future[Tensor] = Future(devices=None if device.type == "cpu" else [device])
        self._futures.append((future, bucket.buffer()))
        if bucket.is_last():
            self.end_step()
            futures, self._futures = self._futures, []
            for waiting, buffer in futures:
                waiting.set_result(buffer)
        return future

    def take(self, bucket: GradBucket) -> None:
        """Hand the gradients of a bucket over."""
        if self.exchange.compressing:
            for parameter, gradient in zip(bucket.parameters(), _gradients(bucket), strict=True):
                self.exchange.take(parameter, self.as_laid_out(parameter, gradient))
            self.exchange.advance()
        else:
            if self.exchange.sends_errors:
                for parameter, gradient in zip(bucket.parameters(), _gradients(bucket), strict=True):
                    self.exchange.add_error(parameter, self.as_laid_out(parameter, gradient))
            self.exchange.average(bucket.buffer())

    def end_step(self) -> None:
        """Let all gradients that were handed over become averages."""
        self.exchange.end_step()

    def as_laid_out(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """View a gradient in DDP's bucket as it lies in memory there.

        DDP lays it out as its parameter was (`channels_last`, say), but shows it contiguous.
        """
        if not self.exchange.compresses(parameter):
            return gradient
        dtype, strides = self._layouts[parameter]
        if self._guard_layouts and (dtype, strides) != _layout(parameter):
            raise RuntimeError(
                f"The parameter {self._names[parameter]!r} has another dtype or layout in memory than when PowerSGD was"
                " attached. Make a new DistributedDataParallel and attach PowerSGD to it; the state's `state_dict`"
                " carries over what it remembers."
            )
        return gradient.as_strided(parameter.shape, strides)


class HierarchicalBuckets(DDPBuckets):
    """Averages the gradients in DDP's buckets inside a machine, and hands each to its owner there.

    Of a bucket each owner receives its own gradients in one collective, while the bucket before is handed over. When
    the step has ended, every owner sends what was averaged to the other ranks of its machine: factors of what is
    compressed, from which each rank makes the gradient, and the others whole.

    Args:
        exchange: of the gradients that this rank owns.
        guard_layouts: as in `attach_powersgd`.
    """

    def __init__(self, exchange: OwnedExchange, guard_layouts: bool = True) -> None:
        super().__init__(exchange, guard_layouts)
        self._owned = exchange
        self._gathering: list[Gathering] = []
        # Of the step, this rank's parameters, or blocks of them, and their gradients.
        self._mine: dict[Tensor, Tensor] = {}
        # Of the step, by owner, its parameters and where DDP wants their averages.
        self._wanted: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @override
    def take(self, bucket: GradBucket) -> None:
        if bucket.index() == 0:
            self._gathering, self._mine, self._wanted = [], {}, {}
        by_owner: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for parameter, gradient in zip(bucket.parameters(), _gradients(bucket), strict=True):
            laid_out = self.as_laid_out(parameter, gradient)
            for block in self._owned.blocks_of(parameter):
                by_owner.setdefault(self._owned.owner_of(block), []).append((block.tensor, block.of(laid_out)))
        before, self._gathering = self._gathering, [self._owned.gather(*item) for item in sorted(by_owner.items())]
        for owner, pairs in by_owner.items():
            self._wanted.setdefault(owner, []).extend(pairs)
        self._hand_over(before)

    @override
    def end_step(self) -> None:
        self._hand_over(self._gathering)
        factors = self.exchange.end_step()
        self._owned.spread(self._wanted, self._mine, factors)
        self._gathering, self._mine, self._wanted = [], {}, {}

    def _hand_over(self, gathering: list[Gathering]) -> None:
        for each in gathering:
            for parameter, gradient in each.wait():
                self._mine[parameter] = gradient
                self.exchange.take(parameter, gradient)
        self.exchange.advance()


# DDP checks the types of a hook's arguments and result, which is why this file does not postpone annotations.
def powersgd_hook(buckets: DDPBuckets, bucket: GradBucket) -> Future[Tensor]:
    """The communication hook in DDP's form: what hands over the buckets is the state that DDP gives back every time."""
    return buckets.reduce(bucket)


def _layout(parameter: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return parameter.dtype, parameter.stride()


def _gradients(bucket: GradBucket) -> list[Tensor]:
    """Give views of the gradients in a bucket, in the order of its parameters."""
    parameters, buffer = bucket.parameters(), bucket.buffer()
    if buffer.is_complex() == parameters[0].is_complex():
        return bucket.gradients()
    # DDP shows complex numbers as pairs of real ones, of which `gradients` takes half as many as it should.
    numbers = torch.view_as_complex(buffer.view(-1, 2))
    parts = torch.split(numbers, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
