"""Tier three: programs from public reports that behave under PowerSGD as under plain DDP, or are told why not."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from models import Classifier, loader, messages, trainer
from torch import Tensor, nn

from lightning_powersgd import PowerSGDStrategy
from lightning_powersgd.exchange import presence

OURS = [pytest.param({}, id="full"), pytest.param({"alternate": True}, id="alternating")]


def run(root: str, config: dict[str, Any] | None, module: LightningModule, steps: int = 40, **kwargs: Any):
    """Fit a module with PowerSGD, or with plain DDP where there is no config; give the trainer, and what was said."""
    strategy = "ddp" if config is None else PowerSGDStrategy(rank=2, **config)
    with messages() as said:
        fitted = trainer(strategy, root=root, max_epochs=-1, max_steps=steps, **kwargs)
        fitted.fit(module, loader())
    return fitted, said


class Noted(Classifier):
    """Keeps its last loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.loss = float(loss.detach())
        return loss


class OwnScaler(Classifier):
    """Scales its loss itself. The scale drops in the middle of training."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.place, self.norms, self.steps = place, [], 0
        if place == "attribute":
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def on_train_start(self) -> None:
        if self.place == "when training starts":
            self.tools = {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**16)}

    @property
    def own_scaler(self) -> torch.amp.GradScaler:
        if self.place == "in the first step" and not hasattr(self, "late"):
            self.late = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        kept = {"attribute": "scaler", "in the first step": "late"}
        if self.place == "argument":
            return self.trainer.strategy.scaler
        return self.tools["scaler"] if self.place == "when training starts" else getattr(self, kept[self.place])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer, scaler = self.optimizers(), self.own_scaler
        if self.steps == 20:
            scaler.update(2.0**8)
        self.steps += 1
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(scaler.scale(loss))
        scaler.unscale_(optimizer.optimizer)
        self.norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), 1e9)))
        scaler.step(optimizer)
        scaler.update(float(scaler.get_scale()))
        optimizer.zero_grad()


@pytest.mark.parametrize("config", OURS)
@pytest.mark.parametrize("place", ["attribute", "argument", "when training starts", "in the first step"])
def test_errors_follow_a_scaler_of_the_programs_own(fit, place, config):
    for norms in fit(_scale_own, place, config):
        # The scale drops by 256. Errors that did not follow it would be as many times too large.
        assert max(norms[20:]) < 5 * max(norms[:20])


def _scale_own(root: str, place: str, config: dict[str, Any]) -> list[float]:
    module = OwnScaler(place)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16) if place == "argument" else None
    _, said = run(root, {**config, "scaler": scaler}, module)
    assert not any("several loss scalers" in text for text in said)
    return module.norms


def test_two_scalers_are_warned_of(fit):
    said, _ = fit(_scale_twice)
    texts = [text for text in said if "several loss scalers" in text]
    assert texts
    assert all("scaler, other" in text for text in texts)


def _scale_twice(root: str) -> list[str]:
    module = OwnScaler("attribute")
    module.other = torch.amp.GradScaler("cpu")
    return run(root, {}, module, steps=3)[1]


class NotFinite(Noted):
    """A parameter's gradient is NaN in every step, which the program cleans, or no optimizer minds."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.spoilt, self.held = nn.Parameter(torch.ones(3)), held
        self.spoilt.register_hook(lambda gradient: gradient * torch.nan)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.spoilt.sum()

    def on_after_backward(self) -> None:
        if self.held:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters() if self.held else self.net.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("config", OURS)
@pytest.mark.parametrize("held", [True, False], ids=["cleaned", "of no optimizer"])
def test_a_gradient_that_is_not_finite_spoils_only_itself(fit, held, config):
    for spoilt, sound in fit(_spoil, held, config):
        assert spoilt == sound


def _spoil(root: str, held: bool, config: dict[str, Any]) -> tuple[float, float]:
    spoilt, sound = NotFinite(held), Noted()
    for module in (spoilt, sound):
        run(root, config, module)
    return spoilt.loss, sound.loss


