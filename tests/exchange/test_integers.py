"""Tier two: factors that travel as integers, between real ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import attach, gradients, like_an_accelerator, make_batches, make_net
from ranks import gather_equal
from reference import mean
from torch import Tensor, nn

from lightning_powersgd import GradientExchange
from lightning_powersgd.compressor import codec
from lightning_powersgd.exchange.integers import IntegerWire

PAIR = {"P": "int8", "Q": "int4"}
MODES = pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])


@contextlib.contextmanager
def hops(two: bool) -> Iterator[None]:
    """Let integers travel in two hops between few ranks, as they do between many."""
    if not two:
        yield
        return
    original = IntegerWire.__init__

    def without_gathering(self: IntegerWire, *args: Any) -> None:
        original(self, *args)
        self._gathers = False

    few_levels = mock.patch.object(codec, "_FEWEST_LEVELS", 1000)
    with few_levels, mock.patch.object(IntegerWire, "__init__", without_gathering):
        yield


def errors_of(exchange: GradientExchange) -> dict[str, Tensor]:
    return {name: error.clone() for name, error in exchange.state.errors.items()}


def _train(steps: int, two_hops: bool, **config: Any) -> list[dict[str, Any]]:
    """Train; give each step's own gradient, average, errors before and after, and bytes."""
    with hops(two_hops):
        model, exchange = attach(make_net(), min_compression_ratio=1.0, **config)
        optimizer, done = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
        for x, y in make_batches(steps):
            before, twin = errors_of(exchange), copy.deepcopy(model.module)
            twin.zero_grad()
            F.cross_entropy(twin(x), y).backward()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            done.append(
                {
                    "local": gradients(twin),
                    "averaged": gradients(model.module),
                    "before": before,
                    "after": errors_of(exchange),
                    "sent": exchange.state.sent_bytes,
                    "planned": exchange.state.plan.sent_bytes(alternate=False),
                    "matrices": len(exchange.state.errors),
                }
            )
            optimizer.step()
        assert gather_equal(list(model.parameters())), "the replicas drifted apart"
    return done


