"""The exchange of gradients between ranks: the only room that sees `GradBucket`, `Future` and a step's collectives.

Collectives are issued from the thread that calls the hook, in the order of the plan's groups, which is the same on
every rank. (PyTorch's own hook issues them from futures' callbacks, whose order differs between ranks, and so
deadlocks or aborts with more than one bucket on gloo.)

For groups 0, 1, 2, … of parameters a step runs

    collective     0          1                2                …   last + 1
    carries        P of 0     P of 1, Q of 0   P of 2, Q of 1   …   Q of last

The gradients of a group are projected as they come (*take*). When all are there, the group before receives its own
collective and orthonormalises its P (*proceed*), and its Q travels with this group's P and with everything that is sent
whole (*start*): G groups take G + 1 collectives. When alternating, there is but one factor to send, and G suffice. What
is sent whole and is large has a collective of its own after that, straight from DDP's bucket and without a copy. At
the end of the step *finish* updates the error buffers and writes the averaged gradients into DDP's buckets. Nothing
that outlives the step is changed before all of it was received and found finite.

A CPU judges that at once. On an accelerator the host would have to wait for the answer, so there the device itself
decides what is kept, and the host asks at the beginning of the next step, when the answer has long arrived.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_powersgd.agreement import mean_over_ranks
from lightning_powersgd.linalg import (
    add_scaled,
    as_matrix,
    as_real,
    assign,
    decompress,
    half_gain,
    orthonormal,
    project,
    saturated,
)
from lightning_powersgd.plan import SIDES, Group, PowerSGDConfig, Side, Slot
from lightning_powersgd.state import PowerSGDState, other_side

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket, Work
else:
    GradBucket, Work = dist.GradBucket, dist.Work


def attach_powersgd(
    ddp: DistributedDataParallel, config: PowerSGDConfig, scaler: torch.amp.GradScaler | None = None
) -> "GradientExchange":
    """Make a DDP module exchange its gradients with PowerSGD. Works without Lightning.

    Args:
        ddp: the module; it must not have a communication hook yet.
        config: the settings.
        scaler: what the loss is scaled with, if it is: error buffers must follow its scale.

    Returns:
        The exchange; its ``state`` is what a checkpoint needs.

    Raises:
        ValueError: if the parameters do not fit the settings (see `PowerSGDState`), or the model has sparse gradients.
        RuntimeError: if the module does not accept the hook.
    """
    for name, module in ddp.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            raise ValueError(
                f"The embedding {name!r} has `sparse=True`, and PowerSGD needs dense gradients. Use `sparse=False`."
            )
    named = [item for item in ddp.module.named_parameters() if item[0] not in ddp.parameters_to_ignore]
    exchange = GradientExchange(
        PowerSGDState(named, config, group_bytes=ddp.bucket_bytes_cap),
        ddp.process_group,
        track_unused=ddp.find_unused_parameters and not ddp.static_graph,
        scaler=scaler,
    )
    ddp.register_comm_hook(exchange, powersgd_hook)
    held = ddp._get_ddp_logging_data().get("comm_hook")  # type: ignore[no-untyped-call]
    if held != powersgd_hook.__qualname__:
        raise RuntimeError(
            f"DistributedDataParallel holds the communication hook {held!r} instead of PowerSGD's; gradients would"
            " not be compressed. Remove the other hook."
        )
    return exchange


# DDP checks the types of a hook's arguments and result, which is why this file does not postpone annotations.
def powersgd_hook(exchange: "GradientExchange", bucket: GradBucket) -> Future[Tensor]:
    """The communication hook in DDP's form: the exchange is the state that DDP hands back on every call."""
    return exchange.reduce_bucket(bucket)


