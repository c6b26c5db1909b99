"""Tier two: compressed and exact steps in turn, and matrices that are not worth compressing, on real gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from clock import a_link_of, steps_that_take
from nets import attach, like_an_accelerator, make_batches, make_net
from torch import Tensor, nn

from lightning_powersgd import GradientExchange, PowerSGDConfig, PowerSGDState
from lightning_powersgd.exchange.worth import leave_whole_what_is_not_worth_it

AUTO = {"compress": "auto", "min_compression_ratio": 1.0}


def train(model: nn.Module, exchange: GradientExchange, steps: int, rate: float = 0.05) -> dict[str, Any]:
    """Train, and give which steps were compressed, and what of gradients all steps together have brought."""
    kinds, delivered = "", {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in make_batches(steps):
        kinds += "c" if exchange.compressing else "e"
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                delivered[name] += parameter.grad
                parameter -= rate * parameter.grad
    return {"kinds": kinds, "delivered": delivered}


@pytest.mark.parametrize("ddp", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("accelerator", [False, True])
def test_where_exact_steps_are_faster_the_run_becomes_ddps(two_ranks, accelerator, ddp):
    for result in two_ranks.run(_exact_is_faster, accelerator, ddp):
        assert result["kinds"] == "c" * 10 + "e" * 6
        assert result["differences"] < 1e-5
        assert result["errors"] == 0
        assert result["averaged"]
        assert result["sent"] == result["dense"]


def _exact_is_faster(accelerator: bool, ddp: dict[str, Any]) -> dict[str, Any]:
    # The parameters stay as they are, so that both see the same gradients.
    with steps_that_take(compressed=2.0, exact=1.0), like_an_accelerator(accelerator):
        model, exchange = attach(make_net().to(memory_format=torch.channels_last), ddp=ddp, **AUTO)
        ours = train(model, exchange, 16, rate=0.0)
    plain = nn.parallel.DistributedDataParallel(make_net())
    ddps = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for batch in make_batches(16):
        plain.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        for name, parameter in plain.named_parameters():
            ddps[name] += parameter.grad
    state = exchange.state
    return {
        "kinds": ours["kinds"],
        # What compressed steps had left unsent has arrived, so that all steps together bring what DDP's bring.
        "differences": max(float((ours["delivered"][name] - ddps[name]).abs().max()) for name in ddps),
        "errors": sum(float(error.abs().sum()) for error in state.errors.values()),
        "averaged": state.averaged,
        "sent": state.sent_bytes,
        "dense": state.dense_bytes,
    }


def test_in_a_trial_errors_wait(two_ranks):
    for kinds, first, last in two_ranks.run(_trial_that_stays):
        assert kinds == "c" * 10 + "e" * 3 + "c" * 2
        assert first == last  # over the exact steps


def _trial_that_stays() -> tuple[str, bytes, bytes]:
    with steps_that_take(compressed=1.0, exact=2.0):
        model, exchange = attach(make_net(), **AUTO)
        kinds = train(model, exchange, 10)["kinds"]
        before = _bytes_of(exchange.state.errors)
        kinds += train(model, exchange, 3)["kinds"]
        after = _bytes_of(exchange.state.errors)
        kinds += train(model, exchange, 2)["kinds"]
    return kinds, before, after


def _bytes_of(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors.values())


def test_all_ranks_decide_by_the_slowest(two_ranks):
    # On the second rank nothing is slower than compressing.
    for kinds in two_ranks.run(_unequal_ranks):
        assert kinds == "c" * 10 + "e" * 6


def _unequal_ranks() -> str:
    with steps_that_take(compressed=1.0 if dist.get_rank() == 0 else 4.0, exact=2.0):
        model, exchange = attach(make_net(), **AUTO)
        return train(model, exchange, 16)["kinds"]


def test_a_step_that_is_not_finite_keeps_the_errors_it_has_sent(two_ranks):
    for lost, kept, gone in two_ranks.run(_overflow):
        assert lost
        assert kept
        assert gone


def _overflow() -> tuple[bool, bool, bool]:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    net = make_net()
    state = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2, **AUTO))
    exchange = GradientExchange(state, scaler=scaler)
    with steps_that_take(compressed=2.0, exact=1.0):
        for number, batch in enumerate(make_batches(15)):
            net.zero_grad()
            scaler.scale(F.cross_entropy(net(batch[0]), batch[1])).backward()
            if number == 13:
                before = _bytes_of(state.errors)
                if dist.get_rank() == 1:
                    net[-1].bias.grad[0] = torch.inf
            exchange.begin_step()
            for parameter in net.parameters():
                exchange.take(parameter, parameter.grad)
            exchange.end_step()
            if number == 13:
                lost = not all(p.grad.isfinite().all() for p in net.parameters())
                kept = _bytes_of(state.errors) == before and state.owing
    return lost, kept, not any(error.any() for error in state.errors.values()) and not state.owing


class Branches(nn.Module):
    """The second branch is not used in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(24, 20), nn.Linear(24, 20)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        return self.first(x) + (self.second(x) if both else 0)


