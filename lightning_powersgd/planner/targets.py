"""From what a user names on a command line to a model: a class, a function, or a checkpoint."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_CHECKPOINTS = (".ckpt", ".pt", ".pth")


class TargetError(ValueError):
    """What was named does not lead to a model; the message says why, in one line."""


def load_target(target: str, arguments: Mapping[str, Any]) -> nn.Module | Mapping[str, Tensor]:
    """Make the module, or read the state dict, that a target names.

    Args:
        target: ``package.module:Class`` or ``path/to/file.py:Class``, where a function that returns a module, or a
            module, may stand for the class; or the path of a checkpoint.
        arguments: of the class or function.

    Returns:
        A module, on the meta device if it can be made there; or a checkpoint's ``state_dict``.

    Raises:
        TargetError: if that cannot be done.
    """
    if target.endswith(_CHECKPOINTS):
        if arguments:
            raise TargetError(f"{target} is a checkpoint, and takes no arguments. Remove --init, or name the class.")
        return _load_state_dict(Path(target))
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise TargetError(
            f"{target!r} names no model. Use package.module:Class, path/to/file.py:Class, or a checkpoint"
            f" ({', '.join(_CHECKPOINTS)})."
        )
    found = _find(_import(place), name)
    if isinstance(found, nn.Module):
        if arguments:
            raise TargetError(
                f"{target} is a module already, and takes no arguments. Remove --init, or name its class."
            )
        return found
    if not callable(found):
        raise TargetError(f"{target} is neither a class nor a function, but a value of type {type(found).__name__}.")
    _require_fitting(found, name, arguments)
    return _make(found, name, arguments)


def _import(place: str) -> ModuleType:
    file = Path(place)
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise TargetError(f"There is no file {place}.")
    # What `python file.py` and `python -m module` can import, the program's entry point shall, too.
    sys.path.insert(0, str(file.resolve().parent) if is_file else os.getcwd())
    try:
        return _import_file(file) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not is_file and f"{place}.".startswith(f"{error.name}."):
            raise TargetError(
                f"There is no module {error.name!r} here. Start where `import {place}` works, or name the file, as in"
                " path/to/file.py:Class."
            ) from error
        raise TargetError(f"Importing {place} failed with {_brief(error)}") from error


def _import_file(file: Path) -> ModuleType:
    # Under a name of its own, so that a file called like a package hides none.
    spec = importlib.util.spec_from_file_location(f"_planned_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _find(module: ModuleType, name: str) -> object:
    if hasattr(module, name):
        return getattr(module, name)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    models = [
        key for key in public if inspect.isclass(getattr(module, key)) and issubclass(vars(module)[key], nn.Module)
    ]
    close = difflib.get_close_matches(name, public, n=3) or models[:3]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise TargetError(f"{module.__name__.removeprefix('_planned_')} has no {name}.{hint}")


def _require_fitting(factory: Callable[..., object], name: str, arguments: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return  # not written in Python: the call itself will tell
    kinds = inspect.Parameter
    for key in arguments:
        if key not in parameters and all(p.kind is not kinds.VAR_KEYWORD for p in parameters.values()):
            close = difflib.get_close_matches(key, parameters, n=1) or list(parameters)
            raise TargetError(f"{name} has no argument {key!r}." + (f" It has {', '.join(close)}." if close else ""))
    missing = [
        parameter
        for key, parameter in parameters.items()
        if parameter.default is kinds.empty
        and parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        and key not in arguments
    ]
    if missing:
        options = " ".join(f"--init {parameter.name}=..." for parameter in missing)
        needed = ", ".join(str(parameter) for parameter in missing)
        raise TargetError(f"{name} needs arguments: {needed}. Give them with {options}")


def _make(factory: Callable[..., object], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _configured(factory(**arguments), name)
    except Exception:
        # Not every constructor works without values; the second attempt shows whether that was the reason.
        try:
            return _configured(factory(**arguments), name)
        except TargetError:
            raise
        except Exception as error:
            raise TargetError(f"Making {name} failed with {_brief(error)}") from error


def _configured(made: object, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TargetError(f"{name} gives a value of type {type(made).__name__}, not a torch.nn.Module.")
    # Where a LightningModule makes the layers that it does not make in its constructor.
    configure = getattr(made, "configure_model", None)
    if callable(configure):
        configure()
    return made


def _load_state_dict(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise TargetError(f"{path} is a folder, not a checkpoint." if path.is_dir() else f"There is no file {path}.")
    try:
        # Files in torch's older format, which is no archive, cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise TargetError(f"{path} cannot be read as a checkpoint; it may be damaged or incomplete.") from error
        raise TargetError(
            f"{path} holds an object of type {found[1]}, and is not loaded, since that could run any code. Name the"
            " model's class instead, or save its state_dict() alone."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TargetError(f"{path} cannot be read as a checkpoint: {_brief(error)}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if (
        not isinstance(state, Mapping)
        or not all(isinstance(name, str) for name in state)
        or not any(isinstance(value, Tensor) for value in state.values())
    ):
        holds = f"the keys {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) else "something else"
        raise TargetError(f"{path} holds no state dict, neither under 'state_dict' nor as a whole, but {holds}.")
    return state


def _brief(error: BaseException) -> str:
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else f"{type(error).__name__}."