class SaveAlone(Callback):
    """Rank 0 saves in the middle of training, without the others."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 5 and trainer.is_global_zero:
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), self.path)
        if trainer.global_step == 7 and trainer.is_global_zero:
            trainer.save_checkpoint(self.path.with_suffix(".again"))


@pytest.mark.parametrize("strategy", ["powersgd", "powergossip"])
def test_a_file_that_rank_0_saves_alone_is_written(fit, tmp_path, strategy):
    said, _ = fit(_save_alone, strategy, tmp_path / "alone.ckpt")
    assert sum("Save on all ranks" in text for text in said) == (2 if strategy == "powersgd" else 3)
    assert {path.name for path in tmp_path.glob("alone*")} == {"alone.ckpt", "alone.again", "alone.after"}
    if strategy == "powersgd":
        assert has_errors(tmp_path / "alone.after")
        assert not has_errors(tmp_path / "alone.ckpt")
        assert not has_errors(tmp_path / "alone.again")


def has_errors(path: Path) -> bool:
    entries = torch.load(path, weights_only=True)["powersgd"]["parameters"].values()
    return all("error" in entry for entry in entries)


def _save_alone(root: str, strategy: str, path: Path) -> list[str]:
    presence.Attendance._FIRST = presence.Attendance._ONCE_LOST
    with messages() as said:
        alike, callbacks = strategy == "powersgd", [SaveAlone(path)]
        fitted = trainer(strategy, root=root, max_steps=10, max_epochs=-1, callbacks=callbacks, alike=alike)
        fitted.fit(Classifier(), loader())
        if fitted.is_global_zero:
            fitted.strategy.save_checkpoint(fitted._checkpoint_connector.dump_checkpoint(), path.with_suffix(".after"))
    return said


class Relaid(LightningModule):
    """Changes how a parameter lies in memory, or its dtype."""

    def __init__(self, change: str, when: str = "between steps") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.when, self.losses = change, when, []
        self.net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 10))

    def on_train_start(self) -> None:
        if self.change == "channels_last":
            self.to(memory_format=torch.channels_last)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5 and self.when == "between steps":
            self.relay()

    def relay(self) -> None:
        weight = self.net[4].weight
        if self.change == "by columns":
            weight.data = weight.data.t().contiguous().t()
        if self.change == "with gaps":
            weight.data = weight.data.repeat_interleave(2, dim=1)[:, ::2]
        if self.change == "float64":
            self.to(torch.float64)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 5 and self.when == "in a step":
            self.relay()
        x = batch[0].repeat(1, 16).view(-1, 8, 8, 8).to(self.net[4].weight.dtype)
        loss = F.cross_entropy(self.net(x), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("config", OURS)
@pytest.mark.parametrize("change", ["channels_last", "by columns", "with gaps", "float64"])
def test_another_layout_or_dtype_is_followed(fit, change, config):
    for losses, unchanged in fit(_relay, change, config):
        # The same run, but for rounding; with gaps, the matrix is sent whole from then on.
        tolerance = 0.1 if change == "with gaps" else 1e-3
        assert losses == pytest.approx(unchanged, abs=tolerance)


def _relay(root: str, change: str, config: dict[str, Any]) -> tuple[list[float], list[float]]:
    relaid, unchanged = Relaid(change), Relaid("none")
    for module in (relaid, unchanged):
        run(root, config, module, steps=12)
    return relaid.losses, unchanged.losses


@pytest.mark.parametrize("change", ["by columns", "float64"])
def test_a_change_in_the_middle_of_a_step_does_not_part_the_replicas(fit, change):
    # Plain DDP no longer averages a parameter whose dtype has changed.
    assert all(fit(_relay_in_a_step, change))


def _relay_in_a_step(root: str, change: str) -> bool:
    module = Relaid(change, "in a step")
    run(root, {}, module, steps=12)  # which compares the replicas in the end
    return torch.tensor(module.losses).isfinite().all()


class Padded(LightningModule):
    """An embedding whose row for padding is zero, and stays so under plain DDP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(200, 64, padding_idx=0), nn.Linear(64, 10)
        with torch.no_grad():
            self.out.weight[:, 5] = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch_idx * 7 + self.global_rank)
        tokens = torch.randint(0, 200, (16, 8), generator=generator)
        features = self.embedding(tokens).mean(dim=1) * (torch.arange(64) != 5)
        return F.cross_entropy(self.out(features), tokens[:, 1] % 10)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("more", [{"rank": 1}, {"rank": 2}, {"rank": 4}, {"warm_start": False}], ids=str)
