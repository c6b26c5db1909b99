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
    # How processes may be started, by what is added to the name, with the arguments that this sets.
    ways_to_start: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"start_method": "popen"},
        "_spawn": {"start_method": "spawn"},
        "_fork": {"start_method": "fork"},
        "_notebook": {"start_method": "fork"},
    }

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy's names. A second call registers them again, and does no harm."""
        names = {cls.registered_name + ending: started for ending, started in cls.ways_to_start.items()}
        # The trainer lowers the case of a name. Without this one, `--trainer.strategy PowerSGDStrategy` would fail
        # unless one of the strategy's own arguments follows, since jsonargparse takes it for a name then.
        names[cls.__name__.lower()] = cls.ways_to_start[""]
        for name, started in names.items():
            for ending, arguments in cls.name_endings.items():
                settings = {**started, **arguments}
                shown = ", ".join(f"{key}={value!r}" for key, value in settings.items()) or "its defaults"
                strategy_registry.register(
                    name + ending,
                    cls,
                    description=f"{cls.__name__} with {shown}",
                    override=True,
                    **settings,
                )
