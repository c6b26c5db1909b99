"""Tier one: what the pages quote is what the package says."""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from pathlib import Path

import pytest
from models import Classifier, loader

import lightning_powersgd
from lightning_powersgd import make_topology
from lightning_powersgd.exchange.topology import ALL, TOPOLOGIES
from lightning_powersgd.planner.command import main

DOCS = Path(__file__).parents[1] / "docs"
GOSSIP = (DOCS / "gossip.md").read_text()


def test_the_example_of_the_energy_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": Classifier(), "data": loader(16)}
    example = re.findall(r"^```python\n(.*?)^```$", (DOCS / "energy.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(example, names)
    assert names["monitor"].steps == 2


def quoted_messages() -> list[str]:
    messages = (DOCS / "troubleshooting.md").read_text().split("## It does not start, or stops")[1]
    in_tables = [message.strip() for _, message in re.findall(r"^\| (`+)(.+?)\1 \|", messages, re.MULTILINE)]
    in_blocks = [
        " ".join(block.split()) for block in re.findall(r"^```\n(Rank .+?)\n```$", GOSSIP, re.MULTILINE | re.DOTALL)
    ]
    assert len(in_tables) > 10
    assert len(in_blocks) == 1
    return in_tables + in_blocks


def test_the_messages_that_pages_quote_are_those_of_the_package():
    sources = Path(lightning_powersgd.__file__).parent.rglob("*.py")
    # Strings that stand in several lines are one.
    said = re.sub(r'"\s*f?"', "", "\n".join(source.read_text() for source in sources))
    for message in quoted_messages():
        parts = [re.escape(part) for part in message.split("…")]
        assert re.search(r".*?".join(parts), said), message


def test_the_topologies_of_the_gossip_page_have_these_figures():
    rows = re.findall(r'^\| `"(\w+)"` \|.*\| ([^|]+) \| ([^|]+) \|$', GOSSIP, re.MULTILINE)
    # In the last one there are no links.
    assert [name for name, *_ in rows] == [name for name in TOPOLOGIES if name != ALL]
    for name, links, gaps in rows:
        graphs = [make_topology(name, ranks) for ranks in (8, 16)]
        assert gaps == ", ".join(f"{graph.spectral_gap:.3g}" for graph in graphs), name
        used = [re.search(r"([\d.]+) used by a rank", graph.summary())[1] for graph in graphs]
        assert links.split(";")[0] == ", ".join(used), name


# Of the page of public reports: each command, and what it prints of it.
REPORTS = re.findall(
    r"^```\nlightning-powersgd (plan .+?)\n```\n\n```text\n(.+?)\n```$",
    (DOCS / "why-slower.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("command", "output"), REPORTS)
def test_the_reports_are_what_the_planner_prints(command, output, monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the planner adds the model's folder
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert output in capsys.readouterr().out


def test_there_are_five_reports():
    assert len(REPORTS) == 5
