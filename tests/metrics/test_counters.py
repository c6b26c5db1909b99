"""Tier one: the counters of energy, on a pretended powercap tree and a pretended NVML."""

from __future__ import annotations

import os
import re
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from lightning_powersgd.metrics import counters
from lightning_powersgd.metrics.counters import (
    ACCELERATORS,
    PROCESSORS,
    NotMeasuredError,
    ProcessorCounter,
    find_counters,
    gpu_counter,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RANGE = 262_143_328_850  # microjoules, of a real package


def domain(powercap: Path, folder: str, name: str, energy: int, most: int = RANGE) -> Path:
    """Write a counter as the kernel shows it."""
    path = powercap / folder
    path.mkdir(parents=True)
    for file, text in {"name": name, "energy_uj": energy, "max_energy_range_uj": most}.items():
        (path / file).write_text(f"{text}\n")
    return path / "energy_uj"


def test_packages_and_memory_are_counted_and_what_is_in_them_is_not(tmp_path):
    first = domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    uncore = domain(tmp_path, "intel-rapl:0:1", "uncore", 1_000_000)
    memory = domain(tmp_path, "intel-rapl:0:2", "dram", 9_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 0)
    platform = domain(tmp_path, "intel-rapl:2", "psys", 1_000_000)
    once_more = domain(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    counter = ProcessorCounter(tmp_path)
    assert counter.joules() == 0
    first.write_text("7500000\n")
    memory.write_text("9250000\n")
    second.write_text("4000000\n")
    for other in (core, uncore, platform, once_more):
        other.write_text("99000000\n")
    assert counter.joules() == 2.5 + 0.25 + 4
    assert counter.joules() == 6.75


def test_a_counter_that_starts_again_goes_on(tmp_path):
    energy = domain(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_500_000)
    counter = ProcessorCounter(tmp_path)
    energy.write_text("500000\n")
    assert counter.joules() == 2
    energy.write_text("1500000\n")
    assert counter.joules() == 3
    energy.write_text("0\n")  # once more round
    assert counter.joules() == (500_000 + RANGE + 1_000_000) / 1e6


def test_a_package_that_is_shown_once_for_each_die_is_counted_once(tmp_path):
    energies = [domain(tmp_path, f"intel-rapl:{die}", f"package-0-die-{die}", 10**10 + die) for die in range(3)]
    # Of another package, and of a die with a counter of its own.
    energies.append(domain(tmp_path, "intel-rapl:3", "package-1-die-0", 10**10))
    energies.append(domain(tmp_path, "intel-rapl:4", "package-1-die-1", 2 * 10**10))
    counter = ProcessorCounter(tmp_path)
    for energy in energies:
        energy.write_text(str(int(energy.read_text()) + 1_000_000))
    assert counter.joules() == 3


def test_missing_counters_are_not_measured(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotMeasuredError, match=r"has no counters \(intel-rapl:\*\) of processor packages"):
            ProcessorCounter(folder)
    domain(tmp_path, "intel-rapl:0:0", "core", 0)
    with pytest.raises(NotMeasuredError, match="has no counters"):
        ProcessorCounter(tmp_path)


def test_counters_that_only_root_may_read_are_not_measured(tmp_path, monkeypatch):
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    secret = domain(tmp_path, "intel-rapl:1", "package-1", 0)
    secret.chmod(0)
    read = Path.read_text

    def refuse(path: Path) -> str:
        # Root may read everything, and tests may run as root.
        if not os.stat(path).st_mode & 0o400:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    (processors,) = find_counters(CPU, tmp_path)
    assert processors.kind == PROCESSORS
    assert processors.refused == f"{secret} may not be read; on most systems only root may"
    with pytest.raises(NotMeasuredError):
        processors.joules()


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many"])
def test_what_is_no_number_is_not_measured(tmp_path, text):
    energy = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    energy.write_text(text)
    (processors,) = find_counters(CPU, tmp_path)
    assert processors.refused == f"{energy} holds {text!r} where a number should be"


def test_a_counter_that_goes_away_is_not_measured_any_more(tmp_path):
    energy = domain(tmp_path, "intel-rapl:0", "package-0", 0)
    counter = ProcessorCounter(tmp_path)
    energy.unlink()
    with pytest.raises(NotMeasuredError, match="cannot be read: No such file or directory"):
        counter.joules()


def test_ranks_of_a_machine_have_one_name_for_its_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(counters, "_BOOT_ID", tmp_path / "boot_id")
    (without,) = find_counters(CPU, tmp_path)
    assert without.name
    (tmp_path / "boot_id").write_text("one boot\n")
    assert [find_counters(CPU, tmp_path)[0].name for _ in range(2)] == ["one boot"] * 2


# NVML


class FakeNvml(types.ModuleType):
    """The part of nvidia-ml-py that is used, with GPUs whose millijoules are given by UUID."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
        pass

    def __init__(self, millijoules: dict[str, int], divided: bool | None = False, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.millijoules, self.divided, self.driver = millijoules, divided, driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.millijoules:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:  # noqa: N802
        if self.divided is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return int(self.divided), 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if self.millijoules[handle] < 0:
            raise self.NVMLError_NotSupported("Not Supported")
        return self.millijoules[handle]


@pytest.fixture
def nvml(monkeypatch):
    """Pretends NVML, and GPUs of a process by their UUIDs, in the order of ``CUDA_VISIBLE_DEVICES``."""

    def pretend(module: types.ModuleType | None, visible: list[str | None]) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        properties = [types.SimpleNamespace(**({"uuid": uuid} if uuid else {})) for uuid in visible]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])

    return pretend


def test_a_gpu_is_found_by_its_uuid_not_by_its_number(nvml, tmp_path):
    module = FakeNvml({"GPU-a": 1_000, "GPU-b": 20_000, "GPU-c": 300_000})
    nvml(module, ["c", "a"])  # as CUDA_VISIBLE_DEVICES=2,0
    assert [gpu_counter(torch.device("cuda", index))() for index in (0, 1)] == [300, 1]
    processors, accelerator = find_counters(GPU, tmp_path)
    assert processors.refused
    assert (accelerator.kind, accelerator.name, accelerator.refused) == (ACCELERATORS, "GPU-c", "")
    module.millijoules["GPU-c"] += 2_500
    assert accelerator.joules() == 302.5


@pytest.mark.parametrize(
    ("module", "uuid", "reason"),
    [
        (None, "a", "the package nvidia-ml-py is not installed"),
        (FakeNvml({"GPU-a": 0}, driver=False), "a", "NVML does not give the GPU GPU-a: Driver Not Loaded"),
        (FakeNvml({"GPU-a": 0}), "of a MIG instance", "NVML does not give the GPU .*: Not Found"),
        (FakeNvml({"GPU-a": 0}, divided=True), "a", r"divided into instances \(MIG\)"),
        (FakeNvml({"GPU-a": -1}), "a", "NVML does not give the energy of the GPU GPU-a: Not Supported"),
        (FakeNvml({"GPU-a": 0}), None, "PyTorch tells it from version 2.5 on"),
    ],
)
def test_a_gpu_without_a_counter_of_its_own_is_not_measured(nvml, tmp_path, module, uuid, reason):
    nvml(module, [uuid])
    _, accelerator = find_counters(GPU, tmp_path)
    assert re.search(reason, accelerator.refused)
    with pytest.raises(NotMeasuredError):
        accelerator.joules()


def test_a_gpu_that_cannot_be_divided_is_measured(nvml):
    nvml(FakeNvml({"GPU-a": 7_000}, divided=None), ["a"])
    assert gpu_counter(GPU)() == 7


@pytest.mark.parametrize(("device", "hip"), [(torch.device("mps"), None), (GPU, "6.2")])
def test_other_accelerators_are_not_measured(nvml, tmp_path, monkeypatch, device, hip):
    nvml(FakeNvml({"GPU-a": 7_000}), ["a"])
    monkeypatch.setattr(torch.version, "hip", hip)
    _, accelerator = find_counters(device, tmp_path)
    assert accelerator.refused == f"no counter of {'AMD GPUs' if hip else 'mps devices'} is known here"
    assert accelerator.name


def test_a_gpu_that_is_lost_is_not_measured_any_more(nvml):
    module = FakeNvml({"GPU-a": 7_000})
    nvml(module, ["a"])
    joules = gpu_counter(GPU)
    with (
        mock.patch.object(module, "nvmlDeviceGetTotalEnergyConsumption", side_effect=module.NVMLError("GPU is lost")),
        pytest.raises(NotMeasuredError, match="GPU is lost"),
    ):
        joules()
