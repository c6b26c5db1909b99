"""PowerSGD as a Lightning strategy: the trainer's lifecycle, and nothing else."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import _augment_message
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_powersgd import native
from lightning_powersgd.agreement import repair_replicas, replicas_agree
from lightning_powersgd.base_strategy import BaseStrategy
from lightning_powersgd.hook import GradientExchange, attach_powersgd
from lightning_powersgd.metrics import CompressionMonitor
from lightning_powersgd.plan import PowerSGDConfig, floating_dtype, require_int
from lightning_powersgd.state import require_values
from lightning_powersgd.untaken import UntakenGradients

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "powersgd"

# What cannot be had beside PowerSGD, and why.
_CONFLICTS = {
    "ddp_comm_hook": "PowerSGD is itself the communication hook, and DDP takes only one",
    "ddp_comm_state": "it belongs to another communication hook, and PowerSGD keeps its own state",
    "ddp_comm_wrapper": "it would change the gradients' dtype around the hook; use `comm_dtype` instead",
    "model_averaging_period": "it averages replicas that drift apart, and PowerSGD's are equal after every step",
    "mixed_precision": "it needs DDP's only communication hook; use `Trainer(precision=...)` instead",
    "skip_all_reduce_unused_params": "PowerSGD needs every bucket in every step; use `find_unused_parameters` alone",
}


class PowerSGDStrategy(BaseStrategy):
    """Distributed data-parallel training with PowerSGD gradient compression.

    Use it as ``Trainer(strategy=PowerSGDStrategy(rank=2))``, or by name as ``Trainer(strategy="powersgd")``. It is
    `lightning.pytorch.strategies.DDPStrategy` in everything but the exchange of gradients
    (Vogels, Karimireddy and Jaggi, NeurIPS 2019, arXiv 1905.13727).

    Args:
        rank: columns kept of each factor. Higher: better approximation, but more bytes and more arithmetic, both in
            proportion. A mapping gives parameter-name patterns (``fnmatch``) a rank of their own: the first match
            wins, 0 sends a parameter whole, ``"*"`` stands for the rest; a parameter that no pattern matches is sent
            whole.
        start_step: synchronised backward passes that are averaged exactly before compression starts. Raise it if the
            loss jumps at the beginning of training.
        min_compression_ratio: a matrix whose dense / sent ratio is below this is sent whole. Higher: fewer matrices are
            compressed, and less arithmetic is spent on those that save little. At least 1.
        alternate: send only one of the two factors on successive steps, in turn: one all-reduce a step and half the
            bytes, at a slower-moving approximation.
        error_feedback: add what one step did not send to the next step's gradient. Costs one buffer of the size of the
            compressed gradients; without it, low ranks reach a worse loss.
        warm_start: start from the factor of the last step instead of a random one.
        error_dtype: dtype of the error buffers, such as "bfloat16" to halve their memory. None is the gradient's.
        comm_dtype: dtype of the factors on the wire, such as "bfloat16" to halve their bytes. None is the gradient's.
        seed: of the first random factors.
        log_metrics: log ``powersgd/compression_ratio``, ``bytes_sent``, ``bytes_saved`` and ``residual_ratio`` at the
            trainer's cadence, without any callback being added by hand.
        prog_bar: show the compression ratio in the progress bar. Needs ``log_metrics``.
        checkpoint_error_feedback: put the error buffers into checkpoints: one buffer a compressed parameter at any
            number of ranks. Without them a resumed run loses what had not been sent yet.
        check_replicas_every: synchronised backward passes after which the ranks compare a checksum of their parameters;
            0 never does. If they differ, which processors of different kinds or unequal numbers of threads can bring
            about, rank 0's parameters and optimizer states are given to all, with a warning.
        accelerator: as in ``DDPStrategy``; set by the trainer.
        parallel_devices: as in ``DDPStrategy``; set by the trainer.
        cluster_environment: as in ``DDPStrategy``; set by the trainer.
        checkpoint_io: as in ``DDPStrategy``.
        precision_plugin: as in ``DDPStrategy``; set by the trainer.
        ddp_comm_state: not accepted, since PowerSGD keeps its own state.
        ddp_comm_hook: not accepted, since PowerSGD is itself the hook.
        ddp_comm_wrapper: not accepted; use ``comm_dtype``.
        model_averaging_period: not accepted, since replicas are always equal.
        process_group_backend: such as "nccl" or "gloo"; None chooses by the device.
        timeout: of collectives.
        start_method: how processes are started: "popen", "spawn", "fork" or "forkserver".
        find_unused_parameters: let DDP look for parameters that the loss does not depend on.
        static_graph: promise DDP that the same parameters are used in every step.
        gradient_as_bucket_view: let gradients live in DDP's buckets, which saves a copy of them.
        bucket_cap_mb: MiB of gradients in a bucket, and in a group of parameters whose factors travel together. None is
            DDP's default, 25. Smaller: communication starts earlier, in more messages.
        **ddp_kwargs: any other argument of ``torch.nn.parallel.DistributedDataParallel``.

    Raises:
        TypeError: for an unknown argument, or one of the wrong type.
        ValueError: for an argument out of range, or one that cannot be had beside PowerSGD.
    """

    registered_name = "powersgd"
    name_endings: ClassVar = {"": {}, "_find_unused_parameters_true": {"find_unused_parameters": True}}

    def __init__(
        self,
        rank: int | Mapping[str, int] = 2,
        start_step: int = 0,
        min_compression_ratio: float = 2.0,
        alternate: bool = False,
        error_feedback: bool = True,
        warm_start: bool = True,
        error_dtype: torch.dtype | str | None = None,
        comm_dtype: torch.dtype | str | None = None,
        seed: int = 0,
        log_metrics: bool = True,
        prog_bar: bool = False,
        checkpoint_error_feedback: bool = True,
        check_replicas_every: int = 100,
        *,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        ddp_comm_state: object | None = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        bucket_cap_mb: float | None = None,
        **ddp_kwargs: Any,
    ) -> None:
        _reject_conflicts(
            ddp_comm_state=ddp_comm_state,
            ddp_comm_hook=ddp_comm_hook,
            ddp_comm_wrapper=ddp_comm_wrapper,
            model_averaging_period=model_averaging_period,
            **ddp_kwargs,
        )
        _reject_unknown(ddp_kwargs)
        self.config = PowerSGDConfig(
            rank=rank,
            start_step=start_step,
            min_compression_ratio=min_compression_ratio,
            alternate=alternate,
            error_feedback=error_feedback,
            warm_start=warm_start,
            error_dtype=floating_dtype("error_dtype", error_dtype),
            comm_dtype=floating_dtype("comm_dtype", comm_dtype),
            seed=seed,
        )
        require_int("check_replicas_every", check_replicas_every, minimum=0, remedy="Use 0 to never compare them.")
        if bucket_cap_mb is not None:
            if not bucket_cap_mb > 0:
                raise ValueError(
                    f"`bucket_cap_mb={bucket_cap_mb}` is not positive. Use a number of MiB, or None for 25."
                )
            ddp_kwargs["bucket_cap_mb"] = bucket_cap_mb
        super().__init__(
            monitor=CompressionMonitor,
            log_metrics=log_metrics,
            prog_bar=prog_bar,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **ddp_kwargs,
        )
        self.checkpoint_error_feedback = checkpoint_error_feedback
        self.check_replicas_every = check_replicas_every
        self._exchange: GradientExchange | None = None
        self._parameters: tuple[torch.nn.Parameter, ...] = ()
        self._trainable: tuple[bool, ...] = ()
        self._next_check = 0
        self._untaken = UntakenGradients([])

    @property
    def exchange(self) -> GradientExchange | None:
        """The exchange of the current or the last fit, with the compressor's state; ``None`` before the first."""
        return self._exchange

    @property
    @override
    def process_group(self) -> dist.ProcessGroup | None:
        group: dist.ProcessGroup | None = self._ddp_kwargs.get("process_group")
        return group

    @property
    @override
    def moment(self) -> str | None:
        if self._exchange is None:
            return "no step"
        return None if self._exchange.exchanging else f"step {self._exchange.state.step}"

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            assert self.lightning_module is not None
            require_values(self.lightning_module.named_parameters())
            # Like the optimizers, a new fit starts afresh, unless a checkpoint is resumed.
            self._exchange = None
            self._next_check = self.check_replicas_every
            self.add_monitor(trainer)
        super().setup(trainer)

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        # Before DDP makes its own checks, which leave the ranks that agree with rank 0 waiting for those that do not.
        self.require_equal_ranks(self._arguments())
        self._parameters = tuple(self.lightning_module.parameters())
        self._trainable = self._trainable_now()
        # A second pass with static graph and manual optimization starts over with DDP's first-step delay.
        self._pl_static_graph_delay_done = False
        super().configure_ddp()

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only, and says nothing elsewhere.
        assert isinstance(self.model, DistributedDataParallel)
        previous = self._exchange
        self._exchange = attach_powersgd(self.model, self.config, getattr(self.precision_plugin, "scaler", None))
        state = self._exchange.state
        if previous is not None:
            # What a parameter that is frozen now had is kept as a checkpoint would keep it.
            previous.average_errors()
            state.load_state_dict(previous.state.state_dict())
            previous.retire()
        say = rank_zero_info if any(state.plan.compressed) else rank_zero_warn
        say(f"{state.plan.summary(alternate=self.config.alternate)}.")

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        self._untaken = UntakenGradients(self.optimizers)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._follow_frozen_parameters()
        self._check_replicas()
        return super().training_step(*args, **kwargs)

    @override
    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        if self._watches_gradients():
            self._untaken.look()
        super().pre_backward(closure_loss)

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        if self._exchange is not None and self._watches_gradients():
            self._untaken.averaged(self._exchange)

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # Said here as well since a GradScaler may skip the step.
        self._untaken.taken_by(optimizer)
        return super().optimizer_step(optimizer, *args, **kwargs)

    @override
    def complete_checkpoint(self, checkpoint: dict[str, Any], alone: bool) -> None:
        # A weights-only checkpoint has no optimizer states, and none of ours either.
        if self._exchange is not None and "optimizer_states" in checkpoint:
            with_errors = self.checkpoint_error_feedback
            if with_errors and alone:
                rank_zero_warn(
                    "A checkpoint was saved on an exception or a signal without PowerSGD's error buffers: their mean"
                    " needs every rank, and not all of them came to save in the same step."
                )
                with_errors = False
            if with_errors:
                self._exchange.average_errors()
            checkpoint[CHECKPOINT_KEY] = self._exchange.state.state_dict(error_feedback=with_errors)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._exchange is None:
            return
        if CHECKPOINT_KEY not in checkpoint:
            rank_zero_info("The checkpoint has no PowerSGD state: error buffers start empty.")
            return
        not_carried_over = self._exchange.state.load_state_dict(checkpoint[CHECKPOINT_KEY])
        if not_carried_over:
            lines = "\n  ".join(not_carried_over)
            rank_zero_warn(f"Not all of the checkpoint's PowerSGD state could be carried over:\n  {lines}")

    @override
    def on_exception(self, exception: BaseException) -> None:
        _augment_message(
            exception,
            pattern=".*Expected to have finished reduction in the prior iteration.*",
            new_message=(
                "The loss that `training_step` returned does not depend on all of the parameters. If that is intended,"
                " let DDP look for unused ones: `strategy='powersgd_find_unused_parameters_true'` or"
                " `PowerSGDStrategy(find_unused_parameters=True)`."
            ),
        )

    @override
    def teardown(self) -> None:
        super().teardown()
        if self._exchange is not None:
            # As Lightning does with the optimizers.
            self._exchange.retire()

    def _watches_gradients(self) -> bool:
        """Whether gradients may be compressed that no optimizer takes."""
        module = self.lightning_module
        return module is not None and not module.automatic_optimization

    def _check_replicas(self) -> None:
        """Compare the replicas if it is time to, and give rank 0's to all if they differ."""
        exchange = self._exchange
        if exchange is None or not self.check_replicas_every or exchange.state.step < self._next_check:
            return
        step = exchange.state.step
        self._next_check = step + self.check_replicas_every
        group = exchange.process_group
        if exchange.world_size == 1 or replicas_agree(exchange.state.parameters, group):
            return
        deviations = repair_replicas(exchange.state.parameters | self._optimizer_tensors(), group)
        worst = max(deviations, key=lambda name: deviations[name], default="none")
        rank_zero_warn(
            f"After {step} steps the replicas were no longer equal: {len(deviations)} tensors deviated from rank 0's,"
            f" most of all {worst!r}, by {deviations.get(worst, 0.0):.1e} of its norm. All ranks go on with rank 0's."
            " Around 1e-6 it is rounding, from processors of different kinds or unequal numbers of threads, and does no"
            " harm; more comes from code that changes parameters on each rank in its own way."
        )

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Give the optimizers' tensors, named in an order that is the same on every rank."""
        assert self._exchange is not None
        names = {parameter: name for name, parameter in self._exchange.state.parameters.items()}
        return {
            f"{key} of {name} in optimizer {index}": value
            for index, optimizer in enumerate(self.optimizers)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (name := names.get(parameter)) is not None
            for key, value in (optimizer.state.get(parameter) or {}).items()
            if isinstance(value, torch.Tensor)
        }

    def _arguments(self) -> dict[str, str]:
        """Describe what must be the same on every rank, beside the model."""
        arguments = {f"the argument `{name}`": repr(value) for name, value in self.config.to_dict().items()}
        for name in ("find_unused_parameters", "static_graph", "bucket_cap_mb"):
            arguments[f"the argument `{name}`"] = repr(self._ddp_kwargs.get(name))
        for name in ("checkpoint_error_feedback", "check_replicas_every"):
            arguments[f"the argument `{name}`"] = repr(getattr(self, name))
        if self.root_device.type == "cpu":
            # The averaged gradient is computed on each rank, and compiled code rounds otherwise than PyTorch's.
            arithmetic = "compiled code" if native.library() else "PyTorch's operations"
            arguments[f"the arithmetic ({native.SWITCH}=0 is PyTorch's everywhere)"] = arithmetic
        return arguments

    def _trainable_now(self) -> tuple[bool, ...]:
        return tuple(parameter.requires_grad for parameter in self._parameters)

    def _follow_frozen_parameters(self) -> None:
        """Wrap the module anew when parameters were unfrozen or frozen since DDP looked at them.

        DDP decides at its construction which gradients it averages. It would leave the replicas of parameters unfrozen
        later to drift apart without a word, and wait forever for the gradients of those frozen later.
        """
        trainable = self._trainable_now()
        if trainable == self._trainable or not isinstance(self.model, DistributedDataParallel):
            return
        if not self.model.require_backward_grad_sync:
            # Gradients accumulate, on each rank for itself. The pass that synchronises them is early enough.
            return
        unfrozen = any(now and not before for now, before in zip(trainable, self._trainable, strict=True))
        if unfrozen or self.model.static_graph or not self.model.find_unused_parameters:
            log.debug("parameters were frozen or unfrozen: wrapping the module in DistributedDataParallel again")
            self.model.reducer._remove_autograd_hooks()
            self.model = self.lightning_module
            self.configure_ddp()


def _reject_conflicts(**arguments: Any) -> None:
    for name, why in _CONFLICTS.items():
        if arguments.get(name) not in (None, False):
            raise ValueError(f"`{name}` cannot be used with PowerSGDStrategy: {why}. Remove `{name}`.")


def _reject_unknown(ddp_kwargs: Mapping[str, Any]) -> None:
    ours = inspect.signature(PowerSGDStrategy.__init__).parameters
    known = {*ours, *inspect.signature(DistributedDataParallel.__init__).parameters} - {"self", "ddp_kwargs"}
    known -= {"module", "device_ids"}  # the trainer's
    for name in ddp_kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else "See the documentation of PowerSGDStrategy for a list."
            raise TypeError(f"PowerSGDStrategy has no argument `{name}`. {hint}")
