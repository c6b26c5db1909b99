"""Tiers two and three: loss scales, narrow dtypes and steps that are not finite, on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from models import Classifier, learnable, loader, norm, replicas_agree, trainer
from nets import attach, gradients, like_an_accelerator, make_batches, make_net
from ranks import gather_equal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_powersgd import PowerSGDStrategy

ALTERNATE = pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])


class AsksTheDevice(TorchDispatchMode):
    """Notes every operation that gives a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# Loss scale


@pytest.mark.lost_by_pytorchs_hook("the loss scale falls: gradients jump 54-fold")
@ALTERNATE
@pytest.mark.parametrize("accelerator", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "config",
    [{}, {"error_dtype": "bfloat16"}, {"comm_dtype": "float16"}, {"comm_dtype": "int8"}, {"rank": 1}],
    ids=str,
)
def test_a_changed_loss_scale_changes_nothing(two_ranks, config, accelerator, alternate):
    """From 2^16 to 2^8 and back: powers of two, so that even the rounding is the same."""
    results = two_ranks.run(_unscaled_gradients, accelerator, alternate=alternate, **config)
    for constant, changing in results:
        assert len(constant) == len(changing) == 12
        for step, (a, b) in enumerate(zip(constant, changing, strict=True)):
            assert all(torch.equal(a[name], b[name]) for name in a), step


def _unscaled_gradients(accelerator: bool, **config: Any) -> list[list[dict[str, Tensor]]]:
    runs = []
    for scales in ([2.0**16] * 12, [2.0**16] * 4 + [2.0**8] * 4 + [2.0**16] * 4):
        scaler = torch.amp.GradScaler("cpu")
        run = []
        with like_an_accelerator(accelerator):
            model, _ = attach(make_net(), scaler=scaler, **config)
            for scale, (x, y) in zip(scales, make_batches(12), strict=True):
                scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
                model.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                run.append({name: g / scale for name, g in gradients(model.module).items()})
        runs.append(run)
    return runs


def test_errors_that_are_too_large_for_float16_stay_finite(two_ranks):
    for finite in two_ranks.run(_scaled_errors_in_half):
        assert finite == [True] * 6


def _scaled_errors_in_half() -> list[bool]:
    scaler = torch.amp.GradScaler("cpu")
    model, exchange = attach(make_net(), scaler=scaler, error_dtype="float16")
    finite = []
    for step, (x, y) in enumerate(make_batches(6)):
        model.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y) * (1e3 if step < 3 else 1)).backward()
        finite.append(all(t.isfinite().all() for t in (*gradients(model).values(), *exchange.state.errors.values())))
    return finite


# float16 on the wire


@pytest.mark.lost_by_pytorchs_hook("small gradients in float16: NaN")
@ALTERNATE
@pytest.mark.parametrize(
    "sizes",
    [[1e-6] * 10, [1.0] * 10, [1e4] * 10, [1.0] * 4 + [1e6] * 6 + [1e-6] * 10],
    ids=["small", "ordinary", "large", "jumping"],
)
def test_float16_factors_survive_gradients_of_any_size(two_ranks, sizes, alternate):
    for lost in two_ranks.run(_lost_in_half_precision, sizes, alternate):
        assert lost < 1e-3, "the sum over ranks rounds by 2^-12 each time"


def _lost_in_half_precision(sizes: list[float], alternate: bool) -> float:
    """Compare all gradients that came in with those that went out and what the errors still hold."""
    model, exchange = attach(make_net(), comm_dtype="float16", alternate=alternate)
    local = make_net()
    came_in: dict[str, Tensor] = {}
    went_out: dict[str, Tensor] = {}
    for size, (x, y) in zip(sizes, make_batches(len(sizes)), strict=True):
        for net in (model, local):
            net.zero_grad()
            (F.cross_entropy(net(x), y) * size).backward()
        for name in exchange.state.errors:
            grad = model.module.get_parameter(name).grad
            assert grad.isfinite().all()
            came_in[name] = came_in.get(name, 0) + local.get_parameter(name).grad.double()
            went_out[name] = went_out.get(name, 0) + grad.double()
    exchange.average_errors()
    for total in came_in.values():
        dist.all_reduce(total)
    return max(
        _deviation(went_out[name] + error.double(), came_in[name] / 2) for name, error in exchange.state.errors.items()
    )


def _deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_float16_parameters(two_ranks, size):
    for finite, lost in two_ranks.run(_half_precision_parameters, size):
        assert finite
        assert lost < 0.02


