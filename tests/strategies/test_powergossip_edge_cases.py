"""Tier three: gossip where callbacks, optimizers and models do what few do."""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, OnExceptionCheckpoint
from models import Classifier, Silent, loader, messages, trainer
from test_powergossip import ROUNDING, deviation, floating, state
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_powersgd import GossipExchange, PowerGossipConfig, PowerGossipStrategy, consensus_distance, make_topology
from lightning_powersgd.exchange.averages import mean_over_ranks


def mean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over the ranks, which all must call this."""
    return dict(mean_over_ranks(floating(dict(tensors)), torch.device("cpu")))


def saved(file: str | Path) -> dict[str, Any]:
    dist.barrier()
    return torch.load(file, weights_only=True)


def saving(root: str, *callbacks: Callback, strategy: Any = "powergossip", max_epochs: int = 1) -> Trainer:
    """Make a trainer that saves checkpoints, with callbacks of which some do."""
    options = {"callbacks": list(callbacks), "max_epochs": max_epochs, "enable_checkpointing": True}
    return trainer(strategy, root=root, alike=False, **options)


# Optimizers


def test_an_optimizer_that_is_replaced_goes_on_where_the_other_was(fit):
    for moved, sent, exchanges in fit(_replace):
        assert max(moved) < 1e-7, "the mean of the models moved"
        assert len(set(sent)) == 1
        assert exchanges == 1


def _replace(root: str) -> tuple[list[float], list[float], int]:
    """The garbage collector runs at one rank only, so that the other one's new optimizer may get an old one's id."""
    moved: list[float] = []
    sent: list[float] = []
    original = GossipExchange.step

    class Replacing(Silent):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                if dist.get_rank():
                    gc.collect()
                self.trainer.strategy.setup_optimizers(self.trainer)

        def on_train_epoch_end(self) -> None:
            sent.append(float(self.trainer.callback_metrics["powergossip/bytes_sent"]))

    def step(self: GossipExchange) -> None:
        before = mean(self.parameters)
        original(self)
        moved.append(deviation(mean(self.parameters), before))

    run = trainer("powergossip", root=root, alike=False, max_epochs=6)
    with mock.patch.object(GossipExchange, "step", step):
        run.fit(Replacing(), loader(32))
    assert run.strategy.exchanges[0].step_count == run.global_step == len(moved)
    return moved, sent, len(run.strategy.exchanges)


def test_a_new_exchange_keeps_the_factors_of_parameters_that_stay(two_ranks):
    for kept, fresh, side, steps in two_ranks.run(_go_on):
        assert kept
        assert fresh
        assert side
        assert steps == 3


def _go_on() -> tuple[bool, bool, bool, int]:
    net = Classifier().net
    named, topology = list(net.named_parameters()), make_topology("ring", 2)
    with torch.no_grad():
        for _, parameter in named:
            parameter += dist.get_rank() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    first, second = (
        GossipExchange(named, topology, PowerGossipConfig(), among) for among in (net[:3].parameters(), None)
    )
    new = factors(second)
    for _ in range(3):
        first.step()
    old = factors(first)
    second.go_on_from(first)
    found = factors(second)
    side = second._rounds[0]._side == "right"
    second.step()
    return (
        all(torch.equal(found[key], value) for key, value in old.items()),
        all(torch.equal(found[key], value) for key, value in new.items() if key not in old) and len(new) > len(old),
        side,
        second.step_count - 1,
    )


def factors(exchange: GossipExchange) -> dict[tuple[str, str], Tensor]:
    return {
        (name, side): factor.clone()
        for links in exchange._rounds
        for mailbox in links._mailboxes
        for name, both in mailbox.factors.items()
        for side, factor in both.items()
    }


class Raw(Silent):
    """Steps an optimizer that the trainer does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_steps_that_nobody_sees_are_warned_of(fit):
    assert any("Nothing was gossiped" in message for message in fit(_step_unseen)[0])


def _step_unseen(root: str) -> list[str]:
    with messages() as said:
        trainer("powergossip", root=root, alike=False, max_steps=2).fit(Raw(), loader(32))
    return said


