"""The probe: ranks that meet, measure the network between them, and forecast what PowerSGD would bring on it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from typing_extensions import Self

from lightning_powersgd.compressor.config import AUTO, PowerSGDConfig
from lightning_powersgd.exchange.agreement import all_or_none
from lightning_powersgd.exchange.link import MESSAGE_BYTES, Link, measure_link
from lightning_powersgd.planner.answer import Answer, Option
from lightning_powersgd.planner.forecast import forecast_exchange
from lightning_powersgd.planner.rendezvous import Meeting, Place, RendezvousError, first_line
from lightning_powersgd.version import __version__

# The ranks that are tried, beside the automatic one, if a user names none.
RANKS = (1, 2, 4, 8)

# What gloo needs to notice by itself that its time is over.
_GRACE_SECONDS = 5.0

# Of what is measured, and the share of it that is done.
OnProgress = Callable[[str, float], None]
Model = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Medium:
    """What gradients would travel through.

    Attributes:
        backend: "gloo" or "nccl".
        device: "cpu" or "cuda".
    """

    backend: str
    device: str

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU. Use --device cpu.")
        if self.backend == "nccl" and self.device == "cpu":
            raise ValueError("--backend nccl sends from GPUs only. Use --device cuda, or --backend gloo.")
        if not getattr(dist, f"is_{self.backend}_available")():
            raise ValueError(f"--backend {self.backend}: this build of torch lacks it. Use the other one.")


def choose_medium(backend: str | None, device: str | None, local_ranks: int | None) -> Medium:
    """Choose what training would use: NCCL between GPUs, if each rank has one; gloo otherwise.

    Args:
        backend: if it is given.
        device: if it is given.
        local_ranks: ranks of this machine, if they are known.

    Raises:
        ValueError: if that cannot be had.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend is None:
        share = device == "cuda" and local_ranks is not None and local_ranks > torch.cuda.device_count()
        backend = "nccl" if device == "cuda" and not share else "gloo"
    return Medium(backend, device)


@contextlib.contextmanager
def joined(meeting: Meeting, medium: Medium, timeout: float) -> Iterator[torch.device]:
    """Make the default process group of the ranks that have met.

    Args:
        meeting: of the ranks.
        medium: what they send through.
        timeout: seconds for which a rank waits for the others.

    Yields:
        The device of this rank.

    Raises:
        RendezvousError: if the ranks cannot reach each other, or lose each other.
    """
    place, device = meeting.place, torch.device("cpu")
    if medium.device == "cuda":
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # NCCL ends the process, with pages of explanation, when its time is over: `_Patience` comes before it.
    seconds = timeout if medium.backend == "gloo" else timeout + 10 * _GRACE_SECONDS
    try:
        dist.init_process_group(
            medium.backend,
            store=PrefixStore("group", meeting.store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=seconds),
        )
        try:
            dist.all_reduce(torch.zeros(1, device=device))
            yield device
        finally:
            dist.destroy_process_group()
    except (RendezvousError, ValueError):
        raise
    except RuntimeError as error:
        raise RendezvousError(
            f"Rank {place.rank} has met the others, but not heard them over {medium.backend}: {first_line(error)}."
            f" {remedy_of(medium)}"
        ) from error


def remedy_of(medium: Medium) -> str:
    """Say what to look at where ranks have met, but do not hear each other."""
    return (
        f"Name the network interface with {medium.backend.upper()}_SOCKET_IFNAME, and open the ports between the"
        " machines. If a rank has failed, see what it says."
    )


