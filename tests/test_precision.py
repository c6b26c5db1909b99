"""Tier two: loss scales, narrow dtypes and steps that are not finite, on two real ranks."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import attach, gradients, make_batches, make_net
from ranks import gather_equal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ALTERNATE = pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])


class AsksTheDevice(TorchDispatchMode):
    """Notes every operation that gives a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def like_an_accelerator(yes: bool):
    """Let the exchange go the way it goes where the host does not wait for the device."""
    return mock.patch("lightning_powersgd.hook._waits_for", return_value=False) if yes else contextlib.nullcontext()


# Loss scale


@ALTERNATE
@pytest.mark.parametrize("accelerator", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("config", [{}, {"error_dtype": "bfloat16"}, {"comm_dtype": "float16"}, {"rank": 1}], ids=str)
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
        model, _ = attach(make_net(), scaler=scaler, **config)
        run = []
        with like_an_accelerator(accelerator):
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
    "config", [{"comm_dtype": "float16"}, {"error_dtype": "bfloat16"}, {"warm_start": False}], ids=str
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
        model, exchange = attach(make_net(), bucket_cap_mb=0.001, **config)
        assert len(exchange.state.plan.groups) > 2
        grads = []

        def step(x: Tensor, y: Tensor, model=model) -> None:
            model.zero_grad()
            for _ in range(accumulate - 1):
                with model.no_sync():
                    F.cross_entropy(model(x), y).backward()
            F.cross_entropy(model(x), y).backward()

        with like_an_accelerator(accelerator):
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


@ALTERNATE
@pytest.mark.parametrize("comm_dtype", [None, "float16"])
def test_an_accelerator_is_never_asked_during_a_step(two_ranks, comm_dtype, alternate):
    for on_the_host, on_the_device in two_ranks.run(_count_questions, comm_dtype, alternate):
        assert on_the_device == 0
        assert on_the_host > 0, "the count counts nothing"


def _count_questions(comm_dtype: str | None, alternate: bool) -> list[int]:
    counts = []
    for accelerator in (False, True):
        scaler = torch.amp.GradScaler("cpu")
        model, exchange = attach(make_net(), scaler=scaler, comm_dtype=comm_dtype, alternate=alternate)
        with like_an_accelerator(accelerator):
            for x, y in make_batches(3):
                loss = scaler.scale(F.cross_entropy(model(x), y))
                with AsksTheDevice() as questions:
                    loss.backward()
                # Between two steps, as a GradScaler does.
                exchange.state.held  # noqa: B018
        counts.append(questions.asked)
    return counts
