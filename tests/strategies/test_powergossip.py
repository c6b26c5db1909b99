"""Tier three: what a Trainer can do, with gossip instead of all-reduce."""

from __future__ import annotations

import contextlib
import copy
import csv
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import networkx as nx
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from models import Classifier, Silent, learnable, loader, messages, norm, trainer
from ranks import counted_sends, gather_equal
from test_powersgd import Gan, Manual, Unfreeze, Unfrozen
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_powersgd import GossipMonitor, PowerGossipStrategy, consensus_distance
from lightning_powersgd.exchange.replicas import differing


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([s[name].double() for s in states]).mean(dim=0) for name in floating(states[0])}


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative deviation of any tensor that has a mean."""
    return max(float((found[name] - t).norm() / (t.norm() + 1e-12)) for name, t in floating(expected).items())


# The mean of a few numbers of float32.
ROUNDING = 1e-6


def train(
    root: str, strategy: Any = "powergossip", model: Any = None, data: Any = None, **kwargs: Any
) -> dict[str, Any]:
    model = Classifier() if model is None else model
    run = trainer(strategy, root=root, alike=False, **kwargs)
    run.fit(model, data or loader(), loader(32, shuffle=False))
    module = getattr(model, "_orig_mod", model)
    return {
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "agree": gather_equal(list(floating(state(module)).values())),
        "steps": [exchange.step_count for exchange in run.strategy.exchanges],
        "taking part": [list(exchange.parameters) for exchange in run.strategy.exchanges],
        "compressed": sum(bool(slot.rank) for exchange in run.strategy.exchanges for slot in exchange.slots),
        "global_step": run.global_step,
        "state": state(module),
    }


# Training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns_and_ends_with_the_average_model_everywhere(fit, optimizer):
    for result in fit(_train, optimizer):
        assert result["agree"]
        assert result["steps"] == [result["global_step"]] == [100]
        assert result["compressed"] == 3
        assert result["metrics"]["train_loss"] < 1.0


def _train(root: str, optimizer: str) -> dict[str, Any]:
    return train(root, model=Classifier(optimizer, lr=0.05 if optimizer == "sgd" else 0.01), max_epochs=10)


def test_what_is_connected_is_said(fit):
    said = fit(_say)[0]
    assert any(
        line.startswith("PowerGossip compresses 3 of 6 trainable parameters: over each link go ")
        and line.endswith(
            "It connects 2 ranks in a topology named 'star': 1 link, 1 used by a rank in a step, spectral gap 1."
        )
        for line in said
    ), said
    assert any("PowerGossip compresses 0 of 6" in line for line in fit(_say, min_compression_ratio=1000.0)[0])


def _say(root: str, **config: Any) -> list[str]:
    with messages() as said:
        train(root, PowerGossipStrategy(topology="star", **config), max_steps=1)
    return said


def test_ranks_with_different_classes_learn_them_all_from_their_neighbours(ranks, tmp_path):
    """Each of four ranks has but two or three of ten classes."""
    together, overlapping, averaged = (
        ranks[4].run(_train_shard, str(tmp_path), strategy)
        for strategy in (PowerGossipStrategy(rank=2), PowerGossipStrategy(rank=2, overlap=True), "ddp")
    )
    alone = ranks[1].run(_train_shard, str(tmp_path), "powergossip")
    assert len(set(together)) == len(set(overlapping)) == 1, "all have the average model"
    # Sixty steps: all-reduce has learnt three quarters, and a rank alone what its own classes are.
    assert averaged[0] > 0.65
    assert together[0] > averaged[0] - 0.15
    assert overlapping[0] > averaged[0] - 0.15
    assert alone[0] < 0.4


def _train_shard(root: str, strategy: Any) -> float:
    x, y = learnable(0, samples=1600)
    order = y.sort(stable=True).indices.view(4, -1)[dist.get_rank()]
    data = DataLoader(TensorDataset(x[order], y[order]), batch_size=40, shuffle=True)
    model = Classifier(lr=0.1)
    run = trainer(strategy, root=root, alike=False, use_distributed_sampler=False, max_epochs=6)
    run.fit(model, data)
    x, y = learnable(1, samples=1000)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())


def test_gradient_accumulation_gossips_after_the_optimizers_step_only(fit):
    for result in fit(train, accumulate_grad_batches=4, max_steps=5, max_epochs=-1):
        assert result["agree"]
        assert result["steps"] == [5]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_is_of_each_ranks_own_gradients(fit, algorithm):
    for result, sizes in fit(_clip, algorithm):
        assert result["agree"]
        # Before the first step there are no gradients.
        assert len(sizes) == 3
        assert all(0 < found <= 0.001 * 1.001 for found in sizes)


def _clip(root: str, algorithm: str) -> tuple[dict[str, Any], list[float]]:
    sizes: list[float] = []

    class Note(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                sizes.append(norm(grads) if algorithm == "norm" else max(float(g.abs().max()) for g in grads))

    clipping = {"gradient_clip_val": 0.001, "gradient_clip_algorithm": algorithm}
    return train(root, callbacks=[Note()], max_steps=4, **clipping), sizes


def test_manual_optimisation(fit):
    for result in fit(_manual):
        assert result["agree"]
        assert result["steps"] == [10]


def _manual(root: str) -> dict[str, Any]:
    return train(root, model=Manual(), max_epochs=1)


def test_each_optimizer_gossips_its_own_parameters(fit):
    for result, sent, expected in fit(_gan):
        assert result["agree"]
        assert result["steps"] == [10, 10]
        assert sent == expected
        kinds = [{name.split(".")[0] for name in names} for names in result["taking part"]]
        assert kinds == [{"generator"}, {"discriminator"}]


def _gan(root: str) -> tuple[dict[str, Any], list[int], list[int]]:
    sent: list[int] = []
    step = PowerGossipStrategy.optimizer_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counted_sends() as bytes_sent:
            output = step(*args, **kwargs)
        sent.append(sum(bytes_sent.values()))
        return output

    strategy = PowerGossipStrategy(min_compression_ratio=1.0)
    with mock.patch.object(PowerGossipStrategy, "optimizer_step", counted):
        result = train(root, strategy, model=Gan(), max_epochs=1)
    expected = []
    for number in range(10):
        for exchange in strategy.exchanges:
            side = "right" if number % 2 else "left"
            sizes = [slot.rank * slot.length(side) if slot.rank else slot.numel for slot in exchange.slots]
            expected.append(4 * sum(sizes))
    return result, sent, expected


def test_parameters_frozen_and_unfrozen_during_the_fit(fit):
    results = fit(_unfreeze)
    for result, steps in results:
        assert result["steps"] == [30]
        assert steps == [10, 20, 30]
        assert set(result["taking part"][0]) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    # Two ranks that send whole parameters agree after each step, and did so when the last layer was frozen.
    assert deviation(results[0][0]["state"], results[1][0]["state"]) < 1e-5


def _unfreeze(root: str) -> tuple[dict[str, Any], list[int]]:
    steps: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            steps.append(trainer.strategy.exchanges[0].step_count)

    strategy = PowerGossipStrategy(rank={"*": 0}, average_model=False)
    return train(root, strategy, model=Unfrozen(), callbacks=[Unfreeze(), Count()], max_epochs=3), steps


def test_an_optimizer_without_trainable_parameters_is_no_error(fit):
    for result in fit(_frozen_optimizer):
        assert result["agree"]
        assert result["steps"] == [4, 4]


def _frozen_optimizer(root: str) -> dict[str, Any]:
    class HalfFrozen(Gan):
        def __init__(self) -> None:
            super().__init__()
            self.generator.requires_grad_(False)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            frozen, other = self.optimizers()
            other.zero_grad()
            self.manual_backward(self.discriminator(batch[0]).mean())
            other.step()
            frozen.step()

    return train(root, model=HalfFrozen(), max_steps=8)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(fit, precision):
    for result in fit(train, precision=precision, max_epochs=10):
        assert result["agree"]
        # As low as in float32; an untrained net has ln 10 = 2.3.
        assert result["metrics"]["train_loss"] < 1.0


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch 2.4 cannot broadcast complex tensors with gloo")
def test_complex_parameters(fit):
    for result in fit(_complex):
        assert result["agree"]
        assert result["state"]["turn"].is_complex()
        assert result["metrics"]["powergossip/consensus_distance"] > 0


def _complex(root: str) -> dict[str, Any]:
    class Turned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.ones(32, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x * self.turn).real)

    result = train(root, model=Turned(), max_steps=5)
    assert gather_equal([torch.view_as_real(result["state"]["turn"])])
    assert result["state"]["turn"].abs().sub(1).abs().max() > 1e-3
    return result


def test_compiled_module(fit):
    compiled, plain = fit(_compiled, True)[0], fit(_compiled, False)[0]
    assert compiled["agree"]
    assert compiled["taking part"] == plain["taking part"]
    # Five steps, in which tracing may change the order of a sum.
    assert deviation(compiled["state"], plain["state"]) < 1e-4


def _compiled(root: str, compiled: bool) -> dict[str, Any]:
    return train(root, model=torch.compile(Silent(), backend="eager") if compiled else Silent(), max_steps=5)


def test_fast_dev_run(fit):
    for result in fit(train, fast_dev_run=True):
        assert result["agree"]
        assert result["steps"] == [1]
        assert result["metrics"]["powergossip/compression_ratio"] > 1


def test_one_process(ranks, tmp_path):
    (result,) = ranks[1].run(train, str(tmp_path), max_epochs=1)
    assert result["steps"] == [20]
    assert result["metrics"]["powergossip/bytes_sent"] == 0
    assert result["metrics"]["powergossip/consensus_distance"] == 0


def test_fit_twice(fit):
    for agree, steps, monitors in fit(_fit_twice):
        assert agree
        assert steps == [[10], [10]]
        assert monitors == 1


def _fit_twice(root: str) -> tuple[bool, list[list[int]], int]:
    model, steps = Classifier(), []
    run = trainer("powergossip", root=root, alike=False, max_epochs=1)
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(model, loader())
        steps.append([exchange.step_count for exchange in run.strategy.exchanges])
    monitors = sum(isinstance(callback, GossipMonitor) for callback in run.callbacks)
    return gather_equal(list(model.parameters())), steps, monitors


def test_a_fit_that_failed_leaves_nothing_to_the_next_one(fit):
    first, second = (results[0]["state"] for results in (fit(_fit_after, fail=False), fit(_fit_after, fail=True)))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def _fit_after(root: str, fail: bool) -> dict[str, Any]:
    if fail:
        with pytest.raises(ValueError, match="failed"):
            train(root, PowerGossipStrategy(overlap=True), callbacks=[Fail()])
    return train(root, PowerGossipStrategy(overlap=True), data=loader(shuffle=False), max_steps=6)


class Fail(Callback):
    def on_train_batch_end(self, trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            raise ValueError("failed")


@pytest.mark.parametrize("average_model", [True, False])
def test_what_is_under_way_arrives_before_the_fit_ends(fit, average_model):
    (before, after), (other_before, other_after) = fit(_drain, average_model)
    assert deviation(mean_of([after, other_after]), mean_of([before, other_before])) < ROUNDING
    assert deviation(after, before) > 1e-4, "nothing arrived"
    assert deviation(after, other_after) < 0.9 * deviation(before, other_before)


def _drain(root: str, average_model: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    last: list[dict[str, Tensor]] = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            last.append(state(pl_module))

    strategy = PowerGossipStrategy(overlap=True, average_model=average_model, rank=4)
    result = train(root, strategy, callbacks=[Look()], max_steps=7)
    return last[0], result["state"]


# The average model


class Watched(Classifier):
    """Notes what validation sees."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__(batch_norm=batch_norm)
        self.seen: list[dict[str, Tensor]] = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.seen.append(state(self))


