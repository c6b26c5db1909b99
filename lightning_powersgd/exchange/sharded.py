"""FSDP2 as a source of gradients: each shard is a matrix of its own, averaged over the replicas of the shard.

A model is sharded over the devices of a machine (``fully_shard`` on a mesh of one dimension), and every machine holds a
replica. In the backward pass FSDP reduce-scatters gradients inside the machine, exactly, and calls the sharded
parameters' ``register_post_accumulate_grad_hook``: there a shard's gradient is taken in, and goes compressed between
the machines, among the ranks that hold the same shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.parameters import parameter_name, require_values
from lightning_powersgd.compressor.plan import DEFAULT_GROUP_BYTES
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.view import as_real
from lightning_powersgd.exchange.core import GradientExchange

# FSDP2 calls hooks on sharded parameters since then.
if torch.__version__ < (2, 6):  # type: ignore[operator]
    raise ImportError(f"Sharded models need PyTorch 2.6 or later, and this is {torch.__version__}. Update PyTorch.")

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def attach_powersgd_to_shards(
    model: nn.Module,
    config: PowerSGDConfig,
    replicas: dist.ProcessGroup | DeviceMesh,
    judges: dist.ProcessGroup | None = None,
    group_bytes: int = DEFAULT_GROUP_BYTES,
) -> ShardedGradients:
    """Make a model that FSDP2 has sharded exchange its gradients between replicas with PowerSGD.

    Works without Lightning. Every rank must call it, after `fully_shard` and before the first forward pass.

    Args:
        model: sharded by `fully_shard` over a mesh of one dimension; also its root, so that no parameter is left out.
        config: the settings. A rank is that of a shard.
        replicas: the ranks that hold the same shard as this one, as a group or as a mesh of one dimension. Their
            parameters must be equal.
        judges: the ranks that hold a replica together with this one. ``None``: those of the model's mesh. With tensor
            parallelism they are more, and must be given.
        group_bytes: gradient bytes of a shard after which a group of parameters that travel together is closed.
            Smaller: communication starts earlier, in more messages.

    Returns:
        What hands the gradients over; its ``exchange`` has the state that a checkpoint needs.

    Raises:
        ValueError: if the model is not sharded by FSDP2, or only in part, or over a mesh that replicates it already, or
            if its shards are kept in main memory; if the shards do not fit the settings (see `PowerSGDState`).
    """
    sharded = _sharded_parameters(model)
    shards = {
        name: local_shard(parameter).requires_grad_(parameter.requires_grad) for name, parameter in sharded.items()
    }
    state = PowerSGDState(shards.items(), config, group_bytes, arrival=_arrival(model, shards))
    if judges is None:
        judges = next(parameter.device_mesh.get_group() for parameter in sharded.values())
    exchange = GradientExchange(
        state,
        replicas.get_group() if isinstance(replicas, DeviceMesh) else replicas,
        follow_use_of={name: sharded[name] for name in state.parameters},
        judges=judges if dist.get_world_size(judges) > 1 else None,
    )
    return ShardedGradients(exchange, sharded, _roots(model), judges)


class ShardedGradients:
    """Hands the gradients of shards to an exchange, as FSDP2's backward pass makes them.

    How often the backward pass brings a parameter's gradient is learnt in the first pass that is synchronised, at the
    end of which all gradients are taken in. From then on each is taken in when the last of its parts has come, so that
    the exchange runs beside the rest of the pass.

    A parameter that the loss does not reach has no gradient with FSDP2. Where another replica has one, it is given that
    of the average; where none has, it stays without.

    Args:
        exchange: of the local shards.
        parameters: the sharded parameters by name.
        roots: the outermost modules that were sharded.
        shards: the ranks that hold a replica together with this one.

    Attributes:
        exchange: what averages the gradients.
        synchronises: whether the next backward pass ends a step. Set it to False for passes whose gradients only
            accumulate; these are reduced inside the machine all the same.
        parameters: the trainable ones by name.
        shards: the ranks that hold a replica together with this one.
        left_over: errors by name, of this rank's shards, that are added to the next gradients: of shards that were
            compressed where a checkpoint was saved, and here are too small for it.
    """

    def __init__(
        self,
        exchange: GradientExchange,
        parameters: Mapping[str, DTensor],
        roots: Iterable[nn.Module],
        shards: dist.ProcessGroup,
    ) -> None:
        self.exchange = exchange
        self.synchronises = True
        self.shards = shards
        self.parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        self.left_over: dict[str, Tensor] = {}
        self._expected: Counter[str] | None = None
        self._arrived: Counter[str] = Counter()
        self._taken: set[str] = set()
        self._pass: int | None = None
        self._opened_by_output = False
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._arrive(name))  # type: ignore[no-untyped-call]
            for name, parameter in self.parameters.items()
        ]
        # After those of FSDP2, which queues the end of its backward pass when the pass comes to the model's output.
        watch = torch.compiler.disable(self._watch)  # type: ignore[no-untyped-call]
        self._handles += [root.register_forward_hook(watch) for root in roots]

    def retire(self) -> None:
        """Leave the gradients to FSDP2 again; the exchange keeps its state for a last checkpoint."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.exchange.retire()

    def _watch(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG002  # a forward hook's arguments
        """Let a backward pass begin at the output of a forward pass."""
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._at_output)  # type: ignore[no-untyped-call]

    def _at_output(self, _: Tensor) -> None:
        if self.synchronises:
            self._open_pass()
            self._opened_by_output = True

    def _open_pass(self) -> None:
        """Begin a backward pass, if it is another one than before, which an exception may have broken off."""
        number = torch._C._current_graph_task_id()
        if number != self._pass:
            self._pass, self._arrived, self._taken = number, Counter(), set()
            self._opened_by_output = False
            Variable._execution_engine.queue_callback(self._end_pass)

    def _arrive(self, name: str) -> None:
        """Take note that a gradient, or a part of it, has come."""
        if not self.synchronises:
            return
        # Where blocks are recomputed, parts of a pass may have numbers of their own.
        if not self._opened_by_output:
            self._open_pass()
        if not self._arrived:
            self._require_as_attached()
            self.exchange.begin_step()
        self._arrived[name] += 1
        if name in self._taken:
            raise RuntimeError(
                f"The gradient of {name!r} came more often in this backward pass than in the ones before. PowerSGD"
                " needs each sharded module to be run as often in every step."
            )
        if self._expected is not None and self._arrived[name] == self._expected[name]:
            self._take(name)
            self.exchange.advance()

    def _end_pass(self) -> None:
        """Take in what is left, wait for the averages, and let parameters without a gradient have them."""
        self._pass, self._opened_by_output = None, False
        if not self._arrived:
            # FSDP2 was told to keep the gradients of this pass to itself.
            self._require_that_hooks_are_called()
            return
        substitutes: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                substitutes[name] = torch.zeros_like(local_shard(parameter))
                self.exchange.take(self._shard(name), substitutes[name])
            elif name not in self._taken:
                self._take(name)
        # Collectives must have one order on all ranks: now all groups have started on each of them.
        self.exchange.advance()
        used = self._ask_who_has(substitutes)
        self.exchange.end_step()
        self._expected = self._arrived
        for name in used():
            self.parameters[name].grad = as_sharded(substitutes[name], self.parameters[name])

    def _take(self, name: str) -> None:
        gradient = self.parameters[name].grad
        assert gradient is not None
        self._taken.add(name)
        shard = local_shard(gradient)
        if name in self.left_over:
            shard.add_(self.left_over.pop(name))
        self.exchange.take(self._shard(name), shard)

    def _shard(self, name: str) -> Tensor:
        return self.exchange.state.parameters[name]

    def _ask_who_has(self, missing: Collection[str]) -> Callable[[], list[str]]:
        """Ask which parameters have a gradient in any replica, and give what waits for the answer for those missing."""
        there = [name not in missing for name in self.parameters]
        flags = torch.tensor(there, dtype=torch.uint8, device=self.exchange.state.device)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.exchange.process_group, async_op=True)

        def answer() -> list[str]:
            if work is not None:
                work.wait()
            if not missing:
                return []
            return [
                name for name, used in zip(self.parameters, flags.tolist(), strict=True) if used and name in missing
            ]

        return answer

    def _require_that_hooks_are_called(self) -> None:
        if self._expected is None and any(parameter.grad is not None for parameter in self.parameters.values()):
            raise RuntimeError(
                "The first backward pass has made gradients without calling the hooks of the sharded parameters, so"
                " that nothing can average them over the replicas. Compiled autograd does so in PyTorch 2.6 to 2.8:"
                " turn it off, or update PyTorch."
            )

    def _require_as_attached(self) -> None:
        frozen = [name for name, parameter in self.parameters.items() if not parameter.requires_grad]
        unfrozen = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        for name in frozen + unfrozen:
            raise RuntimeError(
                f"The parameter {name!r} was {'frozen' if name in frozen else 'unfrozen'} since PowerSGD was attached."
                " Call `retire()`, attach it anew, and load the state of the exchange before."
            )


