"""What a training uses, as torchmetrics, and the callback that measures it under every strategy.

The metric can be used alone:

    >>> from lightning_powersgd import EnergyUse
    >>> use = EnergyUse()
    >>> use.update(seconds=20.0, cpu_seconds=38.0, steps=100, samples=3200, joules=6400.0)
    >>> {name: float(value) for name, value in use.compute().items()}
    {'seconds_per_step': 0.2, 'cpu_seconds_per_step': 0.38, 'joules_per_step': 64.0, 'joules_per_sample': 2.0}
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_powersgd.compressor.config import require_int
from lightning_powersgd.lightning_types import Callback, pl
from lightning_powersgd.metrics.counters import find_counters
from lightning_powersgd.metrics.meter import Meter, Ranks, share_out
from lightning_powersgd.namespaces import Joined, namespace_of

_NAN = math.nan
_JOULES = ("joules", "estimated_joules")
_AMOUNTS = ("seconds", "cpu_seconds", "steps", "samples", *_JOULES)

# Counters of GPUs tick about ten times a second: ten seconds are known to a hundredth.
_SHORTEST_WINDOW = 10.0


class EnergyUse(Metric):
    """What training steps use: joules, processor time and time, for each step and each sample.

    An amount that is NaN was not measured, and then neither was what depends on it. Joules, processor time and samples
    are summed over ranks; seconds and steps are those of one.
    """

    full_state_update = False
    higher_is_better = False
    seconds: Tensor
    cpu_seconds: Tensor
    steps: Tensor
    samples: Tensor
    joules: Tensor
    estimated_joules: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _AMOUNTS:
            of_one_rank = name in ("seconds", "steps")
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="mean" if of_one_rank else "sum")

    @override
    def update(
        self,
        seconds: float,
        cpu_seconds: float,
        steps: float,
        samples: float = _NAN,
        joules: float = _NAN,
        estimated_joules: float = _NAN,
    ) -> None:
        """Add some steps.

        Args:
            seconds: that they took.
            cpu_seconds: that processors worked for them.
            steps: how many they were.
            samples: in their batches.
            joules: that counters measured.
            estimated_joules: that somebody believes they took.
        """
        given = (seconds, cpu_seconds, steps, samples, joules, estimated_joules)
        for name, amount in zip(_AMOUNTS, given, strict=True):
            setattr(self, name, getattr(self, name) + amount)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Give the quotients that are known over all updates, by name, float64 scalars."""
        quotients = {
            f"{name}_per_{unit}": getattr(self, name) / getattr(self, f"{unit}s")
            for unit, names in (("step", ("seconds", "cpu_seconds", *_JOULES)), ("sample", _JOULES))
            for name in names
        }
        return {name: value for name, value in quotients.items() if value.isfinite()}

    def amounts(self) -> dict[str, float]:
        """Give what was added up, by the names of `update`'s arguments; NaN is what is not known."""
        return {name: float(getattr(self, name)) for name in _AMOUNTS}


