"""The collectives of a step: flat payloads that are summed over the ranks of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor.view import as_real

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work


class Wires:
    """The ranks of a process group, and the wires between them that a step uses.

    Args:
        process_group: the ranks; ``None`` is the default group.
        device: of what is sent.

    Attributes:
        world_size: the number of ranks.
        sent_bytes: bytes handed to collectives in this step.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.process_group = process_group
        self.device = device
        self.world_size = dist.get_world_size(process_group)
        self.sent_bytes = 0
        self._wires: list[Wire] = []

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that payloads are packed in."""
        return sum(wire.flat.nbytes for wire in self._wires)

    def new(self, length: int, dtype: torch.dtype) -> Wire:
        """Make the buffer of one collective of a step; empty where every payload is borrowed."""
        self._wires.append(Wire(self, length, dtype))
        return self._wires[-1]

    def all_reduce(self, payload: Tensor) -> Work | None:
        """Sum a payload over the ranks, in place and asynchronously, and count its bytes. ``None``: a rank is alone."""
        if self.world_size == 1:
            return None
        self.sent_bytes += payload.nbytes
        work: Work | None = dist.all_reduce(payload, group=self.process_group, async_op=True)
        assert work is not None, "this rank is not a member of the process group"
        return work

    def receive(self) -> Tensor:
        """Wait for all that is on its way.

        Returns:
            Zero if everything that this step received is finite, else NaN; a float32 scalar, the same on all ranks.
        """
        for wire in self._wires:
            wire.receive()
        blemishes = [wire.blemish for wire in self._wires] or [torch.zeros((), device=self.device)]
        return torch.stack(blemishes).sum().float()

    def cut(self) -> None:
        """Let go of the buffers and of the ranks."""
        self._wires, self.process_group = [], None


class Wire:
    """One collective of a step: a flat payload that is summed over the ranks as it lies in memory.

    Attributes:
        flat: a buffer for it, unless it is borrowed.
        blemish: zero if all that was received is finite, else NaN.
    """

    def __init__(self, wires: Wires, length: int, dtype: torch.dtype) -> None:
        self._wires = wires
        self._in_flight: tuple[Work | None, Tensor] | None = None
        self.flat = torch.zeros(length, dtype=dtype, device=wires.device)
        self.blemish = torch.zeros((), device=wires.device)

    def send(self, payload: Tensor) -> None:
        """Start the all-reduce of a payload; an empty one is left out."""
        if payload.numel():
            self._in_flight = self._wires.all_reduce(payload), payload

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
