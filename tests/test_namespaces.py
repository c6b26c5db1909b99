"""Tier one: both namespaces of Lightning, alone and together, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

TRAINERS = ["lightning.pytorch", "pytorch_lightning"]
FABRICS = ["lightning.fabric", "lightning_fabric"]

# What every program here begins with.
BEGIN = """
import copy, importlib, pickle, sys, warnings
warnings.simplefilter("ignore")
import lightning_powersgd as package
ALL = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
def loaded():
    return [name for name in ALL if name in sys.modules]
assert not loaded(), loaded()
"""


def run(program: str, *arguments: str) -> None:
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(program), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("namespace", TRAINERS)
def test_a_strategy_is_of_the_namespace_that_the_program_imports(namespace):
    run(
        """
        namespace = sys.argv[1]
        names = ("PowerSGDStrategy", "PowerGossipStrategy")
        before = [getattr(package, name) for name in names]
        pl = importlib.import_module(namespace)
        for name, early in zip(names, before, strict=True):
            late = getattr(package, name)
            for cls in (early, late):
                strategy = cls(rank=3)
                assert isinstance(strategy, early) and isinstance(strategy, late)
                assert isinstance(strategy, pl.strategies.DDPStrategy)
                trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
                assert trainer.strategy is strategy
                for copied in (pickle.loads(pickle.dumps(cls(rank=3))), copy.deepcopy(cls(rank=3))):
                    assert type(copied) is type(strategy) and copied.config == strategy.config
            for given in (name.removesuffix("Strategy").lower(), name):
                trainer = pl.Trainer(strategy=given, accelerator="cpu", devices=2, logger=False)
                assert type(trainer.strategy) is late
        others = [other for other in loaded() if other.partition(".")[0] != namespace.partition(".")[0]
                  and other != "lightning_fabric"]
        assert not others, others
        """,
        namespace,
    )


@pytest.mark.parametrize("namespace", TRAINERS)
def test_the_energy_monitor_works_in_the_namespace_that_the_program_imports(namespace):
    run(
        """
        early = package.EnergyMonitor
        pl = importlib.import_module(sys.argv[1])
        boring = importlib.import_module(sys.argv[1] + ".demos.boring_classes")
        monitor = early(watts=100)
        assert isinstance(monitor, pl.Callback) and isinstance(monitor, package.EnergyMonitor)
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=3, callbacks=[monitor], **quiet)
        trainer.fit(boring.BoringModel())
        assert (monitor.steps, monitor.samples) == (3, 3) and monitor.cpu_seconds > 0
        assert abs(monitor.estimated_joules - 100 * monitor.seconds) < 1e-9
        others = [other for other in loaded() if other.partition(".")[0] != sys.argv[1].partition(".")[0]
                  and other != "lightning_fabric"]
        assert not others, others
        """,
        namespace,
    )


@pytest.mark.parametrize("namespace", FABRICS)
def test_fabrics_strategy_is_of_the_namespace_that_the_program_imports(namespace):
    run(
        """
        early = package.PowerSGDFabricStrategy
        fabric = importlib.import_module(sys.argv[1])
        for strategy in (early(rank=3), package.PowerSGDFabricStrategy(rank=3), "powersgd", "PowerSGDFabricStrategy"):
            made = fabric.Fabric(strategy=strategy, accelerator="cpu", devices=2).strategy
            assert isinstance(made, package.PowerSGDFabricStrategy)
            assert isinstance(made, importlib.import_module(sys.argv[1] + ".strategies").DDPStrategy)
            assert made.config.rank == ("auto" if isinstance(strategy, str) else 3)
        assert not {name.partition(".")[0] for name in loaded()} - {sys.argv[1].partition(".")[0]}, loaded()
        """,
        namespace,
    )


@pytest.mark.parametrize("first", TRAINERS)
@pytest.mark.parametrize("used", TRAINERS)
def test_a_program_that_has_imported_both_uses_either(first, used):
    second = next(name for name in TRAINERS if name != first)
    run(
        """
        first, second, used = sys.argv[1:]
        importlib.import_module(first), importlib.import_module(second)
        pl = importlib.import_module(used)
        class Mine(package.PowerSGDStrategy):
            pass
        for cls in (package.PowerSGDStrategy, Mine):
            strategy = cls(rank=3, find_unused_parameters=True)
            trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False)
            assert trainer.strategy is strategy and isinstance(strategy, cls)
            assert pl.strategies.DDPStrategy in type(strategy).__mro__
            assert strategy.config.rank == 3 and strategy._ddp_kwargs["find_unused_parameters"]
        trainer = pl.Trainer(strategy="powersgd", accelerator="cpu", devices=2, logger=False)
        assert pl.strategies.DDPStrategy in type(trainer.strategy).__mro__
        assert isinstance(package.CompressionMonitor(), package.CompressionMonitor)
        """,
        first,
        second,
        used,
    )


@pytest.mark.parametrize("namespace", TRAINERS)
def test_a_strategy_of_ray_train_is_mixed_in_in_any_order(namespace):
    """A stand-in for Ray's strategy, whose constructor calls Lightning's by `super` or by name."""
    run(
        """
        import itertools
        pl = importlib.import_module(sys.argv[1])
        for ours_first, by_name in itertools.product((True, False), repeat=2):
            class RayDDPStrategy(pl.strategies.DDPStrategy):
                def __init__(self, *args, **kwargs):
                    if by_name:
                        pl.strategies.DDPStrategy.__init__(self, *args, **kwargs)
                    else:
                        super().__init__(*args, **kwargs)
                    self.of_ray = True
                @property
                def distributed_sampler_kwargs(self):
                    return dict(num_replicas=7, rank=0)
            bases = [package.PowerSGDStrategy, RayDDPStrategy]
            class Both(*(bases if ours_first else reversed(bases))):
                pass
            strategy = Both(rank=4)
            trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
            assert trainer.strategy is strategy and strategy.of_ray, (ours_first, by_name)
            assert strategy.config.rank == 4 and strategy.exchange is None
            assert strategy.distributed_sampler_kwargs["num_replicas"] == 7
        """,
        namespace,
    )


def test_only_one_namespace_need_be_installed():
    """A stand-in for an environment without `lightning`: its import fails."""
    run(
        """
        import importlib.abc
        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] == "lightning":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Missing())
        assert package.PowerSGDStrategy is not None
        import importlib.util
        original = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "lightning" else original(name, *rest)
        strategy = package.PowerSGDStrategy(rank=2)
        import pytorch_lightning as pl
        assert pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False).strategy is strategy
        """
    )
