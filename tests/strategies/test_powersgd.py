"""Tier three: what a Trainer can do, with PowerSGD, on two real ranks."""

from __future__ import annotations

import contextlib
import csv
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.imports import RequirementCache
from models import Classifier, Silent, loader, messages, replicas_agree, trainer
from ranks import counted_all_reduce, gather_equal
from torch import Tensor, nn

from lightning_powersgd import (
    CompressionMonitor,
    GradientExchange,
    PowerSGDConfig,
    PowerSGDState,
    PowerSGDStrategy,
)
from lightning_powersgd.compressor import native


class Steps(Callback):
    """Notes, at every optimizer step, the exchange's step and the norm of the gradients."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.steps.append(trainer.strategy.exchange.state.step)
        if grads:
            self.norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
            self.largest.append(max(float(g.abs().max()) for g in grads))


def train(root: str, strategy: Any = "powersgd", model: Any = None, data: Any = None, **kwargs: Any) -> dict[str, Any]:
    model = Classifier() if model is None else model
    run = trainer(strategy, root=root, **kwargs)
    run.fit(model, data or loader(), loader(32, shuffle=False))
    module = getattr(model, "_orig_mod", model)
    state = run.strategy.exchange.state
    return {
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
        "agree": replicas_agree(module),
        "step": state.step,
        "compressed": len(list(state.plan.compressed)),
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "global_step": run.global_step,
    }


@pytest.mark.parametrize("strategy", ["powersgd", "powersgd_find_unused_parameters_true"])
def test_training_learns_and_replicas_agree(fit, strategy):
    for result in fit(train, strategy, max_epochs=10):
        assert result["agree"]
        assert result["step"] == result["global_step"] == 100
        assert result["compressed"] == 3
        assert result["metrics"]["train_loss"] < 1.0


def test_the_loss_is_close_to_ddps(fit):
    powersgd = fit(train, "powersgd", max_epochs=20)[0]["metrics"]
    ddp = fit(_train_ddp)[0]
    assert powersgd["val_loss"] == pytest.approx(ddp, abs=0.3)


def _train_ddp(root: str) -> float:
    run = trainer("ddp", root=root, max_epochs=20)
    run.fit(Classifier(), loader(), loader(32, shuffle=False))
    return float(run.callback_metrics["val_loss"])


class Thawing(Classifier):
    """Trains its largest layer for two steps out of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.net[2].requires_grad_(False)
        self.seen: list[tuple[str | None, int, int]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[2].requires_grad_(batch_idx in (4, 5))

    def on_after_backward(self) -> None:
        strategy = self.trainer.strategy
        state = strategy.exchange.state
        hook = strategy.model._get_ddp_logging_data().get("comm_hook")
        self.seen.append((hook, state.step, state.dense_bytes - state.sent_bytes))


def test_where_nothing_is_compressed_ddp_has_no_hook_until_something_is(fit):
    for seen, total in fit(_thaw):
        hooks, steps, saved = zip(*seen, strict=True)
        assert [hook == "powersgd_hook" for hook in hooks] == [True] + [False] * 4 + [True] * 2 + [False]
        assert steps == (0, 0, 1, 1, 2, 3, 3, 3)  # accumulated over two; counted later without a hook
        assert [nbytes > 0 for nbytes in saved] == [False] * 5 + [True] * 2 + [False]
        assert total == 4 * 4 * (32 * 48 + 48 + 40 * 10 + 10) + 4 * (48 * 40 + 40)


def _thaw(root: str) -> tuple[list[tuple[str | None, int, int]], int]:
    module = Thawing()
    strategy = PowerSGDStrategy(rank={"net.2.*": 2, "*": 0}, compress="auto")
    trainer(strategy, root=root, max_steps=4, accumulate_grad_batches=2).fit(module, loader())
    return module.seen, strategy.exchange.state.total_dense_bytes


@pytest.mark.lost_by_pytorchs_hook("on CPU the hook is not registered, and nobody says so")
def test_ddp_holds_the_hook_on_cpu(fit):
    assert fit(_hook_name) == ["powersgd_hook"] * 2


def _hook_name(root: str) -> str:
    names: list[str] = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            names.append(trainer.strategy.model._get_ddp_logging_data()["comm_hook"])

    train(root, callbacks=[Look()], max_steps=1)
    return names[0]


def test_gradient_accumulation_counts_synchronised_passes_only(fit):
    for steps, sent_calls in fit(_accumulate):
        # Noted before each backward pass: no step was counted for a pass that was not synchronised.
        assert steps == [0, 1, 2, 3, 4]
        assert sent_calls == 2 * 5 + 3, "and the mean of three error buffers in the end"


def _accumulate(root: str) -> tuple[list[int], int]:
    # Four batches of each rank's ten make one step, and the last step of the epoch has two.
    noted = Steps()
    with counted_all_reduce() as sent:
        train(root, accumulate_grad_batches=4, max_steps=5, max_epochs=-1, callbacks=[noted], log_every_n_steps=1)
    groups_bytes = [nbytes for nbytes in sent if nbytes > 100]
    return noted.steps, len(groups_bytes)


@pytest.mark.parametrize(("algorithm", "value"), [("norm", 0.01), ("value", 0.001)])
def test_gradient_clipping(fit, algorithm, value):
    for result, measured in fit(_clip, algorithm, value):
        assert result["agree"]
        assert all(0 < found <= value * 1.001 for found in measured)


def _clip(root: str, algorithm: str, value: float) -> tuple[dict[str, Any], list[float]]:
    noted = Steps()
    kwargs = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm, "callbacks": [noted], "max_steps": 4}
    result = train(root, **kwargs)
    return result, noted.norms if algorithm == "norm" else noted.largest


