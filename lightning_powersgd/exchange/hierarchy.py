"""Machines with several devices: exact averages inside, compressed ones between.

Each rank of a machine owns some of the parameters, so that all have about as much to do: whole ones, but for those that
are a large part of the model and are cut (see `blocks`). A gradient is
averaged inside the machine and goes to its owner; owners of equal number average it over the machines with PowerSGD;
and each sends what came of it to the others of its machine. The mathematics is that of PowerSGD between machines, whose
gradients are the means over their ranks. Of arithmetic and of memory for errors, each of L ranks has about an L-th.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_powersgd.compressor.checkpoint import require_readable
from lightning_powersgd.compressor.config import PowerSGDConfig, require_int
from lightning_powersgd.compressor.parameters import parameter_name
from lightning_powersgd.compressor.plan import Plan, Slot, make_plan
from lightning_powersgd.compressor.precision import full_precision
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.view import as_real
from lightning_powersgd.exchange.agreement import all_or_none, of_all_ranks, require_agreement
from lightning_powersgd.exchange.blocks import Block, in_blocks, joined, named_tensors, parted
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.loss_scale import Scaler
from lightning_powersgd.exchange.matrix import write_average

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work

# A parameter, or a block of one, and its gradient.
Pair: TypeAlias = tuple[Tensor, Tensor]


class OwnedExchange(GradientExchange):
    """Averages the gradients of the parameters that a rank owns, over the ranks of other machines that own them, too.

    Every rank must make it at the same time.

    Args:
        named_parameters: as `torch.nn.Module.named_parameters` gives them.
        config: the settings.
        group_bytes: as in `PowerSGDState`.
        scaler: as in `GradientExchange`.
        devices: ranks on each machine. They are numbered machine by machine.

    Raises:
        ValueError: if the number of ranks is not a multiple of the devices.
        RuntimeError: on every rank, if machines have unequal numbers of devices.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: PowerSGDConfig,
        group_bytes: int,
        scaler: Scaler | None,
        devices: int,
    ) -> None:
        self._whole = {parameter_name(name): parameter for name, parameter in named_parameters}
        self._blocks = in_blocks(self._whole.items())
        self._named = named_tensors(self._blocks)
        self._blocks_of = {parameter: self._blocks[name] for name, parameter in self._whole.items()}
        require_int("devices", devices, minimum=1, remedy="Give the number of ranks on each machine.")
        between, self._inside = _groups(devices)
        self._machine, self._number = dist.get_rank(between), dist.get_rank(self._inside)
        self._devices = devices
        # Of frozen ones, too, so that they stay where they are when they are unfrozen.
        owners = owners_of(self._named, devices)
        self._owner_of = {parameter: owners[name] for name, parameter in self._named}
        self._ours = {name for name, owner in owners.items() if owner == self._number}
        self._gathered: dict[str, Any] | None = None
        self._compressed_step = False
        self._bytes_in_node = 0
        self._by_name = dict(self._named)
        state = PowerSGDState(self._named, config, group_bytes, among=self._ours)
        super().__init__(state, between, scaler=scaler, judges=self._inside if devices > 1 else None)

    @property
    @override
    def plan(self) -> Plan:
        return self._plan

    @property
    @override
    def parameters(self) -> Mapping[str, Tensor]:
        return {name: parameter for name, parameter in self._whole.items() if self._slots_of(parameter)}

    @property
    @override
    def replicas(self) -> dist.ProcessGroup | None:
        return None

    @property
    @override
    def needs_all_ranks(self) -> bool:
        return self._gathered is None

    @property
    @override
    def bytes_in_node(self) -> int | None:
        return self._bytes_in_node

    def blocks_of(self, parameter: Tensor) -> Sequence[Block]:
        """Give the blocks that a parameter is cut into; itself alone, as a rule."""
        return self._blocks_of[parameter]

    def owner_of(self, block: Block) -> int:
        """Give the number of the rank in its machine that owns a block."""
        return self._owner_of[block.tensor]

    @override
    def compresses(self, parameter: Tensor) -> bool:
        return any(slot.rank > 0 for slot in self._slots_of(parameter))

    @override
    def begin_step(self) -> None:
        super().begin_step()
        self._gathered = None
        self._compressed_step = self.compressing
        self._bytes_in_node = 0

    def gather(self, owner: int, pairs: Sequence[Pair]) -> Gathering:
        """Average gradients of an owner's parameters inside the machine; the owner receives them.

        Args:
            owner: its number.
            pairs: parameters of one dtype, and their gradients, without gaps in memory.
        """
        gathering = Gathering(pairs, owner, self._inside)
        self._bytes_in_node += gathering.nbytes
        return gathering

    def spread(
        self,
        wanted: Mapping[int, Sequence[Pair]],
        averaged: Mapping[Tensor, Tensor],
        factors: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        """Give all ranks of the machine the averages that each of them owns: of what is compressed, the factors.

        Args:
            wanted: by owner, its parameters, and the gradients that their averages are to be written to.
            averaged: of this rank's parameters, the averaged gradients.
            factors: of these, by name, the factors of those that are compressed in this step.
        """
        spreads = []
        for owner, pairs in sorted(wanted.items()):
            by_dtype: dict[torch.dtype, list[_Part]] = {}
            for parameter, gradient in pairs:
                slot = self._slots[parameter]
                in_factors = self._compressed_step and slot.rank > 0
                dtype = self.state.matrix_dtype(slot) if in_factors else gradient.dtype
                values = None
                if owner == self._number:
                    values = factors[slot.name] if in_factors else (averaged[parameter],)
                by_dtype.setdefault(dtype, []).append(_Part(gradient, slot if in_factors else None, values))
            spreads += [_Spread(parts, dtype, owner, self._inside) for dtype, parts in by_dtype.items()]
        with full_precision(self._device):
            for spread in spreads:
                self._bytes_in_node += spread.nbytes
                spread.finish()

    @override
    def gather_state(self, *, error_feedback: bool) -> None:
        # Of the first machine's ranks; those of other machines have the same, once errors are averaged.
        if self._gathered is None:
            own = self.state.state_dict(error_feedback=error_feedback)
            entries = self._entries(own["parameters"]) if self._machine == 0 else {}
            self._gathered = {**own, "parameters": joined(entries, self._blocks)}

    def _entries(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Give the entries of all owners on the first rank, with one error after the other on its way."""
        with_errors = [name for name, entry in own.items() if "error" in entry]
        everyones = of_all_ranks((_without_errors(own), with_errors), self._inside)
        first = dist.get_global_rank(self._inside, 0)
        entries = {name: entry for theirs, _ in everyones for name, entry in theirs.items()}
        for owner, (_, names) in enumerate(everyones):
            for name in names:
                error = own[name]["error"] if owner == self._number else None
                if owner == 0:
                    entries[name]["error"] = error
                elif owner == self._number:
                    assert error is not None
                    dist.send(error.to(self._device).contiguous(), first, group=self._inside)
                elif self._number == 0:
                    received = torch.empty(entries[name]["shape"], dtype=self._error_dtype(name), device=self._device)
                    dist.recv(received, dist.get_global_rank(self._inside, owner), group=self._inside)
                    entries[name]["error"] = received.cpu()
        return entries if self._number == 0 else {}

    @override
    def saved(self, *, error_feedback: bool) -> dict[str, Any]:
        if self._gathered is None:
            return super().saved(error_feedback=error_feedback)
        entries = self._gathered["parameters"]
        return {**self._gathered, "parameters": entries if error_feedback else _without_errors(entries)}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> list[str]:
        load = super().load_state_dict
        lines = all_or_none(lambda: load(self._of_ours(state_dict)), self._inside)
        return list(dict.fromkeys(line for theirs in lines for line in theirs))

    def _of_ours(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give a state without what other ranks own."""
        require_readable(state_dict)
        saved = parted(state_dict["parameters"], self._blocks)
        others = {name for name, _ in self._named} - self._ours
        return {**state_dict, "parameters": {name: entry for name, entry in saved.items() if name not in others}}

    @override
    def _lay_out(self) -> None:
        super()._lay_out()
        self._plan = make_plan(self._named, self.state.config, whole=self.state.whole)
        self._slots = {self._by_name[slot.name]: slot for slot in self._plan.slots}

    def _slots_of(self, parameter: Tensor) -> list[Slot]:
        blocks = self._blocks_of.get(parameter, [])
        return [self._slots[block.tensor] for block in blocks if block.tensor in self._slots]

    def _error_dtype(self, name: str) -> torch.dtype:
        return self.state.config.error_dtype or self._by_name[name].dtype


class Gathering:
    """Gradients of an owner's parameters, on their way to it: the mean over the ranks of a machine.

    Args:
        pairs: parameters of one dtype, and their gradients, without gaps in memory.
        owner: its number among the ranks.
        inside: the ranks of the machine.
    """

    def __init__(self, pairs: Sequence[Pair], owner: int, inside: dist.ProcessGroup) -> None:
        self._parameters = [parameter for parameter, _ in pairs]
        gradients = [gradient for _, gradient in pairs]
        self._is_owner = dist.get_rank(inside) == owner
        self._flat = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients))
        parts = torch.split(self._flat, [gradient.numel() for gradient in gradients])
        # Laid out in memory as they are.
        self._views = [
            part.as_strided(gradient.shape, gradient.stride(), part.storage_offset())
            for part, gradient in zip(parts, gradients, strict=True)
        ]
        torch._foreach_copy_(self._views, gradients)
        self._flat.div_(dist.get_world_size(inside))
        place = dist.get_global_rank(inside, owner)
        self._work: Work | None = dist.reduce(as_real(self._flat), place, group=inside, async_op=True)

    @property
    def nbytes(self) -> int:
        """Bytes handed to the collective."""
        return self._flat.nbytes

    def wait(self) -> list[Pair]:
        """Give the owner its parameters with their gradients, and the others nothing."""
        if self._work is not None:
            self._work.wait()
        return list(zip(self._parameters, self._views, strict=True)) if self._is_owner else []