def test_the_error_of_a_parameter_that_no_loss_reaches_waits(two_ranks):
    for waits, sent in two_ranks.run(_unused):
        assert waits == (True, False)
        assert sent


def _unused() -> tuple[tuple[bool, bool], bool]:
    model, exchange = attach(Branches(), ddp={"find_unused_parameters": True}, **AUTO)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with steps_that_take(compressed=2.0, exact=1.0):
        for step in range(15):
            model.zero_grad()
            # Rank 1 alone uses it at last, and then all have its error.
            both = step != 13 if step < 14 else dist.get_rank() == 1
            model(torch.randn(4, 24, generator=generator), both).square().sum().backward()
            if step == 13:
                errors = exchange.state.errors
                waits = bool(errors["second.weight"].any()), bool(errors["first.weight"].any())
    return waits, not exchange.state.owing and not any(error.any() for error in exchange.state.errors.values())


@pytest.mark.parametrize("cut", [7, 12, 13, 20])
def test_a_run_goes_on_from_its_state_bit_for_bit(two_ranks, cut):
    for whole, resumed in two_ranks.run(_resume, cut):
        assert whole == resumed


def _resume(cut: int) -> tuple[bytes, bytes]:
    with steps_that_take(compressed=2.0, exact=1.0):
        model, exchange = attach(make_net(), **AUTO)
        whole, saved = _go_on(model, exchange, 0, 26, save_at=cut)
        model, exchange = attach(make_net(), **AUTO)
        model.module.load_state_dict(saved["model"])
        exchange.load_state_dict(saved["exchange"])
        resumed, _ = _go_on(model, exchange, cut, 26)
    return whole, resumed


def _go_on(model: nn.Module, exchange: GradientExchange, start: int, end: int, save_at: int = -1):
    saved: dict[str, Any] = {}
    for step, batch in list(enumerate(make_batches(end)))[start:]:
        if step == save_at:
            parameters = {name: value.clone() for name, value in model.module.state_dict().items()}
            saved = {"model": parameters, "exchange": exchange.state_dict()}
        model.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    return _bytes_of({name: parameter.detach() for name, parameter in model.named_parameters()}), saved


def test_at_another_number_of_ranks_the_trial_begins_anew(two_ranks):
    assert two_ranks.run(_other_size) == [(True, True)] * 2


def _other_size() -> tuple[bool, bool]:
    with steps_that_take(compressed=2.0, exact=1.0):
        model, exchange = attach(make_net(), **AUTO)
        train(model, exchange, 14)
        saved = exchange.state_dict()
    saved["trial"] = {**saved["trial"], "world_size": 3}
    _, resumed = attach(make_net(), **AUTO)
    resumed.load_state_dict(saved)
    return not exchange.compressing, resumed.compressing and resumed.state.trial.decisions == 0


def test_what_a_checkpoint_holds_is_checked(two_ranks):
    for error in two_ranks.run_to_errors(_damaged):
        assert "'position' is 1000000 of the 'trial'" in error


def _damaged() -> None:
    _, exchange = attach(make_net(), **AUTO)
    saved = exchange.state_dict()
    saved["trial"]["position"] = 10**6
    exchange.load_state_dict(saved)


@pytest.mark.parametrize(
    ("gigabits", "whole"),
    [(1e-6, []), (1e6, ["0.weight", "3.weight", "5.weight", "7.weight"]), (1.0, ["0.weight", "5.weight", "7.weight"])],
)
def test_what_is_not_worth_compressing_is_sent_whole(two_ranks, gigabits, whole):
    # A matrix takes 100 µs, whatever its size, and may take twice what it saves; the largest has 55 kB, which take
    # 440 µs on a link of 1 Gbit/s.
    for found, link, forecast, kinds in two_ranks.run(_weigh, gigabits):
        assert found == whole
        assert link == gigabits * 1e9
        assert forecast == pytest.approx(8 * 4 * sum(p.numel() for p in make_net().parameters()) / link)
        assert kinds == ("e" if len(whole) == 4 else "c") * 3


def _weigh(gigabits: float) -> tuple[list[str], float, float, str]:
    model, exchange = attach(make_net(), **AUTO)

    with a_link_of(gigabits * 1e9, seconds_per_matrix=1e-4):
        given = leave_whole_what_is_not_worth_it(exchange)
    forecast = exchange.state.trial.exact_forecast
    kinds = train(model, exchange, 3)["kinds"]
    _, resumed = attach(make_net(), **AUTO)
    resumed.load_state_dict(exchange.state_dict())
    assert resumed.state.whole == exchange.state.whole
    assert [slot.rank for slot in resumed.plan.slots] == [slot.rank for slot in exchange.plan.slots]
    return sorted(exchange.state.whole), given.bits_per_second, forecast, kinds


def test_measuring_is_done_in_about_a_second_and_on_all_ranks_alike(two_ranks):
    (first, whole), (second, too) = two_ranks.run(_measure)
    assert first == second > 0
    assert whole == too


def _measure() -> tuple[float, list[str]]:
    _, exchange = attach(make_net(), **AUTO)
    link = leave_whole_what_is_not_worth_it(exchange)
    return link.bits_per_second, sorted(exchange.state.whole)