class Manual(Classifier):
    """Manual optimisation with its own accumulation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)


@pytest.mark.parametrize(
    "static_graph",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not RequirementCache("lightning>=2.6"),
                reason="before 2.6, Lightning never flushed the first step of a static graph in manual optimisation",
            ),
        ),
    ],
)
def test_manual_optimisation(fit, static_graph):
    for result in fit(_manual, static_graph):
        assert result["agree"]
        assert result["step"] == 10


def _manual(root: str, static_graph: bool) -> dict[str, Any]:
    return train(root, PowerSGDStrategy(rank=2, static_graph=static_graph), model=Manual(), max_epochs=1)


class Gan(Classifier):
    """A generator and a discriminator that take turns, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Identity()
        self.generator = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 32))
        self.discriminator = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        real, noise = batch[0], torch.randn(len(batch[0]), 16)

        self.toggle_optimizer(generator_optimizer)
        loss = F.softplus(-self.discriminator(self.generator(noise))).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

        self.toggle_optimizer(discriminator_optimizer)
        fake = self.generator(noise).detach()
        loss = (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake))).mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        self.untoggle_optimizer(discriminator_optimizer)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(m.parameters(), lr=0.01) for m in (self.generator, self.discriminator)]


@pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])
def test_several_optimizers(fit, alternate):
    for result in fit(_gan, alternate):
        assert result["agree"]
        assert result["step"] == 20


def _gan(root: str, alternate: bool) -> dict[str, Any]:
    strategy = PowerSGDStrategy(rank=2, find_unused_parameters=True, alternate=alternate)
    return train(root, strategy, model=Gan(), max_epochs=1)


class Thrown(Gan):
    """Leaves the discriminator's gradients from the generator's loss to the next `zero_grad`, or does not make any."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.how == "toggled":
            super().training_step(batch, batch_idx)
            return
        generator_optimizer, discriminator_optimizer = self.optimizers(use_pl_optimizer=self.how != "raw optimizers")
        noise = torch.randn(len(batch[0]), 16)

        fake = self.generator(noise)
        loss = self.discriminator(batch[0]).square().mean() + self.discriminator(fake.detach()).mean()
        loss *= torch.inf if self.how == "skipped" else 1
        discriminator_optimizer.zero_grad()
        for part in (loss / 2, loss / 2) if self.how == "accumulated" else (loss,):
            self.manual_backward(part, retain_graph=True)
        discriminator_optimizer.step()

        generator_optimizer.zero_grad()
        self.manual_backward(self.discriminator(fake).mean() if self.how == "thrown away" else fake.square().mean())
        generator_optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(m.parameters(), lr=0.01, fused=self.how == "raw optimizers") for m in networks]


@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("how", ["toggled", "apart", "accumulated", "raw optimizers", "skipped", "thrown away"])
def test_gradients_that_are_thrown_away_are_warned_of_once(fit, how, ddp):
    said = fit(_throw_away, how, ddp)[0]
    found = [message for message in said if "thrown away" in message]
    assert len(found) == (how == "thrown away")
    assert all("Gradients of 1 compressed parameters, such as 'discriminator.0.weight'" in text for text in found)


def _throw_away(root: str, how: str, ddp: dict[str, Any]) -> list[str]:
    strategy = PowerSGDStrategy(rank=2, find_unused_parameters=True, **ddp)
    scaler = torch.amp.GradScaler("cpu") if how == "skipped" else None
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else None
    with messages() as said:
        run = trainer(strategy, root=root, limit_train_batches=4, max_epochs=1, plugins=plugins)
        run.fit(Thrown(how), loader())
    assert scaler is None or scaler.get_scale() < 2.0**16, "no step was skipped"
    return said


class Unused(Classifier):
    """Has a layer that only every second batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(32, 32)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0] + self.extra(batch[0]) if batch_idx % 2 else batch[0]
        return F.cross_entropy(self(x), batch[1])


def test_unused_parameters(fit):
    strategy = "powersgd_find_unused_parameters_true"
    assert all(result["agree"] for result in fit(_train_unused, strategy))


def _train_unused(root: str, strategy: str) -> dict[str, Any]:
    return train(root, strategy, model=Unused())


def test_unused_parameters_without_the_switch_end_in_advice(two_ranks, tmp_path):
    for text in two_ranks.run_to_errors(_train_unused, str(tmp_path), "powersgd"):
        assert "powersgd_find_unused_parameters_true" in text


def test_static_graph(fit):
    found = fit(_train_static, True)
    expected = fit(_train_static, False)
    assert found[0]["agree"]
    assert all(torch.equal(p, expected[0]["parameters"][name]) for name, p in found[0]["parameters"].items())


def _train_static(root: str, static_graph: bool) -> dict[str, Any]:
    return train(root, PowerSGDStrategy(rank=2, static_graph=static_graph), max_epochs=1)


def test_sync_batchnorm_is_left_to_ddp(two_ranks, tmp_path):
    # SyncBatchNorm needs a GPU, and DDP says so on a CPU: the layer was converted, and DDP saw it.
    for text in two_ranks.run_to_errors(_sync_batchnorm, str(tmp_path)):
        assert "SyncBatchNorm layers only work with GPU modules" in text


