"""Tiers one to three: what a training uses, on pretended counters and clocks: exact figures, with one rank and two."""

from __future__ import annotations

import contextlib
import csv
import math
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import Classifier, loader, messages, trainer
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MetricCollection

from lightning_powersgd import EnergyMonitor, EnergyUse
from lightning_powersgd.metrics import energy, meter
from lightning_powersgd.metrics.counters import ACCELERATORS, PROCESSORS, Counter, NotMeasuredError
from lightning_powersgd.metrics.meter import Meter, Ranks, share_out

# The metric alone


def test_use_is_for_a_step_and_for_a_sample():
    use = EnergyUse()
    use.update(seconds=10, cpu_seconds=30, steps=4, samples=128, joules=64, estimated_joules=32)
    use.update(seconds=10, cpu_seconds=10, steps=4, samples=128, joules=192, estimated_joules=96)
    assert use.compute() == {
        "seconds_per_step": 2.5,
        "cpu_seconds_per_step": 5,
        "joules_per_step": 32,
        "estimated_joules_per_step": 16,
        "joules_per_sample": 1,
        "estimated_joules_per_sample": 0.5,
    }


@pytest.mark.parametrize(
    ("unknown", "left"),
    [
        ("joules", {"seconds_per_step", "cpu_seconds_per_step"}),
        ("samples", {"seconds_per_step", "cpu_seconds_per_step", "joules_per_step"}),
    ],
)
def test_what_is_not_measured_once_is_not_known(unknown, left):
    use = EnergyUse()
    amounts = {"seconds": 1, "cpu_seconds": 1, "steps": 1, "samples": 1, "joules": 1}
    for given in (amounts, {**amounts, unknown: math.nan}, amounts):
        use.update(**given)
    assert use.compute().keys() == left


def test_no_steps_use_nothing_that_is_known():
    use = EnergyUse()
    use.update(seconds=1, cpu_seconds=1, steps=0)
    assert use.compute() == {}


def test_use_of_several_ranks(two_ranks):
    assert two_ranks.run(_synchronised) == [{"seconds_per_step": 3.0, "cpu_seconds_per_step": 5.0}] * 2


def _synchronised() -> dict[str, float]:
    use = MetricCollection({"use": EnergyUse()})
    # Processor time adds up; the ranks' steps and seconds pass together.
    use.update(seconds=6, cpu_seconds=4 + 2 * dist.get_rank(), steps=2)
    return {name: float(value) for name, value in use.compute().items()}


# Arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"window": 9.9}, ValueError, r"`window=9.9` is below 10 seconds.*Use 10 or more"),
        ({"window": math.inf}, ValueError, "`window=inf` is not finite"),
        ({"window": math.nan}, ValueError, "`window=nan` is not finite"),
        ({"window": "10"}, TypeError, "`window='10'` is not a number"),
        ({"window": True}, TypeError, "`window=True` is not a number"),
        ({"batch_size": 0}, ValueError, "`batch_size=0` is below 1"),
        ({"batch_size": 8.0}, TypeError, "`batch_size=8.0` is not an integer"),
        ({"watts": 0}, ValueError, "`watts=0` is not positive"),
        ({"watts": -300.0}, ValueError, "`watts=-300.0` is not positive"),
        ({"watts": math.nan}, ValueError, "`watts=nan` is not finite"),
        ({"watts": "300 W"}, TypeError, "`watts='300 W'` is not a number"),
        ({"powercap": None}, TypeError, "`powercap=None` is not a path"),
    ],
)
def test_arguments_that_cannot_be_are_refused_early(arguments, kind, message):
    with pytest.raises(kind, match=message):
        EnergyMonitor(**arguments)


# Meters