def _sharded_parameters(model: nn.Module) -> dict[str, DTensor]:
    """Give the parameters of a sharded model by name, if PowerSGD can exchange their gradients.

    Raises:
        ValueError: naming what is not sharded, or not as it must be.
    """
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"The module {name!r} is wrapped in `FullyShardedDataParallel`, which cuts matrices anywhere. Shard it"
                " with `torch.distributed.fsdp.fully_shard` instead."
            )
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("The model is not sharded. Call `fully_shard` on its layers and on itself first.")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the root's parameters gathered
    parameters = {parameter_name(name): parameter for name, parameter in model.named_parameters()}
    require_values(parameters.items())
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise ValueError(
                    f"The parameter {name!r} is not sharded, so that nothing averages its gradient inside a machine."
                    " Call `fully_shard` on the whole model, too."
                )
            continue
        if parameter.placements[0].is_replicate():
            raise ValueError(
                f"The parameter {name!r} is replicated by FSDP already, on the mesh {parameter.device_mesh}: its"
                " gradients would go between machines uncompressed. Call `fully_shard` with the mesh of one machine's"
                ' devices only, such as `mesh["shard"]`, and give the other dimension as `replicas`.'
            )
        if parameter.device.type != parameter.device_mesh.device_type:
            raise ValueError(
                f"The parameter {name!r} is kept in main memory (`CPUOffloadPolicy`), where PowerSGD would be slow."
                " Leave out the `offload_policy` of `fully_shard`."
            )
    return {name: parameter for name, parameter in parameters.items() if isinstance(parameter, DTensor)}


