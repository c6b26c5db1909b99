"""What the device has found out, and whether the host knows it already.

A CPU's answers are there at once. On an accelerator the host would have to wait for them, so there a number stays on
the device, which decides by itself, and the host asks when the answer has long arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def known(scalar: Tensor) -> bool | float | Tensor:
    """Give a number to the host where that costs nothing, or else leave it on its device."""
    return scalar.item() if host_waits_for(scalar.device) else scalar


def known_each(answers: Tensor) -> list[bool] | list[Tensor]:
    """Give several answers, as `known` gives one."""
    return answers.tolist() if host_waits_for(answers.device) else list(answers.unbind())


def any_of(answers: Sequence[bool | Tensor]) -> bool | Tensor:
    """Whether any of several answers is yes; on the device if one of them is there, which may be of several bools."""
    on_device = [answer.flatten() for answer in answers if isinstance(answer, Tensor)]
    return torch.cat(on_device).any() if on_device else any(answers)


class Verdict:
    """Answers, true or false, on their way from the device that found them out.

    Args:
        answers: a tensor of bools.
    """

    def __init__(self, answers: Tensor) -> None:
        self._arrived: Any = None
        if answers.device.type == "cpu":
            self._answers = answers
            return
        accelerator = torch.get_device_module(answers.device)
        # Into pinned memory: only then the host goes on meanwhile.
        self._answers = answers.to("cpu", non_blocking=True)
        self._arrived = accelerator.Event()
        self._arrived.record(accelerator.current_stream(answers.device))

    def tolist(self) -> list[bool]:
        """Give the answers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        answers: list[bool] = self._answers.view(-1).tolist()
        return answers


def host_waits_for(device: torch.device) -> bool:
    """Whether the host waits for what the device computes anyway, so that asking for a number costs nothing."""
    return device.type == "cpu"
