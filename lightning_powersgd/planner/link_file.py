"""A measured link as a file, which ``probe`` writes and ``plan`` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning_powersgd.exchange.link import Link
from lightning_powersgd.version import __version__

FORMAT_VERSION = 1


def link_content(link: Link) -> dict[str, Any]:
    """Give what there is to say of a link, in types that JSON has. docs/planner.md describes it."""
    return {
        "format_version": FORMAT_VERSION,
        "lightning_powersgd": __version__,
        "world_size": link.world_size,
        "latency_seconds": link.latency,
        "bits_per_second": link.bits_per_second,
        "spread": link.spread,
        "samples": [
            {
                "payload_bytes": sample.payload_bytes,
                "seconds": sample.seconds,
                "low_seconds": sample.low,
                "high_seconds": sample.high,
                "repetitions": sample.repetitions,
                "bits_per_second": link.bits_per_second_of(sample),
            }
            for sample in link.samples
        ],
    }


def write_link(path: Path, link: Link) -> None:
    """Write a link.

    Raises:
        OSError: if that cannot be done.
    """
    path.write_text(json.dumps(link_content(link), indent=1) + "\n")


def read_link(path: Path) -> Link:
    """Read a link: its world size, latency and bandwidth.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not the file of a link.
    """
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
        link = Link(int(content["world_size"]), float(content["latency_seconds"]), float(content["bits_per_second"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the file of a link. Write one with `lightning-powersgd probe`.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has the format {version!r}, not {FORMAT_VERSION}. Write it anew with `lightning-powersgd probe`."
        )
    if link.world_size < 2 or not 0 <= link.latency < math.inf or not 0 < link.bits_per_second < math.inf:
        raise ValueError(f"{path} holds figures that no link has. Write it anew with `lightning-powersgd probe`.")
    return link