class GradientExchange:
    """Averages gradients over the ranks of a process group, compressed.

    Args:
        state: what is remembered between steps; updated in place.
        process_group: the ranks; ``None`` is the default group.
        track_unused: set this where DDP looks for unused parameters. DDP throws away the averaged gradient of a
            parameter that no rank used, so its error must stay where it is instead of being sent.
        scaler: what the loss is scaled with; ``None`` if it is not.

    Attributes:
        exchanging: whether a step is under way: the first bucket has come, and the last has not.
        scale: of this step's loss, in units of the one that the error buffers were computed at.
        used: names of the compressed parameters that this rank's loss reached in the last step.
    """

    def __init__(
        self,
        state: PowerSGDState,
        process_group: dist.ProcessGroup | None = None,
        track_unused: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.state = state
        self.process_group = process_group
        self.world_size = dist.get_world_size(process_group)
        self._scaler = scaler
        self._loss_scale = torch.ones((), device=state.device)
        self.scale: float | Tensor = 1.0
        self.exchanging = False
        self._device = state.device
        self._wires: list[_Wire] = []
        self.used = {slot.name for slot in state.plan.compressed}
        self._reached: set[str] = set()
        self._following = self._follow_use() if track_unused else []
        self._groups = self._make_groups(track_unused)
        self._place = {state.parameters[slot.name]: (group, slot) for group in self._groups for slot in group.slots}
        self._futures: list[tuple[Future[Tensor], Tensor]] = []
        self._started = 0

    @property
    def alone(self) -> bool:
        """Whether gradients pass through untouched: one rank that was always alone.

        One that goes on with the checkpoint of several compresses as they did, so that the run remains the same.
        """
        return self.world_size == 1 and not self.state.total_sent_bytes

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Take one bucket of DDP's; the future will hold it with averaged gradients, in place.

        Raises:
            RuntimeError: if the bucket holds a parameter that the state does not know.
        """
        if bucket.index() == 0:
            self._begin_step()
        if self.world_size > 1:
            self.state.dense_bytes += bucket.buffer().nbytes
        if self.alone:
            future = self._done(bucket.buffer())
        else:
            future = self._compress(bucket) if self.state.compressing else self._average(bucket)
        if bucket.is_last():
            self.state.finish_step()
            self.exchanging = False
            if self._following:
                self.used = self._reached.copy()
                self._reached.clear()
        return future

    def all_reduce(self, payload: Tensor) -> Work | None:
        """Sum a payload over the ranks, in place and asynchronously, and count its bytes. ``None``: a rank is alone."""
        if self.world_size == 1:
            return None
        self.state.sent_bytes += payload.nbytes
        work: Work | None = dist.all_reduce(payload, group=self.process_group, async_op=True)
        assert work is not None, "this rank is not a member of the process group"
        return work

    def residual_norms(self) -> tuple[Tensor, Tensor]:
        """Give ‖e‖² and ‖M‖² of the last step (see `PowerSGDState.residual_norms`)."""
        return self.state.residual_norms(own for group in self._groups for own in group.own_factors)

    def average_errors(self) -> None:
        """Replace every rank's error buffers by their mean.

        The trajectory depends on the mean alone (P and Q are linear in it), so a run may do this at any time. A
        checkpoint then needs one buffer a parameter, whatever the number of ranks. Every rank must call it. A second
        call changes nothing: a mean of three equal buffers would be rounded anew.
        """
        if self.world_size == 1 or self.state.averaged:
            return
        # On the device of the collectives, from which the state has moved when a fit has ended.
        for name, mean in mean_over_ranks(self.state.errors, self._device, self.process_group):
            self.state.errors[name].copy_(mean)
        self.state.averaged = True

    def retire(self) -> None:
        """Let go of the accelerator's memory when a fit ends; the state stays, on the CPU, for a last checkpoint."""
        for handle in self._following:
            handle.remove()
        self.state.to(torch.device("cpu"))
        self._groups, self._wires, self._place = [], [], {}

    def new_wire(self, length: int, dtype: torch.dtype) -> "_Wire":
        """Make the buffer of one collective of a step."""
        self._wires.append(_Wire(self, length, dtype))
        return self._wires[-1]

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled, and the scale may change."""
        return self._scaler is not None

    def reached(self, name: str) -> bool:
        """Whether this rank's loss depends on a compressed parameter, in this step or a pass that was accumulated."""
        return not self._following or name in self._reached

    def _follow_use(self) -> list[RemovableHandle]:
        # A gradient does not tell: DDP hands over what an unused parameter still has in `grad` from the step before.
        return [
            self.state.parameters[slot.name].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, name=slot.name: self._reached.add(name)
            )
            for slot in self.state.plan.compressed
        ]

    def _make_groups(self, track_unused: bool) -> list["_GroupExchange"]:
        groups: list[_GroupExchange] = []
        for group in self.state.plan.groups:
            groups.append(_GroupExchange(self, group, track_unused, passenger=groups[-1] if groups else None))
        groups[-1].lay_out_last()
        return groups

    def _begin_step(self) -> None:
        self.exchanging = True
        self.state.dense_bytes = self.state.sent_bytes = 0
        self._forget_buckets()
        if self._scaler is not None:
            self._loss_scale = self._scaler.scale(torch.ones((), device=self._device))
        scale = self._loss_scale / self.state.loss_scale
        self.scale = float(scale) if _waits_for(self._device) else scale

    def _forget_buckets(self) -> None:
        # At the end of a step, or DDP's old buckets would stay in memory when it rebuilds them; and at the beginning,
        # since an exception may have broken off the last backward pass.
        self._started = 0
        self._futures = []
        for group in self._groups:
            group.forget()

    def _new_future(self) -> Future[Tensor]:
        return Future(devices=[self._device] if self._device.type == "cuda" else None)

    def _done(self, buffer: Tensor) -> Future[Tensor]:
        future = self._new_future()
        future.set_result(buffer)
        return future

    def _average(self, bucket: GradBucket) -> Future[Tensor]:
        """Average a bucket as DDP does without a hook, to the last bit: divide, then sum, in place."""
        work = self.all_reduce(bucket.buffer().div_(self.world_size))
        if work is None:
            return self._done(bucket.buffer())
        return work.get_future().then(lambda done: done.value()[0])

    def _compress(self, bucket: GradBucket) -> Future[Tensor]:
        """Hand the bucket's gradients to their groups, and start the groups that are complete."""
        for parameter, gradient in zip(bucket.parameters(), _gradients(bucket), strict=True):
            if parameter not in self._place:
                raise RuntimeError(
                    "DDP reduces a parameter that PowerSGD does not know. Parameters that are added or unfrozen need a"
                    " new DistributedDataParallel with PowerSGD attached to it."
                )
            group, slot = self._place[parameter]
            # DDP lays a gradient out in memory as its parameter is (`channels_last`, say), but shows it contiguous.
            layout = parameter if slot.rank else gradient
            group.take(slot, gradient.as_strided(layout.shape, layout.stride()))
        future = self._new_future()
        self._futures.append((future, bucket.buffer()))
        while self._started < len(self._groups) and self._groups[self._started].complete:
            if self._started > 0:
                self._groups[self._started - 1].proceed()
            self._groups[self._started].start()
            self._started += 1
        if bucket.is_last():
            self._drain()
        return future

    def _drain(self) -> None:
        """Write the averaged gradients; keep errors and factors as they were if any payload was not finite."""
        assert self._started == len(self._groups), "DDP's buckets left out a trainable parameter"
        self._groups[-1].proceed()
        for wire in self._wires:
            wire.receive()
        # Every rank holds the same averages, so all of them judge alike.
        blemish = torch.stack([wire.blemish for wire in self._wires]).sum()
        finite = blemish == 0
        keep = bool(finite) if _waits_for(self._device) else finite
        for group in self._groups:
            group.finish(blemish, keep)
        assign(self.state.loss_scale, self._loss_scale, keep)
        self.state.keep_step(_Verdict(keep) if isinstance(keep, Tensor) else keep)
        for future, buffer in self._futures:
            future.set_result(buffer)
        self._forget_buckets()


