"""Tier two: low-rank averaging on real gloo ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import gather_equal
from reference import AveragingReference
from test_gossip import MIXED, ONE, ROUNDING, Kind, changed, check_mean, distances, draw, model_of, parameters_of
from test_gossip import Run as GossipRun
from torch import Tensor, nn

from lightning_powersgd import GossipExchange, PowerGossipConfig, make_topology
from lightning_powersgd.compressor.basis import random_factor
from lightning_powersgd.exchange.averaging import Averaging, _decode, _encode


@dataclass
class Run(GossipRun):
    """What one rank saw, beside its models."""

    references: dict[str, Tensor] = field(default_factory=dict)
    agree: bool = True
    sent_bytes: list[int] = field(default_factory=list)
    collectives: list[int] = field(default_factory=list)


def exchange_of(parameters: dict[str, Tensor], **config: Any) -> GossipExchange:
    settings = PowerGossipConfig(**{"min_compression_ratio": 1.0, **config})
    return GossipExchange(parameters.items(), make_topology("all", dist.get_world_size()), settings)


def average(
    steps: int = 6,
    dtype: torch.dtype = torch.float64,
    kinds: dict[str, Kind] = MIXED,
    size: float = 0.1,
    values: Any = None,
    **config: Any,
) -> Run:
    """Average for some steps on this rank, with changes of a size between them; all ranks begin alike."""
    rank, run = dist.get_rank(), Run()
    own = values or (lambda _, name: draw(name, kinds[name].shape, 0))
    parameters = parameters_of(kinds, lambda name: own(rank, name), dtype)
    exchange = exchange_of(parameters, **config)
    sent: list[int] = []
    originals = {"all_reduce": dist.all_reduce, "all_gather_into_tensor": dist.all_gather_into_tensor}

    def counted(name: str) -> Any:
        def collective(first: Tensor, *others: Any, **options: Any) -> Any:
            sent[-1] += (first if name == "all_reduce" else others[0]).nbytes
            return originals[name](first, *others, **options)

        return collective

    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.data.copy_(changed(parameter.data, name, rank, step, size))
        run.before.append(model_of(parameters))
        sent.append(0)
        with mock.patch.multiple(dist, **{name: counted(name) for name in originals}):
            exchange.step()
        run.after.append(model_of(parameters))
        run.sent_bytes.append(exchange.sent_bytes)
    (averaging,) = exchange._rounds
    run.collectives, run.references = sent, averaging.references
    whole = [parameters[slot.name] for slot in exchange.slots if not slot.rank]
    run.agree = gather_equal([*averaging.references.values(), *whole])
    return run


def simulate(world_size: int, steps: int = 6, **config: Any) -> list[list[dict[str, Tensor]]]:
    """What the reference makes of the same run: the models of all ranks after each step."""
    settings = PowerGossipConfig(**{"min_compression_ratio": 1.0, **config})
    layouts = parameters_of(MIXED, lambda name: torch.zeros(MIXED[name].shape), torch.float64)
    slots = {slot.name: slot for slot in settings.plan(layouts.items(), all_ranks=True).slots}
    found: list[list[dict[str, Tensor]]] = [[{} for _ in range(world_size)] for _ in range(steps)]

    def signs(number: int) -> list[float]:
        places = random_factor(f"{settings.seed}/{number}", 1, world_size)[0].argsort().tolist()
        return [0.0 if place == world_size - 1 and world_size % 2 else (1.0, -1.0)[place % 2] for place in places]

    for name, kind in MIXED.items():
        slot = slots[name]
        order = slot.order or tuple(range(len(kind.shape)))
        back = sorted(range(len(order)), key=lambda axis, order=order: order[axis])

        def omega(number: int, slot: Any = slot) -> Tensor:
            return random_factor(f"{settings.seed}/{number}/{slot.name}", slot.rank, slot.columns).T

        first = draw(name, kind.shape, 0)
        matrix = first.permute(order).flatten(1) if slot.rank else first
        reference = AveragingReference(matrix, omega if slot.rank else None, signs)
        values = [first for _ in range(world_size)]
        for step in range(steps):
            values = [changed(x, name, rank, step, 0.1) for rank, x in enumerate(values)]
            for _ in range(settings.iterations):
                shape = values[0].permute(order).shape
                matrices = [x.permute(order).flatten(1) if slot.rank else x for x in values]
                moved = reference(matrices)
                values = [x.view(shape).permute(back) if slot.rank else x for x in moved]
            for rank, x in enumerate(values):
                found[step][rank][name] = x
    return found


def worst_deviation(runs: list[Run], expected: list[list[dict[str, Tensor]]]) -> float:
    return max(
        float((run.after[step][name] - value).norm() / (value.norm() + 1e-30))
        for step, models in enumerate(expected)
        for run, model in zip(runs, models, strict=True)
        for name, value in model.items()
    )


@pytest.mark.parametrize(
    ("world_size", "config"),
    [
        (2, {"rank": 1}),
        (2, {"rank": 3, "iterations": 2}),
        (3, {"rank": 2}),
        (4, {"rank": {"conv.*": 3, "linear.*": 0, "*": 1}, "seed": 5}),
    ],
    ids=str,
)
def test_every_step_equals_the_reference_in_float64(ranks, world_size, config):
    runs = ranks[world_size].run(average, **config)
    # Rounding is 1e-16; a basis whose rows are nearly dependent amplifies it.
    assert worst_deviation(runs, simulate(world_size, **config)) < 1e-10
    assert all(run.agree for run in runs)


def test_float32_and_integers_come_near_to_the_reference(four_ranks):
    expected = simulate(4, rank=3)
    worst = {
        name: worst_deviation(four_ranks.run(average, dtype=torch.float32, rank=3, comm_dtype=name), expected)
        for name in (None, "int8", "int4")
    }
    # Directions are found in other orders, and what is not averaged in a step differs with them; but not by much.
    assert worst[None] < 1e-3
    assert worst["int8"] < 0.2
    assert worst["int4"] < 0.5


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("comm_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_of_the_models_stays_and_references_are_equal(ranks, world_size, comm_dtype, dtype):
    # Odd lengths, so that nothing lies at a multiple of four bytes.
    kinds = {"a": Kind((13, 17)), "b": Kind((7,)), "c": Kind((9, 11), "transposed"), "d": Kind((19, 21))}
    config = {"iterations": 2, "rank": {"a": 1, "*": 3}, "comm_dtype": comm_dtype}
    runs = ranks[world_size].run(average, kinds=kinds, dtype=dtype, **config)
    # Integers are added in float32.
    check_mean(runs, max(ROUNDING[dtype], 1e-6 if comm_dtype else 0))
    assert all(run.agree for run in runs)
    for run in runs:
        assert all(run.sent_bytes)
        assert run.sent_bytes == run.collectives


@pytest.mark.parametrize("comm_dtype", [None, "int8", "int4"])
def test_models_agree_where_nothing_parts_them(four_ranks, comm_dtype):
    """Other than with links, all directions are as good as any other: each has its turn."""
    runs = four_ranks.run(average, steps=40, kinds=ONE, size=0, rank=2, comm_dtype=comm_dtype, values=_own)
    apart = distances(runs)
    assert apart[-1] < 0.02 * apart[0]
    references = [run.references["weight"] for run in runs]
    assert all(torch.equal(reference, references[0]) for reference in references)


def _own(rank: int, name: str) -> Tensor:
    return draw(name, ONE[name].shape, rank)


def test_a_difference_of_low_rank_is_gone_in_one_round(two_ranks):
    runs = two_ranks.run(average, steps=1, kinds=ONE, size=0, rank=2, values=_two_directions)
    before, after = distances(runs)
    assert after < 1e-9 * before


def _two_directions(rank: int, name: str) -> Tensor:
    return draw(name, (12, 15), 7) + rank * draw(name, (12, 2), 8) @ draw(name, (2, 15), 9)


@pytest.mark.parametrize("comm_dtype", [None, "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["linear.weight", "conv.bias"], ids=["of a factor", "sent whole"])
def test_nothing_moves_while_a_model_is_not_finite(two_ranks, where, value, comm_dtype):
    for untouched, finite, agree in two_ranks.run(_break_and_heal, where, value, comm_dtype):
        assert untouched
        assert finite
        assert agree


def _break_and_heal(where: str, value: float, comm_dtype: str | None) -> tuple[bool, bool, bool]:
    rank = dist.get_rank()
    parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, rank), torch.float32)
    exchange = exchange_of(parameters, rank=2, comm_dtype=comm_dtype)
    exchange.step()
    healthy = model_of(parameters)
    if rank == 1:
        parameters[where].data.view(-1)[0] = value
    broken = model_of(parameters)
    exchange.step()
    untouched = all(torch.equal(broken[n].nan_to_num(), v.nan_to_num()) for n, v in model_of(parameters).items())
    for name, parameter in parameters.items():
        parameter.data.copy_(healthy[name])
    exchange.step()
    (averaging,) = exchange._rounds
    finite = all(parameter.isfinite().all() for parameter in parameters.values())
    return untouched, finite, gather_equal(list(averaging.references.values()))


def test_ranks_that_begin_apart_have_one_reference(two_ranks):
    assert all(two_ranks.run(_begin_apart))


def _begin_apart() -> bool:
    parameters = parameters_of(ONE, lambda name: draw(name, ONE[name].shape, dist.get_rank()), torch.float32)
    (averaging,) = exchange_of(parameters)._rounds
    return gather_equal(list(averaging.references.values()))


def test_a_rank_alone_sends_nothing_and_stays(ranks):
    (run,) = ranks[1].run(average, rank=2)
    assert run.sent_bytes == [0] * 6
    assert all(
        torch.equal(before[n], after[n]) for before, after in zip(run.before, run.after, strict=True) for n in before
    )


def test_parameters_without_a_matrix_are_averaged_whole(two_ranks):
    for agree, first in two_ranks.run(_whole_alone):
        assert agree
        assert first == pytest.approx(0.5)


def _whole_alone() -> tuple[bool, float]:
    turn = nn.Parameter(torch.full((6,), float(dist.get_rank()), dtype=torch.complex64))
    exchange = exchange_of({"turn": turn, "bias": nn.Parameter(torch.full((3,), float(dist.get_rank())))})
    exchange.step()
    exchange.retire()
    return gather_equal([torch.view_as_real(turn)]), float(turn[0].real)


def test_a_run_goes_on_from_its_state_with_the_same_bits(two_ranks):
    assert all(two_ranks.run(_go_on))


def _go_on() -> bool:
    rank = dist.get_rank()

    def parameters() -> dict[str, Tensor]:
        return parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, 0), torch.float32)

    def steps(model: dict[str, Tensor], exchange: GossipExchange, numbers: range) -> None:
        for step in numbers:
            for name, parameter in model.items():
                parameter.data.copy_(changed(parameter.data, name, rank, step, 0.1))
            exchange.step()

    config = {"rank": 2, "comm_dtype": "int8"}
    whole = parameters()
    steps(whole, exchange_of(whole, **config), range(6))
    half = parameters()
    first = exchange_of(half, **config)
    steps(half, first, range(3))
    first.retire()
    second = exchange_of(half, **config)
    second.load_state_dict(first.state_dict())
    steps(half, second, range(3, 6))
    return all(torch.equal(whole[name], half[name]) for name in whole)


def test_references_of_other_shapes_are_left_out(two_ranks):
    assert all(two_ranks.run(_other_shapes))


def _other_shapes() -> bool:
    parameters = parameters_of(ONE, lambda name: draw(name, ONE[name].shape, 0), torch.float32)
    averaging: Averaging = exchange_of(parameters)._rounds[0]
    before = averaging.references["weight"].clone()
    averaging.load_state_dict({"rounds": 3, "references": {"weight": torch.ones(2, 2), "gone": torch.ones(1)}})
    return averaging.rounds == 3 and torch.equal(averaging.references["weight"], before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (2, 7)], ids=str)
def test_codes_are_right_to_half_a_level(bits, shape):
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor[-1] *= 1e-6
    found = _decode(_encode(factor, bits).unsqueeze(0), shape, bits)[0]
    level = factor.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((found - factor).abs() <= 0.5001 * level).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_of_zeros_are_zeros_and_of_what_is_not_finite_are_not(bits):
    factor = torch.tensor([[0.0, 0.0, 0.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
    found = _decode(_encode(factor, bits).unsqueeze(0), (3, 3), bits)[0]
    assert torch.equal(found[0], torch.zeros(3))
    assert not found[1].isfinite().all()
    assert not found[2].isfinite().all()


@pytest.mark.parametrize(
    ("config", "topology", "message"),
    [
        ({"comm_dtype": "int8"}, "ring", "`comm_dtype='int8'` is for `topology='all'` only"),
        ({"overlap": True}, "all", "`overlap=True` is not possible with `topology='all'`"),
    ],
)
def test_settings_that_do_not_suit_the_topology_are_refused(config, topology, message):
    with pytest.raises(ValueError, match=message):
        PowerGossipConfig(**config).require_possible(topology)


@pytest.mark.parametrize("comm_dtype", ["float16", torch.int8, "int2", 8])
def test_other_dtypes_are_refused(comm_dtype):
    with pytest.raises(ValueError, match="is none of 'int8', 'int4' and None"):
        PowerGossipConfig(comm_dtype=comm_dtype)
