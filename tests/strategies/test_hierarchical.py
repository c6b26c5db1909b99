"""Tier three: a Trainer on 2 machines of 2 devices, which 4 processes stand in for."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Classifier, ReplicasAgree, loader, messages, norm

from lightning_powersgd import PowerSGDStrategy

CONFIG = {"rank": 2, "min_compression_ratio": 1.0}


def place() -> Any:
    """The place of this process, as torchrun gives it."""
    rank = dist.get_rank()
    numbers = {"LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2, "LOCAL_WORLD_SIZE": 2}
    return mock.patch.dict(os.environ, {name: str(value) for name, value in numbers.items()})


def trainer(root: str, strategy: Any, **options: Any) -> Trainer:
    with place():
        return Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=2,
            num_nodes=2,
            default_root_dir=root,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ReplicasAgree(), *options.pop("callbacks", [])],
            **{"enable_checkpointing": False, "max_epochs": 2, "deterministic": True, **options},
        )


def train(
    root: str, config: dict[str, Any] | None = None, model: Any = None, ckpt_path: Any = None, **options: Any
) -> Any:
    model = Classifier("adamw", lr=0.01) if model is None else model
    hierarchical = {"hierarchical": True, **CONFIG, **(config or {})}
    run = trainer(root, PowerSGDStrategy(**hierarchical), **options)
    with place():
        run.fit(model, loader(shuffle=False), ckpt_path=ckpt_path)
    state = run.strategy.exchange.state
    return {
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "steps": state.step,
        "errors": sum(error.numel() for error in state.errors.values()),
        "run": None,
    }


@pytest.mark.parametrize("config", [{}, {"alternate": True}, {"comm_dtype": "int8"}, {"rank": "auto"}], ids=str)
def test_training_learns_and_replicas_agree(four_ranks, tmp_path, config):
    results = four_ranks.run(train, str(tmp_path), config, max_epochs=12)
    for result in results:
        assert result["steps"] == 60
        assert result["metrics"]["train_loss"] < 1.0
    if config != {"rank": "auto"}:
        # 32 × 48, 48 × 40 and 40 × 10 numbers, of which a device of a machine has its own.
        assert results[0]["errors"] + results[1]["errors"] == 32 * 48 + 48 * 40 + 40 * 10
        assert min(result["errors"] for result in results) > 0
        assert results[0]["metrics"]["powersgd/compression_ratio"] > 2
        # Every gradient goes to its owner, and factors come back.
        dense = 4 * (32 * 48 + 48 + 48 * 40 + 40 + 40 * 10 + 10)
        for result in results:
            assert dense < result["metrics"]["powersgd/bytes_in_node"] < 1.5 * dense


@pytest.mark.parametrize("when", ["in the middle", "after the fit"])
@pytest.mark.parametrize("with_errors", [True, False], ids=["with errors", "without"])
def test_a_run_resumes(four_ranks, tmp_path, with_errors, when):
    straight = four_ranks.run(_through, str(tmp_path), with_errors)
    four_ranks.run(_halfway, str(tmp_path), with_errors, when)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["powersgd"]
    assert set(saved["parameters"]) == {"net.0.weight", "net.2.weight", "net.4.weight"}
    assert all(("error" in entry) == with_errors for entry in saved["parameters"].values())
    for expected, found in zip(straight, four_ranks.run(_through, str(tmp_path), with_errors, "half"), strict=True):
        assert found["steps"] == 10
        if with_errors:
            assert all(torch.equal(found["state"][name], value) for name, value in expected["state"].items())


def _saver(root: str, name: str) -> ModelCheckpoint:
    # Saving replaces errors by their mean, which moves later steps by a rounding.
    return ModelCheckpoint(root, name, every_n_train_steps=5, save_top_k=-1, enable_version_counter=False)


def _through(root: str, with_errors: bool, name: str | None = None) -> dict[str, Any]:
    config = {"checkpoint_error_feedback": with_errors}
    path = None if name is None else f"{root}/{name}.ckpt"
    callbacks = [_saver(root, "other-{step}")]
    return train(root, config, ckpt_path=path, callbacks=callbacks, enable_checkpointing=True, max_epochs=2)


def _halfway(root: str, with_errors: bool, when: str) -> None:
    class Save(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            self.trainer = trainer

    save, middle = Save(), when == "in the middle"
    train(
        root,
        {"checkpoint_error_feedback": with_errors},
        callbacks=[save, *([_saver(root, "half")] if middle else [])],
        enable_checkpointing=middle,
        max_epochs=1,
    )
    if not middle:
        save.trainer.save_checkpoint(f"{root}/half.ckpt")


def test_its_checkpoint_goes_on_flat_and_back(four_ranks, tmp_path):
    four_ranks.run(_halfway, str(tmp_path), True, "in the middle")
    for said, loss in four_ranks.run(_go_on_flat, str(tmp_path)):
        assert not any("could be carried over" in line for line in said), said
        assert loss < 2.5


def _go_on_flat(root: str) -> tuple[list[str], float]:
    with messages() as said:
        train(
            root,
            {"hierarchical": False},
            ckpt_path=f"{root}/half.ckpt",
            callbacks=[_saver(root, "flat")],
            enable_checkpointing=True,
            max_epochs=2,
        )
        result = train(root, ckpt_path=f"{root}/flat.ckpt", max_epochs=3)
    return said, result["metrics"]["train_loss"]


def test_clipping_accumulation_and_parameters_frozen_on_the_way(four_ranks, tmp_path):
    for clipped, steps, thawed in four_ranks.run(_variety, str(tmp_path)):
        assert clipped <= 0.001 * 1.001
        assert steps == 5
        assert thawed == 15


def _variety(root: str) -> tuple[float, int, int]:
    sizes = []

    class Note(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            sizes.append(norm([p.grad for p in pl_module.parameters() if p.grad is not None]))

    class Thaw(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            pl_module.net[0].requires_grad_(trainer.current_epoch != 1)

    train(root, callbacks=[Note()], gradient_clip_val=0.001, max_steps=4)
    accumulated = train(root, accumulate_grad_batches=2, max_steps=5, max_epochs=-1)
    thawed = train(root, callbacks=[Thaw()], max_epochs=3)
    return max(sizes), accumulated["steps"], thawed["steps"]


def test_one_machine_exchanges_nothing_between_machines(two_ranks, tmp_path):
    for ours, theirs in two_ranks.run(_one_machine, str(tmp_path)):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def _one_machine(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from models import trainer as plain

    found = []
    for strategy in (PowerSGDStrategy(hierarchical=True, **CONFIG), "ddp"):
        model = Classifier("adamw", lr=0.01)
        plain(strategy, root=root, max_steps=5).fit(model, loader(shuffle=False))
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return found[0], found[1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hierarchical": 2}, TypeError, "`hierarchical=2` is not a bool"),
        (
            {"hierarchical": True, "find_unused_parameters": True},
            ValueError,
            "`find_unused_parameters` is not possible",
        ),
        ({"hierarchical": True, "process_group": "a group"}, ValueError, "`process_group` is not possible"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PowerSGDStrategy(**arguments)