@pytest.mark.parametrize("config", OURS)
def test_rows_and_columns_without_gradients_stay_exactly_as_they_were(fit, config, more):
    for row, column in fit(_pad, {**config, **more}):
        assert row == column == 0


def _pad(root: str, config: dict[str, Any]) -> tuple[float, float]:
    module = Padded()
    trainer(PowerSGDStrategy(**{"rank": 2, **config}), root=root, max_epochs=-1, max_steps=30).fit(module, loader())
    return float(module.embedding.weight[0].abs().max()), float(module.out.weight[:, 5].abs().max())


class Masked(Noted):
    """Prunes elements of a weight by a hook on its gradient."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.net[0].weight
        self.mask, self.before = torch.arange(weight.numel()).view_as(weight) % 3 > 0, weight.detach().clone()
        weight.register_hook(lambda gradient: gradient * self.mask)

    @property
    def moved(self) -> float:
        return float(((self.net[0].weight - self.before) * ~self.mask).abs().max())


def test_a_mask_by_a_hook_is_warned_of_once_and_the_remedy_works(fit):
    (said, moved, quiet, remedied), _ = fit(_mask)
    (text,) = [text for text in said if "register_hook" in text]
    assert "rank={'net.0.weight': 0, '*': 2}" in text
    assert moved > 0
    assert not any("register_hook" in text for text in quiet)
    assert remedied == 0


def _mask(root: str) -> tuple[list[str], float, list[str], float]:
    masked, remedied = Masked(), Masked()
    _, said = run(root, {}, masked)
    with messages() as quiet:
        strategy = PowerSGDStrategy(rank={"net.0.weight": 0, "*": 2})
        trainer(strategy, root=root, max_epochs=-1, max_steps=40).fit(remedied, loader())
    return said, masked.moved, quiet, remedied.moved


class Flipping(Noted):
    """Freezes and unfreezes a layer in turn."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[2].requires_grad_(batch_idx % 2 == 0)


def test_a_layer_frozen_and_unfrozen_in_turn_sends_no_more_than_its_gradients(fit):
    for largest, sent, counted in fit(_flip):
        assert largest < 4000, "no dense all-reduce"
        assert sent - counted <= 40 * 16, "nothing but a checksum at each flip is left uncounted"


def _flip(root: str) -> tuple[int, int, int]:
    from ranks import counted_all_reduce

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            self.counting = counted_all_reduce()
            self.sent = self.counting.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == trainer.max_steps:
                self.counted = trainer.strategy.exchange.state.total_sent_bytes
                self.counting.__exit__(None, None, None)

    watch = Watch()
    run(root, {"log_metrics": False, "check_replicas_every": 0}, Flipping(), callbacks=[watch])
    return max(watch.sent), sum(watch.sent), watch.counted


class ManyGradients(Noted):
    """Asks for several gradients a step, of the same batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = (tensor[self.global_rank :: 2] for tensor in loader(shuffle=False).dataset.tensors)
        return super().training_step([x, y], batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.2)


@pytest.mark.parametrize("config", OURS)
def test_lbfgs_gets_exact_gradients_and_that_is_said(fit, config):
    (plain, ours, said), other = fit(_ask_often, config)
    assert ours == plain
    assert other[0] == other[1]
    assert sum("LBFGS" in text for text in said) == 1


def _ask_often(root: str, config: dict[str, Any]) -> tuple[float, float, list[str]]:
    plain, ours = ManyGradients(), ManyGradients()
    run(root, None, plain, steps=5)
    _, said = run(root, config, ours, steps=5)
    return plain.loss, ours.loss, said


class Muon(torch.optim.SGD):
    """A namesake of an optimizer that newer versions of PyTorch have."""


class Orthonormalising(Noted):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Muon(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("rank", "warns"), [(2, True), (39, False)])
def test_muon_is_warned_of_at_a_low_rank(fit, rank, warns):
    said, _ = fit(_orthonormalise, rank)
    assert any("Muon" in text for text in said) == warns


def _orthonormalise(root: str, rank: int) -> list[str]:
    with messages() as said:
        strategy = PowerSGDStrategy(rank=rank, min_compression_ratio=1)
        trainer(strategy, root=root, max_steps=2, max_epochs=-1).fit(Orthonormalising(), loader())
    return said


class TooFast(Noted):
    """Descends a bowl with a learning rate that an exact gradient allows, and one that comes late does not."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net, self.lr = nn.Linear(64, 64, bias=False), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("loss", 0.0)
        noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(self.global_step))
        return 0.5 * self.net.weight.square().sum() + 0.1 * (noise * self.net.weight).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(("lr", "warns"), [(0.2, 1), (0.01, 0)])