def test_the_device_is_idle_once_at_each_end_of_a_window():
    order: list[str] = []

    def joules() -> float:
        order.append("read")
        return 100.0 * len(order)

    with mock.patch.object(torch.cuda, "synchronize", side_effect=lambda device: order.append("wait")):
        counted = Meter([joules], torch.device("cuda", 0))
        counted.start()
        for _ in range(5):
            counted.keep_up()  # no wait, and no reading since the last one is fresh
        assert counted.take()[0] == 200
        assert counted.take()[0] == 200
    assert order == ["wait", "read"] * 3


def test_a_long_window_reads_counters_now_and_then():
    now, read = [0.0], []
    with mock.patch.object(meter, "perf_counter", side_effect=lambda: now[0]):
        counted = Meter([lambda: read.append(now[0]) or 0.0], torch.device("cpu"))
        counted.start()
        for now[0] in range(1, 31):
            counted.keep_up()
    assert read == [0, 10, 20, 30]


def test_a_counter_that_fails_leaves_no_joules_and_says_so_once():
    def lost() -> float:
        raise NotMeasuredError("GPU is lost")

    readings: list[Callable[[], float]] = [lambda: 1.0]
    counted = Meter(readings, torch.device("cpu"))
    counted.start()
    readings[0] = lost
    with pytest.warns(UserWarning, match="measures no more joules in this fit: GPU is lost") as warned:
        assert [math.isnan(counted.take()[0]) for _ in range(2)] == [True, True]
    assert len(warned) == 1


def counter(kind: str, name: str, joules: float = 0.0, refused: str = "") -> Counter:
    return Counter(kind, name, lambda: joules, refused)


@pytest.mark.parametrize(
    ("counters", "read", "source"),
    [
        ([counter(PROCESSORS, "m", 5)], [5], "joules of the processors of 1 machine (powercap)"),
        (
            [counter(PROCESSORS, "m", 5), counter(ACCELERATORS, "g", 7)],
            [5, 7],
            "joules of 1 GPU (NVML) and the processors of 1 machine (powercap)",
        ),
        (
            [counter(PROCESSORS, "m", refused="no"), counter(ACCELERATORS, "g", 7)],
            [7],
            "joules of 1 GPU (NVML); processors are not measured (rank 0: no)",
        ),
        # Joules without those of the GPU would be called so wrongly.
        (
            [counter(PROCESSORS, "m", 5), counter(ACCELERATORS, "g", refused="MIG")],
            None,
            "CPU-seconds and no joules, since accelerators are not measured (rank 0: MIG)",
        ),
        (
            [counter(PROCESSORS, "m", refused="no")],
            None,
            "CPU-seconds and no joules, since processors are not measured (rank 0: no)",
        ),
    ],
)
def test_a_rank_reads_what_is_its_own_and_says_what_is_left_out(counters, read, source):
    given, text = share_out(counters, Ranks(1, math.inf, torch.device("cpu")))
    assert (given if given is None else [joules() for joules in given]) == read
    assert text == source


def test_ranks_share_out_what_they_see(four_ranks):
    # Two ranks a machine, and two that share a GPU.
    machines, gpus = ["a", "a", "b", "b"], ["g0", "g1", "g1", "g3"]
    refused = ["", "only root may", "", ""]  # of the processors of a machine that another rank reads
    results = four_ranks.run(_share_out, machines, gpus, refused)
    source = "joules of 3 GPUs (NVML) and the processors of 2 machines (powercap)"
    assert results == [(["a", "g0"], source), (["g1"], source), (["b"], source), (["g3"], source)]
    refused[2] = "only root may"
    without = "joules of 3 GPUs (NVML); processors are not measured (rank 2: only root may)"
    assert four_ranks.run(_share_out, machines, gpus, refused) == [
        (["g0"], without),
        (["g1"], without),
        ([], without),
        (["g3"], without),
    ]


def _share_out(machines: list[str], gpus: list[str], refused: list[str]) -> tuple[list[Any], str]:
    rank = dist.get_rank()
    mine = [
        Counter(PROCESSORS, machines[rank], lambda: machines[rank], refused[rank]),
        Counter(ACCELERATORS, gpus[rank], lambda: gpus[rank]),
    ]
    given, source = share_out(mine, Ranks(4, 10, torch.device("cpu")))
    return [name() for name in given], source


