"""The names by which users ask for a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_powersgd.namespaces import Joined


class Named(Joined):
    """A strategy that can be asked for by name, with each way to start processes."""

    # The name, and what may be added to it, with the arguments that this sets.
    registered_name: ClassVar[str]
    name_endings: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}}

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy's names. A second call registers them again, and does no harm."""
        start_methods = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
        names = {cls.registered_name + ending: method for ending, method in start_methods.items()}
        # The trainer lowers the case of a name. Without this one, `--trainer.strategy PowerSGDStrategy` would fail
        # unless one of the strategy's own arguments follows, since jsonargparse takes it for a name then.
        names[cls.__name__.lower()] = "popen"
        for name, start_method in names.items():
            for ending, arguments in cls.name_endings.items():
                settings = {"start_method": start_method, **arguments}
                shown = ", ".join(f"{key}={value!r}" for key, value in settings.items())
                strategy_registry.register(
                    name + ending,
                    cls,
                    description=f"{cls.__name__} with {shown}",
                    override=True,
                    **settings,
                )
