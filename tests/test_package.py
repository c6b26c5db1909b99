"""Tier one: the package as a whole: who imports whom, and the names it registers."""

from __future__ import annotations

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
from lightning_powersgd import PowerSGDStrategy

ROOMS_BELOW = (
    *("native", "linalg", "plan", "state", "agreement", "hook", "topology", "gossip"),
    *("forecast", "targets", "report", "command"),
)
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
    __import__("lightning_powersgd." + room)
# Lightning, and what only the program `lightning-powersgd` needs, and only for some of its output.
kept_out = {{"lightning", "pytorch_lightning", "torchmetrics", "rich", "matplotlib"}}
found = [name for name in sys.modules if name.split(".")[0] in kept_out]
sys.exit(f"imported {{found[:3]}}" if found else 0)
"""


def load_without_lightning(rooms: tuple[str, ...]) -> int:
    path = str(Path(lightning_powersgd.__file__).parent)
    code = LOAD_WITHOUT_LIGHTNING.format(path=path, rooms=rooms)
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_the_rooms_below_the_line_do_not_import_lightning():
    assert load_without_lightning(ROOMS_BELOW) == 0


def test_the_check_above_can_fail():
    assert load_without_lightning(("strategy",)) != 0


def test_imports_point_one_way():
    order = [*ROOMS_BELOW, "metrics", "untaken", "base_strategy", "strategy", "gossip_strategy"]
    for position, room in enumerate(order):
        text = (Path(lightning_powersgd.__file__).parent / f"{room}.py").read_text()
        for above in order[position:]:
            assert f"from lightning_powersgd.{above} import" not in text, f"{room} imports {above}"


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
    documented = inspect.getdoc(PowerSGDStrategy)
    assert all(f"\n    {name}: " in documented for name in ours if name not in ("self", "ddp_kwargs"))


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