# Trainings


class Machine(Callback):
    """A pretended machine, on which a step takes 4 seconds and some joules, and a batch of validation 1000 seconds.

    Of its processors, which all ranks see, and of a GPU of each rank, if it has some.
    """

    def __init__(self, processors: float | None = 3.0, gpu: float | None = None, batches: int = 1) -> None:
        self.processors, self.gpu, self.batches = processors, gpu, batches
        self.passed = self.seconds = self.cpu_seconds = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.pass_by(4 / self.batches)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.pass_by(1000)

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds
        self.cpu_seconds += seconds / 2

    def find(self, device: torch.device, powercap: Path) -> list[Counter]:
        refused = "" if self.processors else "not here"
        found = [Counter(PROCESSORS, "machine", lambda: self.seconds / 4 * self.processors, refused)]
        if self.gpu:
            found.append(Counter(ACCELERATORS, f"GPU-{pool_rank()}", lambda: self.seconds / 4 * self.gpu))
        return found

    @contextlib.contextmanager
    def pretended(self) -> Iterator[None]:
        with (
            mock.patch.object(meter, "perf_counter", side_effect=lambda: self.seconds),
            mock.patch.object(meter, "process_time", side_effect=lambda: self.cpu_seconds),
            mock.patch.object(energy, "find_counters", self.find),
        ):
            yield


def pool_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def run_fit(
    root: str | Path, machine: Machine, monitor: EnergyMonitor, strategy: Any = "ddp", data: Any = None, **kwargs: Any
) -> Trainer:
    """Train with a monitor on a pretended machine; the ranks take their parts of 160 samples in batches of 8."""
    checkpoint = kwargs.pop("ckpt_path", None)
    callbacks = [machine, monitor, *kwargs.pop("callbacks", [])]
    defaults = {"log_every_n_steps": 1, "max_epochs": 1, "limit_val_batches": 0}
    with machine.pretended():
        run = trainer(strategy, root=root, callbacks=callbacks, **{**defaults, **kwargs})
        run.fit(Classifier(), loader() if data is None else data, loader(16), ckpt_path=checkpoint)
    return run


def energies(run: Trainer) -> dict[str, float]:
    logged = run.callback_metrics.items()
    return {name.removeprefix("energy/"): float(value) for name, value in logged if name.startswith("energy/")}


def rows_of(root: Path) -> list[dict[str, str]]:
    with (root / "csv" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["energy/joules_per_step"]]


@pytest.mark.parametrize("strategy", ["ddp", "powersgd", "powergossip"])
def test_figures_of_two_ranks_are_exact_and_a_machine_is_counted_once(fit, strategy, tmp_path):
    results = fit(_two_ranks, strategy)
    # A step is 3 J of the processors, and 16 J and 32 J of the GPUs; 4 s, 2 s of a processor each; 8 samples each.
    expected = {
        "joules_per_step": 51,
        "joules_per_sample": 51 / 16,
        "seconds_per_step": 4,
        "cpu_seconds_per_step": 4,
    }
    totals = {"joules": 510, "estimated_joules": None, "seconds": 40, "cpu_seconds": 40, "steps": 10, "samples": 160}
    source = "joules of 2 GPUs (NVML) and the processors of 1 machine (powercap)"
    assert results == [(expected, totals, source)] * 2
    # Ten seconds are three steps; the first reading after one says so.
    rows = rows_of(tmp_path)
    assert [(row["step"], float(row["energy/joules_per_step"])) for row in rows] == [("2", 51), ("5", 51), ("8", 51)]


def _two_ranks(root: str, strategy: str) -> tuple[dict[str, float], dict[str, Any], str]:
    monitor = EnergyMonitor()
    machine = Machine(gpu=16.0 * (1 + dist.get_rank()))
    logger, alike = CSVLogger(root, "csv", version=""), strategy != "powergossip"
    run = run_fit(root, machine, monitor, strategy, logger=logger, alike=alike)
    return energies(run), totals_of(monitor), monitor.source