def _half_precision_parameters(size: float) -> tuple[bool, float]:
    """Gradients in float16, too, whose products with a factor are beyond its range."""
    model, exchange = attach(nn.Linear(300, 200, bias=False).half())
    generator = torch.Generator().manual_seed(dist.get_rank())
    came_in = went_out = torch.zeros(200, 300, dtype=torch.float64)
    finite = True
    for _ in range(8):
        x, g = torch.randn(300, generator=generator).half(), torch.randn(200, generator=generator).half()
        model.zero_grad()
        (model(x) * g * size).sum().backward()
        grad = model.module.weight.grad
        finite = finite and bool(grad.isfinite().all())
        came_in = came_in + torch.outer((g * size).double(), x.double())
        went_out = went_out + grad.double()
    exchange.average_errors()
    dist.all_reduce(came_in)
    return finite, _deviation(went_out + exchange.state.errors["weight"].double(), came_in / 2)


# Steps that are not finite


@pytest.mark.lost_by_pytorchs_hook("one inf: every later step is not finite")
@ALTERNATE
@pytest.mark.parametrize("accelerator", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    ("value", "everyone", "bad_step"),
    [(float("inf"), False, 0), (float("nan"), True, 3), (float("-inf"), False, 3)],
    ids=["inf on one rank at first", "nan on all ranks", "-inf on one rank"],
)
@pytest.mark.parametrize("name", ["7.weight", "0.weight", "7.bias"], ids=["first bucket", "last bucket", "sent whole"])
def test_a_step_that_is_not_finite_is_seen_by_all_and_remembered_by_none(
    two_ranks, name, value, everyone, bad_step, accelerator, alternate
):
    config = {"alternate": alternate, "min_compression_ratio": 1.0}
    assert all(two_ranks.run(_recovers, name, value, everyone, bad_step, accelerator, **config))


@pytest.mark.parametrize(
    "config",
    [{"comm_dtype": "float16"}, {"comm_dtype": "int4"}, {"error_dtype": "bfloat16"}, {"warm_start": False}],
    ids=str,
)
@pytest.mark.parametrize("accelerator", [False, True], ids=["host", "device"])
def test_other_settings_recover_as_well(two_ranks, config, accelerator):
    assert all(two_ranks.run(_recovers, "3.weight", float("inf"), False, 2, accelerator, **config))


@ALTERNATE
def test_a_step_that_is_not_finite_while_gradients_accumulate(two_ranks, alternate):
    config = {"alternate": alternate, "accumulate": 3}
    assert all(two_ranks.run(_recovers, "3.weight", float("inf"), False, 2, False, **config))


def _recovers(
    name: str, value: float, everyone: bool, bad_step: int, accelerator: bool, accumulate: int = 1, **config: Any
) -> bool:
    """Run six steps; once with a bad one in between. Every step after it must be what it would have been."""
    runs = []
    ours = everyone or dist.get_rank() == dist.get_world_size() - 1
    for with_bad in (False, True):
        # Which would skip such a step.
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        with like_an_accelerator(accelerator):
            model, exchange = attach(make_net(), bucket_cap_mb=0.001, scaler=scaler, **config)
            assert len(exchange.state.plan.groups) > 2
            grads = []

            def step(x: Tensor, y: Tensor, model=model) -> None:
                model.zero_grad()
                for _ in range(accumulate - 1):
                    with model.no_sync():
                        F.cross_entropy(model(x), y).backward()
                F.cross_entropy(model(x), y).backward()

            for index, (x, y) in enumerate(make_batches(6)):
                if with_bad and index == bad_step:
                    handle = model.module.get_parameter(name).register_hook(
                        lambda g: torch.full_like(g, value) if ours else g
                    )
                    step(x, y)
                    handle.remove()
                    assert not model.module.get_parameter(name).grad.isfinite().all(), "this rank did not notice"
                    for compressed in exchange.state.errors:
                        grad = model.module.get_parameter(compressed).grad
                        assert not grad.isfinite().any(), "an optimizer of its own would take this"
                step(x, y)
                grads.append(gradients(model))
        runs.append(grads)
    assert gather_equal([g for grads in runs[1] for g in grads.values()])
    if not config.get("warm_start", True):
        return all(g.isfinite().all() for grads in runs[1] for g in grads.values())
    return all(torch.equal(a[name], b[name]) for a, b in zip(*runs, strict=True) for name in a)


@pytest.mark.lost_by_pytorchs_hook("a device synchronisation in every bucket")
@ALTERNATE
@pytest.mark.parametrize("comm_dtype", [None, "float16", "int8", "int4"])
def test_an_accelerator_is_never_asked_during_a_step(two_ranks, comm_dtype, alternate):
    for on_the_host, on_the_device in two_ranks.run(_count_questions, comm_dtype, alternate):
        assert on_the_device == 0
        assert on_the_host > 0, "the count counts nothing"


