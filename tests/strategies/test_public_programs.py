"""Tier three: programs of the kinds that public reports are about, with plain DDP and with PowerSGD on two ranks.

Each comes to about the loss that plain DDP comes to, replicas agree, and nobody is warned of anything.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from models import Classifier, loader, messages, trainer
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_powersgd import PowerSGDStrategy


class Program(LightningModule):
    """A net on data that can be learnt, and what a program does with both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = self.make()
        self.losses: list[float] = []

    def make(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.loss(*batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class SkipsBatches(Program):
    """Returns -1 from `on_train_batch_start` (Lightning issue 20045)."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 7 else None


class NothingToLearnOnOneRank(Program):
    """A loss of zero that still depends on all parameters (Lightning issue 12190)."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        nothing = self.global_rank == 1 and self.global_step % 5 == 0
        return sum(p.sum() * 0.0 for p in self.parameters()) if nothing else super().loss(x, y)


class Manual(Program):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.backward_of(self.losses_of(batch))
        optimizer.step()

    def losses_of(self, batch: list[Tensor]) -> Tensor:
        loss = self.loss(*batch)
        self.losses.append(float(loss.detach()))
        return loss

    def backward_of(self, loss: Tensor) -> None:
        self.manual_backward(loss)


class Truncated(Manual):
    """An LSTM whose hidden state goes from batch to batch, detached."""

    def make(self) -> nn.Module:
        return nn.ModuleDict({"lstm": nn.LSTM(8, 32, batch_first=True), "out": nn.Linear(32, 10)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = getattr(self, "hidden", None)
        outputs, hidden = self.net["lstm"](x.view(len(x), 4, 8), hidden if len(self.losses) % 4 else None)
        self.hidden = tuple(state.detach() for state in hidden)
        return self.net["out"](outputs[:, -1])


class CalledTwice(Program):
    """One net with batch normalisation sees two views in one forward pass (PyTorch issues 22095 and 65907)."""

    def make(self) -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y) + 0.1 * F.mse_loss(self(x * 1.1), self(x * 0.9))


class Checkpointed(Program):
    """Activations are computed again in the backward pass, of one layer twice (PyTorch pull request 69060)."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        first = checkpoint(self.net[:4], x, use_reentrant=self.reentrant)
        return self.net[4](first)


class Reentrant(Checkpointed):
    """The older kind (DALLE2-pytorch issue 225); in LoRA-style models, too (Accelerate issue 3536)."""

    reentrant = True


class Frozen(Program):
    """A low-rank adapter of frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.net[4].requires_grad_(True)
        self.down, self.up = nn.Linear(32, 4, bias=False), nn.Linear(4, 48, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net[1:](self.net[0](x) + self.up(self.down(x)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class TakesTurns(Program):
    """Trains the first half, then the second (anemoi-training issue 205)."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch % 2 == 0)
        self.net[4].requires_grad_(self.current_epoch % 2 == 1 or self.current_epoch == 0)


class LogsGradients(Program):
    """Looks at gradients after the backward pass (Lightning issue 3657)."""

    def on_after_backward(self) -> None:
        for name, parameter in self.named_parameters():
            self.log(f"norm/{name}", parameter.grad.norm())


class Jacobian(Program):
    """A penalty on the Jacobian by `torch.func` (PyTorch issue 130932)."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        tangent = torch.ones_like(x) / 32
        scores, slope = torch.func.jvp(self.net, (x,), (tangent,))
        return F.cross_entropy(scores, y) + 0.01 * slope.square().mean()


class Forces(Program):
    """A gradient with respect to the input is part of the loss, as forces of a potential or a gradient penalty are."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        scores = self(x)
        (slope,) = torch.autograd.grad(scores.logsumexp(1).sum(), x, create_graph=True)
        return F.cross_entropy(scores, y) + 0.01 * slope.square().sum(dim=1).mean()


class Contrastive(Program):
    """Features of all ranks, with their gradients (solo-learn issue 258)."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        features = F.normalize(self(x), dim=1)
        everyone = self.all_gather(features, sync_grads=True).flatten(0, 1)
        labels = self.all_gather(y).flatten()
        same = (y[:, None] == labels[None]).float()
        return F.binary_cross_entropy_with_logits(5 * features @ everyone.t(), same)


class Teacher(Program):
    """A slow copy of the net, without gradients, is a target."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + 0.1 * F.mse_loss(self(x), self.teacher(x))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.05)


class Noisy(Program):
    """Adds the same noise to the gradients of all ranks."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        generator = torch.Generator().manual_seed(self.global_step)
        for parameter in self.parameters():
            parameter.grad += 1e-3 * torch.randn(parameter.shape, generator=generator)


class AddsAGroup(Program):
    """Unfreezes a layer and hands it to the optimizer in the middle of training."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.trainer.optimizers[0].add_param_group({"params": self.net[0].parameters(), "lr": 0.01})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.net[0].requires_grad_(False)
        return torch.optim.SGD(self.net[2:].parameters(), lr=0.05, momentum=0.9)


class Dropped(Program):
    """Layers that are left out at random, on each rank others."""

    def make(self) -> nn.Module:
        return nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)])

    def forward(self, x: Tensor) -> Tensor:
        draw = torch.rand(2, generator=torch.Generator().manual_seed(self.global_step * 2 + self.global_rank))
        for layer, chance in zip(self.net[:2], draw, strict=True):
            x = x + F.relu(layer(x)) if chance > 0.3 else x
        return self.net[2](x)


def normed(parametrization: Any) -> type[Program]:
    class Normed(Program):
        def make(self) -> nn.Module:
            net = super().make()
            net[2] = parametrization(net[2])
            return net

    return Normed


class Plateau(Program):
    """A scheduler that looks at a metric."""

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


class FusedAdamW(Program):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Sharded(Program):
    """Each rank keeps the optimizer states of a part of the parameters."""

    def configure_optimizers(self) -> Any:
        # Not above: importing it warns, and is only done on the ranks.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=0.01)


class Attention(Program):
    def make(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Unflatten(1, (2, 16)), layer, nn.Flatten(), nn.Linear(32, 10))


class Convolutions(Program):
    """Depthwise and transposed convolutions."""

    def make(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (32, 1, 1)),
            nn.ConvTranspose2d(32, 16, 3),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 10),
        )


class TwoLosses(Manual):
    """Two losses of one graph, each with a backward pass of its own; the second synchronises."""

    def backward_of(self, loss: Tensor) -> None:
        with self.trainer.strategy.block_backward_sync():
            self.manual_backward(0.5 * loss, retain_graph=True)
        self.manual_backward(0.5 * loss)


class Backbone(Program):
    """Lightning's callback for fine-tuning (Lightning issue 20340)."""

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


STATIC = {"static_graph": True}
UNUSED = {"find_unused_parameters": True}
PROGRAMS: list[Any] = [
    pytest.param(program, settings, kwargs, id=program.__name__ + "".join(f" {key}" for key in {**settings, **kwargs}))
    for program, settings, kwargs in [
        (SkipsBatches, {}, {}),
        (NothingToLearnOnOneRank, {}, {}),
        (Manual, {}, {}),
        (Truncated, {}, {}),
        (CalledTwice, {"broadcast_buffers": False}, {}),
        (Checkpointed, {}, {}),
        (Checkpointed, STATIC, {}),
        (Reentrant, STATIC, {}),
        (Frozen, {}, {}),
        (LogsGradients, {}, {}),
        (Jacobian, {}, {}),
        (Forces, {}, {}),
        (Contrastive, {}, {}),
        (Teacher, {}, {}),
        (Noisy, {}, {}),
        (Dropped, UNUSED, {}),
        # Its gradient is a triangle, which no product of low rank comes near.
        (normed(orthogonal), {"rank": {"*original*": 0, "*": 4}}, {}),
        (normed(spectral_norm), {}, {}),
        (normed(weight_norm), {}, {}),
        (Plateau, {}, {}),
        (FusedAdamW, {}, {}),
        (Sharded, {}, {}),
        (Attention, {}, {}),
        (Convolutions, {}, {}),
        (TwoLosses, {}, {}),
        (Program, {}, {"detect_anomaly": True}),
        (Program, {}, {"precision": "bf16-true"}),
        (
            Program,
            {**STATIC, "gradient_as_bucket_view": True},
            {"precision": "16-mixed", "gradient_clip_val": 1.0},
        ),
        (Program, {}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
    ]
]


@pytest.mark.parametrize("index", range(len(PROGRAMS)), ids=[param.id for param in PROGRAMS])
def test_a_program_comes_to_what_it_comes_to_with_plain_ddp(fit, index):
    for first, plain, ours, said in fit(_compare, index, alternate=bool(index % 2)):
        assert ours < first - 0.6 * (first - plain), f"from {first}: plain DDP came to {plain}, PowerSGD to {ours}"
        assert not said


def _compare(root: str, index: int, alternate: bool) -> tuple[float, float, float, list[str]]:
    program, settings, kwargs = PROGRAMS[index].values
    plain, ours = program(), program()
    ddp = {name: value for name, value in settings.items() if name != "rank"}
    _train(plain, DDPStrategy(**ddp), root, kwargs)
    strategy = PowerSGDStrategy(**{"rank": 4, **settings}, min_compression_ratio=1.2, alternate=alternate)
    said = _train(ours, strategy, root, kwargs)
    start = sum(plain.losses[:5]) / 5
    return start, sum(plain.losses[-10:]) / 10, sum(ours.losses[-10:]) / 10, said


def _train(module: Program, strategy: Any, root: str, kwargs: dict[str, Any]) -> list[str]:
    with messages() as said:
        trainer(strategy, root=root, max_epochs=10, **kwargs).fit(module, loader())
    return [text for text in said if "PowerSGD" in text and "PowerSGD compresses" not in text]


@pytest.mark.parametrize(
    ("program", "callback"), [(TakesTurns, None), (AddsAGroup, None), (Backbone, BackboneFinetuning)]
)
def test_what_plain_ddp_does_not_notice_is_followed(fit, program, callback):
    for first, last in fit(_follow, program, callback):
        assert last < 0.8 * first


def _follow(root: str, program: type[Program], callback: Any) -> tuple[float, float]:
    module = program()
    callbacks = [callback(unfreeze_backbone_at_epoch=2, verbose=False)] if callback else []
    trainer(PowerSGDStrategy(rank=2), root=root, max_epochs=8, callbacks=callbacks).fit(module, loader())
    return sum(module.losses[:5]) / 5, sum(module.losses[-10:]) / 10


def test_accumulation_that_changes_during_the_fit(fit):
    for first, last in fit(_schedule):
        assert last < 0.8 * first


def _schedule(root: str) -> tuple[float, float]:
    module = Program()
    callbacks = [GradientAccumulationScheduler({0: 3, 4: 1})]
    trainer(PowerSGDStrategy(rank=2), root=root, max_epochs=8, callbacks=callbacks).fit(module, loader())
    return sum(module.losses[:5]) / 5, sum(module.losses[-10:]) / 10


def test_three_fits_in_one_process_are_alike(fit):
    for first, second, third in fit(_three_fits):
        assert first == second == third


def _three_fits(root: str) -> list[list[float]]:
    found = []
    for _ in range(3):
        module = Program()
        with contextlib.suppress(ValueError):
            trainer(PowerSGDStrategy(rank=2), root=root, max_epochs=1).fit(module, loader(shuffle=False))
        found.append(module.losses)
    return found


class Averaged(Callback):
    """A moving average of the weights that is in checkpoints, as callbacks of this kind are."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for name, parameter in pl_module.named_parameters():
            self.average.setdefault(name, parameter.detach().clone()).lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


def test_an_average_over_time_resumes(fit, tmp_path):
    for uninterrupted, resumed in fit(_average_over_time, str(tmp_path / "half.ckpt")):
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def _average_over_time(root: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    averages = []
    for resume in (False, True):
        average = Averaged()
        callbacks = [average, Save()] if not resume else [average]
        run = trainer(PowerSGDStrategy(rank=2), root=root, max_epochs=4, callbacks=callbacks)
        run.fit(Classifier(), loader(shuffle=False), ckpt_path=path if resume else None)
        averages.append(average.average)
    return averages[0], averages[1]


def test_sharded_optimizer_states_resume(fit, tmp_path):
    for uninterrupted, resumed in fit(_resume_sharded, str(tmp_path / "half.ckpt")):
        assert resumed == uninterrupted


def _resume_sharded(root: str, path: str) -> tuple[list[float], list[float]]:
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    whole, rest = Sharded(), Sharded()
    for module, callbacks, start in ((whole, [Save()], None), (rest, [], path)):
        run = trainer(PowerSGDStrategy(rank=2), root=root, max_epochs=4, callbacks=callbacks)
        run.fit(module, loader(shuffle=False), ckpt_path=start)
    return whole.losses[-len(rest.losses) :], rest.losses
