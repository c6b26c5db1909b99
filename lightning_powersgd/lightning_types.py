"""Names of Lightning's for annotations, which only a type checker looks up.

Elsewhere they stand for nothing, or for a base that adds nothing: see `namespaces`. They stand in a file of their own
since a command line that resolves annotations runs the imports for type checkers of the files that it reads.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.accelerators.accelerator import Accelerator as FabricAccelerator
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.fabric.plugins import Precision as FabricPrecision
    from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
    from lightning.fabric.utilities.types import _PATH
    from lightning.pytorch import Callback
    from lightning.pytorch.plugins.precision import Precision
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning.pytorch.strategies.strategy import TBroadcast
    from lightning.pytorch.utilities.types import STEP_OUTPUT
else:
    pl = FabricAccelerator = CheckpointIO = ClusterEnvironment = FabricPrecision = _PATH = Precision = Any
    TBroadcast = STEP_OUTPUT = Any
    Callback = DDPStrategy = FabricDDPStrategy = ModelParallelStrategy = object

__all__ = [
    "STEP_OUTPUT",
    "_PATH",
    "Callback",
    "CheckpointIO",
    "ClusterEnvironment",
    "DDPStrategy",
    "FabricAccelerator",
    "FabricDDPStrategy",
    "FabricPrecision",
    "ModelParallelStrategy",
    "Precision",
    "TBroadcast",
    "pl",
]
