"""PowerGossip as a Lightning strategy: the trainer's lifecycle, and nothing else."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import networkx as nx
import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.utils import _sync_module_states
from torch.optim import Optimizer
from typing_extensions import override

from lightning_powersgd.compressor.parameters import require_values
from lightning_powersgd.exchange.agreement import require_agreement
from lightning_powersgd.exchange.gossip import GossipExchange, PowerGossipConfig
from lightning_powersgd.exchange.topology import ALL, Topology, make_topology, require_known
from lightning_powersgd.lightning_types import _PATH, CheckpointIO, ClusterEnvironment, Precision, pl
from lightning_powersgd.metrics.monitors import GossipMonitor
from lightning_powersgd.strategies.arguments import documented
from lightning_powersgd.strategies.average_model import AverageModel, assign, copies, tensors_of
from lightning_powersgd.strategies.shared import SharedLifecycle, temporary_files_beside

# Of a message when the first rank gives its model to all, as DDP has it.
_BROADCAST_BYTES = 250 * 2**20

# Of what a rank needs beside its own model to go on with the same bits.
_KEY = "powergossip"

# The model's entries in a checkpoint: with `WeightAveraging` the first is its average over time, the second the model.
_MODEL_STATES = ("state_dict", "current_model_state")


@documented(PowerGossipConfig, SharedLifecycle)
class PowerGossipStrategy(SharedLifecycle):
    """Decentralised training: every rank has its own model and talks to its neighbours only, by low-rank differences.

    Use it as ``Trainer(strategy=PowerGossipStrategy(topology="ring"))``, or by name as
    ``Trainer(strategy="powergossip")``. There is no all-reduce in a step. Each rank takes the optimizer's step with its
    own gradients, and then gossips with its neighbours (Vogels, Karimireddy and Jaggi, NeurIPS 2020, arXiv 2008.01425).

    Ranks may train on different data. Give each its own with ``Trainer(use_distributed_sampler=False)``, or the trainer
    divides a data set among them as always; all must have the same number of batches. Buffers, such as the statistics
    of batch normalisation, follow a rank's own data, and are averaged wherever the average model is used.

    Args:
        topology: who talks to whom: "ring", "torus", "hypercube", "exponential", "star", "complete", or
            "one_peer_exponential", with one neighbour a step, another in each; or pairs of linked ranks; or a networkx
            graph of ranks. More links: ranks agree sooner, for more bytes. Experimental: "all", without links, in which
            all ranks average their models together, in the same directions (low-rank averaging).
        weights: the mixing matrix, a row for each rank: symmetric, non-negative, rows that sum to 1, zero where there
            is no link. None takes Metropolis-Hastings weights.
        average_model: validate, test, predict with and save the average of the ranks' models, which then needs one
            all-reduce of it; also the optimizer states are saved as averages, so that any number of ranks can resume.
            Otherwise each rank uses its own model, and saves it to a file of its own: ``last.ckpt``,
            ``rank1-last.ckpt``, …
        log_metrics: log ``powergossip/bytes_sent``, ``link_bytes``, ``compression_ratio`` and ``consensus_distance`` at
            the trainer's cadence, without any callback being added by hand.
        timeout: how long a rank waits for a neighbour.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range. What depends on the number of ranks or on the model is found when the
            fit begins.
    """

    monitor = GossipMonitor
    registered_name = "powergossip"

    def __init__(
        self,
        topology: str | Sequence[Sequence[int]] | nx.Graph = "ring",
        rank: int | Mapping[str, int] = 1,
        iterations: int = 1,
        min_compression_ratio: float = 2.0,
        overlap: bool = False,
        comm_dtype: str | None = None,
        weights: Sequence[Sequence[float]] | None = None,
        average_model: bool = True,
        seed: int = 0,
        log_metrics: bool = True,
        prog_bar: bool = False,
        *,
        accelerator: pl.accelerators.Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        require_known(topology)
        self.config = PowerGossipConfig(rank, iterations, min_compression_ratio, overlap, comm_dtype, seed)
        self.config.require_possible(topology)
        if topology == ALL and weights is not None:
            raise ValueError("`weights` are those of links, and `topology='all'` has none. Leave `weights` out.")
        if not isinstance(average_model, bool):
            raise TypeError(f"`average_model={average_model!r}` is not a bool. Use True or False.")
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
        )
        self._graph = topology if isinstance(topology, str | nx.Graph) else list(topology)
        self._weights = weights
        self.average_model = average_model
        self._topology: Topology | None = None
        self._exchanges: dict[Optimizer, GossipExchange] = {}
        self._resumed = False
        self._saved_states: list[dict[str, Any]] = []
        self._average: AverageModel | None = None

    @property
    def topology(self) -> Topology | None:
        """The graph and weights of the current or the last fit; ``None`` before the first."""
        return self._topology

    @property
    def exchanges(self) -> list[GossipExchange]:
        """The exchanges of the current or the last fit, one for each optimizer."""
        return list(self._exchanges.values())

    @property
    @override
    def moment(self) -> str | None:
        if any(exchange.exchanging for exchange in self.exchanges):
            return None
        steps = sum(exchange.step_count for exchange in self.exchanges)
        lent = self._average is not None and self._average.is_lent
        return f"step {steps} with the average model" if lent else f"step {steps}"

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict)
        self._resumed = True
        self._saved_states = checkpoint.get(_KEY, [])

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        fitting, resumed, self._resumed = trainer.state.fn == "fit", self._resumed, False
        saved_states, self._saved_states = self._saved_states, []
        if fitting:
            require_values(self.lightning_module.named_parameters())
            self._exchanges = {}
            self.add_monitor(trainer)
        module = self.lightning_module
        self._average = AverageModel(module, self.root_device)
        # Setting up gives all ranks the first one's model.
        keeps_own = not self.average_model and (resumed or not fitting)
        own_model = copies(tensors_of(module)) if keeps_own else {}
        super().setup(trainer)
        assign(module, own_model)
        if not fitting:
            return
        for optimizer in self.optimizers:
            self._exchange_of(optimizer)
        assert self._topology is not None
        if self._topology.name == ALL:
            for exchange, state in zip(self.exchanges, saved_states, strict=False):
                exchange.load_state_dict(state)
        compressed = any(slot.rank for exchange in self.exchanges for slot in exchange.slots)
        say = rank_zero_info if compressed else rank_zero_warn
        named = self.lightning_module.named_parameters()
        summary = self.config.summary(named, all_ranks=self._topology.name == ALL)
        say(f"{summary}. It connects {self._topology.summary()}.")

    @override
    def configure_ddp(self) -> None:
        # The module is not wrapped, since nothing averages gradients. All ranks begin with the first one's model.
        self.require_equal_ranks(
            {f"the argument `{name}`": repr(value) for name, value in vars(self.config).items()}
            | {
                "the argument `topology`": _shown(self._graph),
                "the argument `weights`": repr(self._weights),
                "the argument `average_model`": repr(self.average_model),
            }
        )
        assert self.lightning_module is not None
        self._topology = make_topology(self._graph, self.world_size, self._weights)
        _give_the_first_ranks(self.lightning_module)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        require_agreement(
            {
                "the number of training batches (`Trainer(limit_train_batches=…)` makes it equal)": str(
                    trainer.num_training_batches
                ),
                "the step to begin with (the files of all ranks must be of one checkpoint)": str(trainer.global_step),
            }
        )

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: Any | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._exchange_of(optimizer).step()
        return output

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        assert self._average is not None
        if self.average_model and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._average.lend()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        assert self._average is not None
        self._average.take_back()

    @override
    def needs_all_ranks(self, checkpoint: Mapping[str, Any]) -> bool:
        return self.average_model and bool(self._exchanges)

    @override
    def complete_checkpoint(self, checkpoint: dict[str, Any], alone: bool) -> None:
        if not self.average_model and self._graph == ALL and self._exchanges:
            checkpoint[_KEY] = [exchange.state_dict() for exchange in self.exchanges]
        if not self.needs_all_ranks(checkpoint):
            return
        assert self._average is not None
        # Copies, since these dicts may be the model's and the optimizer's own. `copy` keeps the modules' versions, too,
        # which are an attribute.
        models = {name: copy.copy(checkpoint[name]) for name in _MODEL_STATES if name in checkpoint}
        checkpoint.update(models)
        if alone:
            checkpoint["state_dict"].update(self._average.own_values(checkpoint["state_dict"]))
            rank_zero_warn(
                "A checkpoint was saved with rank 0's own model: the average needs every rank, and not all of them came"
                " to save in the same step. Save on all ranks, not on rank 0 alone."
            )
            return
        self._average.average_in(models, writes=self.is_global_zero)
        for optimizer_state in checkpoint.get("optimizer_states", []):
            if "state" in optimizer_state:
                # Beside the parameters' states, it may have entries of another kind.
                states = optimizer_state["state"].items()
                by_parameter = {key: dict(state) for key, state in states if isinstance(state, Mapping)}
                optimizer_state["state"] = {**optimizer_state["state"], **by_parameter}
                self._average.average_in(by_parameter, writes=self.is_global_zero)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if not self.average_model and self.global_rank > 0:
            own_file = self._own_file(filepath)
            with temporary_files_beside(own_file):
                self.checkpoint_io.save_checkpoint(checkpoint, own_file, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not self.average_model and self.global_rank > 0:
            link = os.path.islink(checkpoint_path)
            own_file = self._own_file(os.path.realpath(checkpoint_path) if link else checkpoint_path)
            if _exists(own_file):
                checkpoint_path = own_file
            else:
                warnings.warn(
                    f"Rank {self.global_rank} has no {own_file}, and loads the model of {checkpoint_path}.",
                    stacklevel=2,
                )
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if not self.average_model and self.global_rank > 0:
            self.checkpoint_io.remove_checkpoint(self._own_file(filepath))

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        for exchange in self.exchanges:
            exchange.finish()
        if not any(exchange.step_count for exchange in self.exchanges):
            rank_zero_warn(
                "Nothing was gossiped: no optimizer took a step that the trainer knows of. In manual optimisation call"
                " `step()` of what `self.optimizers()` gives, not of the optimizers themselves."
            )
        if self.average_model:
            assert self._average is not None
            self._average.keep()

    @override
    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self._resumed = False
            if self._average is not None:
                self._average.forget()
            for exchange in self.exchanges:
                exchange.retire()

    def _exchange_of(self, optimizer: Optimizer) -> GossipExchange:
        """Give the exchange of an optimizer's parameters; a new one if others were frozen, unfrozen or added."""
        among = [value for group in optimizer.param_groups for value in group["params"] if value.requires_grad]
        exchange = self._exchanges.get(optimizer)
        if exchange is None or not exchange.is_among(among):
            assert self.lightning_module is not None
            assert self._topology is not None
            named = list(self.lightning_module.named_parameters())
            # This one's, and those of optimizers that it replaces.
            before = [other for other in self._exchanges if other is optimizer or other not in self.optimizers]
            if before:
                trainable = [name for name, parameter in named if parameter.requires_grad]
                require_agreement({"the parameters that are trainable": ", ".join(trainable)})
            exchange = GossipExchange(named, self._topology, self.config, among)
            for other in before:
                exchange.go_on_from(self._exchanges.pop(other))
            self._exchanges[optimizer] = exchange
        return exchange

    def _own_file(self, filepath: _PATH) -> str:
        # The rank comes first, or Lightning would take `last.rank1.ckpt` for the last checkpoint of all, and read the
        # number 11 from `hpc_ckpt_1.rank1.ckpt`.
        folder, name = os.path.split(filepath)
        return os.path.join(folder, f"rank{self.global_rank}-{name}")


def _give_the_first_ranks(module: torch.nn.Module) -> None:
    """Give all ranks the first one's parameters and buffers, as DDP does when it wraps a module."""
    group = dist.group.WORLD
    assert group is not None
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    _sync_module_states(module, group, _BROADCAST_BYTES, src=0, params_and_buffers_to_ignore=ignored)


def _exists(path: str) -> bool:
    filesystem, place = url_to_fs(path)
    there: bool = filesystem.exists(place)
    return there


def _shown(topology: str | Sequence[Sequence[int]] | nx.Graph) -> str:
    return repr(sorted(topology.edges, key=str)) if isinstance(topology, nx.Graph) else repr(topology)
