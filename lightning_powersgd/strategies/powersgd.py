"""PowerSGD as a Lightning strategy: the trainer's lifecycle, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_powersgd.compressor.config import (
    AUTO,
    CommDtype,
    Compress,
    PowerSGDConfig,
    Rank,
    floating_dtype,
    require_int,
)
from lightning_powersgd.compressor.parameters import require_values
from lightning_powersgd.exchange.agreement import require_alike
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.ddp import attach_powersgd
from lightning_powersgd.exchange.loss_scale import Scaler
from lightning_powersgd.lightning_types import STEP_OUTPUT, CheckpointIO, ClusterEnvironment, Precision, pl
from lightning_powersgd.metrics.monitors import CompressionMonitor
from lightning_powersgd.strategies.advice import GradientHooks, needs_exact_gradients
from lightning_powersgd.strategies.arguments import ddp_arguments, documented
from lightning_powersgd.strategies.automatic_rank import settle_ranks
from lightning_powersgd.strategies.checkpoint import CHECKPOINT_KEY, ERRORS_NOT_SAVED, load_exchange
from lightning_powersgd.strategies.equal_ranks import describe_exchange
from lightning_powersgd.strategies.never_slower import TrialReport
from lightning_powersgd.strategies.replicas import ReplicaCheck
from lightning_powersgd.strategies.scaler import find_scaler
from lightning_powersgd.strategies.shared import SharedLifecycle
from lightning_powersgd.strategies.untaken import UntakenGradients

log = logging.getLogger(__name__)

# Of a parameter, what DDP and the compressor look at when they are set up: whether it is trainable, dtype and strides.
_Kind = tuple[bool, torch.dtype, tuple[int, ...]]

_UNUSED_PARAMETERS = (
    "The loss that `training_step` returned does not depend on all of the parameters. If that is intended, let DDP look"
    " for unused ones: `strategy='powersgd_find_unused_parameters_true'` or"
    " `PowerSGDStrategy(find_unused_parameters=True)`."
)


@documented(PowerSGDConfig, SharedLifecycle)
class PowerSGDStrategy(SharedLifecycle):
    """Distributed data-parallel training with PowerSGD gradient compression.

    Use it as ``Trainer(strategy=PowerSGDStrategy())``, or by name as ``Trainer(strategy="powersgd")``. It is
    `lightning.pytorch.strategies.DDPStrategy` in everything but the exchange of gradients
    (Vogels, Karimireddy and Jaggi, NeurIPS 2019, arXiv 1905.13727).

    Args:
        log_metrics: log ``powersgd/compression_ratio``, ``bytes_sent``, ``bytes_saved`` and ``residual_ratio`` at the
            trainer's cadence, without any callback being added by hand.
        checkpoint_error_feedback: put the error buffers into checkpoints: one buffer a compressed parameter at any
            number of ranks. Without them a resumed run loses what had not been sent yet.
        check_replicas_every: synchronised backward passes after which the ranks compare a checksum of their parameters;
            0 never does. If they differ, which processors of different kinds or unequal numbers of threads can bring
            about, rank 0's parameters and optimizer states are given to all, with a warning.
        scaler: what the program multiplies its loss with, if it does so itself: a `torch.amp.GradScaler`, or anything
            with its method ``scale``. None looks for the trainer's, and then for one among the module's attributes.
        hierarchical: average exactly inside machines, and compressed between them. Of the arithmetic and of the memory
            for errors each of L ranks of a machine has about an L-th, at about twice the traffic inside it. All
            machines must have as many ranks.
        ddp_comm_state: not accepted, since PowerSGD keeps its own state.
        ddp_comm_hook: not accepted, since PowerSGD is itself the hook.
        ddp_comm_wrapper: not accepted; use ``comm_dtype``.
        model_averaging_period: not accepted, since replicas are always equal.
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

    monitor = CompressionMonitor
    registered_name = "powersgd"
    name_endings: ClassVar = {"": {}, "_find_unused_parameters_true": {"find_unused_parameters": True}}

    def __init__(
        self,
        rank: Rank | Mapping[str, Rank] = AUTO,
        turnaround: float | None = None,
        max_bytes: int | None = None,
        start_step: int = 0,
        min_compression_ratio: float = 2.0,
        alternate: bool = False,
        error_feedback: bool = True,
        warm_start: bool = True,
        error_dtype: torch.dtype | str | None = None,
        comm_dtype: CommDtype = None,
        seed: int = 0,
        compress: Compress | None = None,
        log_metrics: bool = True,
        prog_bar: bool = False,
        checkpoint_error_feedback: bool = True,
        check_replicas_every: int = 100,
        scaler: Scaler | None = None,
        hierarchical: bool = False,
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
        ddp_kwargs = ddp_arguments(
            PowerSGDStrategy,
            ddp_kwargs,
            bucket_cap_mb,
            ddp_comm_state=ddp_comm_state,
            ddp_comm_hook=ddp_comm_hook,
            ddp_comm_wrapper=ddp_comm_wrapper,
            model_averaging_period=model_averaging_period,
        )
        self.config = PowerSGDConfig(
            rank=rank,
            turnaround=turnaround,
            max_bytes=max_bytes,
            start_step=start_step,
            min_compression_ratio=min_compression_ratio,
            alternate=alternate,
            error_feedback=error_feedback,
            warm_start=warm_start,
            error_dtype=floating_dtype("error_dtype", error_dtype),
            comm_dtype=comm_dtype,
            seed=seed,
            compress=compress,
        )
        if not isinstance(hierarchical, bool):
            raise TypeError(f"`hierarchical={hierarchical!r}` is not a bool. Use True or False.")
        for name, given in (
            ("find_unused_parameters", find_unused_parameters),
            ("process_group", ddp_kwargs.get("process_group")),
        ):
            if hierarchical and given:
                raise ValueError(f"`{name}` is not possible with `hierarchical=True`. Leave one of them out.")
        require_int("check_replicas_every", check_replicas_every, minimum=0, remedy="Use 0 to never compare them.")
        super().__init__(
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
        self.scaler = scaler
        self.hierarchical = hierarchical
        self._exchange: GradientExchange | None = None
        self._hooked = True
        self._parameters: tuple[torch.nn.Parameter, ...] = ()
        self._kinds: tuple[_Kind, ...] = ()
        self._batches = 0
        self._replicas = ReplicaCheck(check_replicas_every)
        self._hooks = GradientHooks()
        self._untaken = UntakenGradients([])
        self._trials = TrialReport()

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
        if trainer.state.fn == "fit":
            assert self.lightning_module is not None
            require_values(self.lightning_module.named_parameters())
            # Like the optimizers, a new fit starts afresh, unless a checkpoint is resumed.
            self._exchange, self._hooked, self._batches = None, True, 0
            self._replicas = ReplicaCheck(self.check_replicas_every)
            self.add_monitor(trainer)
        super().setup(trainer)

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        # Before DDP makes its own checks, which leave the ranks that agree with rank 0 waiting for those that do not.
        self.require_equal_ranks(self._arguments())
        self._parameters = tuple(self.lightning_module.parameters())
        self._wrap()

    def _wrap(self) -> None:
        """Wrap the module in `DistributedDataParallel`."""
        self._kinds = self._kinds_now()
        # A second pass with static graph and manual optimization starts over with DDP's first-step delay.
        self._pl_static_graph_delay_done = False
        super().configure_ddp()

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only, and says nothing elsewhere.
        if not self._hooked:
            return
        assert isinstance(self.model, DistributedDataParallel)
        previous = self._exchange
        devices = self.num_processes if self.hierarchical else None
        self._exchange = attach_powersgd(
            self.model, self.config, self._find_scaler(), guard_layouts=False, devices=devices
        )
        if previous is not None:
            # Its ranks stay. What a parameter that is frozen now had is kept as a checkpoint would keep it, but on each
            # rank its own.
            self._exchange.load_state_dict(previous.state.state_dict())
            self._exchange.state.exact = previous.state.exact
            previous.retire()

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        self._untaken = UntakenGradients(self.optimizers)
        if self._exchange is not None:
            self._exchange.state.exact = needs_exact_gradients(self.optimizers)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._exchange is None:
            return
        assert self.lightning_module is not None
        settle_ranks(self._exchange, self.lightning_module.trainer, self.optimizers)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._follow_parameters()
        self._follow_exchange()
        if self._exchange is not None:
            if self._batches < 2:
                # Some programs make it when training starts, or in the first step.
                self._exchange.follow(self._find_scaler())
            self._batches += 1
            self._hooks.look(self._exchange.state)
            self._trials.look(self._exchange.state.trial)
            self._replicas.check(self._exchange, self.optimizers)
        return super().training_step(*args, **kwargs)

    @override
    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        if self._watches_gradients():
            self._untaken.look()
        super().pre_backward(closure_loss)

    @override
    def post_backward(self, closure_loss: torch.Tensor) -> None:
        super().post_backward(closure_loss)
        if self._exchange is None:
            return
        if not self._hooked and self._synchronises:
            self._exchange.pass_step()
        if self._watches_gradients():
            self._untaken.averaged(self._exchange)

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # Said here as well since a GradScaler may skip the step.
        self._untaken.taken_by(optimizer)
        return super().optimizer_step(optimizer, *args, **kwargs)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._exchange is not None:
            # Now that all ranks are here: whichever of them saves a checkpoint later may do so without the others.
            if self.checkpoint_error_feedback:
                self._exchange.average_errors()
            self._exchange.gather_state(error_feedback=self.checkpoint_error_feedback)

    @override
    def needs_all_ranks(self, checkpoint: Mapping[str, Any]) -> bool:
        # A weights-only checkpoint has no optimizer states, and none of ours either.
        if self._exchange is None or "optimizer_states" not in checkpoint:
            return False
        averages = self.checkpoint_error_feedback and not self._exchange.state.averaged
        return averages or self._exchange.needs_all_ranks

    @override
    def complete_checkpoint(self, checkpoint: dict[str, Any], alone: bool) -> None:
        if self._exchange is not None and "optimizer_states" in checkpoint:
            with_errors = self.checkpoint_error_feedback
            if alone and self.needs_all_ranks(checkpoint):
                rank_zero_warn(ERRORS_NOT_SAVED)
                with_errors = False
            if with_errors:
                self._exchange.average_errors()
            if not alone:
                self._exchange.gather_state(error_feedback=with_errors)
            checkpoint[CHECKPOINT_KEY] = self._exchange.saved(error_feedback=with_errors)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._exchange is None:
            return
        load_exchange(self._exchange, checkpoint.get(CHECKPOINT_KEY))

    @override
    def on_exception(self, exception: BaseException) -> None:
        # In the words of this strategy's arguments, where `DDPStrategy` has those of its own.
        unfinished = "Expected to have finished reduction in the prior iteration"
        exception.args = tuple(
            _UNUSED_PARAMETERS if isinstance(arg, str) and unfinished in arg else arg for arg in exception.args
        )

    @override
    def teardown(self) -> None:
        super().teardown()
        if self._exchange is not None:
            # As Lightning does with the optimizers.
            self._exchange.retire()

    @property
    def _synchronises(self) -> bool:
        """Whether a backward pass averages gradients now, rather than let them accumulate on each rank for itself."""
        assert isinstance(self.model, DistributedDataParallel)
        return self.model.require_backward_grad_sync

    def _watches_gradients(self) -> bool:
        """Whether gradients may be compressed that no optimizer takes."""
        module = self.lightning_module
        return module is not None and not module.automatic_optimization

    def _arguments(self) -> dict[str, str]:
        """Describe what must be the same on every rank, beside the model."""
        arguments = describe_exchange(self.config, self._ddp_kwargs, self.root_device)
        for name in ("checkpoint_error_feedback", "check_replicas_every", "hierarchical"):
            arguments[f"the argument `{name}`"] = repr(getattr(self, name))
        return arguments

    def _find_scaler(self) -> Scaler | None:
        scaler: Scaler | None = self.scaler or getattr(self.precision_plugin, "scaler", None)
        module = self.lightning_module
        if scaler is not None or module is None or module.automatic_optimization:
            return scaler
        return find_scaler(module)

    def _kinds_now(self) -> tuple[_Kind, ...]:
        return tuple((p.requires_grad, p.dtype, p.stride()) for p in self._parameters)

    def _follow_parameters(self) -> None:
        """Wrap the module anew when parameters were frozen, unfrozen or laid out otherwise since DDP looked at them.

        DDP decides at its construction which gradients it averages. It would leave the replicas of parameters unfrozen
        later to drift apart without a word, and wait forever for the gradients of those frozen later. A gradient has
        the dtype and the layout in memory of its parameter, and so have the buffers of errors.
        """
        kinds = self._kinds_now()
        if kinds == self._kinds or not isinstance(self.model, DistributedDataParallel):
            return
        if not self._synchronises:
            # The pass that does is early enough.
            return
        pairs = zip(kinds, self._kinds, strict=True)
        only_frozen = all(now in (before, (False, *before[1:])) for now, before in pairs)
        if only_frozen and self.model.find_unused_parameters and not self.model.static_graph:
            return
        log.debug("parameters are of another kind: wrapping the module in DistributedDataParallel again")
        what = "parameters that are trainable, their dtypes and their memory layouts"
        require_alike(repr(kinds), what, self.root_device, self.process_group)
        # The ranks have parameters and buffers alike; unless a parameter changed its dtype after the forward pass:
        # its gradient DDP then leaves to each rank.
        unchanged = all(now[1:] == before[1:] for now, before in zip(kinds, self._kinds, strict=True))
        self._hooked = True
        self._wrap_again(init_sync=not unchanged)

    def _follow_exchange(self) -> None:
        """Wrap the module anew without a hook while nothing is compressed, and with it before something is again.

        DDP divides gradients by the number of ranks while it copies them, and a hook needs a pass of its own for that.
        """
        if self._exchange is None or self.hierarchical:
            return
        if self._hooked == self._exchange.idle and self._synchronises:
            self._hooked = not self._hooked
            self._wrap_again(init_sync=False)

    def _wrap_again(self, init_sync: bool) -> None:
        """Wrap the module in another `DistributedDataParallel`, between two steps.

        Args:
            init_sync: let DDP give rank 0's parameters and buffers to all ranks.
        """
        assert isinstance(self.model, DistributedDataParallel)
        self.model.reducer._remove_autograd_hooks()
        self.model = self.lightning_module
        given, self._ddp_kwargs = self._ddp_kwargs, {**self._ddp_kwargs, "init_sync": init_sync}
        try:
            self._wrap()
        finally:
            self._ddp_kwargs = given