def test_errors_that_grow_without_end_are_warned_of_once(fit, lr, warns):
    said, _ = fit(_grow, lr)
    texts = [text for text in said if "still grow" in text]
    assert len(texts) == warns
    assert all("Lower the learning rate, or raise `rank`" in text for text in texts)


def _grow(root: str, lr: float) -> list[str]:
    with messages() as said:
        strategy = PowerSGDStrategy(rank=1)
        trainer(strategy, root=root, max_steps=500, max_epochs=-1, log_every_n_steps=10).fit(TooFast(lr), loader())
    return said


class SharpnessAware(Classifier):
    """Two passes a step and one optimizer: the gradients of the first are not for it."""

    def __init__(self, advised: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.advised = False, advised

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        optimizer, parameters = self.optimizers(), list(self.parameters())
        if self.advised:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(F.cross_entropy(self(x), y))
        else:
            self.manual_backward(F.cross_entropy(self(x), y))
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            length = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
            for parameter in parameters:
                parameter.add_(parameter.grad * 0.05 / length)
        optimizer.zero_grad()
        loss = F.cross_entropy(self(x), y)
        self.manual_backward(loss)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        optimizer.step()
        optimizer.zero_grad()
        self.loss = float(loss.detach())


def test_sharpness_aware_minimisation_gets_its_own_advice_which_works(fit):
    plain, _ = fit(_sharpen, None, True)[0]
    _, said = fit(_sharpen, {}, False)[0]
    advised, quiet = fit(_sharpen, {}, True)[0]
    assert any("block_backward_sync" in text for text in said)
    assert not any("toggle_optimizer" in text for text in said)
    assert not any("thrown" in text for text in quiet)
    assert advised == pytest.approx(plain, abs=0.3)


def _sharpen(root: str, config: dict[str, Any] | None, advised: bool) -> tuple[float, list[str]]:
    module = SharpnessAware(advised)
    _, said = run(root, config, module, steps=60)
    return module.loss, said


class Lazy(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(10))


class OtherOrder(Classifier):
    """Registers two layers of equal shape in another order on rank 1."""

    def configure_model(self) -> None:
        names = ["first", "second"] if self.global_rank == 0 else ["second", "first"]
        for name in names:
            self.register_module(name, nn.Linear(40, 40))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Lazy, ["'net.0.weight'", "lazy module", "configure_model"]),
        (OtherOrder, ["The ranks disagree on the order", "'first.weight'", "'second.weight'"]),
    ],
)
def test_what_plain_ddp_refuses_or_confuses_is_refused_by_name(two_ranks, tmp_path, module, words):
    for error in two_ranks.run_to_errors(_fit_bad, str(tmp_path), module):
        assert all(word in error for word in words), error


def _fit_bad(root: str, module: type[LightningModule]) -> None:
    trainer(root=root).fit(module(), loader())


def test_a_strategy_is_copied_after_a_fit(fit):
    assert fit(_copy) == [True, True]


def _copy(root: str) -> bool:
    fitted, _ = run(root, {}, Classifier(), steps=3)
    copied = copy.deepcopy(fitted.strategy)
    return copied.exchange.state.step == 3 and copied.config == fitted.strategy.config


def test_the_time_to_wait_is_short_where_nothing_is_to_be_saved_together(fit, tmp_path):
    for seconds in fit(_save_weights_alone, str(tmp_path / "weights.ckpt")):
        assert seconds < presence.Attendance._FIRST.total_seconds() / 2


def _save_weights_alone(root: str, path: str) -> float:
    started = time.monotonic()

    class SaveWeights(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 3 and trainer.is_global_zero:
                weights = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
                trainer.strategy.save_checkpoint(weights, path)

    run(root, {}, Classifier(), steps=5, callbacks=[SaveWeights()])
    return time.monotonic() - started
