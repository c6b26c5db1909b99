"""Tier two: machines with several devices, on real gloo ranks: 4 processes are 2 machines of 2 devices."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import gather_equal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_powersgd import GradientExchange, PowerSGDConfig, PowerSGDState, attach_powersgd
from lightning_powersgd.exchange import blocks
from lightning_powersgd.exchange.averages import mean_over_ranks
from lightning_powersgd.exchange.blocks import in_blocks, named_tensors
from lightning_powersgd.exchange.hierarchy import OwnedExchange, _groups, owners_of


class Net(nn.Module):
    """Matrices in several layouts, vectors, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3).to(memory_format=torch.channels_last)
        self.layers = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 9))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh().mean(dim=(2, 3))
        return self.gain * self.layers(torch.cat((h, h.square(), h.abs(), h.sin()), dim=1))


def make(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(net: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return net(torch.randn(4, 3, 8, 8, generator=generator).to(dtype)).square().mean()


def attach(net: Net, devices: int = 2, bucket_cap_mb: float = 0.005, **config: Any) -> tuple[nn.Module, OwnedExchange]:
    ddp = DistributedDataParallel(net, bucket_cap_mb=bucket_cap_mb)
    exchange = attach_powersgd(
        ddp, PowerSGDConfig(**{"rank": 2, "min_compression_ratio": 1.0, **config}), devices=devices
    )
    assert isinstance(exchange, OwnedExchange)
    return ddp, exchange


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def saved_by_the_first(exchange: OwnedExchange) -> dict[str, Any]:
    """What the first rank saves, on every rank."""
    saved = [exchange.state_dict()]
    dist.broadcast_object_list(saved, 0)
    return saved[0]


CONFIGS = [
    {},
    {"alternate": True},
    {"rank": {"*.weight": 3, "*": 0}},
    {"comm_dtype": "int8"},
    {"comm_dtype": "bfloat16"},
    {"start_step": 2},
    {"error_dtype": "bfloat16"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_the_flat_exchange_of_the_machines_means(four_ranks, config, dtype):
    if "error_dtype" in config:
        config = {"error_dtype": torch.bfloat16 if dtype == torch.float32 else torch.float32}
    assert four_ranks.run(_compare, config, dtype) == [[True] * 5] * 4


def _compare(config: dict[str, Any], dtype: torch.dtype) -> list[bool]:
    between, inside = _groups(2)
    net, reference = make(dtype), make(dtype)
    ddp, _ = attach(net, **config)
    settings = PowerSGDConfig(**{"rank": 2, "min_compression_ratio": 1.0, **config})
    exchange = GradientExchange(PowerSGDState(reference.named_parameters(), settings), between, judges=inside)
    equal = []
    for step in range(5):
        loss_of(ddp, step, dtype).backward()
        loss_of(reference, step, dtype).backward()
        exchange.begin_step()
        for parameter in reference.parameters():
            parameter.grad.div_(2)
            dist.all_reduce(parameter.grad, group=inside)
            exchange.take(parameter, parameter.grad)
        exchange.end_step()
        expected = gradients(reference)
        equal.append(all(torch.equal(value, expected[name]) for name, value in gradients(net).items()))
        net.zero_grad()
        reference.zero_grad()
    return equal


def test_ranks_agree_and_have_half_of_the_work_and_of_the_memory(four_ranks):
    flat = sum(parameter.numel() for name, parameter in make().named_parameters() if "weight" in name)
    results = four_ranks.run(_train)
    for agree, numbers, _ in results:
        assert agree
        # A rank of two has no more than 0.55 of it.
        assert numbers <= 0.55 * flat
    assert sum(numbers for _, numbers, _ in results[:2]) == flat
    # Each rank sends its own part between machines; the small ones, whole, too.
    sent = [sent for _, _, sent in results]
    assert sent[:2] == sent[2:]


def _train() -> tuple[bool, int, int]:
    ddp, exchange = attach(make())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(6):
        loss_of(ddp, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    numbers = sum(error.numel() for error in exchange.state.errors.values())
    return gather_equal(list(ddp.parameters())), numbers, exchange.state.sent_bytes


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_any_number_of_devices(four_ranks, devices):
    assert all(four_ranks.run(_any_number, devices))


def _any_number(devices: int) -> bool:
    ddp, exchange = attach(make(), devices)
    for step in range(3):
        loss_of(ddp, step).backward()
        with torch.no_grad():
            for parameter in ddp.parameters():
                parameter -= 0.1 * parameter.grad
        ddp.zero_grad()
    return gather_equal(list(ddp.parameters())) and exchange.world_size == 4 // devices


def test_what_is_not_finite_leaves_no_trace_on_any_rank(four_ranks):
    assert all(four_ranks.run(_overflow))


def _overflow() -> bool:
    ddp, exchange = attach(make())
    for step in range(3):
        loss_of(ddp, step).backward()
        ddp.zero_grad()
    before = exchange.state.state_dict()["parameters"]
    (loss_of(ddp, 4) * (float("inf") if dist.get_rank() == 3 else 1.0)).backward()
    after = exchange.state.state_dict()["parameters"]
    kept = all(torch.equal(entry["error"], after[name]["error"]) for name, entry in before.items())
    finite = torch.stack([p.grad.isfinite().all() for name, p in ddp.module.named_parameters() if "weight" in name])
    ddp.zero_grad()
    return kept and not bool(finite.any())


# Checkpoints


@pytest.mark.parametrize("config", [{}, {"alternate": True}, {"comm_dtype": "int8"}], ids=str)
def test_a_state_that_was_saved_goes_on_with_the_same_bits(four_ranks, config):
    assert all(four_ranks.run(_go_on, config))


def _go_on(config: dict[str, Any]) -> bool:
    ddp, exchange = attach(make(), **config)
    for step in range(3):
        loss_of(ddp, step).backward()
        ddp.zero_grad()
    saved = saved_by_the_first(exchange)
    again, other = attach(make(), **config)
    lines = other.load_state_dict(saved)
    equal = not lines
    for step in range(3, 6):
        loss_of(ddp, step).backward()
        loss_of(again, step).backward()
        first, second = gradients(ddp.module), gradients(again.module)
        equal = equal and all(torch.equal(first[name], second[name]) for name in first)
        ddp.zero_grad()
        again.zero_grad()
    return equal


def test_its_checkpoint_is_that_of_the_flat_exchange(four_ranks):
    assert all(four_ranks.run(_exchange_checkpoints))


def _exchange_checkpoints() -> bool:
    ddp, exchange = attach(make())
    for step in range(3):
        loss_of(ddp, step).backward()
        ddp.zero_grad()
    saved = saved_by_the_first(exchange)
    flat = DistributedDataParallel(make())
    settings = PowerSGDConfig(rank=2, min_compression_ratio=1.0)
    other = attach_powersgd(flat, settings)
    fits = not other.load_state_dict(saved)
    state = other.state_dict()
    _, back = attach(make())
    fits = fits and not back.load_state_dict(state)
    mine = back.state.errors
    return fits and all(torch.equal(error, saved["parameters"][name]["error"]) for name, error in mine.items())


def test_a_damaged_state_is_refused_on_every_rank(four_ranks):
    for text in four_ranks.run_to_errors(_load_damaged):
        assert "The PowerSGD state is damaged" in text


def _load_damaged() -> None:
    _, exchange = attach(make())
    saved = saved_by_the_first(exchange)
    # One of the two owners has it.
    saved["parameters"]["layers.0.weight"]["rank"] = -1
    exchange.load_state_dict(saved)


# A parameter that is a large part of the model


class Words(nn.Module):
    """Mostly an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(203, 8)
        self.out = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(x).tanh())


def words() -> Words:
    torch.manual_seed(0)
    return Words()


def cutting() -> Any:
    """Take few elements for many, so that the embedding is cut into six blocks."""
    return mock.patch.object(blocks, "SMALLEST", 1000)


def step_of(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    net(torch.randint(0, 203, (64,), generator=generator)).square().mean().backward()


def test_a_large_parameter_is_cut_so_that_owners_have_about_as_much():
    named = [("wte", torch.empty(50257, 768, device="meta"))]
    for layer in range(12):
        shapes = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}
        named += [(f"{layer}.{name}", torch.empty(shape, device="meta")) for name, shape in shapes.items()]
    cut = in_blocks(named)
    assert [block.name for block in cut["wte"]][:2] == ["wte[0:10052]", "wte[10052:20104]"]
    assert torch.cat([block.of(torch.arange(50257)) for block in cut["wte"]]).equal(torch.arange(50257))
    owners = owners_of(named_tensors(cut), 8)
    loads = [0] * 8
    for each in cut.values():
        for block in each:
            loads[owners[block.name]] += block.tensor.numel()
    # The embedding alone is 2.5 times what each of eight owners should have.
    assert max(loads) < 1.05 * sum(loads) / 8


@pytest.mark.parametrize(
    ("shape", "why"),
    [((2**11, 2**11), "square"), ((2**9, 2**13), "wide"), ((2**18, 15), "small"), ((2**22,), "a vector")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_stay_whole(shape, why):
    (only,) = in_blocks([("x", torch.empty(shape, device="meta"))])["x"]
    assert (only.name, only.rows) == ("x", None), why


@pytest.mark.parametrize("config", [{}, {"alternate": True}, {"rank": {"embedding.weight": 2, "*": 0}}], ids=str)
def test_blocks_are_matrices_of_their_own(four_ranks, config):
    for finite, agree, names, owned in four_ranks.run(_learn_words, config):
        assert finite
        assert agree
        assert names == {"embedding.weight", "out.weight", "out.bias"}
        # Three of the six blocks.
        assert sum("embedding" in name for name in owned) == 3


def _learn_words(config: dict[str, Any]) -> tuple[bool, bool, set[str], list[str]]:
    with cutting():
        net = words()
        ddp, exchange = attach(net, **config)
    mean = torch.zeros_like(net.embedding.weight)
    for _ in range(40):
        step_of(ddp, 0)
        mean += net.embedding.weight.grad
        ddp.zero_grad()
    # What is sent over 40 equal steps is the gradient, but for what is still in the errors.
    step_of(exact := words(), 0)
    ((_, expected),) = mean_over_ranks({"": exact.embedding.weight.grad}, torch.device("cpu"))
    close = torch.linalg.norm(mean / 40 - expected) < 0.1 * torch.linalg.norm(expected)
    agree = gather_equal(list(ddp.parameters())) and gather_equal([mean])
    return bool(close), agree, set(exchange.parameters), list(exchange.state.errors)


@pytest.mark.parametrize("config", [{}, {"alternate": True}, {"error_dtype": "bfloat16"}], ids=str)
def test_a_checkpoint_of_blocks_goes_on_with_the_same_bits_and_its_errors_fit_others(four_ranks, config):
    assert four_ranks.run(_checkpoint_of_blocks, config) == [[True] * 5] * 4


def _checkpoint_of_blocks(config: dict[str, Any]) -> list[bool]:
    with cutting():
        ddp, exchange = attach(words(), **config)
        again, other = attach(words(), **config)
    for step in range(3):
        step_of(ddp, step)
        ddp.zero_grad()
    saved = saved_by_the_first(exchange)
    equal = [not other.load_state_dict(saved)]
    for step in range(3, 6):
        step_of(ddp, step)
        step_of(again, step)
    equal.append(all(torch.equal(a.grad, b.grad) for a, b in zip(ddp.parameters(), again.parameters(), strict=True)))
    # Without blocks, and back.
    flat, settings = DistributedDataParallel(words()), {"rank": 2, "min_compression_ratio": 1.0, **config}
    whole = attach_powersgd(flat, PowerSGDConfig(**settings))
    lines = whole.load_state_dict(saved)
    equal.append(all(line.startswith("embedding.weight") for line in lines))
    state = whole.state_dict()
    equal.append(
        state["parameters"]["embedding.weight"]["error"].equal(saved["parameters"]["embedding.weight"]["error"])
    )
    with cutting():
        _, back = attach(words(), **config)
    back.load_state_dict(state)
    everyones = saved_by_the_first(back)["parameters"]["embedding.weight"]["error"]
    equal.append(everyones.equal(saved["parameters"]["embedding.weight"]["error"]))
    return equal


def test_another_shape_is_refused_for_blocks_as_for_others(four_ranks):
    for text in four_ranks.run_to_errors(_another_shape):
        assert "was saved for 'embedding.weight' of shape (200, 8), but the model's has shape (203, 8)" in text


def _another_shape() -> None:
    net = words()
    net.embedding = nn.Embedding(200, 8)
    flat = attach_powersgd(DistributedDataParallel(net), PowerSGDConfig(rank=2, min_compression_ratio=1.0))
    with cutting():
        _, exchange = attach(words())
    exchange.load_state_dict(flat.state_dict())


# Owners, and what is refused


def test_owners_have_about_as_much_and_large_ones_come_first():
    sizes = {"a": 90, "b": 50, "c": 50, "d": 40, "e": 30, "f": 1}
    named = [(name, torch.zeros(size)) for name, size in sizes.items()]
    owners = owners_of(named, 2)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == number) for number in range(2)]
    assert max(loads) <= 1.1 * sum(loads) / 2
    assert owners == owners_of(list(reversed(named)), 2)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (3, "4 ranks are no machines of 3 devices each"),
        ("own", "The ranks disagree on the number of devices of a machine"),
        (0, "`devices=0` is below 1"),
    ],
)
def test_unequal_machines_are_refused_on_every_rank(four_ranks, devices, message):
    for text in four_ranks.run_to_errors(_refused, devices):
        assert message in text


def _refused(devices: Any) -> None:
    attach(make(), 1 + dist.get_rank() // 2 if devices == "own" else devices)


def test_unused_parameters_are_refused(four_ranks):
    for text in four_ranks.run_to_errors(_unused):
        assert "`find_unused_parameters=True` is not possible" in text


def _unused() -> None:
    attach_powersgd(DistributedDataParallel(make(), find_unused_parameters=True), PowerSGDConfig(), devices=2)