class _GroupExchange:
    """One group's part in a step.

    A step starts from the factor that is held, say Q. A full step first turns it into an orthonormal basis P̂ of the
    other side, which takes the first collective; a half step (alternating) orthonormalises the held factor as it is.
    Then M is projected onto the basis, and that projection is what the ranks average, keep as the next warm start, and
    reconstruct the gradient from.
    """

    def __init__(
        self, exchange: GradientExchange, group: Group, track_unused: bool, passenger: "_GroupExchange | None"
    ) -> None:
        self._exchange = exchange
        self._state = exchange.state
        self._alternate = exchange.state.config.alternate
        self._track_unused = track_unused
        self.slots, self._compressed, self.dtype = group.slots, group.compressed, group.dtype
        self._matrices = {slot.name: _Matrix(slot, self._state) for slot in group.compressed}

        # What is sent whole and is large is only borrowed from DDP's bucket.
        packed = [slot for slot in group.whole if not slot.travels_alone]

        # The first collective: [what is sent whole | flags, positive where any rank used a parameter | P | passenger].
        # When alternating there is no other, and it takes either factor.
        whole = [slot.numel for slot in packed]
        flags = len(group.compressed) if track_unused else 0
        self._lengths = {side: sum(slot.rank * slot.length(side) for slot in group.compressed) for side in SIDES}
        self._start = sum(whole) + flags
        first_sides, last_sides = (SIDES, SIDES) if self._alternate else (SIDES[:1], SIDES[1:])
        factors = max(self._lengths[side] for side in first_sides)
        room = passenger.last_length if passenger is not None and passenger.dtype == group.dtype else 0
        self._wire = exchange.new_wire(self._start + factors + room, group.dtype)
        parts = torch.split(self._wire.flat[: sum(whole)], whole)
        self._first_whole = {slot.name: part.view(slot.shape) for slot, part in zip(packed, parts, strict=True)}
        self._flags = dict(zip(self._matrices, self._wire.flat[sum(whole) : self._start], strict=False))
        self._last_flat = self._wire.flat[self._start :]
        self._payload = {side: self._factors(self._last_flat, side) for side in first_sides}
        self._alone = {slot.name: exchange.new_wire(0, group.dtype) for slot in group.whole if slot.travels_alone}
        if passenger is not None:
            passenger.lay_out_last(self._wire.flat[self._start + factors :] if room else None)

        # This rank's own part of the last factors as it was sent, so that the error holds its rounding too.
        own_length = max(self._lengths[side] for side in last_sides)
        own_dtype = torch.promote_types(group.dtype, torch.float32)
        self._own_flat = torch.zeros(own_length, dtype=own_dtype, device=self._state.device)
        self._own = {side: self._factors(self._own_flat, side) for side in last_sides}
        self._last_wire: _Wire | None = None
        self._whole: dict[str, Tensor] = {}
        self._taken = 0
        self._sent: Side = "right"

    @property
    def last_length(self) -> int:
        """Elements of Q, which follow in the next collective; none when alternating."""
        return 0 if self._alternate else self._lengths["right"]

    def lay_out_last(self, flat: Tensor | None = None) -> None:
        """Lay out Q in a part of the next group's collective, or else in one of its own."""
        if self._alternate:
            return
        if flat is None:
            self._last_wire = self._exchange.new_wire(self.last_length, self.dtype)
            flat = self._last_wire.flat
        self._payload["right"], self._last_flat = self._factors(flat, "right"), flat

    @property
    def complete(self) -> bool:
        """Whether the gradients of all parameters are there."""
        return self._taken == len(self.slots)

    @property
    def own_factors(self) -> list[Tensor]:
        """The factors that this rank sent last, in the step before."""
        own = self._own[self._sent]
        return [matrix.received(self._sent, own[name]) for name, matrix in self._matrices.items()]

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Put a gradient into the first payload: whole, or its projection after adding the error.

        Args:
            slot: the parameter's.
            gradient: a view of DDP's bucket, laid out in memory as the parameter is.
        """
        self._taken += 1
        if not slot.rank:
            self._whole[slot.name] = gradient
            if not slot.travels_alone:
                self._first_whole[slot.name].copy_(gradient)
            return
        if self._track_unused:
            self._flags[slot.name].fill_(self._exchange.reached(slot.name))
        matrix = self._matrices[slot.name]
        factor, side = self._state.start_factor(slot), other_side(self._state.held)
        matrix.basis = orthonormal(factor, matrix.dtype) if self._alternate else factor.to(matrix.dtype)
        matrix.take(gradient, self._exchange.scale)
        matrix.project(side, self._payload[side][slot.name])

    def start(self) -> None:
        """Send the first collective: what is sent whole, and P (alternating: the projection). The large ones follow."""
        if self._alternate:
            self._sent = other_side(self._state.held)
            self._divide_and_keep_own()
            self._wire.flat[: self._start] /= self._exchange.world_size
            self._wire.send(self._wire.flat[: self._start + self._lengths[self._sent]])
        else:
            self._wire.flat[: self._start + self._lengths["left"]] /= self._exchange.world_size
            self._wire.send(self._wire.flat)
        for name, wire in self._alone.items():
            wire.send(self._whole[name].view(-1).div_(self._exchange.world_size))

    def proceed(self) -> None:
        """Receive the first collective; in a full step, orthonormalise P and compute Q."""
        self._wire.receive()
        for name, part in self._first_whole.items():
            self._whole[name].copy_(part)
        for name, matrix in self._matrices.items():
            if not self._alternate:
                # In M's dtype, since a basis never travels and need not be rounded to the wire's.
                matrix.basis = orthonormal(matrix.received("left", self._payload["left"][name]), matrix.dtype)
            if self._track_unused:
                # Without a basis the gradient is zero.
                matrix.basis *= self._flags[name] > 0
            if not self._alternate:
                matrix.project("right", self._payload["right"][name])
        if not self._alternate:
            self._divide_and_keep_own()
            if self._last_wire is not None:
                self._last_wire.send(self._last_wire.flat)

    def finish(self, blemish: Tensor, keep: bool | Tensor) -> None:
        """Write the averaged gradients ĝ = P̂ Qᵀ.

        Args:
            blemish: zero, or NaN if anything that any group received was not finite: no compressed gradient of such a
                step may be, or an optimizer of its own would take it, and then again what the error still holds.
            keep: whether to keep the local residual as the error, and the averaged factors for the next step.
        """
        self._last_flat.add_(blemish)
        for name, matrix in self._matrices.items():
            factors = {side: matrix.received(side, self._payload[side][name]) for side in self._sides}
            own = matrix.received(self._sent, self._own[self._sent][name])
            keep_this = keep & self._used(name, keep)
            matrix.decompress(self._sent, own, factors[self._sent], keep_this)
            for side, factor in factors.items():
                self._state.keep_factor(name, side, factor, keep_this)
            # What the step has written anew is at its scale already.
            if self._track_unused and self._exchange.scaled and keep_this is not True:
                ratio = torch.as_tensor(self._exchange.scale, device=self._wire.flat.device)
                self._state.rescale(name, torch.where(keep & (self._flags[name] == 0), ratio, 1.0))

    def forget(self) -> None:
        """Let go of the step's gradients."""
        self._taken = 0
        self._whole.clear()
        for matrix in self._matrices.values():
            matrix.forget()

    @property
    def _sides(self) -> tuple[Side, ...]:
        """The sides of the factors that a step averages."""
        return (self._sent,) if self._alternate else SIDES

    def _used(self, name: str, keep: bool | Tensor) -> bool | Tensor:
        """Whether any rank used a parameter. If none did, DDP throws its average away."""
        if not self._track_unused:
            return True
        used = self._flags[name] > 0
        return used if isinstance(keep, Tensor) else bool(used)

    def _divide_and_keep_own(self) -> None:
        """Divide the last factors by the number of ranks for the sum, and keep them as they are after that rounding."""
        length, world_size = self._lengths[self._sent], self._exchange.world_size
        own = self._own_flat[:length].copy_(self._last_flat[:length].div_(world_size))
        own *= world_size

    def _factors(self, flat: Tensor, side: Side) -> dict[str, Tensor]:
        """View the beginning of a flat tensor as factors by name, (r, n) or (r, m)."""
        lengths = [slot.rank * slot.length(side) for slot in self._compressed]
        parts = torch.split(flat[: sum(lengths)], lengths)
        return {slot.name: part.view(slot.rank, -1) for slot, part in zip(self._compressed, parts, strict=True)}


