"""Tier one: what the pages quote is what the package says."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_powersgd

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"


def quoted_messages() -> list[str]:
    messages = PAGE.read_text().split("## It does not start, or stops")[1]
    return [message for _, message in re.findall(r"^\| (`+)(.+?)\1 \|", messages, re.MULTILINE)]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_package():
    sources = Path(lightning_powersgd.__file__).parent.glob("*.py")
    # Strings that stand in several lines are one.
    said = re.sub(r'"\s*f?"', "", "\n".join(source.read_text() for source in sources))
    assert len(quoted_messages()) > 10
    for message in quoted_messages():
        parts = [re.escape(part) for part in message.split("…")]
        assert re.search(r".*?".join(parts), said), message