class Patience:
    """Ends this process with a message if nothing happens for too long, whatever it is stuck in.

    Args:
        seconds: that may pass between two calls of `renew`.
        message: for stderr.
    """

    def __init__(self, seconds: float, message: str) -> None:
        self._seconds = seconds + _GRACE_SECONDS
        self._message = message
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        self.renew()
        return self

    def __exit__(self, *error: object) -> None:
        self._cancel()

    def renew(self) -> None:
        """Begin to wait anew."""
        self._cancel()
        self._timer = threading.Timer(self._seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        print(f"lightning-powersgd probe: {self._message}", file=sys.stderr, flush=True)
        # A collective of NCCL that hangs cannot be interrupted.
        os._exit(2)


def probe(
    meeting: Meeting,
    medium: Medium,
    *,
    seconds: float,
    timeout: float,
    answer: Callable[[Link, torch.device, OnProgress], Answer] | None,
    on_progress: OnProgress,
) -> tuple[Link, Answer | None]:
    """Measure the link between ranks that have met, and what it means for a model. Every rank must call this.

    Args:
        meeting: of the ranks.
        medium: what they send through.
        seconds: that measuring the link may take.
        timeout: seconds for which a rank waits for the others.
        answer: makes a forecast on every rank, from the link and the rank's device, and says how far it is.
        on_progress: is called with what goes on, and the share of it that is done.

    Raises:
        RendezvousError: if the ranks cannot reach each other, or lose each other.
        ValueError: if a forecast cannot be made.
    """
    message = (
        f"Rank {meeting.place.rank} has heard nothing over {medium.backend} for {timeout:g} s. {remedy_of(medium)}"
    )
    with Patience(timeout, message) as patience, joined(meeting, medium, timeout) as device:

        def on_share(what: str, share: float) -> None:
            patience.renew()
            on_progress(what, share)

        link = measure_link(None, device, seconds, on_progress=lambda share: on_share("network", share))
        found = None if answer is None else answer(link, device, on_share)
        # Also where a process has come that was told of other ranks than these.
        meeting.require_peace()
        return link, found


def settings_of(place: Place, medium: Medium, seconds: float, model: str) -> dict[str, str]:
    """Give what all ranks must have alike.

    Args:
        place: of this process.
        medium: what it would send through.
        seconds: that measuring the link may take.
        model: its name and its settings.
    """
    return {
        "world size": str(place.world_size),
        "backend": medium.backend,
        "device": medium.device,
        "version of lightning-powersgd": __version__,
        "version of torch": torch.__version__,
        "message sizes": ", ".join(map(str, MESSAGE_BYTES)),
        "argument --seconds": f"{seconds:g}",
        "model": model,
    }


def answer_for(
    model: Model,
    configs: Mapping[str, PowerSGDConfig],
    link: Link,
    device: torch.device,
    *,
    compress_seconds: float | None,
    step_seconds: float | None,
    on_progress: OnProgress,
) -> Answer:
    """Forecast what each setting would bring on a link. Every rank must call this.

    All ranks measure the arithmetic at the same time, as they will compute in training, and the slowest one counts.

    Args:
        model: see `forecast_exchange`.
        configs: by the rank that a user has written.
        link: that was measured.
        device: of this rank.
        compress_seconds: that the arithmetic takes in a step; ``None`` measures it.
        step_seconds: of forward and backward without any exchange, if they are known.
        on_progress: is called with what goes on, and the share of it that is done.

    Raises:
        ValueError: on every rank, if a forecast cannot be made on one of them.
    """
    options = []
    for rank, config in configs.items():
        forecasts = all_or_none(
            lambda config=config: forecast_exchange(  # type: ignore[misc]  # mypy does not see the default
                model,
                config,
                world_size=link.world_size,
                latency=link.latency,
                compress_seconds=compress_seconds,
                device=device,
            )
        )
        slowest = max(forecast.compress_seconds for forecast in forecasts)
        forecast = replace(forecasts[0], compress_seconds=slowest)
        options.append(Option(rank, forecast, forecast.over(link.bits_per_second)))
        on_progress("compression", len(options) / len(configs))
    return Answer(tuple(options), step_seconds)


def configs_to_try(config: PowerSGDConfig, rank: str | None) -> dict[str, PowerSGDConfig]:
    """Give the settings to forecast, by the rank as a user writes it.

    Args:
        config: the settings.
        rank: that a user has named; ``None`` tries a few.
    """
    if rank is not None:
        return {rank: config}
    ranks = {str(number): replace(config, rank=number, turnaround=None, max_bytes=None) for number in RANKS}
    return {AUTO: config, **ranks}