class Around(Callback):
    """Notes a rank's model before and after validation, and before the end."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_validation_start(self, trainer, pl_module) -> None:
        self.before.append(state(pl_module))

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.after.append(state(pl_module))

    def on_train_end(self, trainer, pl_module) -> None:
        self.after.append(state(pl_module))


BATCH_NORM = "net.1.running_mean"


@pytest.mark.parametrize("average_model", [True, False])
def test_which_model_is_validated_and_left(fit, average_model):
    results = fit(_watch, average_model)
    assert len(results[0]["before"]) == 2
    for epoch in range(2):
        own = [result["before"][epoch] for result in results]
        # Statistics of batch normalisation are of a rank's own data.
        assert deviation({"": own[0][BATCH_NORM]}, {"": own[1][BATCH_NORM]}) > 1e-3
        assert deviation(own[0], own[1]) > 1e-3
        for rank, result in enumerate(results):
            expected = mean_of(own) if average_model else own[rank]
            assert deviation(result["seen"][epoch], expected) < ROUNDING
            assert all(torch.equal(own[rank][name], value) for name, value in result["after"][epoch].items())
    last = [result["after"][-1] for result in results]
    for rank, result in enumerate(results):
        assert deviation(result["left"], mean_of(last) if average_model else last[rank]) < ROUNDING
        assert result["agree"] == average_model
        assert result["validated"] == pytest.approx(result["again"], rel=1e-5)


def _watch(root: str, average_model: bool) -> dict[str, Any]:
    model, around = Watched(), Around()
    strategy = PowerGossipStrategy(average_model=average_model)
    run = trainer(strategy, root=root, alike=False, callbacks=[around], num_sanity_val_steps=1)
    model.seen.clear()
    run.fit(model, loader(), loader(32, shuffle=False))
    left, seen = state(model), model.seen[1:]  # without the sanity check
    agree = gather_equal(list(floating(left).values()))
    losses = [run.validate(model, loader(32, shuffle=False), verbose=False)[0]["val_loss"] for _ in range(2)]
    assert all(torch.equal(left[name], value) for name, value in state(model).items())
    before = around.before[1:3]
    found = {"before": before, "after": around.after, "seen": seen, "left": left, "agree": agree}
    return {**found, "validated": losses[0], "again": losses[1]}


def test_evaluation_without_a_fit_takes_the_first_ranks_model_or_each_its_own(fit):
    for average_model in (True, False):
        results = fit(_validate_only, average_model)
        assert [kept for kept, _ in results] == [True, not average_model]
        assert all(loss > 0 for _, loss in results)


def _validate_only(root: str, average_model: bool) -> tuple[bool, float]:
    model = Classifier(batch_norm=True)
    for parameter in model.parameters():
        parameter.data += dist.get_rank()
    before = state(model)
    run = trainer(PowerGossipStrategy(average_model=average_model), root=root, alike=False)
    loss = run.validate(model, loader(32), verbose=False)[0]["val_loss"]
    run.test(model, loader(32), verbose=False)
    assert len(run.predict(model, loader(32))) == 2
    return all(torch.equal(before[name], value) for name, value in state(model).items()), loss


# Checkpoints


class Keep(Callback):
    """Notes a rank's model and optimizer before ModelCheckpoint saves them."""

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        if trainer.global_step == 6:
            self.own = state(pl_module), copy.deepcopy(trainer.optimizers[0].state_dict()["state"])

    def on_train_batch_start(self, trainer, pl_module, *args: Any) -> None:
        if trainer.global_step == 6:
            self.later = state(pl_module), copy.deepcopy(trainer.optimizers[0].state_dict()["state"])