class _Matrix:
    """One compressed parameter in one step: M = g + e, and the basis that it is projected onto.

    M is formed in DDP's bucket, so that it costs no memory. Only where M is wider than the gradient it is a temporary,
    formed anew for each use.

    Attributes:
        dtype: of M (see `PowerSGDState.matrix_dtype`).
        basis: orthonormal rows, or the held factor itself in the first half of a full step; of M's dtype.
    """

    def __init__(self, slot: Slot, state: PowerSGDState) -> None:
        self._slot = slot
        self._state = state
        self.dtype = state.matrix_dtype(slot)
        self._in_bucket = self.dtype == slot.dtype
        self._scale: float | Tensor = 1.0
        self._gains: dict[Side, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Let go of what belongs to one step."""
        self._gradient = self.basis = torch.empty(0)
        self._error: Tensor | None = None
        self._summed = False

    def take(self, gradient: Tensor, scale: float | Tensor) -> None:
        """Take in the gradient.

        Args:
            gradient: of the parameter's shape and memory layout.
            scale: of its loss, in units of the error's.
        """
        self._scale = scale
        magnitudes = self._state.magnitudes.get(self._slot.name, {})
        self._gains = {side: half_gain(magnitude * scale) for side, magnitude in magnitudes.items()}
        order, error = self._slot.order, self._state.errors.get(self._slot.name)
        self._gradient = as_matrix(gradient, order)
        self._error = None if error is None else as_matrix(error, order)

    def project(self, side: Side, out: Tensor) -> None:
        """Project M onto the basis: the factor of that side, (r, n) or (r, m), as it travels."""
        matrix, error = self._sum()
        if side == "left":
            matrix, error = matrix.t(), None if error is None else error.t()
        project(matrix, self.basis, out, error, self._scale, self._gains.get(side))

    def received(self, side: Side, factor: Tensor) -> Tensor:
        """Give a factor in units of M, as it was before it travelled."""
        return factor / self._gains[side] if self._gains else factor

    def decompress(self, side: Side, own: Tensor, average: Tensor, keep: bool | Tensor) -> None:
        """Write the averaged gradient over this rank's, and the local residual into the error.

        Args:
            side: of the factors.
            own: this rank's projection.
            average: the mean of the ranks' projections.
            keep: whether to update the error.
        """
        matrix, pending = self._sum()
        if pending is not None:
            add_scaled(matrix, pending, self._scale)
        factors = [(self.basis, factor) if side == "right" else (factor, self.basis) for factor in (average, own)]
        decompress(matrix, factors[0], factors[1], self._error, keep)
        if not self._in_bucket:
            self._gradient.copy_(saturated(matrix, self._gradient.dtype))

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        """Give M, (n, m), or the gradient in M's dtype and the error that is yet to be added to it in its place."""
        if not self._in_bucket:
            return self._gradient.to(self.dtype), self._error
        pending = None if self._summed else self._error
        self._summed = True
        return self._gradient, pending


class _Wire:
    """One collective of a step: a flat payload that is summed over the ranks as it lies in memory.

    Attributes:
        flat: a buffer for it, unless it is borrowed.
        blemish: zero if all that was received is finite, else NaN.
    """

    def __init__(self, exchange: GradientExchange, length: int, dtype: torch.dtype) -> None:
        self._exchange = exchange
        self._in_flight: tuple[Work | None, Tensor] | None = None
        self.flat = torch.zeros(length, dtype=dtype, device=exchange.state.device)
        self.blemish = torch.zeros((), device=exchange.state.device)

    def send(self, payload: Tensor) -> None:
        """Start the all-reduce of a payload; an empty one is left out."""
        if payload.numel():
            self._in_flight = self._exchange.all_reduce(payload), payload

    def receive(self) -> None:
        """Wait for what is on its way, if it has not been received yet."""
        if self._in_flight is not None:
            work, payload = self._in_flight
            if work is not None:
                work.wait()
            self._in_flight = None
            # Zero times a number is zero, and times inf or NaN is NaN. One journey through memory and no temporary,
            # where `isfinite` takes ten times as long.
            self.blemish = (torch.stack(torch.aminmax(as_real(payload))) * 0).sum()


def _gradients(bucket: GradBucket) -> list[Tensor]:
    """Give views of the gradients in a bucket, in the order of its parameters."""
    parameters, buffer = bucket.parameters(), bucket.buffer()
    if buffer.is_complex() == parameters[0].is_complex():
        return bucket.gradients()
    # DDP shows complex numbers as pairs of real ones, of which `gradients` takes half as many as it should.
    numbers = torch.view_as_complex(buffer.view(-1, 2))
    parts = torch.split(numbers, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


class _Verdict:
    """Whether a step was finite, on its way from the device that found it out."""

    def __init__(self, finite: Tensor) -> None:
        self._finite = finite.to("cpu", non_blocking=finite.is_cuda)
        self._arrived = torch.cuda.Event() if finite.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(finite.device))

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._finite)


def _waits_for(device: torch.device) -> bool:
    """Whether the host waits for what the device computes anyway, so that asking for a number costs nothing."""
    return device.type == "cpu"
