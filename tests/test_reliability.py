"""Tier one: what docs/reliability.md says is tested is tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {path.name: path for path in TESTS.rglob("test_*.py")}
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
LOSSES = re.findall(r"^\| (.+) \| `(test_\w+\.py)::(test_\w+)` \|$", PAGE, re.MULTILINE)


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_page_lists_what_pytorchs_hook_loses():
    assert len(LOSSES) == 14


@pytest.mark.parametrize(("loss", "file", "test"), LOSSES)
def test_every_loss_has_a_test_that_names_it(loss, file, test):
    decorators = [ast.unparse(decorator) for decorator in functions(FILES[file])[test].decorator_list]
    assert f"pytest.mark.lost_by_pytorchs_hook({loss!r})" in decorators


def test_every_test_that_the_page_names_is_there():
    there = {name for path in FILES.values() for name in functions(path)}
    named = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", PAGE))
    assert len(named) > 20
    assert named <= there
    assert set(re.findall(r"test_\w+\.py", PAGE)) <= FILES.keys()
