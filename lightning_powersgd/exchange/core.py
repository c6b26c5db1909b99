"""The exchange of gradients between ranks: matrices, a process group, and the collectives of a step.

Where gradients come from is not known here. A source of gradients, such as DDP's hook (`ddp`), hands them over:

    exchange.begin_step()
    for parameter, gradient in ...:             # in any order, as the backward pass makes them
        exchange.take(parameter, gradient)
        exchange.advance()                      # starts the collectives that can start
    exchange.end_step()                         # every gradient holds the average over the ranks now

Collectives are issued from the thread that makes these calls, in the order of the plan's groups, which is the same on
every rank. (PyTorch's own hook issues them from futures' callbacks, whose order differs between ranks, and so
deadlocks or aborts with more than one bucket on gloo.)

For groups 0, 1, 2, … of parameters a compressed step runs

    collective     0          1                2                …   last + 1
    carries        P of 0     P of 1, Q of 0   P of 2, Q of 1   …   Q of last

When all gradients of a group are there, they are projected (*put in*). Then the group before receives its collective
and orthonormalises its P (*proceed*), and its Q travels with this group's P and with everything that is sent whole
(*start*): G groups take G + 1 collectives. When alternating, there is but one factor to send, and G suffice. What
is sent whole and is large has a collective of its own after that, straight from where its gradient lies and without a
copy. At the end of the step *finish* updates the error buffers and writes the averages over the gradients. Nothing that
outlives the step is changed before all of it was received and found finite.

With ``compress="auto"`` a step is exact where that is the faster way (see `compressor.trial`). What compressed steps
have not sent is sent in the first exact step that belongs to no trial.

On an accelerator all of it runs in a stream of its own (`lane`), which follows the backward pass and never holds it up.

A CPU judges that at once. On an accelerator the host would have to wait for the answer, so there the device itself
decides what is kept, and the host asks at the beginning of the next step, when the answer has long arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.plan import Plan, Slot
from lightning_powersgd.compressor.precision import full_precision
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.trial import Trial
from lightning_powersgd.compressor.verdict import host_waits_for, known
from lightning_powersgd.exchange.agreement import largest_of_ranks
from lightning_powersgd.exchange.averages import mean_over_ranks
from lightning_powersgd.exchange.groups import CompressedGroup, ExactGroup
from lightning_powersgd.exchange.lane import Lane
from lightning_powersgd.exchange.loss_scale import LossScale, Scaler
from lightning_powersgd.exchange.stopwatch import Stopwatch
from lightning_powersgd.exchange.unsent import UnsentErrors
from lightning_powersgd.exchange.use import ReachedParameters
from lightning_powersgd.exchange.wire import Wires

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work


class GradientExchange:
    """Averages gradients over the ranks of a process group, compressed.

    Args:
        state: what is remembered between steps; updated in place.
        process_group: the ranks; ``None`` is the default group.
        follow_use_of: parameters by name, where the source throws away the averaged gradient of one that no rank's loss
            reached, as DDP does when it looks for unused parameters. Then its error stays where it is instead of being
            sent. ``None`` where the loss reaches all of them.
        scaler: what the loss is scaled with; ``None`` if it is not.
        judges: the ranks that must judge alike whether a step was finite, beside those that average: the owners of the
            other shards of a sharded model, say. ``None`` where there are no others.

    Where a scaler would skip a step that is not finite, and where there are other judges, nothing of such a step is
    kept, and no compressed gradient of it is finite. Otherwise each matrix is judged by itself, so that what is not
    finite spoils only its own parameter, as it does without compression.

    Attributes:
        exchanging: whether a step is under way.
    """

    def __init__(
        self,
        state: PowerSGDState,
        process_group: dist.ProcessGroup | None = None,
        follow_use_of: Mapping[str, Tensor] | None = None,
        scaler: Scaler | None = None,
        judges: dist.ProcessGroup | None = None,
    ) -> None:
        self.state = state
        self.process_group = process_group
        self.exchanging = False
        self._device = state.device
        self._lane = Lane(state.device)
        self._judges = judges
        self._loss_scale = LossScale(scaler, state)
        self._follow_use_of = follow_use_of
        self._reached: ReachedParameters | None = None
        self._exact: list[ExactGroup] = []
        self._compressed: list[CompressedGroup] = []
        # Of each parameter: the number of its group, and its slot.
        self._place: dict[Tensor, tuple[int, Slot]] = {}
        self._lay_out()
        self._dense_bytes = 0
        self._started = 0
        self._averaging: list[Work] = []
        self._unsent: UnsentErrors | None = None
        self._stopwatch = Stopwatch(state.device)
        if state.config.compresses_where_faster:
            state.trial = Trial(self.world_size)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._wires.world_size

    @property
    def plan(self) -> Plan:
        """How the gradients of all parameters are exchanged."""
        return self.state.plan

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """All parameters whose gradients are exchanged, by name."""
        return self.state.parameters

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks whose parameters are equal; ``None`` is the default group."""
        return self.process_group

    @property
    def needs_all_ranks(self) -> bool:
        """Whether `gather_state` must be called before `saved` gives the state of all parameters."""
        return False

    @property
    def bytes_in_node(self) -> int | None:
        """Bytes handed to collectives inside this machine in the last step; ``None`` where it has none of its own."""
        return None

    @property
    def alone(self) -> bool:
        """Whether gradients pass through untouched: one rank that was always alone.

        One that goes on with the checkpoint of several compresses as they did, so that the run remains the same.
        """
        return self.world_size == 1 and not self.state.total_sent_bytes

    @property
    def compressing(self) -> bool:
        """Whether the gradients of this step, or between steps of the next one, are compressed."""
        # Where nothing is compressed and nobody asks for speed, groups stay: their sums have one order, also after a
        # resume, where DDP's buckets have another one in its first step.
        return self.state.compressing and not self.alone and (self.compresses_any or self.state.trial is None)

    @property
    def compresses_any(self) -> bool:
        """Whether steps that are compressed differ from those that are not."""
        # Ranks that judge together make the same collectives, also those with shards too small to be compressed.
        return bool(self._names) or self._judges is not None

    @property
    def idle(self) -> bool:
        """Whether the next step and many that follow it are exact, and those of DDP without a hook would be the same.

        Only where it is asked for speed: DDP's sums have another order in its first step (see `compressing`).
        """
        state = self.state
        if state.trial is None:
            return False
        return not self.compresses_any or ((state.exact or state.trial.rests_exact) and not state.owing)

    @property
    def sends_errors(self) -> bool:
        """Whether the errors go out with the exact gradients of this step (see `add_error`)."""
        return self._unsent is not None

    @property
    def used(self) -> set[str]:
        """Names of the compressed parameters that this rank's loss reached in the last step."""
        return self._names if self._reached is None else self._reached.last

    def follow(self, scaler: Scaler | None) -> None:
        """Let errors follow the scale of a loss, for a scaler that was made late.

        Args:
            scaler: what the loss is scaled with from now on, and was in the steps before.
        """
        self._loss_scale.follow(scaler)

    def compresses(self, parameter: Tensor) -> bool:
        """Whether the gradients of a parameter are compressed, in steps that are."""
        return parameter in self._place and self._place[parameter][1].rank > 0

    def configure(self, config: PowerSGDConfig, whole: Iterable[str] = ()) -> None:
        """Take other settings, before the first step. Every rank must do so alike.

        Args:
            config: the settings.
            whole: names of parameters that are sent whole, whatever their rank.

        Raises:
            ValueError: if the parameters do not fit them.
        """
        self.state.configure(config, whole)
        self._lay_out()

    def begin_step(self) -> None:
        """Begin a step. One that was broken off by an exception is forgotten.

        Raises:
            RuntimeError: if the step is captured as a CUDA graph.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "This backward pass is captured as a CUDA graph, and PowerSGD decides anew in every step what it sends:"
                " a replay would repeat one step's decisions. Capture the forward and backward pass of a module without"
                " DDP, or train without CUDA graphs."
            )
        self.exchanging = True
        self._dense_bytes = 0
        with self._lane.apart(), full_precision(self._device):
            # A CPU looks at all that was received first, since it nearly always is finite.
            self._wires.begin_step(self.state.encodes, host_waits_for(self._device) or self._together)
            self._forget_gradients()
            self._loss_scale.begin_step()
        state, self._unsent = self.state, None
        if self._tries and state.owing and state.trial is not None and state.trial.rests_exact:
            self._unsent = UnsentErrors(state, self._loss_scale, self._reached, self.process_group, self._judges)

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of a parameter. At the end of the step it is overwritten with the average.

        Args:
            parameter: one of the state's.
            gradient: of the parameter's shape, without gaps in memory. Of a compressed parameter, also of its strides.

        Raises:
            RuntimeError: if the state does not know the parameter.
        """
        if parameter not in self._place:
            raise RuntimeError(
                "A gradient came of a parameter that PowerSGD does not know. Parameters that are added or unfrozen"
                " need a new exchange: attach PowerSGD anew, with DDP to a new DistributedDataParallel."
            )
        self._count(gradient)
        if not self.alone:
            index, slot = self._place[parameter]
            if self._unsent is not None:
                self.add_error(parameter, gradient)
            self._groups[index].take(slot, gradient)

    def add_error(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add what was not sent so far to a gradient, in a step that `sends_errors`, for a source that packs gradients.

        Args:
            parameter: one of the state's.
            gradient: as in `take`; it shares memory with what is then given to `average`.
        """
        assert self._unsent is not None
        with self._lane.apart(), full_precision(self._device):
            self._unsent.add_to(self._place[parameter][1].name, gradient)

    def average(self, flat: Tensor) -> None:
        """Average gradients that a source has packed itself, to the last bit as DDP does.

        Only for steps that are not compressed, and instead of *take*.

        Args:
            flat: gradients; at the end of the step they are overwritten with the averages.
        """
        assert not self.compressing, "a compressed step needs the gradient of every parameter"
        self._count(flat)
        if not self.alone:
            with self._lane.apart(), full_precision(self._device):
                work = self._wires.all_reduce(self._wires.share(flat))
            if work is not None:
                self._averaging.append(work)

    def advance(self) -> None:
        """Start the groups whose gradients are all there, in their order."""
        groups = self._groups
        with self._lane.apart(), full_precision(self._device):
            while self._started < len(groups) and groups[self._started].complete:
                groups[self._started].put_in()
                if self._started > 0:
                    groups[self._started - 1].proceed()
                groups[self._started].start()
                self._started += 1

    def end_step(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Receive what is on its way, and write the averages over the gradients.

        Errors and factors stay as they were if anything that any rank received was not finite.

        Returns:
            Of the gradients that are compressed, by name, the factors (r, n) and (r, m) of which the average is the
            product. The next step writes over them.

        Raises:
            RuntimeError: if the gradient of a parameter was not handed over.
        """
        self.advance()
        self._require_all_gradients()
        with self._lane.apart(), full_precision(self._device):
            if self._started:
                self._groups[-1].proceed()
            self._wait()
            averages = self._finish_compressed() if self.compressing else {}
            if self._unsent is not None:
                self._unsent.settle()
        self._lane.join()
        self._unsent = None
        self._forget_gradients()
        self._try()
        self.state.finish_step(self._dense_bytes, self._wires.sent_bytes)
        if self._reached is not None:
            self._reached.end_step()
        self.exchanging = False
        return averages

    def pass_step(self) -> None:
        """Count an exact step of a source that has averaged the gradients itself, such as DDP without a hook."""
        self._try()
        nbytes = self.plan.dense_bytes if self.world_size > 1 else 0
        self.state.finish_step(nbytes, nbytes)

    def residual_norms(self) -> tuple[Tensor, Tensor]:
        """Give ‖e‖² and ‖M‖² of the last step (see `PowerSGDState.residual_norms`)."""
        return self.state.residual_norms(own for group in self._compressed for own in group.own_factors)

    def average_errors(self) -> None:
        """Replace every rank's error buffers by their mean.

        The trajectory depends on the mean alone (P and Q are linear in it), so a run may do this at any time. A
        checkpoint then needs one buffer a parameter, whatever the number of ranks. Every rank must call it. A second
        call changes nothing: a mean of three equal buffers would be rounded anew.
        """
        if self.world_size == 1 or self.state.averaged:
            return
        # On the device of the collectives, from which the state has moved when a fit has ended.
        errors = self.state.all_errors
        for name, mean in mean_over_ranks(errors, self._device, self.process_group):
            errors[name].copy_(mean)
            # It travels in float32 at least.
            self.state.total_sent_bytes += mean.numel() * max(mean.itemsize, 4)
        self.state.averaged = True

    def state_dict(self) -> dict[str, Any]:
        """Give the state with the mean of the ranks' errors. Every rank must call it.

        With `load_state_dict` this makes an exchange a ``Stateful`` of `torch.distributed.checkpoint`.
        """
        self.average_errors()
        self.gather_state(error_feedback=True)
        return self.saved(error_feedback=True)

    def gather_state(self, *, error_feedback: bool) -> None:
        """Let the first rank have what others look after, if there is such. Every rank must call it.

        Args:
            error_feedback: whether to include the error buffers, which should be averaged before.
        """

    def saved(self, *, error_feedback: bool) -> dict[str, Any]:
        """Give the state as it is, with or without this rank's errors (see `PowerSGDState.state_dict`)."""
        return self.state.state_dict(error_feedback=error_feedback)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:
        """Take over what `state_dict` gave, and tell what did not fit (see `PowerSGDState.load_state_dict`)."""
        before = self.state.plan
        not_carried_over = self.state.load_state_dict(state_dict)
        if self.state.plan is not before:
            self._lay_out()
        return not_carried_over

    def retire(self) -> None:
        """Let go of the accelerator's memory and of the ranks; the state stays, on the CPU, for a last checkpoint."""
        if self._reached is not None:
            self._reached.retire()
        self.state.to(torch.device("cpu"))
        self._wires.cut()
        self.process_group = self._judges = None
        self._exact, self._compressed, self._place = [], [], {}

    @property
    def _groups(self) -> list[CompressedGroup] | list[ExactGroup]:
        return self._compressed if self.compressing else self._exact

    @property
    def _together(self) -> bool:
        """Whether all matrices are judged by everything that was received, and not each by itself."""
        return self._loss_scale.changes or self._judges is not None

    @property
    def _tries(self) -> bool:
        """Whether compressed and exact steps are compared."""
        return self.state.may_compress and not self.alone and self.compresses_any

    def _try(self) -> None:
        """Go on with the trial, now that a step is over."""
        trial = self.state.trial
        if trial is None or not self._tries:
            return
        seconds = trial.timed
        self._stopwatch.lap(None if seconds is None else seconds.append)
        trial.finish_step()
        if trial.asks:
            self._stopwatch.finish()
            trial.answer(*self.slowest(trial.medians()))

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Give the longest times of all ranks that must decide alike. Every rank must call it."""
        judges = [] if self._judges is None else [self._judges]
        return largest_of_ranks(seconds, self._device, self.process_group, *judges)

    def _lay_out(self) -> None:
        """Make the groups and the wires of the state's plan."""
        state, plan = self.state, self.state.plan
        if self._reached is not None:
            self._reached.retire()
        self._names = {slot.name for slot in plan.compressed}
        followed = self._follow_use_of
        self._reached = None
        if followed is not None:
            self._reached = ReachedParameters({name: followed[name] for name in self._names})
        self._wires = Wires(self.process_group, state.device)
        self._exact = [ExactGroup(group, self._wires) for group in plan.groups]
        self._compressed = self._make_groups()
        self._place = {
            state.parameters[slot.name]: (index, slot)
            for index, group in enumerate(plan.groups)
            for slot in group.slots
        }

    def _make_groups(self) -> list[CompressedGroup]:
        groups: list[CompressedGroup] = []
        for index in range(len(self.state.plan.groups)):
            passenger = groups[-1] if groups else None
            groups.append(CompressedGroup(index, self.state, self._wires, self._loss_scale, self._reached, passenger))
        if groups:
            groups[-1].lay_out_last()
        return groups

    def _count(self, gradient: Tensor) -> None:
        """Count what plain all-reduce would send."""
        if self.world_size > 1:
            self._dense_bytes += gradient.nbytes

    def _require_all_gradients(self) -> None:
        missing = [name for group in self._groups for name in group.missing]
        took_some = len(missing) < len(self._place)
        if missing and not self.alone and (took_some or self.compressing):
            raise RuntimeError(
                f"The step has no gradient of {len(missing)} parameters, such as {missing[0]!r}. Every trainable"
                " parameter's must be handed over in every step; zeros where the loss does not depend on it."
            )

    def _finish_compressed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Judge what was received, and write the averages; keep errors and factors as they were if it is not finite.

        Returns:
            The factors of the averages by name.
        """
        # Every rank that averages holds the same averages, so all of them judge alike.
        blemish = self._wires.receive()
        if blemish is not None and self._judges is not None:
            dist.all_reduce(blemish, group=self._judges)
        if self.alone:
            return {}
        finite = False if blemish is None else cast("bool | Tensor", known(blemish == 0))
        together = self._together
        kept = [group.finish(finite, together=together) for group in self._compressed]
        if together:
            self._loss_scale.end_step(finite)
        self.state.keep_step([finite] if together else kept)
        return {name: factors for group in self._compressed for name, factors in group.averages.items()}

    def _forget_gradients(self) -> None:
        # At the end of a step, or they would stay in memory, also when DDP makes new buckets; and at the beginning,
        # since an exception may have broken off the last backward pass.
        self._started = 0
        self._wait()
        for exact in self._exact:
            exact.forget()
        for compressed in self._compressed:
            compressed.forget()

    def _wait(self) -> None:
        """Wait for what a source has packed itself."""
        averaging, self._averaging = self._averaging, []
        for work in averaging:
            work.wait()
