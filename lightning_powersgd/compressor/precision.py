"""Arithmetic at the precision of its operands, whatever a program has asked of its own matrix products.

A backward pass may run under autocast, which would compute projections in half precision, or with float32 products that
are rounded to TF32 or bfloat16. What a projection and its product lose that way is in no error buffer, so it would be
lost for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()
_IEEE = "ieee"


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Compute on a device without autocast, and with float32 matrix products in float32."""
    if not torch.is_autocast_enabled(device.type) and _products(device) in (_IEEE, "highest", "none"):
        return _NOTHING
    return _full_precision(device)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    before = _products(device)
    with torch.autocast(device.type, enabled=False):
        _set_products(device, _IEEE if _by_backend(device) else "highest")
        try:
            yield
        finally:
            _set_products(device, before)


def _by_backend(device: torch.device) -> bool:
    """Whether each backend has a precision of its own, as since PyTorch 2.9."""
    return hasattr(_backend(device), "fp32_precision")


def _backend(device: torch.device) -> object:
    return torch.backends.cuda.matmul if device.type == "cuda" else getattr(torch.backends.mkldnn, "matmul", None)


def _products(device: torch.device) -> str:
    precision: str = getattr(_backend(device), "fp32_precision", "") or torch.get_float32_matmul_precision()
    return precision


def _set_products(device: torch.device, precision: str) -> None:
    if _by_backend(device):
        _backend(device).fp32_precision = precision  # type: ignore[attr-defined]
    else:
        torch.set_float32_matmul_precision(precision)