class EnergyMonitor(Joined, Callback):
    """Measures the energy that training takes, with any strategy, and logs it for each step and each sample.

    Each rank reads the energy counter of its own GPU (NVIDIA's, by `nvidia-ml-py`), and one rank of a machine those of
    its processors (``/sys/class/powercap``). They are read where the device is idle, at both ends of windows of
    `window` seconds, and summed over ranks. Logged are, as ``energy/…`` and of the last window, ``joules_per_step``,
    ``joules_per_sample``, ``seconds_per_step`` and ``cpu_seconds_per_step``. Where a counter is missing there are no
    joules: nothing is estimated that was not asked for. Validation inside the fit is not counted.

    A step is one of ``trainer.global_step``. Totals of the fit are in `joules`, `seconds`, `cpu_seconds`, `steps` and
    `samples`; they are in the callback's part of a checkpoint, and a resumed fit goes on adding.

    Args:
        window: seconds of training between two readings, at least 10. It ends at the next step that the trainer logs. A
            longer one is measured more exactly, and logged less often.
        batch_size: samples in a rank's batch. ``None`` looks for the first tensor in each batch, as Lightning does for
            logging.
        watts: what one rank draws while it trains, with its part of the machine. Then ``estimated_joules_per_step`` and
            ``estimated_joules_per_sample`` are logged, too: `watts` × seconds × ranks.
        powercap: the folder of the processors' counters.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for an argument out of range.
    """

    part, base = "pytorch", "callbacks.Callback"

    def __init__(
        self,
        window: float = _SHORTEST_WINDOW,
        batch_size: int | None = None,
        watts: float | None = None,
        powercap: str | Path = "/sys/class/powercap",
    ) -> None:
        super().__init__()
        _require_number("window", window, "Give the seconds between two readings, 10 or more.")
        if window < _SHORTEST_WINDOW:
            raise ValueError(
                f"`window={window}` is below {_SHORTEST_WINDOW:g} seconds, too short for counters that move in ticks."
                " Use 10 or more."
            )
        if batch_size is not None:
            require_int("batch_size", batch_size, minimum=1, remedy="Give the samples in a rank's batch, or None.")
        if watts is not None:
            _require_number("watts", watts, "Give what one rank draws in watts, or None for no estimate.")
            if watts <= 0:
                raise ValueError(f"`watts={watts}` is not positive. Give what one rank draws, or None for no estimate.")
        if not isinstance(powercap, str | Path):
            raise TypeError(f"`powercap={powercap!r}` is not a path. Give the folder of the processors' counters.")
        self._window, self._batch_size, self._watts, self._powercap = window, batch_size, watts, Path(powercap)
        self._total, self._recent = EnergyUse(sync_on_compute=False), EnergyUse(sync_on_compute=False)
        self._source = ""
        self._meter: Meter | None = None

    @property
    def source(self) -> str:
        """What is measured, and what is not, and why; empty before the first fit. The same on every rank."""
        return self._source

    @property
    def joules(self) -> float | None:
        """Joules of the fit so far, all ranks together; ``None`` where they were not measured all the time."""
        return _known(self._total.joules)

    @property
    def estimated_joules(self) -> float | None:
        """Joules of the fit so far by the `watts` that were given; ``None`` without."""
        return _known(self._total.estimated_joules)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, up to the end of the last window."""
        return float(self._total.seconds)

    @property
    def cpu_seconds(self) -> float:
        """Seconds that processors worked for the ranks' processes, all threads of all ranks together."""
        return float(self._total.cpu_seconds)

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self._total.steps)

    @property
    def samples(self) -> int | None:
        """Samples so far, all ranks together; ``None`` where the size of a batch was not found."""
        samples = _known(self._total.samples)
        return None if samples is None else int(samples)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._total.amounts()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._total.reset()
        self._total.update(**state_dict)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            # A checkpoint, which is loaded after this, brings its own.
            self._total.reset()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1 and not dist.is_initialized():
            raise RuntimeError(
                f"`EnergyMonitor` sums over ranks with torch.distributed, which {type(trainer.strategy).__name__} does"
                " not set up. Leave the callback out."
            )
        device = trainer.strategy.root_device
        self._ranks = Ranks(trainer.world_size, trainer.num_training_batches, device)
        counters, self._source = share_out(find_counters(device, self._powercap), self._ranks)
        rank_zero_info(f"EnergyMonitor measures {self._source}.")
        self._recent.reset()
        self._step = self._counted_step = trainer.global_step
        self._next_step = self._step + 1
        self._samples, self._lacks_samples = 0.0, False
        self._meter = Meter(counters, device)
        self._meter.start()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meter is not None:
            self._meter.stop()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meter is not None:
            self._meter.start()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._meter is not None
        self._samples += self._batch_size or _size_of(batch, trainer)
        self._meter.keep_up()
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        # Nothing in this condition may differ between ranks, as `trainer.should_stop` may.
        if stepped and self._step >= self._next_step and _is_logged(trainer) and self._ranks.meet(f"step {self._step}"):
            self._count(trainer)
            if float(self._recent.seconds) >= self._window:
                _log(trainer, {f"energy/{name}": value for name, value in self._recent.compute().items()})
                self._recent.reset()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Ranks that end after different steps come to different places.
        if self._ranks.meet(f"the end, at step {trainer.global_step}"):
            self._count(trainer)
        else:
            rank_zero_warn(
                f"EnergyMonitor's totals end with step {self._counted_step}: the ranks did not come to the same step"
                " after that."
            )
        self._meter = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._meter = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._meter = None

    def _count(self, trainer: pl.Trainer) -> None:
        """Add what all ranks have used since the last time, and say when to do so next. Every rank must call this."""
        assert self._meter is not None
        amounts = [*self._meter.take(), self._samples / _ranks_of_a_batch(trainer)]
        joules, rank_seconds, cpu_seconds, samples = self._ranks.sum(amounts)
        steps, self._samples, self._counted_step = trainer.global_step - self._counted_step, 0.0, trainer.global_step
        seconds = rank_seconds / trainer.world_size
        estimate = _NAN if self._watts is None else self._watts * rank_seconds
        for use in (self._total, self._recent):
            use.update(seconds, cpu_seconds, steps, samples, joules, estimate)
        if math.isnan(samples) and not self._lacks_samples:
            self._lacks_samples = True
            rank_zero_warn(
                "EnergyMonitor finds no tensor in a batch to tell its size, and counts no samples. Give it the size:"
                " `EnergyMonitor(batch_size=…)`."
            )
        elapsed = float(self._recent.seconds)
        missing = self._window - (elapsed if elapsed < self._window else 0.0)
        # A little more than steps like these take; but a few of them tell little about many.
        factor = min(1.05 * missing / seconds, 10) if seconds else 10
        self._next_step = self._counted_step + math.ceil(factor * steps)


def _log(trainer: pl.Trainer, values: dict[str, Tensor]) -> None:
    """Log values once: what a module logs is written again and again until an epoch ends."""
    trainer.callback_metrics.update(values)
    numbers = {"epoch": float(trainer.current_epoch), **{name: float(value) for name, value in values.items()}}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _is_logged(trainer: pl.Trainer) -> bool:
    """Whether the trainer's loggers get what is logged in this step, which they do at one cadence on all ranks."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def _size_of(batch: Any, trainer: pl.Trainer) -> float:
    """Give the size of a batch as Lightning's logging does; NaN where it finds none."""
    room = "lightning.pytorch" if namespace_of(trainer) == "lightning" else "pytorch_lightning"
    data = importlib.import_module(f"{room}.utilities.data")
    try:
        return float(data.extract_batch_size(batch))
    except (data.MisconfigurationException, RecursionError):
        return _NAN


def _ranks_of_a_batch(trainer: pl.Trainer) -> int:
    """Give the number of ranks that work on the same batch, since each has a part of the model."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    names: tuple[str, ...] = getattr(mesh, "mesh_dim_names", None) or ()
    return mesh.size(names.index("tensor_parallel")) if mesh and "tensor_parallel" in names else 1


def _known(amount: Tensor) -> float | None:
    return None if amount.isnan() else float(amount)


def _require_number(name: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}={value!r}` is not a number. {remedy}")
    if not math.isfinite(value):
        raise ValueError(f"`{name}={value}` is not finite. {remedy}")