def flat(states: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{number}/{key}": value for number, entry in states.items() for key, value in entry.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_checkpoint_has_the_average_model_and_optimizer_and_changes_nothing(fit, tmp_path, optimizer):
    results = fit(_save, optimizer)
    for own, later in results:
        for before, after in zip(own, later, strict=True):
            assert all(torch.equal(before[name], value) for name, value in after.items())
    saved = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert "powersgd" not in saved
    assert deviation(saved["state_dict"], mean_of([own[0] for own, _ in results])) < ROUNDING
    assert saved["state_dict"]["net.1.num_batches_tracked"] == 6
    states = flat(saved["optimizer_states"][0]["state"])
    assert set(states) == set(results[0][0][1])
    assert deviation(states, mean_of([own[1] for own, _ in results])) < ROUNDING
    if optimizer == "adamw":
        assert states["0/step"] == 6
    weights = torch.load(tmp_path / "weights-6.ckpt", weights_only=True)
    assert "optimizer_states" not in weights
    assert all(torch.equal(weights["state_dict"][name], value) for name, value in saved["state_dict"].items())


def _save(root: str, optimizer: str) -> tuple[Any, Any]:
    keep = Keep()
    common = {"save_top_k": -1, "auto_insert_metric_name": False, "enable_version_counter": False}
    savers = [
        ModelCheckpoint(root, "kept", every_n_train_steps=6, **common),
        ModelCheckpoint(root, "weights-{step}", every_n_train_steps=3, save_weights_only=True, **common),
    ]
    model = Classifier(optimizer, lr=0.01, batch_norm=True)
    train(root, model=model, callbacks=[keep, *savers], max_steps=8, enable_checkpointing=True)
    return (keep.own[0], flat(keep.own[1])), (keep.later[0], flat(keep.later[1]))


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (3, 1)])
def test_a_run_resumes_at_any_number_of_ranks(ranks, tmp_path, before, after):
    ranks[before].run(_save_at_the_end, str(tmp_path), "powergossip")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    for agree, steps, found, states in ranks[after].run(_resume, str(tmp_path), "powergossip"):
        assert agree
        assert steps == (5, 8)
        assert all(torch.equal(found[name], value) for name, value in saved["state_dict"].items())
        for name, value in flat(saved["optimizer_states"][0]["state"]).items():
            assert torch.equal(states[name], value)


