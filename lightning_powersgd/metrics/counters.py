"""Counters of energy that a rank can read: its GPU's, and those of its machine's processors.

A counter is read or it is not: nothing here estimates. What a device's counter covers is its maker's word:

- `nvmlDeviceGetTotalEnergyConsumption`, millijoules of a whole GPU board since the driver was loaded, Volta or newer
  (https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html);
- the powercap framework's ``energy_uj``, microjoules of a processor package or of its memory
  (https://docs.kernel.org/power/powercap/powercap.html).
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# Two readings that are nearer to each other, in microjoules, are of one counter: between one reading and the next a
# package uses less, and counters of two dies are far apart.
_SAME_COUNTER_UJ = 1_000_000


class NotMeasuredError(Exception):
    """A counter that cannot be read, and why."""


@dataclass(frozen=True)
class Counter:
    """A counter of joules that belongs to a rank.

    Attributes:
        kind: what it counts, in the plural.
        name: of the one thing that it counts. Ranks that see the same thing have the same name for it.
        joules: reads it: the joules since some moment, which is the same as long as the counter lives. Raises
            `NotMeasuredError`.
        refused: why it cannot be read; empty where it can.
    """

    kind: str
    name: str
    joules: Callable[[], float]
    refused: str = ""


ACCELERATORS, PROCESSORS = "accelerators", "processors"


def find_counters(device: torch.device, powercap: Path) -> list[Counter]:
    """Find the counters of what a rank computes with, also of what cannot be measured.

    Args:
        device: of the rank.
        powercap: the folder of the processors' counters, ``/sys/class/powercap``.
    """
    found = [_made(PROCESSORS, _machine(), lambda: ProcessorCounter(powercap).joules)]
    if device.type != "cpu":
        found.append(_made(ACCELERATORS, _accelerator(device), lambda: gpu_counter(device)))
    return found


def _made(kind: str, name: str, make: Callable[[], Callable[[], float]]) -> Counter:
    try:
        joules = make()
        joules()
    except NotMeasuredError as error:
        return Counter(kind, name, _never, str(error))
    return Counter(kind, name, joules)


def _never() -> float:
    raise NotMeasuredError("it could not be read when the fit began")


def _machine() -> str:
    """Name this machine, alike in all containers on it."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def _accelerator(device: torch.device) -> str:
    return _uuid(device) or f"{_machine()} {device}"


def _uuid(device: torch.device) -> str:
    """Give a GPU's UUID as NVML writes it; empty for other devices, and for PyTorch before 2.5."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if device.type == "cuda" else None
    return "" if uuid is None else f"GPU-{uuid}"


def gpu_counter(device: torch.device) -> Callable[[], float]:
    """Find the energy counter of a GPU by its UUID, since NVML numbers GPUs otherwise than CUDA does.

    Args:
        device: of this rank.

    Returns:
        What reads it, in joules.

    Raises:
        NotMeasuredError: if there is none, or it counts other GPU instances, too.
    """
    if device.type != "cuda" or torch.version.hip:
        what = "AMD GPUs" if torch.version.hip else f"{device.type} devices"
        raise NotMeasuredError(f"no counter of {what} is known here")
    uuid = _uuid(device)
    if not uuid:
        raise NotMeasuredError("the GPU's UUID is not known; PyTorch tells it from version 2.5 on")
    try:
        import pynvml
    except ImportError:
        raise NotMeasuredError("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        divided = _is_divided(pynvml, handle)
    except pynvml.NVMLError as error:
        raise NotMeasuredError(f"NVML does not give the GPU {uuid}: {error}") from error
    if divided:
        raise NotMeasuredError("the GPU is divided into instances (MIG), and its counter is that of all of them")

    def joules() -> float:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except pynvml.NVMLError as error:
            raise NotMeasuredError(f"NVML does not give the energy of the GPU {uuid}: {error}") from error

    return joules


def _is_divided(pynvml: Any, handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError_NotSupported:
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


class ProcessorCounter:
    """The energy of a machine's processor packages, and of their memory where that has a counter of its own.

    Args:
        powercap: the folder of the counters, ``/sys/class/powercap``.

    Raises:
        NotMeasuredError: if there are none, or one of them cannot be read.
    """

    def __init__(self, powercap: Path) -> None:
        self._domains = _domains(powercap)
        if not self._domains:
            raise NotMeasuredError(f"{powercap} has no counters (intel-rapl:*) of processor packages")
        self._ranges = {domain: _number(domain / "max_energy_range_uj") for domain in self._domains}
        self._last = {domain: _number(domain / "energy_uj") for domain in self._domains}
        self._microjoules = 0

    def joules(self) -> float:
        """Give the joules since this object was made. A counter must not have gone round twice since the last call.

        Raises:
            NotMeasuredError: if one of the counters cannot be read any more.
        """
        for domain, last in self._last.items():
            now = _number(domain / "energy_uj")
            # Counters start again from zero: at 200 W after some 20 minutes, of others after 5.
            self._microjoules += now - last if now >= last else now - last + self._ranges[domain]
            self._last[domain] = now
        return self._microjoules / 1e6


def _domains(powercap: Path) -> list[Path]:
    """Give the folders of packages, and of memory beside them; every joule is counted in one of them only.

    A package has its cores and its graphics in it, but no memory. "psys", the whole platform, has packages in it, and
    "intel-rapl-mmio" counts them once more.
    """
    domains: list[Path] = []
    readings: dict[str, list[int]] = {}
    for domain in sorted(powercap.glob("intel-rapl:*")):
        name = _text(domain / "name")
        if package := re.match(r"package-\d+", name):
            # Some kernels show the one counter of a package once for each of its dies.
            reading, others = _number(domain / "energy_uj"), readings.setdefault(package[0], [])
            if all(abs(reading - other) >= _SAME_COUNTER_UJ for other in others):
                domains.append(domain)
            others.append(reading)
        elif name == "dram":
            domains.append(domain)
    return domains


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise NotMeasuredError(f"{path} holds {text!r} where a number should be")
    return int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except PermissionError:
        raise NotMeasuredError(f"{path} may not be read; on most systems only root may") from None
    except OSError as error:
        raise NotMeasuredError(f"{path} cannot be read: {error.strerror}") from None