def totals_of(monitor: EnergyMonitor) -> dict[str, Any]:
    names = ("joules", "estimated_joules", "seconds", "cpu_seconds", "steps", "samples")
    return {name: getattr(monitor, name) for name in names}


class Powercap(Machine):
    """A machine whose processors have a counter in files: 3 joules a step, and soon round."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder / "intel-rapl:0"
        if pool_rank() == 0:
            self.folder.mkdir(parents=True)
            (self.folder / "name").write_text("package-0\n")
            (self.folder / "max_energy_range_uj").write_text("10000000\n")
            self.write()
        dist.barrier()

    def pass_by(self, seconds: float) -> None:
        super().pass_by(seconds)
        if pool_rank() == 0:
            self.write()

    def write(self) -> None:
        energy = 9_500_000 + self.seconds / 4 * 3_000_000
        (self.folder / "energy_uj").write_text(f"{int(energy) % 10_000_000}\n")

    find = staticmethod(energy.find_counters)


@pytest.mark.parametrize("strategy", ["ddp", "powersgd"])
def test_a_counter_in_files_that_goes_round_comes_out_exactly(fit, strategy):
    assert fit(_powercap, strategy) == [(3, 3 / 16, 30)] * 2


def _powercap(root: str, strategy: str) -> tuple[float, float, float | None]:
    folder = Path(root) / "powercap"
    monitor = EnergyMonitor(powercap=folder)
    logged = energies(run_fit(root, Powercap(folder), monitor, strategy))
    return logged["joules_per_step"], logged["joules_per_sample"], monitor.joules


def test_a_window_takes_one_collective(fit):
    # One to set up, and one for each reading: after a step, after three windows, and at the end.
    assert fit(_count_collectives) == [(2, 5)] * 2


def _count_collectives(root: str) -> tuple[int, int]:
    gathered, summed = mock.Mock(side_effect=meter.of_all_ranks), mock.Mock(side_effect=dist.all_reduce)
    with (
        mock.patch.object(meter, "of_all_ranks", gathered),
        mock.patch.object(meter, "dist", mock.Mock(wraps=dist, all_reduce=summed)),
    ):
        run_fit(root, Machine(), EnergyMonitor())
    return gathered.call_count, summed.call_count


def test_a_reading_waits_for_the_loggers_and_for_the_end_of_accumulation(fit, tmp_path):
    assert fit(_accumulate) == [(8, 128)] * 2
    rows = rows_of(tmp_path)
    assert [(row["step"], row["energy/joules_per_sample"]) for row in rows] == [("3", "0.1875"), ("7", "0.1875")]


def _accumulate(root: str) -> tuple[int, int | None]:
    monitor = EnergyMonitor(batch_size=4)
    logger = CSVLogger(root, "csv", version="")
    kwargs = {"accumulate_grad_batches": 2, "log_every_n_steps": 4, "logger": logger, "max_steps": 8, "max_epochs": 2}
    # A step is 3 J and two batches of 4 samples on two ranks.
    run_fit(root, Machine(batches=2), monitor, **kwargs)
    return monitor.steps, monitor.samples


def test_validation_inside_the_fit_is_not_counted(fit):
    for metrics, totals in fit(_validate):
        assert metrics["seconds_per_step"] == 4
        assert metrics["joules_per_step"] == 3
        assert (totals["seconds"], totals["joules"], totals["cpu_seconds"]) == (40, 30, 40)


def _validate(root: str) -> tuple[dict[str, float], dict[str, Any]]:
    monitor = EnergyMonitor()
    kwargs = {"limit_val_batches": 1, "val_check_interval": 4, "num_sanity_val_steps": 1}
    return energies(run_fit(root, Machine(), monitor, "powersgd", **kwargs)), totals_of(monitor)


def test_a_resumed_fit_goes_on_adding(fit):
    for saved, resumed in fit(_resume):
        assert 0 < saved["steps"] <= 10
        assert resumed["steps"] == saved["steps"] + 10
        # The pretended machine began anew, as a real one does.
        assert resumed["joules"] == 3 * resumed["steps"]
        assert resumed["seconds"] == 4 * resumed["steps"]
        assert resumed["samples"] == 16 * resumed["steps"]


def _resume(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    saver = ModelCheckpoint(root, filename="saved")
    run_fit(root, Machine(), EnergyMonitor(), callbacks=[saver], enable_checkpointing=True)
    saved = torch.load(f"{root}/saved.ckpt", weights_only=True)["callbacks"]["EnergyMonitor"]
    assert all(type(amount) is float for amount in saved.values())
    resumed = EnergyMonitor()
    run_fit(root, Machine(), resumed, max_epochs=2, ckpt_path=f"{root}/saved.ckpt")
    return saved, totals_of(resumed)


def test_the_totals_are_those_of_one_fit(fit):
    assert fit(_fit_twice) == [[10, 10]] * 2


def _fit_twice(root: str) -> list[int]:
    monitor, steps = EnergyMonitor(), []
    for _ in range(2):
        run_fit(root, Machine(), monitor)
        steps.append(monitor.steps)
    return steps


def test_an_estimate_is_made_on_request_and_called_one(fit):
    for metrics, totals in fit(_estimate):
        assert metrics == {
            "seconds_per_step": 4,
            "cpu_seconds_per_step": 4,
            "estimated_joules_per_step": 2 * 4 * 250,
            "estimated_joules_per_sample": 2 * 4 * 250 / 16,
        }
        assert totals["joules"] is None
        assert totals["estimated_joules"] == 10 * 2 * 4 * 250


def _estimate(root: str) -> tuple[dict[str, float], dict[str, Any]]:
    monitor = EnergyMonitor(watts=250)
    return energies(run_fit(root, Machine(processors=None), monitor)), totals_of(monitor)


def test_ranks_with_unequal_numbers_of_batches_do_not_wait_for_each_other(fit):
    said, steps = fit(_uneven)[0]
    # Rank 0 ends before the first reading, and rank 1 comes to one.
    assert steps == 0
    assert any("EnergyMonitor's totals end with step 0" in text for text in said)


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter([sample for _, sample in zip(range(8 * self.batches), loader().dataset, strict=False)])


class Apart(Callback):
    """Lets every rank train for itself, so that DDP does not wait for ranks without batches either."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.model.require_backward_grad_sync = False


