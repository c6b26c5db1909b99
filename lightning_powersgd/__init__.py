"""PowerSGD gradient compression for PyTorch Lightning, as a one-line switch.

Importing the package registers the strategy names ``powersgd``, ``powersgd_spawn``, ``powersgd_fork`` and
``powersgd_notebook``, each also with the suffix ``_find_unused_parameters_true``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_powersgd.forecast import Forecast, LinkForecast, forecast_exchange
from lightning_powersgd.hook import GradientExchange, attach_powersgd
from lightning_powersgd.metrics import BytesSaved, BytesSent, CompressionMonitor, CompressionRatio, ResidualRatio
from lightning_powersgd.plan import Plan, PowerSGDConfig, make_plan
from lightning_powersgd.state import PowerSGDState
from lightning_powersgd.strategy import PowerSGDStrategy
from lightning_powersgd.version import __version__

PowerSGDStrategy.register_strategies(StrategyRegistry)

__all__ = [
    "BytesSaved",
    "BytesSent",
    "CompressionMonitor",
    "CompressionRatio",
    "Forecast",
    "GradientExchange",
    "LinkForecast",
    "Plan",
    "PowerSGDConfig",
    "PowerSGDState",
    "PowerSGDStrategy",
    "ResidualRatio",
    "__version__",
    "attach_powersgd",
    "forecast_exchange",
    "make_plan",
]
