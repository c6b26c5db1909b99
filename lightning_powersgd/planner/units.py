"""Quantities as people write and read them: rates of links, times, bytes and ratios."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_RATE = re.compile(r"(\d+\.?\d*|\.\d+)\s*([kKmMgGtT]?)(?:[bB]it(?:/s)?|bps)")
SLOWEST_LINK, FASTEST_LINK = 1.0, 1e18


def parse_rate(text: str) -> float:
    """Read the speed of a link, such as "100mbit", "1.5gbit", "25 Gbit/s" or "400Gbps".

    Returns:
        Bits per second.

    Raises:
        ValueError: if it is not one.
    """
    found = _RATE.fullmatch(text.strip())
    rate = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not SLOWEST_LINK <= rate <= FASTEST_LINK:
        raise ValueError(f"{text!r} is not the speed of a link. Use a number and a unit, such as 100mbit or 1.5gbit.")
    return rate


def format_rate(bits_per_second: float) -> str:
    """Write the speed of a link in a readable unit."""
    return _in_unit(bits_per_second, (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)), "bit/s")


def format_seconds(seconds: float) -> str:
    """Write a time in a readable unit."""
    return _in_unit(seconds, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)), "s")


def format_bytes(count: float) -> str:
    """Write a number of bytes in a readable unit."""
    return _in_unit(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def format_ratio(ratio: float) -> str:
    """Write how many times more something is."""
    return f"{_three_digits(ratio)}×"


def _in_unit(value: float, units: Sequence[tuple[str, float]], smallest: str) -> str:
    for unit, size in units:
        if value >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.3g} {smallest}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
