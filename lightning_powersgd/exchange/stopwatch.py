"""The time between points of a computation, by the clock of the device that computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Measures laps. Nothing waits for an accelerator before `finish`.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._last: Any = None
        self._running: list[tuple[Any, Any, Callable[[float], None]]] = []

    def lap(self, keep: Callable[[float], None] | None) -> None:
        """End a lap and begin the next one.

        Args:
            keep: is given the seconds of the lap that ends, at the latest by `finish`; ``None``: they are not wanted.
        """
        now = self._now()
        if keep is not None and self._last is not None:
            self._running.append((self._last, now, keep))
            if self._accelerator is None:
                self.finish()
        self._last = now

    def finish(self) -> None:
        """Wait until the last lap is over, and give away all seconds."""
        running, self._running = self._running, []
        for begin, end, keep in running:
            if self._accelerator is None:
                keep(end - begin)
            else:
                end.synchronize()
                keep(begin.elapsed_time(end) / 1e3)

    def _now(self) -> Any:
        if self._accelerator is None:
            return time.perf_counter()
        event = self._accelerator.Event(enable_timing=True)
        event.record()
        return event
