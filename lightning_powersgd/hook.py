"""The exchange of gradients between ranks: the only room that sees `GradBucket`, `Future` and collectives.

Collectives are issued from the thread that calls the hook, in the order of the plan's groups, which is the same on
every rank. (PyTorch's own hook issues them from futures' callbacks, whose order differs between ranks, and so
deadlocks or aborts with more than one bucket on gloo.)

For groups 0, 1, 2, … of parameters a step runs

    collective     0          1                2                …   last + 1
    carries        P of 0     P of 1, Q of 0   P of 2, Q of 1   …   Q of last

The gradients of a group are projected as they come (*take*). When all are there, the group before receives its own
collective and orthonormalises its P (*proceed*), and its Q travels with this group's P and with everything that is sent
whole (*start*): G groups take G + 1 collectives. When alternating, there is but one factor to send, and G suffice. At
the end of the step *finish* updates the error buffers and writes the averaged gradients into DDP's buckets. Nothing
that outlives the step is changed before all of it was received and found finite.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_powersgd.linalg import as_matrix, decompress, orthonormal, project
from lightning_powersgd.plan import Group, PowerSGDConfig, Side, Slot
from lightning_powersgd.state import PowerSGDState, other_side

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket, Work
else:
    GradBucket, Work = dist.GradBucket, dist.Work


def attach_powersgd(ddp: DistributedDataParallel, config: PowerSGDConfig) -> "GradientExchange":
    """Make a DDP module exchange its gradients with PowerSGD. Works without Lightning.

    Args:
        ddp: the module; it must not have a communication hook yet.
        config: the settings.

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
    """

    def __init__(
        self, state: PowerSGDState, process_group: dist.ProcessGroup | None = None, track_unused: bool = False
    ) -> None:
        self.state = state
        self.process_group = process_group
        self.world_size = dist.get_world_size(process_group)
        self._device = state.device
        self._wires: list[_Wire] = []
        self._groups = self._make_groups(track_unused)
        self._place = {state.parameters[slot.name]: (group, slot) for group in self._groups for slot in group.slots}
        self._futures: list[tuple[Future[Tensor], Tensor]] = []
        self._started = 0

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Take one bucket of DDP's; the future will hold it with averaged gradients, in place.

        Raises:
            RuntimeError: if the bucket holds a parameter that the state does not know.
        """
        if bucket.index() == 0:
            self._begin_step()
        if self.world_size == 1:
            future = self._new_future()
            future.set_result(bucket.buffer())
        else:
            self.state.dense_bytes += bucket.buffer().nbytes
            future = self._compress(bucket) if self.state.compressing else self._average(bucket)
        if bucket.is_last():
            self.state.finish_step()
        return future

    def all_reduce(self, payload: Tensor) -> Work:
        """Sum a payload over the ranks, in place and asynchronously, and count its bytes."""
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
        for error in self.state.errors.values():
            # In float32 at least, or a bfloat16 sum of many ranks would round at every one of them. On the device of
            # the collectives, from which the state has moved when a fit has ended.
            mean = (
                error.to(self._device, torch.promote_types(error.dtype, torch.float32)).contiguous() / self.world_size
            )
            dist.all_reduce(mean, group=self.process_group)
            error.copy_(mean)
        self.state.averaged = True

    def retire(self) -> None:
        """Let go of the accelerator's memory when a fit ends; the state stays, on the CPU, for a last checkpoint."""
        self._groups, self._wires, self._place = [], [], {}
        self.state.to(torch.device("cpu"))

    def new_wire(self, length: int, dtype: torch.dtype) -> "_Wire":
        """Make the buffer of one collective of a step."""
        self._wires.append(_Wire(self, length, dtype))
        return self._wires[-1]

    def _make_groups(self, track_unused: bool) -> list["_GroupExchange"]:
        groups: list[_GroupExchange] = []
        for group in self.state.plan.groups:
            groups.append(_GroupExchange(self, group, track_unused, passenger=groups[-1] if groups else None))
        groups[-1].lay_out_last()
        return groups

    def _begin_step(self) -> None:
        self.state.dense_bytes = self.state.sent_bytes = 0
        self._forget_buckets()

    def _forget_buckets(self) -> None:
        # At the end of a step, or DDP's old buckets would stay in memory when it rebuilds them; and at the beginning,
        # since an exception may have broken off the last backward pass.
        self._started = 0
        self._futures = []
        for group in self._groups:
            group.forget()

    def _new_future(self) -> Future[Tensor]:
        device = self.state.device
        return Future(devices=[device] if device.type == "cuda" else None)

    def _average(self, bucket: GradBucket) -> Future[Tensor]:
        """Average a bucket as DDP does without a hook, to the last bit: divide, then sum, in place."""
        future = self.all_reduce(bucket.buffer().div_(self.world_size)).get_future()
        return future.then(lambda done: done.value()[0])

    def _compress(self, bucket: GradBucket) -> Future[Tensor]:
        """Hand the bucket's gradients to their groups, and start the groups that are complete."""
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter not in self._place:
                raise RuntimeError(
                    "DDP reduces a parameter that PowerSGD does not know. Parameters that are added or unfrozen need a"
                    " new DistributedDataParallel with PowerSGD attached to it."
                )
            group, slot = self._place[parameter]
            # DDP lays a gradient out in memory as its parameter is (`channels_last`, say), but shows it contiguous.
            layout = parameter if slot.rank else gradient
            group.take(slot, gradient.as_strided(layout.shape, layout.stride()))
        while self._started < len(self._groups) and self._groups[self._started].complete:
            if self._started > 0:
                self._groups[self._started - 1].proceed()
            self._groups[self._started].start()
            self._started += 1
        future = self._new_future()
        self._futures.append((future, bucket.buffer()))
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
        finite = not torch.stack([wire.blemish for wire in self._wires]).any()
        for group in self._groups:
            group.finish(keep=finite)
        for future, buffer in self._futures:
            future.set_result(buffer)
        self._forget_buckets()
        if finite:
            self.state.averaged = False
            self.state.turn()


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

        # The first collective: [what is sent whole | flags, positive where any rank used a parameter | P | passenger].
        # When alternating there is no other, and it takes either factor.
        whole = [slot.numel for slot in group.whole]
        flags = len(group.compressed) if track_unused else 0
        both: tuple[Side, Side] = ("left", "right")
        self._lengths = {side: sum(slot.rank * slot.length(side) for slot in group.compressed) for side in both}
        self._start = sum(whole) + flags
        first_sides, last_sides = (both, both) if self._alternate else (both[:1], both[1:])
        factors = max(self._lengths[side] for side in first_sides)
        room = passenger.last_length if passenger is not None and passenger.dtype == group.dtype else 0
        self._wire = exchange.new_wire(self._start + factors + room, group.dtype)
        parts = torch.split(self._wire.flat[: sum(whole)], whole)
        self._first_whole = {slot.name: part.view(slot.shape) for slot, part in zip(group.whole, parts, strict=True)}
        self._flags = dict(zip(self._matrices, self._wire.flat[sum(whole) : self._start], strict=False))
        self._first = {side: self._factors(self._wire.flat[self._start :], side) for side in first_sides}
        if passenger is not None:
            passenger.lay_out_last(self._wire.flat[self._start + factors :] if room else None)

        # This rank's own part of the last factors, as rounded for the wire, so that the error holds that rounding too.
        own_length = max(self._lengths[side] for side in last_sides)
        self._own_flat = torch.zeros(own_length, dtype=group.dtype, device=self._state.device)
        self._own = {side: self._factors(self._own_flat, side) for side in last_sides}
        self._last, self._last_flat = self._first, self._wire.flat[self._start :]
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
        self._last, self._last_flat = {"right": self._factors(flat, "right")}, flat

    @property
    def complete(self) -> bool:
        """Whether the gradients of all parameters are there."""
        return self._taken == len(self.slots)

    @property
    def own_factors(self) -> list[Tensor]:
        """The factors that this rank sent in the last payload."""
        return list(self._own[self._sent].values())

    def take(self, slot: Slot, gradient: Tensor) -> None:
        """Put a gradient into the first payload: whole, or its projection after adding the error.

        Args:
            slot: the parameter's.
            gradient: a view of DDP's bucket, laid out in memory as the parameter is.
        """
        self._taken += 1
        if not slot.rank:
            self._whole[slot.name] = gradient
            self._first_whole[slot.name].copy_(gradient)
            return
        if self._track_unused:
            self._flags[slot.name].copy_(gradient.any())
        matrix = self._matrices[slot.name]
        factor, side = self._state.start_factor(slot), other_side(self._state.held)
        matrix.basis = orthonormal(factor, matrix.dtype) if self._alternate else factor.to(matrix.dtype)
        matrix.take(gradient)
        matrix.project(side, self._first[side][slot.name])

    def start(self) -> None:
        """Send the first collective: what is sent whole, and P (alternating: the projection)."""
        if self._alternate:
            self._sent = other_side(self._state.held)
            self._keep_own()
            self._wire.send(self._start + self._lengths[self._sent])
        else:
            self._wire.send()

    def proceed(self) -> None:
        """Receive the first collective; in a full step, orthonormalise P and compute Q."""
        self._wire.receive()
        for name, gradient in self._whole.items():
            gradient.copy_(self._first_whole[name])
        for name, matrix in self._matrices.items():
            if not self._alternate:
                # In M's dtype, since a basis never travels and need not be rounded to the wire's.
                matrix.basis = orthonormal(self._first["left"][name], matrix.dtype)
            if self._track_unused:
                # Without a basis nothing is sent, the gradient is zero, and the error, M itself, stays.
                matrix.basis *= self._flags[name] > 0
            if not self._alternate:
                matrix.project("right", self._last["right"][name])
        if not self._alternate:
            self._keep_own()
            if self._last_wire is not None:
                self._last_wire.send()

    def finish(self, *, keep: bool) -> None:
        """Write the averaged gradients ĝ = P̂ Qᵀ.

        Args:
            keep: keep the local residual as the error, and the averaged factor as the next warm start.
        """
        own, average = self._own[self._sent], self._last[self._sent]
        for name, matrix in self._matrices.items():
            matrix.decompress(self._sent, own[name], average[name], keep=keep)
            if keep:
                self._state.keep_factor(name, self._sent, average[name])

    def forget(self) -> None:
        """Let go of the step's gradients."""
        self._taken = 0
        self._whole.clear()
        for matrix in self._matrices.values():
            matrix.forget()

    def _keep_own(self) -> None:
        length = self._lengths[self._sent]
        self._own_flat[:length].copy_(self._last_flat[:length])

    def _factors(self, flat: Tensor, side: Side) -> dict[str, Tensor]:
        """View the beginning of a flat tensor as factors by name, (r, n) or (r, m)."""
        lengths = [slot.rank * slot.length(side) for slot in self._compressed]
        parts = torch.split(flat[: sum(lengths)], lengths)
        return {slot.name: part.view(slot.rank, -1) for slot, part in zip(self._compressed, parts, strict=True)}


