"""Tier one: quantities as people write and read them."""

from __future__ import annotations

import pytest

from lightning_powersgd.planner.units import format_bytes, format_rate, format_seconds, parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1gbit", 1e9),
        ("400mbit", 4e8),
        ("1.5gbit", 1.5e9),
        (" 25 Gbit/s", 2.5e10),
        ("100Gbps", 1e11),
        (".5Tbit", 5e11),
        ("64kbit", 64e3),
        ("300bit", 300),
    ],
)
def test_speeds_of_links(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "1", "1g", "0mbit", "-1gbit", "1GB/s", "1GBps", "1e9bit", "1.2.3gbit"])
def test_what_is_not_the_speed_of_a_link(text):
    with pytest.raises(ValueError, match=r"is not the speed of a link.*such as 100mbit"):
        parse_rate(text)


def test_numbers_are_readable():
    assert [format_seconds(value) for value in (0, 12e-6, 0.0345, 0.9999, 61)] == [
        "0 s",
        "12 µs",
        "34.5 ms",
        "1 s",
        "61 s",
    ]
    assert [format_bytes(value) for value in (40, 1500, 2.5e6, 1.2e12)] == ["40 B", "1.5 kB", "2.5 MB", "1,200 GB"]
    assert [format_rate(value) for value in (1e9, 999.9e6, 1.5e13)] == ["1 Gbit/s", "1 Gbit/s", "15 Tbit/s"]
