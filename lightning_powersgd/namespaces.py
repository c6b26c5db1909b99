"""Both namespaces of Lightning, `lightning` and `pytorch_lightning`: one class of ours for the classes of both.

Our classes import neither. One becomes a class of Lightning's when it is first needed: then it is joined with the base
that it names, of the namespace that the program has imported.
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.util
import sys
import types
import typing
from typing import Any, ClassVar, TypeVar

import wrapt

_T = TypeVar("_T", bound="Joined")

# The parts of Lightning that we have classes for, and what they are called in each namespace.
_MODULES = {
    "pytorch": ("lightning.pytorch", "pytorch_lightning"),
    "fabric": ("lightning.fabric", "lightning_fabric"),
}


class _OursFirst(abc.ABCMeta):
    """Puts bases of ours before others.

    Others, such as strategies of Ray Train, may call Lightning's constructor by name and so leave out that of ours.
    Ours calls the next one, whatever it is.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], *args: Any, **kwargs: Any) -> Any:
        ours_first = tuple(sorted(bases, key=lambda base: not isinstance(base, cls)))
        return super().__new__(cls, name, ours_first, *args, **kwargs)


class Joined(metaclass=_OursFirst):
    """A class that is joined with one of Lightning's when an instance is made.

    A subclass says with which: a part of Lightning, and the place of the class in it.
    """

    part: ClassVar[str]
    base: ClassVar[str]

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Make an instance of the class that is joined with Lightning's."""
        return super().__new__(cls if _is_joined(cls) else joined(cls, _module_for(cls.part)))


def joined(cls: type[_T], module: str) -> type[_T]:
    """Join a class of ours with its base in a namespace; always the same class for the same two.

    Args:
        cls: a subclass of `Joined`.
        module: what the part of Lightning is called in the namespace, such as "pytorch_lightning".
    """
    both: type[_T] = _join(cls, _base_of(cls, module), module)
    return both


def in_use(cls: type[_T]) -> type[_T]:
    """Give the joined class if the program has imported one namespace, and else the class itself."""
    loaded = _loaded(cls.part)
    return joined(cls, loaded[0]) if len(loaded) == 1 else cls


def namespace_of(thing: object) -> str:
    """Give the name of the package that a class of Lightning's, or an instance, is from; empty if it is from none."""
    cls = thing if isinstance(thing, type) else type(thing)
    theirs = (base.__module__.partition(".")[0] for base in cls.__mro__)
    packages = {name.partition(".")[0] for names in _MODULES.values() for name in names}
    return next((name for name in theirs if name in packages), "")


def follow(instance: Joined, neighbour: object) -> None:
    """Let an instance be of the namespace of an object that Lightning gives it. Matters where a program has both."""
    cls = type(instance)
    for module in _MODULES[cls.part]:
        if module.partition(".")[0] == namespace_of(neighbour) != namespace_of(instance):
            ours = next(base for base in cls.__mro__ if issubclass(base, Joined) and not _is_joined(base))
            instance.__class__ = joined(ours, module)


def when_imported(cls: type[Joined], registry: str) -> None:
    """Register a strategy's names with every namespace that the program has imported, or will import.

    Args:
        cls: the strategy, with the class method ``register_strategies``.
        registry: where the registry is, in ``cls.part`` of Lightning.
    """

    def register(module: types.ModuleType) -> None:
        strategy: Any = joined(cls, module.__name__)
        strategy.register_strategies(_attribute(module.__name__, registry))
        # What takes a class, such as a command line, takes ours too where it is not joined yet.
        _base_of(cls, module.__name__).register(cls)

    for name in _MODULES[cls.part]:
        wrapt.register_post_import_hook(register, name)


@functools.cache
def _join(cls: Any, base: type, module: str) -> Any:
    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = cls.__reduce_ex__(self, protocol)
        return (_remake, (cls, module), *reduced[2:])

    # One of this package's is found at its top by its name, and printed so.
    home = "lightning_powersgd" if cls.__module__.startswith("lightning_powersgd.") else cls.__module__
    public = {"__module__": home, "__doc__": cls.__doc__, "__reduce_ex__": reduce_ex, "__init__": _typed(cls, base)}
    return types.new_class(cls.__name__, (cls, base), exec_body=lambda namespace: namespace.update(public))


def _typed(cls: Any, base: Any) -> Any:
    """Give a class's constructor with types instead of their names, those of the base for arguments that it has, too.

    A command line that looks for types would else import those of `lightning`, which our files name.
    """
    init = cls.__init__
    theirs = typing.get_type_hints(base.__init__)
    types_ = {
        name: theirs[name] if name in theirs else eval(given, init.__globals__) if isinstance(given, str) else given
        for name, given in init.__annotations__.items()
    }
    typed = types.FunctionType(init.__code__, init.__globals__, init.__name__, init.__defaults__, init.__closure__)
    typed.__kwdefaults__, typed.__annotations__, typed.__qualname__ = init.__kwdefaults__, types_, init.__qualname__
    typed.__module__ = init.__module__
    return typed


def _remake(cls: type[_T], module: str) -> _T:
    """Make an instance for `pickle` and `copy`, still empty."""
    instance: _T = object.__new__(joined(cls, module))
    return instance


def _is_joined(cls: type[Joined]) -> bool:
    return any(cls.base.rpartition(".")[2] == base.__name__ and not issubclass(base, Joined) for base in cls.__mro__)


def _base_of(cls: type[Joined], module: str) -> Any:
    return _attribute(module, cls.base)


def _attribute(module: str, place: str) -> Any:
    room, _, name = place.rpartition(".")
    return getattr(importlib.import_module(f"{module}.{room}"), name)


def _loaded(part: str) -> list[str]:
    return [name for name in _MODULES[part] if name in sys.modules]


def _module_for(part: str) -> str:
    """Give the namespace that the program has imported; the first where it has both; one that is installed if none."""
    installed = (name for name in _MODULES[part] if importlib.util.find_spec(name.partition(".")[0]))
    return next(iter(_loaded(part)), None) or next(installed)