class _Matrix:
    """One compressed parameter in one step: M = g + e, and the basis that it is projected onto.

    M is formed in DDP's bucket, so that it costs no memory. Only an error wider than the gradient needs a temporary of
    its dtype, formed anew for each use.

    Attributes:
        dtype: of M: the wider of the gradient's and the error's.
        basis: orthonormal rows, or the held factor itself in the first half of a full step; of M's dtype.
    """

    def __init__(self, slot: Slot, state: PowerSGDState) -> None:
        self._slot = slot
        self._state = state
        self.dtype = state.matrix_dtype(slot)
        self._in_bucket = self.dtype == slot.dtype
        self.forget()

    def forget(self) -> None:
        """Let go of what belongs to one step."""
        self._gradient = self.basis = torch.empty(0)
        self._error: Tensor | None = None
        self._summed = False

    def take(self, gradient: Tensor) -> None:
        """Take in the gradient, of the parameter's shape and memory layout."""
        order, error = self._slot.order, self._state.errors.get(self._slot.name)
        self._gradient = as_matrix(gradient, order)
        self._error = None if error is None else as_matrix(error, order)

    def project(self, side: Side, out: Tensor) -> None:
        """Project M onto the basis: the factor of that side, (r, n) or (r, m)."""
        matrix, error = self._sum()
        if side == "right":
            project(matrix, self.basis, out, error)
        else:
            project(matrix.t(), self.basis, out, None if error is None else error.t())

    def decompress(self, side: Side, own: Tensor, average: Tensor, *, keep: bool) -> None:
        """Write the averaged gradient over this rank's, and with `keep` the local residual into the error.

        Args:
            side: of the factors.
            own: this rank's projection.
            average: the mean of the ranks' projections.
            keep: whether to update the error.
        """
        matrix, _ = self._sum()
        factors = [(self.basis, factor) if side == "right" else (factor, self.basis) for factor in (average, own)]
        decompress(matrix, factors[0], factors[1], self._error if keep else None)
        if not self._in_bucket:
            self._gradient.copy_(matrix)

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        """Give M, (n, m), or the gradient and the error that is yet to be added to it in its place."""
        if self._error is not None and not self._in_bucket:
            return self._gradient + self._error, None
        pending = None if self._summed else self._error
        self._summed = True
        return self._gradient, pending