def _sync_batchnorm(root: str) -> None:
    train(root, model=Classifier(batch_norm=True), sync_batchnorm=True)


def test_batch_norm(fit):
    assert all(result["agree"] for result in fit(_batch_norm))


def _batch_norm(root: str) -> dict[str, Any]:
    return train(root, model=Classifier(batch_norm=True))


class Tied(Classifier):
    """An encoder and a decoder that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.decoder(F.relu(self.encoder(x))))


def test_shared_weights(fit):
    for result in fit(_tied):
        assert result["agree"]
        assert result["compressed"] == 4


def _tied(root: str) -> dict[str, Any]:
    return train(root, model=Tied())


class Unfreeze(BaseFinetuning):
    """Trains the first layer from the second epoch on only, as fine-tuning does, and freezes the last in the third."""

    def freeze_before_training(self, pl_module) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)
        if epoch == 2:
            self.freeze(pl_module.net[4])


class Unfrozen(Classifier):
    """Optimizes what is trainable at first; `Unfreeze` adds the rest."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize(
    "ddp", [{}, {"find_unused_parameters": True}, {"find_unused_parameters": True, "static_graph": True}], ids=str
)
def test_parameters_frozen_and_unfrozen_during_training(fit, ddp):
    for result, changed in fit(_unfreeze, ddp):
        assert result["agree"], "replicas of an unfrozen layer drifted apart"
        assert changed == {0: [False, True, True], 4: [True, True, False]}
        assert result["step"] == 30


def _unfreeze(root: str, ddp: dict[str, Any]) -> tuple[dict[str, Any], dict[int, list[bool]]]:
    changed: dict[int, list[bool]] = {0: [], 4: []}

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            self.before = {layer: pl_module.net[layer].weight.detach().clone() for layer in changed}

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            for layer, weight in self.before.items():
                changed[layer].append(not torch.equal(weight, pl_module.net[layer].weight))

    strategy = PowerSGDStrategy(**{"rank": 2, **ddp})
    return train(root, strategy, model=Unfrozen(), callbacks=[Unfreeze(), Watch()], max_epochs=3), changed


def test_unfreezing_while_gradients_accumulate_counts_no_extra_step(fit):
    for result in fit(_unfreeze_accumulating):
        assert result["agree"]
        assert result["step"] == result["global_step"] == 4


