"""An exchange's entry in the checkpoint of a sharded model.

It is the entry of an exchange that is not sharded, with these differences:

| key | what |
|---|---|
| ``parameters`` | by name, the error of the whole parameter; empty if a folder beside holds errors, shard by shard |
| ``shards`` | by the number of a process in its replica, its entries by name, for its shards, without errors |
| ``errors`` | the names of the parameters whose errors the folder holds |

So errors fit every mesh, and one device that has it all. Factors fit where a replica is sharded as it was.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate

from lightning_powersgd.exchange.agreement import all_or_none, of_all_ranks
from lightning_powersgd.exchange.sharded import ShardedGradients, as_sharded, local_shard
from lightning_powersgd.strategies.checkpoint import CHECKPOINT_KEY, load_exchange


def sharded_errors(gradients: ShardedGradients) -> dict[str, DTensor]:
    """Give the errors by name, sharded as the parameters are. Every rank must call it.

    Small parameters may be compressed on some shards only; the others have no error.
    """
    errors = gradients.exchange.state.all_errors
    compressed = {name for names in of_all_ranks(list(errors), gradients.shards) for name in names}
    shards = {
        # When a fit has ended, they are in main memory.
        name: errors[name].to(parameter.device) if name in errors else torch.zeros_like(local_shard(parameter))
        for name, parameter in gradients.parameters.items()
        if name in compressed
    }
    return {name: as_sharded(shard, gradients.parameters[name]) for name, shard in shards.items()}


def make_entry(gradients: ShardedGradients, whole_errors: Mapping[str, DTensor] | None) -> dict[str, Any]:
    """Give the entry. Every rank must call it; that of the first one is complete.

    Args:
        gradients: of the model.
        whole_errors: what is to be put together; ``None`` if errors are not saved, or elsewhere.
    """
    state = gradients.exchange.state
    entry = state.state_dict(error_feedback=False)
    everyones = of_all_ranks(entry["parameters"], gradients.shards)
    entry["shards"] = {str(number): shard for number, shard in enumerate(everyones)}
    entry["parameters"] = {}
    entry["errors"] = sorted({name for shard in everyones for name in shard})
    for name, error in (whole_errors or {}).items():
        shape = list(error.shape)
        saved = next(shard[name] for shard in everyones if name in shard)
        rank = min(saved["rank"], shape[0], math.prod(shape[1:]))
        # Every rank of a replica takes part, and the first one keeps it.
        whole = error.full_tensor().cpu()
        entry["parameters"][name] = {"shape": shape, "rank": rank, "factors": {}, "error": whole}
    return entry


def save_errors(errors: Mapping[str, DTensor], folder: Path) -> None:
    """Save errors shard by shard beside a checkpoint's other files. Every rank must call it."""
    if errors:
        save({"errors": dict(errors)}, checkpoint_id=folder / CHECKPOINT_KEY)


def load_entry(gradients: ShardedGradients, saved: Mapping[str, Any] | None, path: Path) -> None:
    """Let the exchange of a sharded model go on where a checkpoint was saved, of a sharded model or another.

    Every rank must call it.

    Args:
        gradients: of the model.
        saved: the entry; ``None`` if the checkpoint has none.
        path: of the checkpoint.

    Raises:
        ValueError: as `PowerSGDState.load_state_dict`.
    """
    if not isinstance(saved, Mapping) or not isinstance(saved.get("parameters"), Mapping):
        load_exchange(gradients.exchange, saved)
        return
    errors = _local_errors(gradients, saved, path)
    shards = saved.get("shards", {})
    same_count = len(shards) == dist.get_world_size(gradients.shards)
    mine = shards.get(str(dist.get_rank(gradients.shards)), {}) if same_count else {}
    entries = {}
    for name, parameter in gradients.parameters.items():
        shape = list(local_shard(parameter).shape)
        entry = dict(mine[name]) if name in mine and mine[name].get("shape") == shape else None
        error = errors.get(name)
        if entry is None and error is not None and error.any():
            # A factor of other shards is of no use here.
            entry = {"shape": shape, "rank": 1, "factors": {}}
        if entry is not None:
            entries[name] = {**entry, "error": error} if error is not None else entry
    all_or_none(lambda: load_exchange(gradients.exchange, {**saved, "parameters": entries}), gradients.shards)
    compressed = gradients.exchange.state.factors
    gradients.left_over = {name: error for name, error in errors.items() if name not in compressed and error.any()}


def _local_errors(gradients: ShardedGradients, saved: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Give this rank's shards of the saved errors, by name."""
    folder = path / CHECKPOINT_KEY
    if folder.is_dir():
        errors = {
            name: as_sharded(torch.zeros_like(local_shard(gradients.parameters[name])), gradients.parameters[name])
            for name in saved.get("errors", [])
            if name in gradients.parameters
        }
        load({"errors": errors}, checkpoint_id=folder)
        return {name: local_shard(error) for name, error in errors.items()}
    whole = {name: entry["error"] for name, entry in saved["parameters"].items() if "error" in entry}
    return {
        name: _shard_of(error, gradients.parameters[name])
        for name, error in whole.items()
        if name in gradients.parameters and error.shape == gradients.parameters[name].shape
    }


def _shard_of(whole: Tensor, parameter: DTensor) -> Tensor:
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local_shard(everywhere.redistribute(placements=parameter.placements)).contiguous()


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a folder to write a checkpoint to, which becomes that of the path when all ranks have written theirs.

    So a run that is killed in the middle leaves the checkpoint of that name as it was. Every rank must call it.
    """
    first = dist.get_rank() == 0
    part, old = (path.with_name(f"{path.name}.{ending}") for ending in ("part", "old"))
    if first:
        _remove(part)
    dist.barrier()
    yield part
    dist.barrier()
    if first:
        _remove(old)
        if path.exists():
            path.rename(old)
        part.rename(path)
        _remove(old)
    dist.barrier()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
