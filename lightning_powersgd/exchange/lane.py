"""A stream of its own for the exchange, beside the one in which a device computes gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


class Lane:
    """What the exchange asks of a device, in its order, beside what the backward pass asks.

    In the stream of the backward pass, a collective that the exchange waits for would hold that up. A CPU has no
    streams.

    Args:
        device: of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._accelerator is None else self._accelerator.Stream(device)

    def apart(self) -> AbstractContextManager[None]:
        """Work in the lane, after all that was asked of the device so far."""
        return _NOTHING if self._stream is None else self._in_stream()

    @contextmanager
    def _in_stream(self) -> Iterator[None]:
        self._stream.wait_stream(self._accelerator.current_stream(self._device))
        with self._accelerator.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what is asked of the device from now on come after all that was done in the lane."""
        if self._stream is not None:
            self._accelerator.current_stream(self._device).wait_stream(self._stream)