class _Wire:
    """One collective of a step: a flat buffer that is averaged over the ranks as it lies in memory.

    Attributes:
        flat: the buffer.
        blemish: zero if all that was received is finite, else NaN.
    """

    def __init__(self, exchange: GradientExchange, length: int, dtype: torch.dtype) -> None:
        self._exchange = exchange
        self._in_flight: tuple[Work, Tensor] | None = None
        self.flat = torch.zeros(length, dtype=dtype, device=exchange.state.device)
        self.blemish = torch.zeros((), device=exchange.state.device)

    def send(self, length: int | None = None) -> None:
        """Start the all-reduce of the buffer, or of its beginning; an empty one is left out."""
        part = self.flat[:length].div_(self._exchange.world_size)
        if part.numel():
            self._in_flight = self._exchange.all_reduce(part), part

    def receive(self) -> None:
        """Wait for what is on its way, if it has not been received yet."""
        if self._in_flight is not None:
            work, part = self._in_flight
            work.wait()
            self._in_flight = None
            # Zero times a number is zero, and times inf or NaN is NaN: an order of magnitude cheaper than `isfinite`.
            self.blemish = (part * 0).sum()


def require_agreement(settings: Mapping[str, str], process_group: dist.ProcessGroup | None = None) -> None:
    """Compare settings over all ranks, so that a difference ends in one clear error instead of a hang in a collective.

    Args:
        settings: what every rank must have alike, by name. Every rank must call this.
        process_group: the ranks; ``None`` is the default group.

    Raises:
        RuntimeError: on every rank, naming the first difference.
    """
    everyone: list[Mapping[str, str]] = [{}] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, settings, group=process_group)
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            if everyone[0].get(name) != theirs.get(name):
                raise RuntimeError(
                    f"The ranks disagree on {name}: rank 0 has {everyone[0].get(name, 'none')}, rank {rank} has"
                    f" {theirs.get(name, 'none')}. Start every rank with the same code, package versions and arguments."
                )
