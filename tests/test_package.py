"""Tier one: the package as a whole: who imports whom, and the names it registers."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

import lightning_powersgd
from lightning_powersgd import PowerGossipStrategy, PowerSGDStrategy

PACKAGE = Path(lightning_powersgd.__file__).parent
# By floor, the floors that it may import, beside its own. What no floor holds stands at the top of the package.
BELOW: dict[str, set[str]] = {
    "version": set(),
    "lightning_types": set(),
    "namespaces": set(),
    "compressor": set(),
    "exchange": {"compressor"},
    "planner": {"compressor", "exchange", "version"},
    "metrics": {"compressor", "exchange", "lightning_types", "namespaces"},
    "strategies": {"compressor", "exchange", "lightning_types", "metrics", "namespaces", "version"},
    "__main__": {"planner"},
    "__init__": {"compressor", "exchange", "metrics", "namespaces", "strategies", "planner", "version"},
}
WITHOUT_LIGHTNING = ("compressor", "exchange", "planner")
NAMES = [
    f"powersgd{suffix}{ending}"
    for suffix in ("", "_spawn", "_fork", "_notebook")
    for ending in ("", "_find_unused_parameters_true")
]

LOAD_WITHOUT_LIGHTNING = """
import sys, types
# The package itself registers its strategies; only its rooms are loaded here.
package = types.ModuleType("lightning_powersgd")
package.__path__ = [{path!r}]
sys.modules["lightning_powersgd"] = package
for room in {rooms!r}:
    __import__(room)
# Lightning, and what only the program `lightning-powersgd` needs, and only for some of its output.
kept_out = {{"lightning", "pytorch_lightning", "torchmetrics", "rich", "matplotlib"}}
found = [name for name in sys.modules if name.split(".")[0] in kept_out]
sys.exit(f"imported {{found[:3]}}" if found else 0)
"""


def rooms_of(*floors: str) -> dict[str, str]:
    """The modules of floors, by name, with their source."""
    rooms = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        rooms[".".join(parts[:-1] if len(parts) > 2 and parts[-1] == "__init__" else parts)] = path.read_text()
    return {name: text for name, text in rooms.items() if name.split(".")[1] in floors}


def imports_of(text: str) -> set[str]:
    """The rooms of this package that a module imports, also those that it imports in a function or for its types."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    found = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    rooms = rooms_of(*BELOW)
    found = {name if name in rooms else name.rpartition(".")[0] for name in found}
    return found & rooms.keys()


def imports_that_point_up(floor: str, text: str) -> set[str]:
    return {name for name in imports_of(text) if name.split(".")[1] not in {floor, *BELOW[floor]}}


def load_without_lightning(*floors: str) -> int:
    code = LOAD_WITHOUT_LIGHTNING.format(path=str(PACKAGE), rooms=list(rooms_of(*floors)))
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_the_floors_below_the_line_do_not_import_lightning():
    assert load_without_lightning(*WITHOUT_LIGHTNING) == 0


@pytest.mark.parametrize("floor", ["metrics", "strategies"])
def test_the_check_above_can_fail(floor):
    assert load_without_lightning(floor) != 0


def test_every_room_stands_on_a_floor():
    assert {name.split(".")[1] for name in rooms_of(*BELOW)} == BELOW.keys()
    assert len(rooms_of(*BELOW)) == len(list(PACKAGE.rglob("*.py")))


@pytest.mark.parametrize("floor", BELOW)
def test_imports_point_down(floor):
    for room, text in rooms_of(floor).items():
        assert not imports_that_point_up(floor, text), room


@pytest.mark.parametrize(
    ("floor", "text"),
    [
        ("compressor", "from lightning_powersgd.exchange.ddp import attach_powersgd"),
        ("exchange", "def f():\n    from lightning_powersgd.metrics import CompressionRatio"),
        ("planner", "from lightning_powersgd.strategies import powersgd"),
    ],
)
def test_the_check_of_imports_can_fail(floor, text):
    assert imports_that_point_up(floor, text)


def test_no_room_imports_itself_by_way_of_others():
    order = graphlib.TopologicalSorter({room: imports_of(text) - {room} for room, text in rooms_of(*BELOW).items()})
    assert len(list(order.static_order())) == len(rooms_of(*BELOW))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_gives_its_strategy(name):
    strategy = StrategyRegistry.get(name)
    assert type(strategy) is PowerSGDStrategy
    expected = "fork" if "fork" in name or "notebook" in name else "spawn" if "spawn" in name else "popen"
    assert strategy._start_method == expected
    assert strategy._ddp_kwargs["find_unused_parameters"] is name.endswith("_true")


def test_importing_twice_registers_once():
    before = StrategyRegistry.available_strategies()
    importlib.reload(lightning_powersgd)
    assert StrategyRegistry.available_strategies() == before
    assert StrategyRegistry["ddp"]["strategy"] is not PowerSGDStrategy


def test_a_trainer_takes_the_name_in_a_fresh_interpreter():
    code = (
        "import lightning_powersgd; from lightning.pytorch import Trainer;"
        "t = Trainer(strategy='powersgd', accelerator='cpu', devices=2);"
        "assert t.strategy.config == lightning_powersgd.PowerSGDStrategy().config; print(type(t.strategy).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "PowerSGDStrategy"


def test_the_arguments_of_ddp_strategy_are_all_there():
    theirs = set(inspect.signature(DDPStrategy.__init__).parameters) - {"kwargs"}
    ours = inspect.signature(PowerSGDStrategy.__init__).parameters
    assert theirs <= set(ours)
    assert all(parameter.annotation is not parameter.empty for name, parameter in ours.items() if name != "self")


@pytest.mark.parametrize("strategy", [PowerSGDStrategy, PowerGossipStrategy])
def test_a_strategy_documents_every_argument_once_in_the_order_of_its_signature(strategy):
    arguments = list(inspect.signature(strategy).parameters)
    documented = re.findall(r"^    \*{0,2}(\w+): ", inspect.getdoc(strategy).split("Raises:")[0], re.MULTILINE)
    assert documented == arguments


def test_everything_public_is_documented():
    for name in lightning_powersgd.__all__:
        assert name == "__version__" or getattr(lightning_powersgd, name).__doc__, name


def test_a_strategy_object_works_for_one_process(tmp_path):
    trainer = Trainer(
        strategy=PowerSGDStrategy(), accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False
    )
    assert trainer.strategy.world_size == 1


def test_the_reference_has_every_public_name():
    reference = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    documented = set(re.findall(r":: lightning_powersgd\.(\w+)", reference))
    assert documented == {*lightning_powersgd.__all__} - {"__version__"}
