"""Arguments of the strategies: which are refused beside PowerSGD, and how their documentation is put together."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T", bound=type)

# What cannot be had beside PowerSGD, and why.
_CONFLICTS = {
    "ddp_comm_hook": "PowerSGD is itself the communication hook, and DDP takes only one",
    "ddp_comm_state": "it belongs to another communication hook, and PowerSGD keeps its own state",
    "ddp_comm_wrapper": "it would change the gradients' dtype around the hook; use `comm_dtype` instead",
    "model_averaging_period": "it averages replicas that drift apart, and PowerSGD's are equal after every step",
    "mixed_precision": "it needs DDP's only communication hook; use `Trainer(precision=...)` instead",
    "skip_all_reduce_unused_params": "PowerSGD needs every bucket in every step; use `find_unused_parameters` alone",
}


def ddp_arguments(
    strategy: type, ddp_kwargs: Mapping[str, Any], bucket_cap_mb: float | None, **others: Any
) -> dict[str, Any]:
    """Check the arguments that a strategy hands on to DDP.

    Args:
        strategy: whose.
        ddp_kwargs: those that its signature does not name.
        bucket_cap_mb: as in the strategies; left out if it is None.
        **others: arguments that Lightning's strategy has and that may be in conflict with PowerSGD.

    Returns:
        The arguments of the first two.

    Raises:
        TypeError: for one that neither the strategy nor DDP has, naming it, and what may have been meant.
        ValueError: for one that cannot be had beside PowerSGD, naming it, and why.
    """
    arguments = {**ddp_kwargs, **others}
    for name, why in _CONFLICTS.items():
        if arguments.get(name) not in (None, False):
            raise ValueError(f"`{name}` cannot be used with {strategy.__name__}: {why}. Remove `{name}`.")
    _reject_unknown(ddp_kwargs, strategy)
    require_bucket_cap(bucket_cap_mb)
    return {**ddp_kwargs} if bucket_cap_mb is None else {**ddp_kwargs, "bucket_cap_mb": bucket_cap_mb}


def require_bucket_cap(bucket_cap_mb: float | None) -> None:
    """Check the size of a bucket.

    Raises:
        ValueError: if it is not positive.
    """
    if bucket_cap_mb is not None and not bucket_cap_mb > 0:
        raise ValueError(f"`bucket_cap_mb={bucket_cap_mb}` is not positive. Use a number of MiB, or None for 25.")


def _reject_unknown(ddp_kwargs: Mapping[str, Any], strategy: type) -> None:
    ours = inspect.signature(strategy.__init__).parameters  # type: ignore[misc]
    known = {*ours, *inspect.signature(DistributedDataParallel.__init__).parameters} - {"self", "ddp_kwargs"}
    known -= {"module", "device_ids"}  # the trainer's
    for name in ddp_kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{close[0]}`?" if close else "See its documentation for a list."
            raise TypeError(f"{strategy.__name__} has no argument `{name}`. {hint}")


def documented(*sources: type) -> Callable[[_T], _T]:
    """Let a class's docstring explain all arguments of its constructor, those too that other classes explain already.

    Args:
        *sources: the other classes, in which an argument of the same name means the same.

    Returns:
        A decorator. It writes the arguments in the order of the signature.
    """

    def document(cls: _T) -> _T:
        docstring = inspect.cleandoc(cls.__doc__ or "")
        explained = {name: text for source in sources for name, text in _arguments(inspect.getdoc(source) or "")}
        explained |= _arguments(docstring)
        names = [name for name in inspect.signature(cls).parameters if name in explained]
        own = "".join(text for _, text in _arguments(docstring))
        cls.__doc__ = docstring.replace(own, "".join(explained[name] for name in names), 1)
        return cls

    return document


def _arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """Give the names and the text of the arguments that a docstring without indentation explains."""
    section = re.search(r"^Args:\n((?: {4}.*\n)+)", docstring + "\n", re.MULTILINE)
    for argument in re.finditer(r"^ {4}\*{0,2}(\w+): .*\n(?: {8}.*\n)*", section[1] if section else "", re.MULTILINE):
        yield argument[1], argument[0]
