"""PowerSGD gradient compression for PyTorch Lightning, as a one-line switch.

Importing the package registers the strategy names ``powersgd``, ``powersgd_spawn``, ``powersgd_fork`` and
``powersgd_notebook``, each also with the suffix ``_find_unused_parameters_true``; and ``powergossip`` with the first
three endings.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_powersgd.agreement import consensus_distance
from lightning_powersgd.forecast import Forecast, LinkForecast, forecast_exchange
from lightning_powersgd.gossip import GossipExchange, PowerGossipConfig
from lightning_powersgd.gossip_strategy import PowerGossipStrategy
from lightning_powersgd.hook import GradientExchange, attach_powersgd
from lightning_powersgd.metrics import (
    BytesSaved,
    BytesSent,
    CompressionMonitor,
    CompressionRatio,
    ConsensusDistance,
    GossipMonitor,
    ResidualRatio,
)
from lightning_powersgd.plan import Plan, PowerSGDConfig, make_plan
from lightning_powersgd.state import PowerSGDState
from lightning_powersgd.strategy import PowerSGDStrategy
from lightning_powersgd.topology import Topology, make_topology
from lightning_powersgd.version import __version__

PowerSGDStrategy.register_strategies(StrategyRegistry)
PowerGossipStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "BytesSaved",
    "BytesSent",
    "CompressionMonitor",
    "CompressionRatio",
    "ConsensusDistance",
    "Forecast",
    "GossipExchange",
    "GossipMonitor",
    "GradientExchange",
    "LinkForecast",
    "Plan",
    "PowerGossipConfig",
    "PowerGossipStrategy",
    "PowerSGDConfig",
    "PowerSGDState",
    "PowerSGDStrategy",
    "ResidualRatio",
    "Topology",
    "__version__",
    "attach_powersgd",
    "consensus_distance",
    "forecast_exchange",
    "make_plan",
    "make_topology",
]