@pytest.mark.parametrize(("first", "second"), [("ddp", "powergossip"), ("powergossip", "ddp")])
def test_checkpoints_of_plain_ddp_and_ours_load_into_each_other(fit, tmp_path, first, second):
    fit(_save_at_the_end, first)
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    for agree, steps, found, _ in fit(_resume, second):
        assert agree
        assert steps == (5, 8)
        assert all(torch.equal(found[name], value) for name, value in saved["state_dict"].items())


def _save_at_the_end(root: str, strategy: str) -> None:
    run = trainer(strategy, root=root, alike=False, max_steps=5)
    run.fit(Classifier("adamw", lr=0.01), loader())
    run.save_checkpoint(f"{root}/first.ckpt")


def _resume(root: str, strategy: str, path: str = "first.ckpt", **arguments: Any) -> tuple[Any, ...]:
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            found["state"] = state(pl_module)
            found["optimizer"] = copy.deepcopy(flat(trainer.optimizers[0].state_dict()["state"]))
            found["step"] = trainer.global_step

    model = Classifier("adamw", lr=0.01)
    strategy = PowerGossipStrategy(**arguments) if arguments else strategy
    run = trainer(strategy, root=root, alike=False, max_steps=8, max_epochs=-1, callbacks=[Look()])
    run.fit(model, loader(), ckpt_path=f"{root}/{path}")
    return gather_equal(list(model.parameters())), (found["step"], run.global_step), found["state"], found["optimizer"]