@MODES
@pytest.mark.parametrize("two_hops", [False, True], ids=["one hop", "two hops"])
@pytest.mark.parametrize("comm_dtype", ["int8", "int4", PAIR], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_nothing_is_lost_on_the_wire(ranks, world_size, comm_dtype, two_hops, alternate):
    results = ranks[world_size].run(_train, 20, two_hops, comm_dtype=comm_dtype, alternate=alternate)
    # The first steps travel in bfloat16, whose sums are rounded once more on their way.
    for steps in list(zip(*results, strict=True))[2:]:
        for name in steps[0]["before"]:
            came = mean([(step["local"][name] + step["before"][name]).double() for step in steps])
            went = steps[0]["averaged"][name].double() + mean([step["after"][name].double() for step in steps])
            assert (came - went).norm() < 3e-6 * came.norm(), name


def test_errors_stay_about_as_small_as_without_rounding(two_ranks):
    exact = two_ranks.run(_size_of_errors, comm_dtype=None)[0]
    for comm_dtype in ("int8", "int4", PAIR):
        assert two_ranks.run(_size_of_errors, comm_dtype=comm_dtype)[0] < 1.3 * exact


def _size_of_errors(comm_dtype: Any) -> float:
    after = _train(100, False, comm_dtype=comm_dtype)[-1]["after"]
    return sum(float(error.norm() ** 2) for error in after.values()) ** 0.5


def test_bytes_are_a_quarter_once_the_magnitudes_are_known(two_ranks):
    for steps in two_ranks.run(_train, 3, False, comm_dtype="int8"):
        first, _, third = steps
        # A flag for each factor, and those of a group are even in number.
        flags = third["sent"] - third["planned"]
        assert 2 * third["matrices"] <= flags <= 4 * third["matrices"]
        # In bfloat16, and then in 8 bits.
        whole = first["sent"] - 2 * (first["sent"] - third["sent"] + flags)
        assert whole >= 0


class Two(nn.Module):
    """Two layers whose gradients do not depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.good, self.bad = nn.Linear(40, 30), nn.Linear(40, 30)

    def forward(self, x: Tensor, spoilt: float) -> Tensor:
        return self.good(x).square().mean() + (self.bad(x) * spoilt).square().mean()


def _one_bad_matrix(value: float, two_hops: bool, like_a_gpu: bool, **config: Any) -> tuple[Any, ...]:
    with hops(two_hops), like_an_accelerator(like_a_gpu):
        model, exchange = attach(Two(), **config)
        seen = []
        for step in range(8):
            torch.manual_seed(10 * step + dist.get_rank())
            model.zero_grad()
            bad = step == 5 and dist.get_rank() == 1
            before = errors_of(exchange)
            model(torch.randn(16, 40), value if bad else 1.0).backward()
            finite = [bool(layer.weight.grad.isfinite().all()) for layer in (model.module.good, model.module.bad)]
            nowhere = not model.module.bad.weight.grad.isfinite().any()
            kept = torch.equal(before["bad.weight"], exchange.state.errors["bad.weight"])
            seen.append((*finite, nowhere, kept))
        return seen, gather_equal([model.module.good.weight.grad, model.module.bad.weight.grad])


@MODES
@pytest.mark.parametrize("like_a_gpu", [False, True], ids=["cpu", "like an accelerator"])
@pytest.mark.parametrize("two_hops", [False, True], ids=["one hop", "two hops"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_arrives_as_that_and_spoils_only_its_own_matrix(
    two_ranks, value, two_hops, like_a_gpu, alternate
):
    config = {"comm_dtype": "int8", "alternate": alternate}
    for seen, equal in two_ranks.run(_one_bad_matrix, value, two_hops, like_a_gpu, **config):
        assert equal
        for step, (good, bad, nowhere, kept) in enumerate(seen):
            assert good
            assert bad == (step != 5)
            assert nowhere == kept == (step == 5)


class Late(nn.Module):
    """A layer that has no gradient for some steps, beside one that has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.late = nn.Linear(40, 30), nn.Linear(40, 30)

    def forward(self, x: Tensor, switch: float) -> Tensor:
        return (self.always(x) + 100 * switch * self.late(x)).square().mean()


def _late(like_a_gpu: bool, **config: Any) -> tuple[list[float], list[int]]:
    with like_an_accelerator(like_a_gpu):
        model, exchange = attach(Late(), **config)
        lost, sent = [], []
        for step in range(60):
            torch.manual_seed(2 * step + dist.get_rank())
            model.zero_grad()
            model(torch.randn(16, 40), float(step >= 10)).backward()
            error, total = exchange.state.errors["late.weight"], model.module.late.weight.grad
            lost.append(float(error.norm() / (error + total).norm().clamp_min(1e-30)))
            sent.append(exchange.state.sent_bytes)
        assert gather_equal([model.module.late.weight.grad])
        return lost, sent


@MODES
@pytest.mark.parametrize("like_a_gpu", [False, True], ids=["cpu", "like an accelerator"])
@pytest.mark.parametrize("comm_dtype", ["int8", "int4"])
def test_a_matrix_that_comes_late_is_soon_as_good_as_others(two_ranks, comm_dtype, like_a_gpu, alternate):
    exact, _ = two_ranks.run(_late, like_a_gpu, comm_dtype=None, alternate=alternate)[0]
    lost, sent = two_ranks.run(_late, like_a_gpu, comm_dtype=comm_dtype, alternate=alternate)[0]
    assert lost[:10] == [0.0] * 10
    assert sum(lost[-20:]) < 1.1 * sum(exact[-20:])
    # Once magnitudes are known, the late matrix has one, too: nothing falls back to bfloat16.
    assert len(set(sent[20::2])) == len(set(sent[21::2])) == 1
    assert max(sent[4:]) < 0.7 * sent[0]


def _broken_off(**config: Any) -> tuple[bool, int]:
    model, exchange = attach(make_net(), **config)
    batches = list(make_batches(6))
    for step, (x, y) in enumerate(batches):
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if step == 3:
            handle = next(model.module.parameters()).register_hook(_raise)
            with contextlib.suppress(ZeroDivisionError):
                loss.backward()
            handle.remove()
            # DDP itself is not ready for another pass after one that was broken off.
            model, exchange_2 = attach(model.module, **config)
            exchange_2.load_state_dict(exchange.state_dict())
            exchange = exchange_2
            continue
        loss.backward()
    return gather_equal(list(gradients(model.module).values())), exchange.state.step


def _raise(gradient: Tensor) -> None:
    raise ZeroDivisionError


@MODES
def test_a_step_that_was_broken_off_leaves_nothing_behind(two_ranks, alternate):
    equal, step = two_ranks.run(_broken_off, comm_dtype="int8", alternate=alternate)[0]
    assert equal
    assert step == 5
