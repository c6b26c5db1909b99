"""Tier three: training loops of one's own with Fabric, on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from models import learnable, messages
from ranks import gather_equal
from torch import Tensor, nn

from lightning_powersgd import PowerSGDFabricStrategy

OURS = [pytest.param({}, id="full"), pytest.param({"alternate": True}, id="alternating")]


def make_fabric(config: dict[str, Any] | str, **kwargs: Any) -> Fabric:
    strategy = config if isinstance(config, str) else PowerSGDFabricStrategy(**{"rank": 2, **config})
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=dist.get_world_size(), **kwargs)
    fabric.launch()
    return fabric


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 10))


class Loop:
    """A net, its optimizer, and steps that accumulate and clip gradients."""

    def __init__(self, fabric: Fabric, lr: float = 0.1) -> None:
        self.fabric, net = fabric, make_net()
        self.model, self.optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9))

    def run(self, first: int, last: int) -> Tensor:
        for step in range(first, last):
            x, y = learnable(2 * step + self.fabric.global_rank, samples=16)
            with self.fabric.no_backward_sync(self.model, enabled=step % 2 == 0):
                loss = F.cross_entropy(self.model(x), y)
                self.fabric.backward(loss)
            if step % 2:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return loss.detach()

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize("config", OURS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_loop_learns_saves_and_goes_on_bit_for_bit(two_ranks, tmp_path, precision, config):
    for first, last, same, equal, steps, rest in two_ranks.run(_loop, str(tmp_path / "a.ckpt"), precision, config):
        assert last < 0.7 * first
        assert same, "the resumed run is not the uninterrupted one"
        assert equal, "the replicas drifted apart"
        assert steps == 60, "passes that are not synchronised count as steps"
        assert rest == {"note": 7}


def _loop(path: str, precision: str, config: dict[str, Any]) -> tuple[Any, ...]:
    fabric = make_fabric(config, precision=precision)
    loop = Loop(fabric)
    first = loop.run(0, 2)
    loop.run(2, 40)
    state = {"model": loop.model, "optimizer": loop.optimizer}
    fabric.save(path, {**state, "note": 7})
    last = loop.run(40, 120)
    [exchange] = fabric.strategy.exchanges
    steps, uninterrupted = exchange.state.step, loop.weights
    rest = fabric.load(path, state, strict=False)
    loop.run(40, 120)
    same = all(torch.equal(a, b) for a, b in zip(uninterrupted, loop.weights, strict=True))
    return float(first), float(last), same, gather_equal(loop.weights), steps, rest


def test_the_name_gives_the_strategy_and_plain_ddps_file_loads(two_ranks, tmp_path):
    for equal, said in two_ranks.run(_exchange_files, str(tmp_path)):
        assert equal
        assert not any("could be carried over" in text for text in said)


def _exchange_files(folder: str) -> tuple[bool, list[str]]:
    equal = []
    with messages() as said:
        for first, second in (("ddp", "powersgd"), ("powersgd", "ddp")):
            before = Loop(make_fabric(first))
            before.run(0, 6)
            before.fabric.save(f"{folder}/{first}.ckpt", {"model": before.model, "optimizer": before.optimizer})
            after = Loop(make_fabric(second))
            after.fabric.load(f"{folder}/{first}.ckpt", {"model": after.model, "optimizer": after.optimizer})
            equal += [torch.equal(a, b) for a, b in zip(before.weights, after.weights, strict=True)]
    return all(equal), said


def test_several_models_have_an_exchange_each(two_ranks, tmp_path):
    for same, entries in two_ranks.run(_two_models, str(tmp_path / "a.ckpt")):
        assert same
        assert entries == {"first", "second"}


def _two_models(path: str) -> tuple[bool, set[str]]:
    fabric = make_fabric({"rank": 1})
    first, second = Loop(fabric), Loop(fabric, lr=0.02)
    for step in range(0, 12, 2):
        first.run(step, step + 2)
        second.run(step, step + 2)
    alone = Loop(make_fabric({"rank": 1}), lr=0.02)
    alone.run(0, 12)
    fabric.save(path, {"first": first.model, "second": second.model})
    same = all(torch.equal(a, b) for a, b in zip(second.weights, alone.weights, strict=True))
    return same, set(torch.load(path, weights_only=True)["powersgd"])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rank": 0}, ValueError, "below 1"),
        ({"find_unused": True}, TypeError, "Did you mean `find_unused_parameters`"),
        ({"mixed_precision": object()}, ValueError, "cannot be used with PowerSGDFabricStrategy"),
        ({"bucket_cap_mb": 0}, ValueError, "is not positive"),
    ],
)
def test_bad_arguments_are_refused_at_once(kwargs, error, message):
    with pytest.raises(error, match=message):
        PowerSGDFabricStrategy(**{"rank": 2, **kwargs})


def test_ranks_with_other_settings_are_an_error_on_every_rank(two_ranks):
    for text in two_ranks.run_to_errors(_disagree):
        assert "The ranks disagree on the argument `rank`: rank 0 has 2, rank 1 has 3" in text


def _disagree() -> None:
    Loop(make_fabric({"rank": 2 + dist.get_rank()}))


def test_lbfgs_gets_exact_gradients(two_ranks):
    (plain, ours, said), _ = two_ranks.run(_lbfgs)
    assert ours == plain
    assert any("LBFGS" in text for text in said)


def _lbfgs() -> tuple[float, float, list[str]]:
    losses = []
    with messages() as said:
        for strategy in ("ddp", "powersgd"):
            fabric, net = make_fabric(strategy), make_net()
            model, optimizer = fabric.setup(net, torch.optim.LBFGS(net.parameters(), lr=0.2))
            x, y = learnable(fabric.global_rank)

            def closure(model=model, optimizer=optimizer, fabric=fabric, x=x, y=y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                fabric.backward(loss)
                return loss

            losses.append(float([optimizer.step(closure) for _ in range(3)][-1].detach()))
    return losses[0], losses[1], said