def _uneven(root: str) -> tuple[list[str], int]:
    monitor = EnergyMonitor()
    data = DataLoader(Stream(4 + 2 * dist.get_rank()), batch_size=8)
    with (
        messages() as said,
        # They ask for each other at different places, where no patience helps.
        mock.patch.object(meter, "_PATIENCE", meter.timedelta(milliseconds=10)),
        # By which all ranks wait for rank 0 in every batch, in versions of Lightning that have it.
        mock.patch(
            "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop._broadcast_sigterm_tensor", create=True
        ),
    ):
        run_fit(root, Machine(), monitor, data=data, log_every_n_steps=5, callbacks=[Apart()], alike=False)
    dist.barrier()
    return said, monitor.steps


def test_batches_of_unknown_number_are_counted_where_the_ranks_meet(fit):
    for totals, left in fit(_stream):
        assert (totals["steps"], totals["joules"]) == (12, 36)
        assert left <= 4  # of the last questions, whose answers may still be read


def _stream(root: str) -> tuple[dict[str, Any], int]:
    monitor = EnergyMonitor()
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    run_fit(root, Machine(), monitor, data=DataLoader(Stream(12), batch_size=8))
    dist.barrier()
    left = store.num_keys() - before
    dist.barrier()
    return totals_of(monitor), left


