"""Where the planner measures."""

from __future__ import annotations

import torch


def measuring_device(device: torch.device | str | None) -> torch.device:
    """Find the device to measure on: CUDA if there is a GPU, unless another is named.

    Raises:
        ValueError: if there is no GPU and one is named.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device='cuda'`: torch finds no GPU. Use 'cpu', or give `compress_seconds`.")
    return device


def describe(device: torch.device) -> str:
    """Say in a few words what was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"this {device.type.upper()} with {threads} thread{'s' if threads > 1 else ''}"
