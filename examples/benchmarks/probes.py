"""What a step asks of a GPU and of its host, beside the time that it takes as a whole."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity

# What the profiler calls the device's work; it also draws the program's annotations there.
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Probe:
    """What a step asks for.

    Attributes:
        launches: kernels, copies and fills that the host starts.
        device_seconds: that the device works, added up over its streams.
        host_seconds: that the host spends in the communication hook; 0 where DDP has none.
        tail_seconds: from the last gradient to the last average, as the device sees them.
        held_bytes: that are there between two steps, beyond the network.
        peak_bytes: at most during a step, alike.
    """

    launches: float
    device_seconds: float
    host_seconds: float = 0.0
    tail_seconds: float = 0.0
    held_bytes: int = 0
    peak_bytes: int = 0


def probe_work(work: Callable[[], object], device: torch.device, repeats: int = 2) -> Probe:
    """Count launches, and add up the device's time. A CPU launches nothing.

    Args:
        work: what to look at.
        device: that does it.
        repeats: to take the mean of; two, since alternating steps differ.
    """
    if device.type == "cpu":
        return Probe(0, 0)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize(device)
    assert profile.profiler is not None
    started = [event for event in profile.profiler.kineto_results.events() if event.activity_type() in _WORK]
    return Probe(len(started) / repeats, 1e-9 * sum(event.duration_ns() for event in started) / repeats)


def probe_step(
    step: Callable[[], object], module: nn.Module, hook_seconds: list[float], held_bytes: int, device: torch.device
) -> Probe:
    """Look at training steps from all sides. They are not for timing: looking takes time.

    Args:
        step: a whole one, without ``zero_grad``.
        module: whose gradients it computes.
        hook_seconds: that `timed_hooks` adds to.
        held_bytes: that the exchange holds before it.
        device: of the module.
    """

    def stepping() -> None:
        step()
        module.zero_grad()

    found = probe_work(stepping, device)
    tails, host = [], []
    with _last_gradient(module, device) as tail:
        for _ in range(10):
            hook_seconds.clear()
            step()
            tails.append(tail())
            host.append(sum(hook_seconds))
            module.zero_grad()
    # Of both kinds of alternating steps.
    found.tail_seconds, found.host_seconds = float(np.mean(tails)), float(np.mean(host))
    found.held_bytes = held_bytes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        stepping()
        found.peak_bytes = held_bytes + torch.cuda.max_memory_allocated(device) - before
    return found


@contextlib.contextmanager
def _last_gradient(module: nn.Module, device: torch.device) -> Iterator[Callable[[], float]]:
    """Note when the last gradient is there; give what tells the seconds since then, in the order of the device."""
    last = [_moment(device)]

    def note(_: object) -> None:
        last[0] = _moment(device)

    def since() -> float:
        now = _moment(device)
        if isinstance(now, float):
            return now - last[0]
        now.synchronize()
        return 1e-3 * float(last[0].elapsed_time(now))

    handles = [parameter.register_post_accumulate_grad_hook(note) for parameter in module.parameters()]
    try:
        yield since
    finally:
        for handle in handles:
            handle.remove()


def _moment(device: torch.device) -> float | torch.cuda.Event:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def timed_hooks() -> Iterator[list[float]]:
    """Let every communication hook that is registered meanwhile tell the host's seconds, of each bucket."""
    seconds: list[float] = []
    register = dist._register_comm_hook

    def registering(reducer: object, state: object, hook: Callable[..., object]) -> None:
        def timed(state: object, bucket: object) -> object:
            start = time.perf_counter()
            try:
                return hook(state, bucket)
            finally:
                seconds.append(time.perf_counter() - start)

        register(reducer, state, timed)

    with mock.patch.object(dist, "_register_comm_hook", registering):
        yield seconds