class Counting(torch.optim.SGD):
    """Keeps a number beside the parameters' states."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.state["steps"] = self.state.get("steps") or 1
        return loss


class Wrapping(torch.optim.SGD):
    """Has its states under another name."""

    def state_dict(self) -> dict[str, Any]:
        content = super().state_dict()
        return {"fast": content["state"], "param_groups": content["param_groups"]}


@pytest.mark.parametrize("optimizer", [Counting, Wrapping])
def test_optimizers_with_states_of_their_own_kind_are_saved(fit, tmp_path, optimizer):
    fit(_save_optimizer, optimizer)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert content["state"]["steps"] == 1 if optimizer is Counting else "state" not in content


def _save_optimizer(root: str, optimizer: type[torch.optim.SGD]) -> None:
    class Model(Classifier):
        def configure_optimizers(self) -> torch.optim.SGD:
            return optimizer(self.parameters(), lr=0.01, momentum=0.9)

    run = trainer("powergossip", root=root, alike=False, max_steps=2)
    run.fit(Model(), loader())
    run.save_checkpoint(f"{root}/last.ckpt")


# Parameters and buffers


@pytest.mark.parametrize("log_metrics", [False, True])
def test_an_epoch_without_anything_to_gossip_is_trained_to_its_end(fit, log_metrics):
    assert fit(_freeze_all, log_metrics) == [12, 12]


def _freeze_all(root: str, log_metrics: bool) -> int:
    class FrozenAtFirst(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.batches = 0

        def on_train_epoch_start(self) -> None:
            self.requires_grad_(self.current_epoch > 0)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.batches += 1
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            if loss.requires_grad:
                self.manual_backward(loss)
            optimizer.step()

    model = FrozenAtFirst().requires_grad_(False)
    trainer(PowerGossipStrategy(log_metrics=log_metrics), root=root, alike=False, max_epochs=3).fit(model, loader(64))
    return model.batches


def test_another_memory_layout_is_followed(fit):
    assert fit(_channels_last) == [2, 2]


def _channels_last(root: str) -> int:
    class Model(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)

        def on_fit_start(self) -> None:
            self.to(memory_format=torch.channels_last)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.conv(x.view(-1, 32, 1, 1)).flatten(1))

    model = Model()
    run = trainer(PowerGossipStrategy(average_model=False), root=root, alike=False, max_steps=2)
    run.fit(model, loader())
    return run.global_step


def test_what_validation_writes_to_a_buffer_stays(fit):
    for rank, seen in enumerate(fit(_best)):
        assert seen == [1 + 10 * rank, 2 + 10 * rank, 3 + 10 * rank]


def _best(root: str) -> list[float]:
    class Best(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("best", torch.zeros(()))
            self.seen: list[float] = []

        def on_validation_epoch_end(self) -> None:
            self.best.fill_(self.current_epoch + 1 + 10 * dist.get_rank())

        def on_train_epoch_end(self) -> None:
            self.seen.append(float(self.best))

    model = Best()
    trainer("powergossip", root=root, alike=False, max_epochs=3).fit(model, loader(32), loader(32, shuffle=False))
    return model.seen


def test_evaluation_leaves_each_rank_its_own_whole_numbers(fit):
    assert fit(_count) == [100, 101]


def _count(root: str) -> int:
    model = Classifier()
    model.register_buffer("count", torch.tensor(100 + dist.get_rank()))
    run = trainer(PowerGossipStrategy(average_model=False), root=root, alike=False, max_steps=1)
    run.validate(model, loader(32, shuffle=False), verbose=False)
    return int(model.count)


# Checkpoints


def test_a_checkpoint_has_what_is_alike_as_it_is(ranks, tmp_path):
    for model, content in ranks[3].run(_save_frozen, str(tmp_path)):
        assert all(torch.equal(content[name], value) for name, value in model.items())
        assert content._metadata["net.0"]["version"] == 1


def _save_frozen(root: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = Classifier()
    model.frozen = nn.Linear(50, 50).requires_grad_(False)
    run = trainer("powergossip", root=root, alike=False, max_steps=2)
    run.fit(model, loader())
    run.save_checkpoint(f"{root}/last.ckpt")
    return state(model), saved(f"{root}/last.ckpt")["state_dict"]


def test_averages_over_time_are_averaged_over_the_ranks(fit):
    pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="needs a later version of Lightning")
    for deviations in fit(_average_over_time):
        assert max(deviations) < ROUNDING


def _average_over_time(root: str) -> list[float]:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Keep(Callback):
        def on_validation_start(self, trainer, pl_module) -> None:
            prefix = "module."
            content = averaging._average_model.state_dict()
            self.average = {key[len(prefix) :]: v.clone() for key, v in content.items() if key.startswith(prefix)}

        def on_validation_end(self, trainer, pl_module) -> None:
            self.model = state(pl_module)

    averaging, keep = EMAWeightAveraging(decay=0.5), Keep()
    saver = ModelCheckpoint(root, "in_validation", save_on_train_epoch_end=False, enable_version_counter=False)
    saving(root, averaging, keep, saver).fit(Classifier(), loader(), loader(32, shuffle=False))
    content = saved(f"{root}/in_validation.ckpt")
    return [
        deviation(content["state_dict"], mean(keep.average)),
        deviation(content["current_model_state"], mean(keep.model)),
    ]


class Tied(Classifier):
    """With a weight of two names, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scratch += x.mean()
        return self.second(self.first(super().forward(x)))