def test_weights_alone_are_restored_for_validation(fit):
    for loss, expected in fit(_validate_weights):
        assert loss == expected


def _validate_weights(root: str) -> tuple[float, float]:
    run = trainer("powergossip", root=root, alike=False, max_epochs=1)
    model, data = Classifier(), loader(32, shuffle=False)
    run.fit(model, loader())
    run.save_checkpoint(f"{root}/weights.ckpt", weights_only=True)
    expected = run.validate(model, data, verbose=False)[0]["val_loss"]
    other = trainer("powergossip", root=root, alike=False)
    found = other.validate(Classifier(), data, ckpt_path=f"{root}/weights.ckpt", verbose=False)[0]["val_loss"]
    return found, expected


@pytest.mark.parametrize("ckpt_path", ["last", "link.ckpt", "hpc"])
def test_each_rank_saves_its_own_model_and_resumes_from_it(fit, tmp_path, ckpt_path):
    results = fit(_save_own)
    own = [left for left, _ in results]
    assert deviation(own[0], own[1]) > 1e-3
    files = [tmp_path / "last.ckpt", tmp_path / "rank1-last.ckpt"]
    for file, left in zip(files, own, strict=True):
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], value) for name, value in left.items())
    for rank, (found, states, step) in enumerate(fit(_resume_own, ckpt_path)):
        assert step == 5
        assert all(torch.equal(found[name], value) for name, value in own[rank].items())
        assert all(torch.equal(states[name], value) for name, value in results[rank][1].items())
    # What ModelCheckpoint does not keep is removed, of every rank.
    names = {path.name for path in tmp_path.glob("*step*.ckpt")}
    assert names == {"step=5.ckpt", "rank1-step=5.ckpt"}


