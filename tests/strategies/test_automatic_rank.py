"""Tier four: ranks that follow from the length of the training, in whole runs of the trainer."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from models import Classifier, learnable, loader, messages, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_powersgd import PowerSGDStrategy
from lightning_powersgd.strategies.automatic_rank import length_of


class StopAt(Callback):
    """Ends a training that was announced as a longer one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Outcome(NamedTuple):
    ranks: tuple[int, ...]
    turnaround: float | None
    said: str
    weights: list[Tensor]


def fit(root: Path, strategy: Any = None, stop: int = 6, optimizer: str = "sgd", data: Any = None, **kwargs) -> Outcome:
    strategy = strategy or PowerSGDStrategy()
    callbacks = [StopAt(stop), *kwargs.pop("callbacks", [])]
    resumed = kwargs.pop("ckpt_path", None)
    run = trainer(strategy, root=root, callbacks=callbacks, **{"max_epochs": -1, **kwargs})
    model = Classifier(optimizer)
    with messages() as said:
        run.fit(model, loader() if data is None else data, ckpt_path=resumed)
    state = getattr(strategy, "exchange", None) and strategy.exchange.state
    ranks = tuple(slot.rank for slot in reversed(list(state.plan.slots)) if len(slot.shape) > 1) if state else ()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return Outcome(ranks, state.config.turnaround if state else None, " ".join(said), weights)


@pytest.mark.parametrize(
    ("optimizer", "length", "found", "turnaround"),
    [("sgd", 800, {2}, 20), ("sgd", 20_000, {1}, 500), ("adamw", 6400, {2}, 20)],
)
def test_the_length_of_the_training_and_its_optimizer_give_the_ranks(
    two_ranks, tmp_path, optimizer, length, found, turnaround
):
    first, _ = two_ranks.run(fit, tmp_path, optimizer=optimizer, max_steps=length)
    assert set(first.ranks) == found
    assert first.turnaround == turnaround
    assert "PowerSGD compresses 3 of 6" in first.said
    assert f"has its turn within {turnaround} steps, {length / turnaround:.0f} times in {length:,} steps" in first.said


def test_a_short_training_is_plain_ddp_to_the_last_bit_and_says_so(two_ranks, tmp_path):
    first, _ = two_ranks.run(fit, tmp_path, max_steps=20)
    assert set(first.ranks) == {0}
    assert "Gradients are exchanged as plain DDP does it. `rank=2` would send" in first.said
    plain, _ = two_ranks.run(fit, tmp_path, "ddp", max_steps=20)
    assert all(map(torch.equal, first.weights, plain.weights))


class Endless(IterableDataset):
    def __iter__(self):
        for seed in itertools.count():
            x, y = learnable(seed, samples=1)
            yield x[0], y[0]


def _without_length(root: Path) -> Outcome:
    return fit(root, data=DataLoader(Endless(), batch_size=8))


def test_a_length_that_nobody_knows_is_assumed_and_said(two_ranks, tmp_path):
    first, _ = two_ranks.run(_without_length, tmp_path)
    assert first.turnaround == 10_000 / 40
    assert "The length of the training is not known, and `rank='auto'` takes it for 10,000 steps." in first.said


class Untold:
    """A trainer of which Lightning cannot tell how long it will train, as of some with growing accumulation."""

    @property
    def estimated_stepping_batches(self) -> int:
        raise RuntimeError("Estimated stepping batches cannot be computed")


def test_a_length_that_lightning_cannot_tell_is_not_known():
    assert length_of(Untold()) == math.inf


def _with_unequal_batches(root: Path) -> Outcome:
    data = loader(samples=64 if dist.get_rank() else 32)
    return fit(root, data=data, max_epochs=100, use_distributed_sampler=False)


def test_ranks_with_unequal_data_agree(two_ranks, tmp_path):
    first, second = two_ranks.run(_with_unequal_batches, tmp_path)
    assert first.ranks == second.ranks
    assert first.turnaround == second.turnaround