class FailInValidation(Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        raise ValueError("failed")


def test_a_checkpoint_saved_alone_during_validation_has_one_model_that_loads(fit, tmp_path):
    own = fit(_save_alone_in_validation)[0]
    content = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    Tied().load_state_dict(content)
    assert all(torch.equal(content[name], value) for name, value in own.items())


def _save_alone_in_validation(root: str) -> dict[str, Tensor]:
    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            self.model = state(pl_module)

    keep, saver = Keep(), OnExceptionCheckpoint(root)
    with (
        mock.patch.object(saver, "on_exception") if dist.get_rank() else contextlib.nullcontext(),
        mock.patch("lightning_powersgd.strategies.shared.PATIENCE", timedelta(seconds=0.1)),
        pytest.raises(ValueError, match="failed"),
    ):
        saving(root, keep, FailInValidation(), saver).fit(Tied(), loader(), loader(32, shuffle=False))
    dist.barrier()
    return keep.model


def test_ranks_that_fail_in_and_after_validation_do_not_wait_for_each_other(fit):
    fit(_fail_around_validation)


def _fail_around_validation(root: str) -> None:
    class Local(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    class FailAround(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            if dist.get_rank() == 0:
                raise ValueError("failed")

        def on_train_epoch_end(self, *_: Any) -> None:
            raise ValueError("failed")

    with (
        mock.patch("lightning_powersgd.strategies.shared.PATIENCE", timedelta(seconds=1)),
        pytest.raises(ValueError, match="failed"),
    ):
        saving(root, FailAround(), OnExceptionCheckpoint(root)).fit(Local(), loader(32), loader(32, shuffle=False))
    dist.barrier()


def test_an_exception_before_the_ranks_have_met_is_the_users(monkeypatch):
    monkeypatch.setattr(PowerGossipStrategy, "world_size", 2)
    assert not PowerGossipStrategy()._all_ranks_come(emergency=True)


def test_what_a_link_points_to_is_not_removed_with_it(fit, tmp_path):
    fit(_link)
    for name in ("epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"):
        assert (tmp_path / name).exists()
        assert (tmp_path / f"rank1-{name}").exists()


def _link(root: str) -> None:
    saver = ModelCheckpoint(root, "{epoch}", save_top_k=-1, save_last="link")
    saver.CHECKPOINT_NAME_LAST = "{epoch}-last"
    strategy = PowerGossipStrategy(average_model=False)
    original = strategy.remove_checkpoint

    def remove_first_at_rank_1(filepath: str) -> None:
        if dist.get_rank() == 0:
            dist.barrier()
        original(filepath)
        if dist.get_rank() == 1:
            dist.barrier()

    with mock.patch.object(strategy, "remove_checkpoint", remove_first_at_rank_1):
        saving(root, saver, strategy=strategy, max_epochs=3).fit(Classifier(), loader(32))


def test_each_rank_resumes_its_own_model_with_layers_that_were_unfrozen(fit):
    for found, own in fit(_resume_unfrozen):
        assert all(torch.equal(found[name], value) for name, value in own.items())


def _resume_unfrozen(root: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    class Backbone(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[:2]
            self.save_hyperparameters({"options": argparse.Namespace(width=48)})

        def configure_optimizers(self) -> torch.optim.SGD:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)

        def on_train_start(self) -> None:
            self.found = state(self)

    def run(model: Backbone, max_epochs: int, **kwargs: Any) -> Any:
        unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        strategy = PowerGossipStrategy(average_model=False)
        made = trainer(strategy, root=root, alike=False, max_epochs=max_epochs, callbacks=[unfreezing])
        made.fit(model, loader(32), **kwargs)
        return made

    first, second = Backbone(), Backbone()
    run(first, 2).save_checkpoint(f"{root}/last.ckpt")
    dist.barrier()
    # Later versions of Lightning load with `weights_only=True` unless they are told otherwise.
    loading = {"weights_only": False} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}
    run(second, 3, ckpt_path=f"{root}/last.ckpt", **loading)
    assert float(consensus_distance(floating(state(first)))) > 1e-3
    return second.found, state(first)