@dataclass
class _Part:
    """What a rank is to know of one gradient.

    Attributes:
        gradient: that the average is to be written to.
        slot: of the parameter, if its factors travel; ``None`` if the average travels whole.
        values: the owner's: both factors, or the average.
    """

    gradient: Tensor
    slot: Slot | None
    values: tuple[Tensor, ...] | None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what travels."""
        if self.slot is None:
            return [tuple(self.gradient.shape)]
        return [(self.slot.rank, self.slot.rows), (self.slot.rank, self.slot.columns)]

    def write(self, values: Sequence[Tensor]) -> None:
        """Write what has travelled."""
        if self.slot is None:
            self.gradient.copy_(values[0])
        else:
            write_average(self.gradient, self.slot, (values[0], values[1]))


class _Spread:
    """What an owner tells the ranks of its machine in one collective."""

    def __init__(self, parts: list[_Part], dtype: torch.dtype, owner: int, inside: dist.ProcessGroup) -> None:
        self._parts = parts
        self._shapes = [shape for part in parts for shape in part.shapes]
        if all(part.values is not None for part in parts):
            self._flat = torch.cat([value.reshape(-1) for part in parts for value in part.values or ()])
        else:
            length = sum(math.prod(shape) for shape in self._shapes)
            self._flat = torch.empty(length, dtype=dtype, device=parts[0].gradient.device)
        place = dist.get_global_rank(inside, owner)
        self._work: Work | None = dist.broadcast(as_real(self._flat), place, group=inside, async_op=True)

    @property
    def nbytes(self) -> int:
        """Bytes handed to the collective."""
        return self._flat.nbytes

    def finish(self) -> None:
        """Wait for it, and write all averages."""
        if self._work is not None:
            self._work.wait()
        pieces = torch.split(self._flat, [math.prod(shape) for shape in self._shapes])
        values = iter([piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)])
        for part in self._parts:
            part.write([next(values) for _ in part.shapes])


def _without_errors(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in entry.items() if key != "error"} for name, entry in entries.items()}


def owners_of(named_parameters: Iterable[tuple[str, Tensor]], devices: int) -> dict[str, int]:
    """Deal parameters out, the largest first, always to the owner who has least.

    Args:
        named_parameters: by name.
        devices: on each machine.

    Returns:
        The number of the owner of each, by name.
    """
    sizes = sorted(((-parameter.numel(), name) for name, parameter in named_parameters))
    has = [0] * devices
    owners = {}
    for size, name in sizes:
        owners[name] = has.index(min(has))
        has[owners[name]] -= size
    return owners


# Groups outlive what is attached to a module, and are the same for all that is.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]]]
_made = WeakKeyDictionary()


def _groups(devices: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Give the groups of a rank: its equals on all machines, and the ranks of its machine.

    Raises:
        RuntimeError: on every rank, if machines have unequal numbers of devices.
        ValueError: if the number of ranks is not a multiple of the devices.
    """
    require_agreement({"the number of devices of a machine": str(devices)})
    everyone, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert everyone is not None
    if world % devices:
        raise ValueError(f"{world} ranks are no machines of {devices} devices each. All must have equally many.")
    made = _made.setdefault(everyone, {})
    if devices not in made:
        # Every rank takes part in making every group.
        between = [dist.new_group(range(number, world, devices)) for number in range(devices)]
        inside = [dist.new_group(range(first, first + devices)) for first in range(0, world, devices)]
        made[devices] = (between[rank % devices], inside[rank // devices])
    return made[devices]