def _saved_and_resumed(root: Path, before: dict[str, Any], after: dict[str, Any], **later: Any) -> tuple[Outcome, ...]:
    saver = ModelCheckpoint(root, filename="half", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    both = {"root": root, "data": loader(samples=3200, shuffle=False), "stop": 400}
    through = fit(
        strategy=PowerSGDStrategy(**before), max_epochs=2, enable_checkpointing=True, callbacks=[saver], **both
    )
    path = root / "half.ckpt"
    return through, fit(strategy=PowerSGDStrategy(**after), ckpt_path=path, **{"max_epochs": 2, **later}, **both)


@pytest.mark.parametrize("alternate", [False, True])
def test_a_run_resumes_bit_for_bit_with_the_ranks_that_it_had(two_ranks, tmp_path, alternate):
    settings = {"alternate": alternate}
    through, resumed = two_ranks.run(_saved_and_resumed, tmp_path, settings, settings)[0]
    assert all(map(torch.equal, through.weights, resumed.weights))
    assert "could be carried over" not in resumed.said


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        pytest.param({}, {}, True, id="a longer training"),
        pytest.param({"rank": 3}, {}, True, id="a fixed rank before"),
        pytest.param({"rank": {"net.0*": 3, "*": 1}}, {}, True, id="patterns before"),
        pytest.param({"max_bytes": 3000}, {}, True, id="a budget before"),
        pytest.param({}, {"turnaround": 20}, False, id="another turnaround now"),
        pytest.param({}, {"rank": 3}, False, id="a fixed rank now"),
    ],
)
def test_a_checkpoint_keeps_its_ranks_unless_others_are_asked_for(two_ranks, tmp_path, before, after, kept):
    through, resumed = two_ranks.run(_saved_and_resumed, tmp_path, before, after, max_epochs=1000)[0]
    assert (through.ranks == resumed.ranks) == kept
    assert ("could be carried over" in resumed.said) == (not kept)


def test_a_plain_checkpoint_leaves_the_ranks_to_the_length(two_ranks, tmp_path):
    _, resumed = two_ranks.run(_plain_then_ours, tmp_path)[0]
    assert resumed.turnaround == 20


def _plain_then_ours(root: Path) -> tuple[Outcome, ...]:
    saver = ModelCheckpoint(root, filename="three", every_n_train_steps=3, save_top_k=-1)
    plain = fit(root, "ddp", max_steps=800, enable_checkpointing=True, callbacks=[saver])
    return plain, fit(root, ckpt_path=root / "three.ckpt", max_steps=800)


def _after_a_search(root: Path) -> Outcome:
    return fit(root, callbacks=[LearningRateFinder(num_training_steps=5)], max_steps=800)


def test_a_search_for_the_learning_rate_does_not_count_as_the_training(two_ranks, tmp_path):
    first, _ = two_ranks.run(_after_a_search, tmp_path)
    assert first.turnaround == 20


class Unfreeze(Callback):
    def on_train_batch_start(self, trainer: Trainer, module: Classifier, batch: Any, batch_idx: int) -> None:
        module.net[0].requires_grad_(trainer.global_step >= 3)


def _unfrozen(root: Path) -> Outcome:
    return fit(root, callbacks=[Unfreeze()], max_steps=800)


def test_ranks_stay_when_parameters_are_unfrozen(two_ranks, tmp_path):
    first, _ = two_ranks.run(_unfrozen, tmp_path)
    assert first.turnaround == 20
    assert len(first.ranks) == 3


def _within_a_budget(root: Path) -> int:
    strategy = PowerSGDStrategy(max_bytes=2500)
    fit(root, strategy, max_steps=800)
    return strategy.exchange.state.sent_bytes


def test_a_budget_is_kept(two_ranks, tmp_path):
    for sent in two_ranks.run(_within_a_budget, tmp_path):
        assert 1500 < sent <= 2500
