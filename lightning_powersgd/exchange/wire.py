"""The collectives of a step: flat payloads that are summed over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Collection
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
        encodes: whether factors can travel as integers in this step, if they are to (see `integers`).
        judges: whether somebody asks in this step if everything that was received is finite.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.process_group = process_group
        self.device = device
        self.world_size = dist.get_world_size(process_group)
        self.sent_bytes = 0
        self.encodes = self.judges = True
        self._wires: list[Wire] = []

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers that payloads are packed in."""
        return sum(wire.flat.nbytes for wire in self._wires)

    def add(self, wire: Wire) -> Wire:
        """Take one collective more for every step."""
        self._wires.append(wire)
        return wire

    def begin_step(self, encodes: bool, judges: bool) -> None:
        """Begin a step. One that was broken off by an exception is forgotten."""
        self.sent_bytes, self.encodes, self.judges = 0, encodes, judges
        for wire in self._wires:
            wire.forget()

    def share(self, payload: Tensor) -> Tensor:
        """Turn a payload into this rank's share of the mean, in place, to the last bit as DDP does."""
        # Multiplying with the reciprocal rounds unlike a division.
        return payload.mul_(1 / self.world_size)

    def all_reduce(self, payload: Tensor) -> Work | None:
        """Sum a payload over the ranks, in place and asynchronously, and count its bytes. ``None``: a rank is alone."""
        if self.world_size == 1:
            return None
        self.sent_bytes += payload.nbytes
        work: Work | None = dist.all_reduce(payload, group=self.process_group, async_op=True)
        assert work is not None, "this rank is not a member of the process group"
        return work

    def all_to_all(self, outgoing: Tensor) -> tuple[Work | None, Tensor]:
        """Send the w-th row of a payload to rank w, asynchronously; what comes instead is in the rows of the result."""
        self.sent_bytes += outgoing.nbytes
        incoming = torch.empty_like(outgoing)
        return dist.all_to_all_single(incoming, outgoing, group=self.process_group, async_op=True), incoming

    def all_gather(self, mine: Tensor, *, counted: bool = True) -> tuple[Work | None, Tensor]:
        """Give the flat payloads of all ranks, in their rows, asynchronously."""
        if counted:
            self.sent_bytes += mine.nbytes
        everyones = mine.new_empty(self.world_size * mine.numel())
        work = dist.all_gather_into_tensor(everyones, mine, group=self.process_group, async_op=True)
        return work, everyones.view(self.world_size, -1)

    def receive(self) -> Tensor | None:
        """Wait for all that is on its way.

        Returns:
            Zero if everything that this step received is finite, else NaN; a float32 scalar, the same on all ranks.
            ``None`` if nobody asks.
        """
        for wire in self._wires:
            wire.receive()
        if not self.judges:
            return None
        blemishes = [wire.blemish for wire in self._wires] or [torch.zeros((), device=self.device)]
        return torch.stack(blemishes).sum().float()

    def cut(self) -> None:
        """Let go of the buffers and of the ranks."""
        self._wires, self.process_group = [], None


class Wire:
    """One collective of a step: a flat payload that is summed over the ranks as it lies in memory.

    Args:
        wires: between the ranks.
        length: of the buffer; 0 where every payload is borrowed.
        dtype: of the buffer.

    Attributes:
        flat: the buffer.
        blemish: zero if all that was received is finite, else NaN; only where somebody asks.
    """

    def __init__(self, wires: Wires, length: int, dtype: torch.dtype) -> None:
        self._wires = wires
        self._in_flight: tuple[Work | None, Tensor] | None = None
        self.flat = torch.zeros(length, dtype=dtype, device=wires.device)
        self.blemish = torch.zeros((), device=wires.device)

    def share(self, part: Tensor) -> None:
        """Make a part of the payload ready, in place: the sum over the ranks is to be the mean."""
        self._wires.share(part)

    def share_factors(  # the factors and their bits are for wires that encode them
        self,
        part: Tensor,
        factors: Collection[Tensor],  # noqa: ARG002
        bits: int,  # noqa: ARG002
        own: Tensor | None = None,
    ) -> None:
        """Make factors ready, in place.

        Args:
            part: of the payload.
            factors: that lie in it, one behind the other.
            bits: of each entry on the wire.
            own: of the part's length; is given what this rank contributes to the mean, after the wire's rounding.
        """
        self.share(part)
        if own is not None:
            torch.mul(part.to(own.dtype), self._wires.world_size, out=own)

    def forget(self) -> None:
        """Let go of a step that was broken off, when what it has sent no longer touches the buffer."""
        if self._in_flight is not None:
            work, _ = self._in_flight
            if work is not None:
                work.wait()
            self._in_flight = None

    def send(self, payload: Tensor) -> None:
        """Start the all-reduce of a payload, which is the beginning of the buffer or borrowed; not of an empty one."""
        if payload.numel():
            self._in_flight = self._wires.all_reduce(payload), payload

    def receive(self) -> None:
        """Wait for what is on its way, if it has not been received yet."""
        if self._in_flight is not None:
            work, payload = self._in_flight
            if work is not None:
                work.wait()
            self._in_flight = None
            if self._wires.judges:
                # Zero times a number is zero, and times inf or NaN is NaN. One journey through memory and no temporary,
                # where `isfinite` takes ten times as long.
                self.blemish = (torch.stack(torch.aminmax(as_real(payload))) * 0).sum()
