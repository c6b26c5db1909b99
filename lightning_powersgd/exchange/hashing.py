"""Numbers that look random and are the same on every machine, since they follow from their places alone."""

from __future__ import annotations

import torch
from torch import Tensor


def random_words(count: int, device: torch.device, first: int = 0) -> Tensor:
    """Give 64 random bits for each of several places (SplitMix64's, Steele et al., 2014).

    Args:
        count: of the places.
        device: of the result.
        first: place.

    Returns:
        (count,), int64.
    """
    x = torch.arange(first + 1, first + count + 1, device=device) * -0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, with zeros from the left; a signed shift brings the sign from there."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_signs(count: int, device: torch.device, first: int = 0) -> Tensor:
    """Give a random sign for each of several places, a multiple of 64.

    Args:
        count: of the places.
        device: of the result.
        first: place, a multiple of 64.

    Returns:
        (count,), int8, of −1 and 1.
    """
    octets = random_words(count // 64, device, first // 64).view(torch.uint8).unsqueeze(1)
    bits = (octets >> torch.arange(8, device=device, dtype=torch.uint8)) & 1
    return bits.view(torch.int8).mul_(2).sub_(1).flatten()