def _arrival(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Order parameters as the backward pass makes their gradients: by sharded modules, the last first, the root's last.

    FSDP2 reduces the gradients of a sharded module together. Those that belong to the root itself, such as the
    embedding and the head, are reduced when the pass ends.
    """
    units = [parameter_name(name) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    order = {unit: place for place, unit in enumerate(sorted(units, key=lambda unit: (unit == "", -units.index(unit))))}

    def place_of(name: str) -> int:
        inside = [unit for unit in units if not unit or name.startswith(f"{unit}.")]
        return order[max(inside, key=len)]

    return sorted(names, key=place_of)


def _roots(model: nn.Module) -> list[nn.Module]:
    """Give the sharded modules that are not part of another one."""
    units = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    inner = {name for name in units for other in units if name != other and (not other or name.startswith(f"{other}."))}
    return [module for name, module in model.named_modules() if name in units.keys() - inner]


def local_shard(tensor: Tensor) -> Tensor:
    """Give this rank's shard, which shares memory with the whole."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def give_the_first_replicas(model: nn.Module, replicas: dist.ProcessGroup) -> None:
    """Give all replicas of a sharded model the first one's parameters and buffers, as DDP does."""
    first = dist.get_global_rank(replicas, 0)
    for tensor in (*model.parameters(), *model.buffers()):
        shard = local_shard(tensor) if isinstance(tensor, DTensor) else tensor.detach()
        if shard.numel():
            dist.broadcast(as_real(shard), first, group=replicas)


def as_sharded(shard: Tensor, parameter: DTensor) -> DTensor:
    """Take this rank's shard of a tensor for the whole, which is sharded as a parameter of its shape is."""
    whole: DTensor = DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return whole