def _count_questions(comm_dtype: str | None, alternate: bool) -> list[int]:
    counts = []
    for accelerator in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        with like_an_accelerator(accelerator):
            model, exchange = attach(make_net(), scaler=scaler, comm_dtype=comm_dtype, alternate=alternate)
            for x, y in make_batches(3):
                loss = scaler.scale(F.cross_entropy(model(x), y))
                with AsksTheDevice() as questions:
                    loss.backward()
                # Between two steps, as a GradScaler does.
                exchange.state.encodes  # noqa: B018
        counts.append(questions.asked)
    return counts


# Whole runs


GOOD_STEPS = 500


class Repeats(Classifier):
    """Takes the next batch only when the last one gave finite gradients, and spoils some of them on one rank.

    So a run with overflows makes the same steps as one without.
    """

    def __init__(self, spoiled: set[int]) -> None:
        super().__init__(lr=0.02)
        self.spoiled, self.batch = spoiled, 0
        self.finite: list[bool] = []
        self.scales: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = (data[self.trainer.global_rank :: 2] for data in learnable(seed=self.batch))
        loss = F.cross_entropy(self(x), y)
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())
        rank = batch_idx % 2
        return loss * float("inf") if batch_idx in self.spoiled and rank == self.trainer.global_rank else loss

    def on_before_optimizer_step(self, optimizer) -> None:
        optimizer.param_groups[0]["lr"] = self.lr * (1 - self.batch / GOOD_STEPS)
        finite = all(bool(p.grad.isfinite().all()) for p in self.parameters())
        self.finite.append(finite)
        self.batch += finite
        self.trainer.should_stop = self.batch == GOOD_STEPS


@ALTERNATE
def test_a_hundred_overflows_do_not_change_a_mixed_precision_run(fit, alternate):
    # One of six steps, four to six finite ones between two, in which the loss scale grows back.
    offsets = torch.randint(4, 6, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    spoiled = {6 * index + offset for index, offset in enumerate(offsets)}
    for (clean, *_), (loss, finite, scales, agree) in fit(_overflow, spoiled, alternate):
        assert [index for index, good in enumerate(finite) if not good] == sorted(spoiled)
        assert set(scales) == {2.0**16, 2.0**15}
        assert agree
        assert clean < 0.9, "nothing was learnt"
        assert loss == pytest.approx(clean, rel=0.005)


def _overflow(root: str, spoiled: set[int], alternate: bool) -> list[tuple[float, list[bool], list[float], bool]]:
    return [_mixed_run(root, bad, alternate) for bad in (set(), spoiled)]


def _mixed_run(root: str, spoiled: set[int], alternate: bool) -> tuple[float, list[bool], list[float], bool]:
    model = Repeats(spoiled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=4 if spoiled else 2000)
    run = trainer(
        PowerSGDStrategy(rank=2, alternate=alternate, log_metrics=False),
        root=root,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        max_epochs=1,
    )
    run.fit(model, DataLoader(torch.zeros(2000)))
    assert sum(model.finite) == GOOD_STEPS
    x, y = learnable(seed=-1, samples=2048)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x), y))
    return loss, model.finite, model.scales, replicas_agree(model)


@pytest.mark.parametrize("precision", ["16-true", "bf16-mixed", "bf16-true", "64-true"])
@ALTERNATE
def test_any_precision_learns(fit, precision, alternate):
    for loss, agree, dtype in fit(_learn, precision, alternate):
        assert loss < 1.5
        assert agree
        assert dtype == {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
            precision, torch.float32
        )


def _learn(root: str, precision: str, alternate: bool) -> tuple[float, bool, torch.dtype]:
    model = Classifier()
    run = trainer(PowerSGDStrategy(rank=2, alternate=alternate), root=root, precision=precision, max_epochs=8)
    run.fit(model, loader())
    return float(run.callback_metrics["train_loss"]), replicas_agree(model), next(model.parameters()).dtype


def test_a_checkpoint_of_a_scaled_run_goes_on_without_a_scale(fit):
    for norms in fit(_resume_scaled):
        assert norms[0] == pytest.approx(norms[1], rel=0.02), "float16 rounds the two runs differently"


def _resume_scaled(root: str) -> list[float]:
    """Give the norm of the errors after eight scaled steps, at two scales, and one that is not scaled."""
    norms = []
    for scale in (2.0**6, 2.0**12):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run = trainer(root=root, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=8, max_epochs=-1)
        run.fit(Classifier(), loader(shuffle=False))
        assert float(run.strategy.exchange.state.loss_scale) == scale
        run.save_checkpoint(f"{root}/{scale}.ckpt")
        run = trainer(root=root, max_steps=9, max_epochs=-1)
        run.fit(Classifier(), loader(shuffle=False), ckpt_path=f"{root}/{scale}.ckpt")
        assert float(run.strategy.exchange.state.loss_scale) == 1.0
        norms.append(norm(run.strategy.exchange.state.errors.values()))
    return norms
