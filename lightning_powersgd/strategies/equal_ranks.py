"""What ranks must have alike for any strategy: versions, arguments and parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_powersgd.compressor import fused, native
from lightning_powersgd.compressor.config import PowerSGDConfig
from lightning_powersgd.exchange.agreement import require_agreement
from lightning_powersgd.namespaces import namespace_of
from lightning_powersgd.version import __version__


def require_equal_ranks(
    strategy: object,
    arguments: Mapping[str, str],
    named_parameters: Iterable[tuple[str, Tensor]],
    process_group: dist.ProcessGroup | None,
) -> None:
    """Make sure that the ranks have the same versions, arguments and parameters, in one order.

    Args:
        strategy: of Lightning's namespace whose version is compared.
        arguments: what else must be alike, by what it is called.
        named_parameters: of the model.
        process_group: the ranks; ``None`` is the default group.

    Raises:
        RuntimeError: on every rank, naming the first difference.
    """
    fingerprint = {
        "the version of lightning_powersgd": __version__,
        "the version of torch": torch.__version__,
        "the version of lightning": sys.modules[namespace_of(strategy)].__version__,
    }
    fingerprint |= arguments
    for name, parameter in named_parameters:
        kind = "trainable" if parameter.requires_grad else "frozen"
        fingerprint[f"the parameter {name!r}"] = f"{kind} {tuple(parameter.shape)} {parameter.dtype}"
    require_agreement(fingerprint, process_group)


def describe_exchange(config: PowerSGDConfig, ddp_kwargs: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """Describe what decides on the collectives of a step and on their results, beside the model.

    Args:
        config: the settings.
        ddp_kwargs: arguments of `DistributedDataParallel`.
        device: of the gradients.
    """
    arguments = {f"the argument `{name}`": repr(value) for name, value in config.to_dict().items()}
    for name in ("find_unused_parameters", "static_graph", "bucket_cap_mb"):
        arguments[f"the argument `{name}`"] = repr(ddp_kwargs.get(name))
    arguments["whether times decide on what is compressed"] = repr(config.compresses_where_faster)
    # The averaged gradient is computed on each rank, and compiled code rounds otherwise than PyTorch's.
    if device.type == "cpu":
        arithmetic = "compiled code" if native.library() else "PyTorch's operations"
        arguments[f"the arithmetic ({native.SWITCH}=0 is PyTorch's everywhere)"] = arithmetic
    elif device.type == "cuda":
        arguments[f"the arithmetic ({fused.SWITCH}=0 is PyTorch's everywhere)"] = fused.arithmetic(device)
    return arguments