def _unfreeze_accumulating(root: str) -> dict[str, Any]:
    strategy = PowerSGDStrategy(rank=2, find_unused_parameters=True)
    return train(root, strategy, model=Unfrozen(), callbacks=[Unfreeze()], max_epochs=2, accumulate_grad_batches=5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(fit, precision):
    for result in fit(train, precision=precision, max_epochs=10):
        assert result["agree"]
        # As low as in float32; an untrained net has ln 10 = 2.3.
        assert result["metrics"]["train_loss"] < 1.0


def test_compiled_module(fit):
    compiled, plain = fit(_compiled, True)[0], fit(_compiled, False)[0]
    assert compiled["agree"]
    for name, parameter in plain["parameters"].items():
        # Ten steps, in which tracing may change the order of a sum.
        assert torch.allclose(compiled["parameters"][name], parameter, atol=1e-4)


def _compiled(root: str, compiled: bool) -> dict[str, Any]:
    # Traces forward and backward as the default backend does, but needs no compiler.
    model = torch.compile(Silent(), backend="aot_eager") if compiled else Silent()
    return train(root, model=model, max_epochs=1)


def test_compiled_submodule_keeps_its_names(fit):
    names = fit(_compiled_submodule)[0]
    assert set(names) == {"net.0.weight", "net.2.weight", "net.4.weight"}


def _compiled_submodule(root: str) -> list[str]:
    model = Classifier()
    model.net = torch.compile(model.net, backend="eager")
    run = trainer(root=root, max_steps=2)
    run.fit(model, loader())
    assert replicas_agree(model)
    return list(run.strategy.exchange.state.state_dict()["parameters"])


def test_validate_test_and_predict(fit):
    for before, after, predictions in fit(_evaluate):
        assert before == after
        assert predictions == 16


def _evaluate(root: str) -> tuple[float, float, int]:
    model, data = Classifier(), loader(32, shuffle=False)
    run = trainer(root=root, max_epochs=1)
    run.fit(model, loader(), data)
    validated = run.validate(model, data, verbose=False)[0]["val_loss"]
    tested = run.test(model, data, verbose=False)[0]["test_loss"]
    return validated, tested, sum(len(batch) for batch in run.predict(model, data))


def test_evaluation_without_a_fit(fit):
    assert all(loss > 0 for loss in fit(_validate_only))


def _validate_only(root: str) -> float:
    return trainer(root=root).validate(Classifier(), loader(32), verbose=False)[0]["val_loss"]


def test_sanity_checking(fit):
    assert all(result["agree"] for result in fit(train, num_sanity_val_steps=2))


def test_fast_dev_run(fit):
    for result in fit(train, fast_dev_run=True):
        assert result["agree"]
        assert result["step"] == 1
        assert result["metrics"]["powersgd/compression_ratio"] > 1


def test_fit_twice(fit):
    for agree, steps in fit(_fit_twice):
        assert agree
        assert steps == [10, 10]


def _fit_twice(root: str) -> tuple[bool, list[int]]:
    model, steps = Classifier(), []
    run = trainer(root=root, max_epochs=1)
    for epochs in (1, 2):
        run.fit_loop.max_epochs = epochs
        run.fit(model, loader())
        # Like the optimizers, the exchange of a new fit is a new one.
        steps.append(run.strategy.exchange.state.step)
    assert sum(type(callback).__name__ == "CompressionMonitor" for callback in run.callbacks) == 1
    return replicas_agree(model), steps


def test_early_stopping(fit):
    for result in fit(_early_stopping):
        assert result["agree"]
        assert 0 < result["global_step"] < 1000


def _early_stopping(root: str) -> dict[str, Any]:
    stop = EarlyStopping("val_loss", patience=1, min_delta=0.5, check_on_train_epoch_end=False)
    return train(root, callbacks=[stop], max_epochs=100)


def test_averaged_weights(fit):
    for result in fit(_average_weights):
        assert result["agree"]


def _average_weights(root: str) -> dict[str, Any]:
    return train(root, callbacks=[StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], max_epochs=3)


def test_learning_rate_finder(fit):
    for agree, rate, steps, global_step in fit(_find_rate):
        assert agree
        assert rate > 0
        # The search leaves no trace: its steps do not count, and the errors it made are gone.
        assert steps == global_step <= 10


def _find_rate(root: str) -> tuple[bool, float, int, int]:
    model = Classifier(lr=0.001)
    finder = LearningRateFinder(num_training_steps=10, early_stop_threshold=None)
    run = trainer(root=root, max_epochs=1, callbacks=[finder], enable_checkpointing=True)
    run.fit(model, loader())
    return replicas_agree(model), model.lr, run.strategy.exchange.state.step, run.global_step


# Metrics


def read_csv(root: Path) -> list[dict[str, str]]:
    with (root / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_metrics_reach_callback_metrics_loggers_and_count_what_was_sent(fit, tmp_path):
    logged, counted, dense = fit(_log_metrics)[0]
    assert logged["powersgd/bytes_sent"] == counted[-1]
    assert logged["powersgd/compression_ratio"] == pytest.approx(dense / counted[-1], rel=1e-12)
    assert logged["powersgd/bytes_saved"] == sum(dense - sent for sent in counted)
    assert 0 < logged["powersgd/residual_ratio"] < 1

    rows = [row for row in read_csv(tmp_path) if row["powersgd/bytes_sent"]]
    assert [float(row["powersgd/bytes_sent"]) for row in rows] == counted
    saved = [float(row["powersgd/bytes_saved"]) for row in rows]
    assert saved == [sum(dense - sent for sent in counted[: n + 1]) for n in range(len(counted))]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {name for name in events.Tags()["scalars"] if name.startswith("powersgd/")} == {
        "powersgd/compression_ratio",
        "powersgd/bytes_sent",
        "powersgd/bytes_saved",
        "powersgd/residual_ratio",
    }


def _log_metrics(root: str) -> tuple[dict[str, float], list[int], int]:
    counted: list[int] = []

    class Count(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            self.manager = counted_all_reduce()
            self.sent = self.manager.__enter__()

        def on_after_backward(self, trainer, pl_module) -> None:
            self.manager.__exit__(None, None, None)
            counted.append(sum(self.sent))

    loggers = [CSVLogger(root, "csv", version=""), TensorBoardLogger(root, "tb", version="")]
    strategy = PowerSGDStrategy(rank=2, alternate=True, start_step=3)
    run = trainer(strategy, root=root, max_steps=8, log_every_n_steps=1, logger=loggers, callbacks=[Count()])
    run.fit(Classifier(), loader())
    dense = sum(p.numel() * p.element_size() for p in run.lightning_module.parameters())
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    return metrics, counted, dense


def test_metrics_follow_the_trainers_cadence(fit, tmp_path):
    fit(_log_seldom)
    assert [row["step"] for row in read_csv(tmp_path) if row["powersgd/residual_ratio"]] == ["3", "7"]


def _log_seldom(root: str) -> None:
    train(root, log_every_n_steps=4, logger=CSVLogger(root, "csv", version=""), max_epochs=1)


def test_metrics_are_measured_once_a_step_while_gradients_accumulate(fit):
    assert fit(_count_measurements) == [4, 4]


def _count_measurements(root: str) -> int:
    measure = GradientExchange.residual_norms
    with mock.patch.object(GradientExchange, "residual_norms", autospec=True, side_effect=measure) as measured:
        train(root, accumulate_grad_batches=5, log_every_n_steps=1, max_epochs=2)
    return measured.call_count


@pytest.mark.parametrize("prog_bar", [False, True])
def test_a_monitor_of_the_users_own_takes_the_place_of_ours(fit, prog_bar):
    assert fit(_own_monitor, prog_bar) == [1, 1]


def _own_monitor(root: str, prog_bar: bool) -> int:
    run = trainer(root=root, max_epochs=1, callbacks=[CompressionMonitor(prog_bar=prog_bar)])
    run.fit(Classifier(), loader())
    assert "powersgd/compression_ratio" in run.callback_metrics
    return sum(isinstance(callback, CompressionMonitor) for callback in run.callbacks)


def test_a_barebones_trainer_is_left_alone(fit):
    fit(_barebones)


def _barebones(root: str) -> None:
    run = Trainer(strategy="powersgd", accelerator="cpu", devices=2, barebones=True, max_steps=2)
    run.fit(Classifier(), loader())
    assert not any(isinstance(callback, CompressionMonitor) for callback in run.callbacks)


def test_metrics_can_be_turned_off(fit):
    assert not any(name.startswith("powersgd") for name in fit(_log_nothing)[0]["metrics"])


def _log_nothing(root: str) -> dict[str, Any]:
    return train(root, PowerSGDStrategy(rank=2, log_metrics=False), max_epochs=1)


@pytest.mark.parametrize("prog_bar", [False, True])
def test_the_ratio_is_in_the_progress_bar_if_asked_for(fit, prog_bar):
    assert fit(_progress_bar, prog_bar) == [prog_bar] * 2


def _progress_bar(root: str, prog_bar: bool) -> bool:
    seen: list[bool] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append("powersgd/compression_ratio" in self.get_metrics(trainer, pl_module))

    strategy = PowerSGDStrategy(rank=2, prog_bar=prog_bar)
    train(root, strategy, max_epochs=1, callbacks=[Bar()], enable_progress_bar=True)
    assert len(set(seen)) == 1, "from the first batch on, since the bar is drawn after the step was measured"
    return seen[-1]


# Checkpoints


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("config", [{"rank": 1}, {"rank": 2}, {"rank": 2, "alternate": True}], ids=str)
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(ranks, tmp_path, world_size, config, optimizer):
    for parameters, metrics, agree in ranks[world_size].run(_resume, str(tmp_path), config, optimizer):
        assert agree
        assert parameters, "the parameters differ"
        assert metrics[0] == metrics[1]
        assert "powersgd/bytes_saved" in metrics[0]


def _resume(root: str, config: dict[str, Any], optimizer: str, save_last: bool = False) -> tuple[bool, Any, bool]:
    runs = []
    for resume in (False, True):
        model = Classifier(optimizer=optimizer, lr=0.01)
        saver = ModelCheckpoint(root, "{epoch}", save_top_k=-1, every_n_epochs=1, save_last=save_last)
        run = trainer(
            PowerSGDStrategy(**{"rank": 2, **config}),
            root=root,
            max_epochs=3,
            callbacks=[saver],
            enable_checkpointing=True,
        )
        path = f"{root}/epoch=0.ckpt" if resume else None
        run.fit(model, loader(shuffle=False), loader(32, shuffle=False), ckpt_path=path)
        runs.append((list(model.parameters()), {name: float(v) for name, v in run.callback_metrics.items()}))
    equal = all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    return equal, (runs[0][1], runs[1][1]), replicas_agree(model)


@pytest.mark.lost_by_pytorchs_hook("state cannot be loaded with `weights_only=True`")
def test_a_checkpoint_holds_plain_types_only_and_one_buffer_a_parameter(fit, tmp_path):
    fit(_save)
    checkpoint = torch.load(tmp_path / "full.ckpt", weights_only=True)
    saved = checkpoint["powersgd"]
    assert saved["format_version"] == 1
    assert saved["step"] == 10
    assert saved["settings"]["rank"] == 2
    assert set(saved["parameters"]) == {"net.0.weight", "net.2.weight", "net.4.weight"}
    for name, entry in saved["parameters"].items():
        assert entry["error"].shape == checkpoint["state_dict"][name].shape
        assert {side: factor.shape for side, factor in entry["factors"].items()} == {
            "right": (2, entry["error"].shape[1])
        }
    assert "powersgd" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    # What the file costs: the error buffers once, and the factors, whatever the number of ranks.
    extra = (tmp_path / "full.ckpt").stat().st_size - (tmp_path / "without.ckpt").stat().st_size
    assert extra == pytest.approx(sum(e["error"].nbytes for e in saved["parameters"].values()), rel=0.2)


def _save(root: str) -> None:
    for name, keep in (("without", False), ("full", True)):
        run = trainer(PowerSGDStrategy(rank=2, checkpoint_error_feedback=keep), root=root, max_epochs=1)
        run.fit(Classifier(), loader())
        run.save_checkpoint(f"{root}/{name}.ckpt")
        run.save_checkpoint(f"{root}/weights.ckpt", weights_only=True)


@pytest.mark.parametrize(("first", "second"), [("ddp", "powersgd"), ("powersgd", "ddp")])
def test_checkpoints_of_plain_ddp_and_ours_load_into_each_other(fit, first, second):
    for agree, steps in fit(_cross_load, first, second):
        assert agree
        assert steps == 20


def _cross_load(root: str, first: str, second: str) -> tuple[bool, int]:
    run = trainer(first, root=root, max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(f"{root}/first.ckpt")
    model = Classifier()
    run = trainer(second, root=root, max_epochs=2)
    with messages() as said:
        run.fit(model, loader(), ckpt_path=f"{root}/first.ckpt")
    expected = second == "powersgd" and dist.get_rank() == 0
    assert any("no PowerSGD state: error buffers start empty" in message for message in said) == expected
    return replicas_agree(model), run.global_step


def test_weights_alone_are_restored_for_validation(fit):
    fit(_validate_weights)


def _validate_weights(root: str) -> None:
    run = trainer(root=root, max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(f"{root}/weights.ckpt", weights_only=True)
    trainer(root=root).validate(Classifier(), loader(32), ckpt_path=f"{root}/weights.ckpt", verbose=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 3}, "net.0.weight: right factor of shape (2, 32) where (3, 32) is needed"),
        ({"rank": {"net.0.*": 0, "*": 2}}, "net.0.weight: no longer compressed"),
    ],
    ids=str,
)
def test_a_changed_rank_resumes_and_says_what_was_not_carried_over(fit, config, message):
    results = fit(_resume_changed, config)
    assert all(agree for agree, _ in results)
    assert any(message in line for line in results[0][1])


def _resume_changed(root: str, config: dict[str, Any]) -> tuple[bool, list[str]]:
    run = trainer(root=root, max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(f"{root}/first.ckpt")
    model = Classifier()
    with messages() as said:
        trainer(PowerSGDStrategy(**{"rank": 2, **config}), root=root, max_epochs=2).fit(
            model, loader(), ckpt_path=f"{root}/first.ckpt"
        )
    return replicas_agree(model), said


def test_files_of_one_step_resume_alike_on_three_ranks(ranks, tmp_path):
    # A mean over three ranks rounds. The second file of a step must not average what is averaged.
    for equal, metrics, agree in ranks[3].run(_resume, str(tmp_path), {}, "sgd", save_last=True):
        assert agree
        assert equal
        assert metrics[0] == metrics[1]


def test_a_checkpoint_on_an_exception_of_all_ranks_is_complete(fit, tmp_path):
    means = fit(_fail_and_save, everywhere=True)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["powersgd"]
    assert saved["step"] == 3
    assert saved["averaged"]
    for name, entry in saved["parameters"].items():
        assert torch.equal(entry["error"], means[0][name])
        assert torch.equal(entry["error"], means[1][name])


ON_EXCEPTION = {"save_on_exception": True, "save_top_k": -1, "every_n_train_steps": 100}
SAVERS = {
    "on_exception": OnExceptionCheckpoint,
    "kept": lambda root: ModelCheckpoint(root, "kept", save_last=True, **ON_EXCEPTION),
    "linked": lambda root: ModelCheckpoint(root, "linked", save_last="link", **ON_EXCEPTION),
    "weights": lambda root: ModelCheckpoint(root, "weights", save_weights_only=True, **ON_EXCEPTION),
}


@pytest.mark.skipif(RequirementCache("lightning<2.6"), reason="before 2.6 ModelCheckpoint does not save on exceptions")
@pytest.mark.parametrize("saver", SAVERS)
def test_a_rank_that_fails_alone_saves_without_the_others(fit, tmp_path, saver):
    fit(_fail_and_save, everywhere=False, saver=saver)
    saved = torch.load(tmp_path / f"{saver}.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    if saver != "weights":
        assert saved["powersgd"]["step"] == 3
        assert all("error" not in entry for entry in saved["powersgd"]["parameters"].values())


def test_a_signal_in_the_middle_of_saving_does_not_unbind_the_ranks(fit):
    assert all(fit(_save_while_saving))


def _save_while_saving(root: str) -> bool:
    """While rank 0 writes a checkpoint, SLURM's signal handler saves another, which rank 1 cannot do."""

    class Signalled(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            if not str(path).endswith("hpc_ckpt_1.ckpt"):
                run.save_checkpoint(f"{root}/hpc_ckpt_1.ckpt")

    run = trainer(PowerSGDStrategy(rank=2, checkpoint_io=Signalled()), root=root, max_steps=3)
    run.fit(Classifier(), loader())
    barriers = []
    barrier = DDPStrategy.barrier

    def noting(self, name: str | None = None) -> None:
        barriers.append(name)
        barrier(self, name)

    with (
        mock.patch("lightning_powersgd.strategies.shared.PATIENCE", timedelta(seconds=0.1)),
        mock.patch.object(DDPStrategy, "barrier", noting),
    ):
        run.save_checkpoint(f"{root}/ordinary.ckpt")
    return barriers == ["Trainer.save_checkpoint"]


def _fail_and_save(root: str, everywhere: bool, saver: str = "on_exception") -> dict[str, Tensor]:
    """Fail on both ranks after three steps; save on both, or on rank 0 alone."""

    class Fail(Callback):
        def on_train_batch_end(self, trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise ValueError("failed")

    callback = SAVERS[saver](root)
    run = trainer(root=root, callbacks=[Fail(), callback], enable_checkpointing=True)
    with (
        mock.patch.object(callback, "on_exception") if not everywhere and dist.get_rank() else contextlib.nullcontext(),
        mock.patch("lightning_powersgd.strategies.shared.PATIENCE", timedelta(seconds=120 if everywhere else 0.1)),
        messages() as said,
        pytest.raises(ValueError, match="failed"),
    ):
        run.fit(Classifier(), loader())
    if dist.get_rank() == 0 and saver != "weights":
        assert any("without PowerSGD's error buffers" in message for message in said) != everywhere
    return run.strategy.exchange.state.errors


def test_a_checkpoint_is_written_where_it_is_moved_within_one_filesystem(fit, tmp_path):
    first, second = fit(_note_temporary_files)[0]
    assert first != str(tmp_path / "new"), "the directory was not there yet"
    assert second == str(tmp_path / "new")


def _note_temporary_files(root: str) -> list[str]:
    folders: list[str] = []
    make = tempfile.mkstemp

    def noting(*args: Any, **kwargs: Any) -> tuple[int, str]:
        handle, name = make(*args, **kwargs)
        folders.append(str(Path(name).parent))
        return handle, name

    run = trainer(root=root, max_steps=1)
    run.fit(Classifier(), loader())
    with mock.patch.object(tempfile, "mkstemp", noting):
        run.save_checkpoint(f"{root}/new/a.ckpt")
        run.save_checkpoint(f"{root}/new/a.ckpt")
    return folders


def test_a_frozen_parameter_finds_its_errors_again(fit):
    """Frozen in the middle of a run, saved, resumed while it is still frozen, and unfrozen then."""
    for before, waiting, after in fit(_freeze_and_unfreeze):
        assert before.norm() > 0
        assert torch.equal(before, waiting)
        assert torch.equal(before, after)


def _freeze_and_unfreeze(root: str) -> list[Tensor]:
    seen = []

    class Freeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                seen.append(trainer.strategy.exchange.state.errors["net.0.weight"].clone())
            pl_module.net[0].weight.requires_grad_(trainer.global_step not in range(4, 9))

        def on_before_backward(self, trainer, pl_module, loss) -> None:
            if trainer.global_step == 9:
                seen.append(trainer.strategy.exchange.state.errors["net.0.weight"].clone())

    class FrozenAtFirst(Classifier):
        def on_load_checkpoint(self, checkpoint) -> None:
            self.net[0].weight.requires_grad_(False)

    def run(model: Classifier, steps: int, path: str | None) -> None:
        run = trainer(root=root, max_steps=steps, max_epochs=-1, callbacks=[Freeze()])
        run.fit(model, loader(), ckpt_path=path)
        run.strategy.exchange.average_errors()
        run.save_checkpoint(f"{root}/{steps}.ckpt")

    run(Classifier(), 4, None)
    seen.append(torch.load(f"{root}/4.ckpt", weights_only=True)["powersgd"]["parameters"]["net.0.weight"]["error"])
    run(Classifier(), 6, f"{root}/4.ckpt")
    seen.append(torch.load(f"{root}/6.ckpt", weights_only=True)["powersgd"]["parameters"]["net.0.weight"]["error"])
    run(FrozenAtFirst(), 10, f"{root}/6.ckpt")
    return [seen[0], seen[2], seen[3]]


def test_a_parameter_frozen_in_a_run_is_saved_with_the_mean_error(fit, tmp_path):
    mine, theirs = fit(_freeze_and_save)
    assert not torch.equal(mine, theirs)
    for name, part in (("full", (mine + theirs) / 2), ("without", None)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["powersgd"]["parameters"]["net.0.weight"]
        assert torch.equal(saved["error"], part) if part is not None else "error" not in saved


def _freeze_and_save(root: str) -> Tensor:
    class Freeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                seen.append(trainer.strategy.exchange.state.errors["net.0.weight"].clone())
                pl_module.net[0].weight.requires_grad_(False)

    seen: list[Tensor] = []
    run = trainer(root=root, max_steps=6, max_epochs=-1, callbacks=[Freeze()])
    run.fit(Classifier(), loader())
    run.save_checkpoint(f"{root}/full.ckpt")
    run.strategy.checkpoint_error_feedback = False
    run.save_checkpoint(f"{root}/without.ckpt")
    return seen[0]


# Replicas


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replicas_that_drift_are_found_and_repaired(fit, optimizer):
    for said, agree, momentum, step in fit(_drift, check_replicas_every=4, optimizer=optimizer):
        assert (agree, momentum) == (True, True)
        assert step == 20
        if said is not None:
            assert "After 8 steps the replicas were no longer equal" in said[0]
            assert "'net.2.weight', by" in said[0]
            assert len(said) == 1, "once repaired, they stay equal"


def test_nobody_looks_for_drift_when_told_not_to(fit):
    for said, agree, _, _ in fit(_drift, check_replicas_every=0):
        assert not agree
        assert not said


def _drift(root: str, check_replicas_every: int, optimizer: str = "sgd") -> tuple[list[str] | None, bool, bool, int]:
    class Drift(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 6 and trainer.global_rank == 1:
                pl_module.net[2].weight.data[3, 5] += 1e-4

    model = Classifier(optimizer=optimizer, lr=0.01)
    run = Trainer(
        strategy=PowerSGDStrategy(rank=2, check_replicas_every=check_replicas_every),
        accelerator="cpu",
        devices=2,
        max_steps=20,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Drift()],
        default_root_dir=root,
    )
    with messages() as said:
        run.fit(model, loader())
    mine = [value for state in run.optimizers[0].state.values() for value in state.values() if torch.is_tensor(value)]
    drift = [line for line in said if "no longer equal" in line]
    return drift if dist.get_rank() == 0 else None, replicas_agree(model), gather_equal(mine), run.global_step


def test_a_checkpoint_of_another_shape_is_refused_by_name(two_ranks, tmp_path):
    for text in two_ranks.run_to_errors(_resume_other_shape, str(tmp_path)):
        assert "'net.0.weight' of shape (48, 32)" in text
        assert "(48, 31)" in text


def _resume_other_shape(root: str) -> None:
    run = trainer(root=root, max_epochs=1)
    run.fit(Classifier(), loader())
    state = run.strategy.exchange.state.state_dict()
    other = Classifier()
    other.net[0] = nn.Linear(31, 48)
    PowerSGDState(other.named_parameters(), PowerSGDConfig(rank=2)).load_state_dict(state)


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"`rank=0` is below 1.*mapping"),
        ({"rank": -3}, ValueError, "`rank=-3` is below 1"),
        ({"rank": 1.5}, TypeError, "`rank=1.5` is not an integer"),
        ({"rank": True}, TypeError, "`rank=True` is not an integer"),
        ({"rank": {}}, ValueError, "no pattern"),
        ({"rank": {"a": -1}}, ValueError, r"`rank\['a'\]=-1` is below 0"),
        ({"rank": {3: 1}}, TypeError, "pattern 3"),
        ({"start_step": -1}, ValueError, "`start_step=-1` is below 0"),
        ({"min_compression_ratio": 0.5}, ValueError, "below 1"),
        ({"min_compression_ratio": "2"}, TypeError, "not a number"),
        ({"min_compression_ratio": float("nan")}, ValueError, "below 1"),
        ({"alternate": "yes"}, TypeError, "not a bool"),
        ({"error_dtype": torch.int8}, ValueError, "`error_dtype=torch.int8` is not a floating-point dtype"),
        ({"comm_dtype": "complex64"}, ValueError, "`comm_dtype='complex64'` is not a floating-point dtype"),
        ({"comm_dtype": "no_such"}, ValueError, "`comm_dtype='no_such'`"),
        ({"seed": -1}, ValueError, "`seed=-1`"),
        ({"bucket_cap_mb": 0}, ValueError, "`bucket_cap_mb=0`"),
        ({"check_replicas_every": -1}, ValueError, "`check_replicas_every=-1` is below 0. Use 0 to never"),
        ({"check_replicas_every": 0.5}, TypeError, "`check_replicas_every=0.5` is not an integer"),
        ({"prog_bar": True, "log_metrics": False}, ValueError, "`log_metrics=True`"),
        ({"rnak": 2}, TypeError, "no argument `rnak`. Did you mean `rank`?"),
        ({"ddp_comm_hook": print}, ValueError, "`ddp_comm_hook` cannot be used.*is itself the communication hook"),
        ({"ddp_comm_state": "a state"}, ValueError, "`ddp_comm_state` cannot be used"),
        ({"ddp_comm_wrapper": print}, ValueError, "`ddp_comm_wrapper` cannot be used.*`comm_dtype`"),
        ({"model_averaging_period": 4}, ValueError, "`model_averaging_period` cannot be used"),
        ({"mixed_precision": "a policy"}, ValueError, "`mixed_precision` cannot be used"),
        ({"skip_all_reduce_unused_params": True}, ValueError, "`skip_all_reduce_unused_params` cannot be used"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(kwargs, error, message):
    with pytest.raises(error, match=message):
        PowerSGDStrategy(**{"rank": 2, **kwargs})


def test_every_argument_of_ddp_is_accepted_and_arrives():
    strategy = PowerSGDStrategy(rank=2, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=1)
    assert strategy._ddp_kwargs == {
        "broadcast_buffers": False,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 1,
        "find_unused_parameters": False,
        "static_graph": False,
    }


BAD_FITS = {
    "a pattern without a match": "`rank` has the pattern 'decoder.*', which matches no parameter",
    "a parameter without values": "'extra.weight' is on the meta device",
    "ranks that disagree": "The ranks disagree on the argument `rank`: rank 0 has 1, rank 1 has 2",
    "ranks with other buckets": "The ranks disagree on the argument `bucket_cap_mb`: rank 0 has 25, rank 1 has 1",
    "ranks with and without compiled code": "LIGHTNING_POWERSGD_NATIVE=0 is PyTorch's everywhere): rank 0 has compiled"
    " code, rank 1 has PyTorch's operations",
    "ranks with other shapes": "The ranks disagree on the parameter 'net.0.weight'",
    "ranks with other versions": "The ranks disagree on the version of lightning_powersgd: rank 0 has 0, rank 1 has 1",
    "ranks with other versions of torch": "The ranks disagree on the version of torch: rank 0 has 0, rank 1 has 1",
    "a sparse embedding": "`sparse=True`",
}


@pytest.mark.parametrize("case", BAD_FITS)
def test_bad_models_are_refused_on_every_rank_before_training(two_ranks, tmp_path, case):
    for text in two_ranks.run_to_errors(_bad_fit, str(tmp_path), case):
        assert BAD_FITS[case] in text
        assert "training_step" not in text


def _bad_fit(root: str, case: str) -> None:
    model, strategy = Classifier(), PowerSGDStrategy(rank=2)
    if case == "a pattern without a match":
        strategy = PowerSGDStrategy(rank={"decoder.*": 4, "*": 2})
    elif case == "a parameter without values":
        model.extra = nn.Linear(8, 8, device="meta")
    elif case == "ranks that disagree":
        strategy = PowerSGDStrategy(rank=1 + dist.get_rank())
    elif case == "ranks with other buckets":
        strategy = PowerSGDStrategy(bucket_cap_mb=1 if dist.get_rank() else 25)
    elif case == "ranks with and without compiled code":
        with mock.patch.object(native, "library", return_value=not dist.get_rank()):
            trainer(strategy, root=root, max_steps=1).fit(model, loader())
    elif case == "ranks with other shapes":
        model.net[0] = nn.Linear(32 + dist.get_rank(), 48)
    elif case == "ranks with other versions":
        with mock.patch("lightning_powersgd.strategies.equal_ranks.__version__", str(dist.get_rank())):
            trainer(strategy, root=root, max_steps=1).fit(model, loader())
    elif case == "ranks with other versions of torch":
        with mock.patch.object(torch, "__version__", str(dist.get_rank())):
            trainer(strategy, root=root, max_steps=1).fit(model, loader())
    elif case == "a sparse embedding":
        model.extra = nn.Embedding(8, 8, sparse=True)
    trainer(strategy, root=root, max_steps=1).fit(model, loader())


def test_a_model_that_cannot_be_compressed_warns(fit):
    assert any("compresses none of the 6 trainable parameters" in message for message in fit(_warnings)[0])


def _warnings(root: str) -> list[str]:
    # Warnings alone: `messages` would take an info line for one.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(root, PowerSGDStrategy(rank=2, min_compression_ratio=1000.0), max_steps=1)
    return [str(warning.message) for warning in caught]