def test_a_batch_of_unknown_size_gives_no_samples_and_says_so_once(tmp_path):
    machine, monitor = Machine(), EnergyMonitor()

    class Untold(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step([torch.zeros(8, 32), torch.zeros(8, dtype=torch.long)], batch_idx)

    told = mock.Mock()
    with mock.patch.object(energy, "rank_zero_warn", told):
        data = DataLoader(range(6), batch_size=1, collate_fn=lambda samples: "text")
        run = fit_alone(tmp_path, machine, monitor, Untold(), data)
    assert energies(run) == {"joules_per_step": 3, "seconds_per_step": 4, "cpu_seconds_per_step": 2}
    assert totals_of(monitor)["samples"] is None
    ((warning,),) = (call.args for call in told.call_args_list)
    assert "EnergyMonitor finds no tensor in a batch" in warning


def fit_alone(root: Path, machine: Machine, monitor: EnergyMonitor, model: LightningModule, data: Any) -> Trainer:
    """Train in this process, without a strategy of several."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with machine.pretended(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=root,
            callbacks=[machine, monitor],
            log_every_n_steps=1,
            max_epochs=1,
            **quiet,
        )
        run.fit(model, data)
    return run


def test_one_device_needs_no_process_group(tmp_path):
    machine, monitor = Machine(), EnergyMonitor()
    with messages() as said:
        run = fit_alone(tmp_path, machine, monitor, Classifier(), loader(48))
    assert energies(run) == {
        "joules_per_step": 3,
        "joules_per_sample": 3 / 8,
        "seconds_per_step": 4,
        "cpu_seconds_per_step": 2,
    }
    assert monitor.joules == 18
    assert said.count("EnergyMonitor measures joules of the processors of 1 machine (powercap).") == 1


def test_nothing_is_called_joules_on_a_machine_without_counters(tmp_path):
    machine, monitor = Machine(), EnergyMonitor(powercap=tmp_path / "missing")
    with mock.patch.object(machine, "find", energy.find_counters):
        run = fit_alone(tmp_path, machine, monitor, Classifier(), loader(48))
    assert energies(run) == {"seconds_per_step": 4, "cpu_seconds_per_step": 2}
    assert monitor.joules is None
    assert monitor.estimated_joules is None
    assert monitor.source.startswith("CPU-seconds and no joules, since processors are not measured (rank 0: ")
    assert (monitor.steps, monitor.cpu_seconds, monitor.samples) == (6, 12, 48)


def test_a_fit_that_fails_counts_up_to_its_last_reading(tmp_path):
    machine, monitor = Machine(), EnergyMonitor()

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise OSError("no more data")
            return super().training_step(batch, batch_idx)

    with pytest.raises(OSError, match="no more data"):
        fit_alone(tmp_path, machine, monitor, Failing(), loader(160))
    assert (monitor.steps, monitor.joules) == (3, 9)
    # The next one begins anew.
    fit_alone(tmp_path, machine, monitor, Classifier(), loader(48))
    assert (monitor.steps, monitor.joules) == (6, 18)


def test_a_strategy_without_torchs_process_group_is_refused(tmp_path):
    pretended = types.SimpleNamespace(world_size=2, strategy=object())
    with (
        mock.patch.object(energy.dist, "is_initialized", return_value=False),
        pytest.raises(RuntimeError, match=r"`EnergyMonitor` sums over ranks with torch.distributed, which object does"),
    ):
        EnergyMonitor().on_train_start(pretended, None)


@pytest.mark.parametrize(
    ("names", "expected"), [(None, 1), (("data_parallel",), 1), (("data_parallel", "tensor_parallel"), 4)]
)
def test_ranks_with_parts_of_one_model_have_one_batch(names, expected):
    mesh = types.SimpleNamespace(mesh_dim_names=names, size=lambda dim: (2, 4)[dim])
    strategy = types.SimpleNamespace(device_mesh=mesh)
    assert energy._ranks_of_a_batch(types.SimpleNamespace(strategy=strategy)) == expected
    assert energy._ranks_of_a_batch(types.SimpleNamespace(strategy=object())) == 1
