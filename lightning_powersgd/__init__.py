"""PowerSGD gradient compression for PyTorch Lightning, as a one-line switch.

It works with `lightning` and with `pytorch_lightning`, and imports neither. With each that the program imports it
registers the strategy names ``powersgd``, ``powersgd_spawn``, ``powersgd_fork`` and
``powersgd_notebook``, each also with the suffix ``_find_unused_parameters_true``; and ``powergossip`` with the first
three endings; and ``powersgd_model_parallel``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.compressor.plan import Plan, make_plan
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.turnaround import turnaround_for
from lightning_powersgd.exchange.averages import consensus_distance
from lightning_powersgd.exchange.core import GradientExchange
from lightning_powersgd.exchange.ddp import attach_powersgd
from lightning_powersgd.exchange.gossip import GossipExchange, PowerGossipConfig
from lightning_powersgd.exchange.topology import Topology, make_topology
from lightning_powersgd.metrics import energy, monitors
from lightning_powersgd.metrics.compression import (
    BytesSaved,
    BytesSent,
    CompressionRatio,
    ConsensusDistance,
    ResidualRatio,
)
from lightning_powersgd.metrics.energy import EnergyUse
from lightning_powersgd.namespaces import in_use, when_imported
from lightning_powersgd.planner.forecast import Forecast, LinkForecast, forecast_exchange
from lightning_powersgd.strategies import fabric, model_parallel, powergossip, powersgd
from lightning_powersgd.version import __version__

if TYPE_CHECKING:
    from lightning_powersgd.exchange.sharded import ShardedGradients, attach_powersgd_to_shards
    from lightning_powersgd.metrics.energy import EnergyMonitor
    from lightning_powersgd.metrics.monitors import CompressionMonitor, GossipMonitor
    from lightning_powersgd.strategies.fabric import PowerSGDFabricStrategy
    from lightning_powersgd.strategies.model_parallel import PowerSGDModelParallelStrategy
    from lightning_powersgd.strategies.powergossip import PowerGossipStrategy
    from lightning_powersgd.strategies.powersgd import PowerSGDStrategy

# What is Lightning's too, in whose namespace the program uses.
_JOINED = {
    cls.__name__: cls
    for cls in (
        energy.EnergyMonitor,
        monitors.CompressionMonitor,
        monitors.GossipMonitor,
        fabric.PowerSGDFabricStrategy,
        model_parallel.PowerSGDModelParallelStrategy,
        powergossip.PowerGossipStrategy,
        powersgd.PowerSGDStrategy,
    )
}

when_imported(powersgd.PowerSGDStrategy, "strategies.StrategyRegistry")
when_imported(fabric.PowerSGDFabricStrategy, "strategies.STRATEGY_REGISTRY")
when_imported(powergossip.PowerGossipStrategy, "strategies.StrategyRegistry")
when_imported(model_parallel.PowerSGDModelParallelStrategy, "strategies.StrategyRegistry")


def __getattr__(name: str) -> Any:
    if name in _JOINED:
        return in_use(_JOINED[name])
    if name in ("ShardedGradients", "attach_powersgd_to_shards"):
        # What PyTorch needs for it takes a second to import, and older versions do not have it.
        from lightning_powersgd.exchange import sharded

        return getattr(sharded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BytesSaved",
    "BytesSent",
    "CompressionMonitor",
    "CompressionRatio",
    "ConsensusDistance",
    "EnergyMonitor",
    "EnergyUse",
    "Forecast",
    "GossipExchange",
    "GossipMonitor",
    "GradientExchange",
    "LinkForecast",
    "Plan",
    "PowerGossipConfig",
    "PowerGossipStrategy",
    "PowerSGDConfig",
    "PowerSGDFabricStrategy",
    "PowerSGDModelParallelStrategy",
    "PowerSGDState",
    "PowerSGDStrategy",
    "ResidualRatio",
    "ShardedGradients",
    "Topology",
    "__version__",
    "attach_powersgd",
    "attach_powersgd_to_shards",
    "consensus_distance",
    "forecast_exchange",
    "make_plan",
    "make_topology",
    "turnaround_for",
]