def _save_own(root: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    saver = ModelCheckpoint(
        root, "{step}", save_top_k=1, every_n_train_steps=1, save_last=True, monitor="step", mode="max"
    )
    model, strategy = Classifier("adamw", lr=0.01), PowerGossipStrategy(average_model=False)
    run = trainer(strategy, root=root, alike=False, max_steps=5, callbacks=[saver], enable_checkpointing=True)
    run.fit(model, loader())
    if run.is_global_zero:
        Path(root, "link.ckpt").symlink_to("last.ckpt")
    run.save_checkpoint(f"{root}/hpc_ckpt_1.ckpt")
    return state(model), flat(run.optimizers[0].state_dict()["state"])


def _resume_own(root: str, ckpt_path: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    found: list[Any] = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            states = copy.deepcopy(flat(trainer.optimizers[0].state_dict()["state"]))
            found.extend((state(pl_module), states, trainer.global_step))

    hpc = Path(root, "hpc_ckpt_1.ckpt")
    if ckpt_path != "hpc":
        # Lightning prefers it to any other.
        dist.barrier()
        if dist.get_rank() == 0:
            for path in Path(root).glob("*hpc*"):
                path.unlink()
        dist.barrier()
    assert hpc.exists() == (ckpt_path == "hpc")
    saver = ModelCheckpoint(root, "unused", save_last=True, every_n_epochs=100, enable_version_counter=False)
    callbacks = [Look(), saver]
    strategy = PowerGossipStrategy(average_model=False)
    options = {"callbacks": callbacks, "enable_checkpointing": True, "max_steps": 6, "max_epochs": -1}
    path = {"last": "last", "hpc": "hpc"}.get(ckpt_path, f"{root}/{ckpt_path}")
    trainer(strategy, root=root, alike=False, **options).fit(Classifier("adamw", lr=0.01), loader(), ckpt_path=path)
    return tuple(found)


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_checkpoint_on_an_exception_holds_nobody_up(fit, tmp_path, everywhere):
    results = fit(_fail_and_save, everywhere)
    own = [left for left, _ in results]
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert deviation(saved["state_dict"], mean_of(own) if everywhere else own[0]) < ROUNDING
    assert any("with rank 0's own model" in message for message in results[0][1]) != everywhere


def test_ranks_with_different_numbers_of_neighbours_meet_for_a_checkpoint_on_an_exception(ranks, tmp_path):
    # Twice, since the group remembers what the ranks have sent to each other in an earlier fit.
    for attempt in ("first", "second"):
        results = ranks[3].run(_fail_and_save, str(tmp_path / attempt), True, [[0, 1], [1, 2]])
        saved = torch.load(tmp_path / attempt / "on_exception.ckpt", weights_only=True)
        assert deviation(saved["state_dict"], mean_of([left for left, _ in results])) < ROUNDING
        assert not any("with rank 0's own model" in message for message in results[0][1])


def _fail_and_save(root: str, everywhere: bool, topology: Any = "ring") -> tuple[dict[str, Tensor], list[str]]:
    """Fail on all ranks after three steps; save on all, or on rank 0 alone."""
    saver, model = OnExceptionCheckpoint(root), Classifier()
    strategy = PowerGossipStrategy(topology)
    run = trainer(strategy, root=root, alike=False, callbacks=[Fail(), saver], enable_checkpointing=True)
    with (
        mock.patch.object(saver, "on_exception") if not everywhere and dist.get_rank() else contextlib.nullcontext(),
        mock.patch("lightning_powersgd.strategies.shared.PATIENCE", timedelta(seconds=120 if everywhere else 0.1)),
        messages() as said,
        pytest.raises(ValueError, match="failed"),
    ):
        run.fit(model, loader())
    return state(model), said


# Metrics


NAMES = {f"powergossip/{name}" for name in ("bytes_sent", "link_bytes", "compression_ratio", "consensus_distance")}


def read_csv(root: Path) -> list[dict[str, str]]:
    with (root / "csv" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["powergossip/bytes_sent"]]


def test_metrics_are_logged_at_the_trainers_cadence_and_say_what_was_sent(ranks, tmp_path):
    results = ranks[3].run(_log_metrics, str(tmp_path))
    rows = read_csv(tmp_path)
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert {name for name in rows[0] if name.startswith("powergossip/")} == NAMES
    metrics, sent, apart, dense = results[0]
    assert metrics.keys() >= NAMES
    for row, number in zip(rows, (1, 3, 5), strict=True):
        assert float(row["powergossip/bytes_sent"]) == sum(sent[number].values())
        # Rank 0 is the middle of the star.
        assert float(row["powergossip/link_bytes"]) == sent[number][1] == sent[number][2]
        ratio = 2 * dense / sum(sent[number].values())
        assert float(row["powergossip/compression_ratio"]) == pytest.approx(ratio, rel=1e-6)
        # A sketch, by a standard deviation of 2 %.
        assert float(row["powergossip/consensus_distance"]) == pytest.approx(apart[number], rel=0.08)
    # A leaf has one link.
    assert results[1][0]["powergossip/bytes_sent"] == metrics["powergossip/link_bytes"]


def _log_metrics(root: str) -> tuple[dict[str, float], list[dict[int, int]], list[float], int]:
    counted: list[dict[int, int]] = []
    apart: list[float] = []

    class Count(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.manager = counted_sends()
            self.sent = self.manager.__enter__()

        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
            self.manager.__exit__(None, None, None)
            counted.append(dict(self.sent))
            apart.append(float(consensus_distance(dict(pl_module.named_parameters()))))

    logging = {"logger": CSVLogger(root, "csv", version=""), "log_every_n_steps": 2, "callbacks": [Count()]}
    run = trainer(PowerGossipStrategy(topology="star", rank=2), root=root, alike=False, max_steps=6, **logging)
    run.fit(Classifier(), loader())
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    return metrics, counted, apart, sum(p.nbytes for p in run.lightning_module.parameters())


def test_metrics_can_be_turned_off(fit):
    assert not any(name.startswith("powergossip") for name in fit(_log_nothing)[0]["metrics"])


def _log_nothing(root: str) -> dict[str, Any]:
    return train(root, PowerGossipStrategy(log_metrics=False), max_steps=2)


@pytest.mark.parametrize("prog_bar", [False, True])
def test_the_ratio_is_in_the_progress_bar_if_asked_for(fit, prog_bar):
    assert fit(_progress_bar, prog_bar) == [[prog_bar] * 2] * 2


def _progress_bar(root: str, prog_bar: bool) -> list[bool]:
    seen: list[bool] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append("powergossip/compression_ratio" in self.get_metrics(trainer, pl_module))

    bar = {"callbacks": [Bar()], "enable_progress_bar": True}
    train(root, PowerGossipStrategy(prog_bar=prog_bar), max_steps=2, **bar)
    return seen


# Names and bad input


@pytest.mark.parametrize("ending", ["", "_spawn", "_fork", "_notebook", "strategy"])
def test_every_name_gives_the_strategy(ending):
    strategy = StrategyRegistry.get(f"powergossip{ending}")
    assert type(strategy) is PowerGossipStrategy
    assert strategy.config == PowerGossipStrategy().config
    assert strategy._start_method == {"_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}.get(ending, "popen")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"topology": "rnig"}, ValueError, r"`topology='rnig'` is not one of .*Did you mean 'ring'\?"),
        ({"topology": 5}, TypeError, "`topology=5` is no graph"),
        ({"rank": 0}, ValueError, r"`rank=0` is below 1.*mapping"),
        ({"rank": 1.5}, TypeError, "`rank=1.5` is not an integer"),
        ({"rank": {}}, ValueError, "no pattern"),
        ({"iterations": 0}, ValueError, "`iterations=0` is below 1"),
        ({"iterations": True}, TypeError, "`iterations=True` is not an integer"),
        ({"min_compression_ratio": 0.5}, ValueError, "`min_compression_ratio=0.5` is below 1"),
        ({"overlap": "yes"}, TypeError, "`overlap='yes'` is not a bool"),
        ({"average_model": None}, TypeError, "`average_model=None` is not a bool"),
        ({"seed": -1}, ValueError, "`seed=-1` is below 0"),
        ({"prog_bar": True, "log_metrics": False}, ValueError, "`prog_bar=True` needs `log_metrics=True`"),
        ({"rnak": 2}, TypeError, "rnak"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(kwargs, error, message):
    with pytest.raises(error, match=message):
        PowerGossipStrategy(**kwargs)


BAD_FITS = {
    "a graph of other ranks": "`topology` links 1 and 2, which are not two of the 2 ranks from 0 to 1",
    "a graph that is not connected": "`topology` (custom) is not connected: rank 0 has no way to 1",
    "a directed graph": "`topology` is a directed graph, but links work both ways",
    "weights of other ranks": "`weights` has the shape (3, 3), but there are 2 ranks",
    "a pattern without a match": "`rank` has the pattern 'decoder.*', which matches no parameter",
    "a parameter without values": "'extra.weight' is on the meta device",
    "other ranks of factors": "The ranks disagree on the argument `rank`: rank 0 has 1, rank 1 has 2",
    "other topologies": "The ranks disagree on the argument `topology`: rank 0 has 'ring', rank 1 has 'star'",
    "other graphs": "The ranks disagree on the argument `topology`: rank 0 has [(0, 1)], rank 1 has []",
    "other weights": "The ranks disagree on the argument `weights`: rank 0 has None, rank 1 has [[0.5, 0.5], [0",
    "other use of the average": "The ranks disagree on the argument `average_model`: rank 0 has False, rank 1 has True",
    "other metrics": "The ranks disagree on the argument `log_metrics`: rank 0 has False, rank 1 has True",
    "other shapes": "The ranks disagree on the parameter 'net.0.weight'",
    "other frozen parameters": "The ranks disagree on the parameter 'net.2.weight': rank 0 has trainable (40, 48)",
    "other versions": "The ranks disagree on the version of lightning_powersgd: rank 0 has 0, rank 1 has 1",
    "other numbers of batches": "The ranks disagree on the number of training batches (`Trainer(limit_train_batches=…)`"
    " makes it equal): rank 0 has 20, rank 1 has 19",
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_fits_are_refused_on_every_rank_before_training(two_ranks, tmp_path, case):
    for text in two_ranks.run_to_errors(_bad_fit, str(tmp_path), case):
        assert BAD_FITS[case] in text
        assert "training_step" not in text


def _bad_fit(root: str, case: str) -> None:
    rank = dist.get_rank()
    model, data, arguments, version = Classifier(), loader(), {}, contextlib.nullcontext()
    if case == "a graph of other ranks":
        arguments = {"topology": [[0, 1], [1, 2]]}
    elif case == "a graph that is not connected":
        arguments = {"topology": []}
    elif case == "a directed graph":
        arguments = {"topology": nx.DiGraph([(0, 1)])}
    elif case == "weights of other ranks":
        arguments = {"weights": torch.full((3, 3), 1 / 3).tolist()}
    elif case == "a pattern without a match":
        arguments = {"rank": {"decoder.*": 4, "*": 2}}
    elif case == "a parameter without values":
        model.extra = nn.Linear(8, 8, device="meta")
    elif case == "other ranks of factors":
        arguments = {"rank": 1 + rank}
    elif case == "other topologies":
        arguments = {"topology": "star" if rank else "ring"}
    elif case == "other graphs":
        arguments = {"topology": nx.empty_graph(2) if rank else nx.path_graph(2)}
    elif case == "other weights":
        arguments = {"weights": [[0.5, 0.5], [0.5, 0.5]] if rank else None}
    elif case == "other use of the average":
        arguments = {"average_model": bool(rank)}
    elif case == "other metrics":
        arguments = {"log_metrics": bool(rank)}
    elif case == "other shapes":
        model.net[0] = nn.Linear(32 + rank, 48)
    elif case == "other frozen parameters":
        model.net[2].weight.requires_grad_(not rank)
    elif case == "other versions":
        version = mock.patch("lightning_powersgd.strategies.equal_ranks.__version__", str(rank))
    elif case == "other numbers of batches":
        data = loader(160 - 8 * rank)
    with version:
        options = {"max_steps": 1, "use_distributed_sampler": False}
        trainer(PowerGossipStrategy(**arguments), root=root, alike=False, **options).fit(model, data)


def test_files_of_different_steps_are_refused(two_ranks, tmp_path):
    two_ranks.run(_save_after, str(tmp_path), 2, "early")
    two_ranks.run(_save_after, str(tmp_path), 4, "late")
    (tmp_path / "rank1-early.ckpt").replace(tmp_path / "rank1-late.ckpt")
    for text in two_ranks.run_to_errors(_resume_from, str(tmp_path), "late"):
        assert "The ranks disagree on the step to begin with" in text


def test_a_rank_without_a_file_of_its_own_says_so(two_ranks, tmp_path):
    two_ranks.run(_save_after, str(tmp_path), 2, "own")
    (tmp_path / "rank1-own.ckpt").unlink()
    assert two_ranks.run(_resume_from, str(tmp_path), "own") == [0, 1]


def _save_after(root: str, steps: int, name: str) -> None:
    run = trainer(PowerGossipStrategy(average_model=False), root=root, alike=False, max_steps=steps, max_epochs=-1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(f"{root}/{name}.ckpt")


def _resume_from(root: str, name: str) -> int:
    run = trainer(PowerGossipStrategy(average_model=False), root=root, alike=False, max_steps=5, max_epochs=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Classifier(), loader(), ckpt_path=f"{root}/{name}.ckpt")
    return sum("loads the model of" in str(warning.message) for warning in caught)


def test_what_is_equal_on_all_ranks_is_not_averaged(ranks):
    assert ranks[3].run(_differing) == [["gradient"]] * 3


def _differing() -> list[str]:
    values = {"frozen": torch.full((5,), 0.1), "gradient": torch.full((5,), 0.1 + dist.get_rank() / 7)}
    assert not differing({}, torch.device("cpu"))
    return list(differing(values, torch.device("cpu")))
