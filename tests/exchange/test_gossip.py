"""Tier two: gossip on real gloo ranks."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import networkx as nx
import pytest
import torch
import torch.distributed as dist
from cases import laid_out
from ranks import counted_sends
from reference import GossipReference
from torch import Tensor, nn

from lightning_powersgd import GossipExchange, PowerGossipConfig, consensus_distance, make_topology
from lightning_powersgd.compressor.basis import random_factor
from lightning_powersgd.exchange.averages import mean_over_ranks

# As in `test_faults`: most of a process's first seconds go into imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning.pytorch"])

CPU = torch.device("cpu")
NAMES = ("ring", "torus", "hypercube", "exponential", "star", "complete", "one_peer_exponential")


@dataclass(frozen=True)
class Kind:
    """What a parameter looks like."""

    shape: tuple[int, ...]
    layout: str = "contiguous"


# As in a net of convolutions, batch normalisation and linear layers.
MIXED = {
    "conv.weight": Kind((12, 4, 3, 3)),
    "conv.bias": Kind((12,)),
    "norm.weight": Kind((12,)),
    "last.weight": Kind((14, 5, 3, 2), "channels last"),
    "transposed.weight": Kind((20, 33), "transposed"),
    "linear.weight": Kind((24, 15)),
    "scale": Kind(()),
    "none": Kind((0, 4)),
}
ONE = {"weight": Kind((12, 15))}


def draw(name: str, shape: tuple[int, ...], rank: int, step: int = -1) -> Tensor:
    """Draw what a parameter is, or what a step adds to it, on a rank."""
    seed = 10_000 * rank + 100 * (step + 1) + len(name)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed(value: Tensor, name: str, rank: int, step: int, size: float) -> Tensor:
    """What an optimizer's step makes of a parameter, by the data of a rank and by the parameter itself."""
    if not size:
        return value
    return value + size * (draw(name, tuple(value.shape), rank, step).to(value.dtype) + torch.sin(3 * value))


@dataclass
class Run:
    """What one rank saw: its model before and after each step, by name and in float64."""

    before: list[dict[str, Tensor]] = field(default_factory=list)
    after: list[dict[str, Tensor]] = field(default_factory=list)
    factors: dict[tuple[int, int, str, str], Tensor] = field(default_factory=dict)
    drained: dict[str, Tensor] = field(default_factory=dict)


def parameters_of(kinds: dict[str, Kind], values: Callable[[str], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    made = {name: laid_out(values(name).to(dtype), kind.layout) for name, kind in kinds.items()}
    return {name: nn.Parameter(value) for name, value in made.items()}


def model_of(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().double().clone() for name, parameter in parameters.items()}


def gossip(
    topology: Any = "ring",
    steps: int = 6,
    dtype: torch.dtype = torch.float64,
    kinds: dict[str, Kind] = MIXED,
    size: float = 0.1,
    values: Callable[[int, str], Tensor] | None = None,
    **config: Any,
) -> Run:
    """Gossip for some steps on this rank, with changes of a size between them."""
    rank, run = dist.get_rank(), Run()
    own = values or (lambda rank, name: draw(name, kinds[name].shape, rank))
    parameters = parameters_of(kinds, lambda name: own(rank, name), dtype)
    config = {"min_compression_ratio": 1.0, **config}
    exchange = GossipExchange(
        parameters.items(), make_topology(topology, dist.get_world_size()), PowerGossipConfig(**config)
    )
    for step in range(steps):
        for name, parameter in parameters.items():
            parameter.data.copy_(changed(parameter.data, name, rank, step, size))
        run.before.append(model_of(parameters))
        exchange.step()
        run.after.append(model_of(parameters))
    exchange.finish()
    run.drained = model_of(parameters)
    run.factors = factors_of(exchange)
    return run


def factors_of(exchange: GossipExchange) -> dict[tuple[int, int, str, str], Tensor]:
    """Give the factors that this rank remembers, by the link's ends, the parameter and the side."""
    rank = dist.get_rank()
    return {
        (min(rank, peer), max(rank, peer), name, side): factors[row]
        for links in exchange._rounds
        for mailbox in links._mailboxes
        for name, sides in mailbox.factors.items()
        for side, factors in sides.items()
        for row, peer in enumerate(links._peers)
    }


def simulate(
    world_size: int, topology: Any, steps: int, kinds: dict[str, Kind] = MIXED, size: float = 0.1, **config: Any
) -> list[list[dict[str, Tensor]]]:
    """What the reference makes of the same run: the models of all ranks after each step, and when all has arrived."""
    settings = PowerGossipConfig(**{"min_compression_ratio": 1.0, **config})
    rounds = list(make_topology(topology, world_size).rounds)
    layouts = parameters_of(kinds, lambda name: torch.zeros(kinds[name].shape), torch.float64)
    slots = {slot.name: slot for slot in settings.plan(layouts.items()).slots}
    found: list[list[dict[str, Tensor]]] = [[{} for _ in range(world_size)] for _ in range(steps + 1)]
    for name, kind in kinds.items():
        slot = slots[name]
        order = slot.order or tuple(range(len(kind.shape)))
        back = sorted(range(len(order)), key=lambda axis, order=order: order[axis])

        def first_factor(i: int, j: int, slot: Any = slot) -> Tensor:
            return random_factor(f"{settings.seed}/{i}-{j}/{slot.name}/right", slot.rank, slot.columns).T

        def trace(side: Any, slot: Any = slot) -> Tensor:
            return 1e-9 * random_factor(f"{settings.seed}/{slot.name}/{side}", slot.rank, slot.length(side)).T

        traces = (trace("right"), trace("left")) if slot.rank else None
        reference = GossipReference(first_factor if slot.rank else None, rounds, traces)
        values = [draw(name, kind.shape, rank) for rank in range(world_size)]
        add = [torch.zeros_like(x) for x in values]
        for step in range(steps):
            values = [changed(x, name, rank, step, size) for rank, x in enumerate(values)]
            for _ in range(settings.iterations):
                values = [x + a for x, a in zip(values, add, strict=True)]
                matrices = [x.permute(order).flatten(1) if slot.rank else x for x in values]
                shape = values[0].permute(order).shape
                moves = reference(matrices, step % len(rounds))
                add = [a.view(shape).permute(back) if slot.rank else a for a in moves]
            if not settings.overlap:
                values = [x + a for x, a in zip(values, add, strict=True)]
                add = [torch.zeros_like(x) for x in values]
            for rank, x in enumerate(values):
                found[step][rank][name] = x
        for rank in range(world_size):
            found[steps][rank][name] = values[rank] + add[rank]
    return found


def worst_deviation(runs: list[Run], expected: list[list[dict[str, Tensor]]]) -> float:
    """The largest deviation of any parameter from the reference, at any step, relative to its norm."""
    worst = 0.0
    for step, models in enumerate(expected):
        for run, model in zip(runs, models, strict=True):
            found = run.after[step] if step < len(run.after) else run.drained
            for name, value in model.items():
                worst = max(worst, float((found[name] - value).norm() / (value.norm() + 1e-30)))
    return worst


CASES = [
    (4, "ring", {"rank": 1}),
    (4, "ring", {"rank": 2, "overlap": True}),
    (4, "ring", {"rank": 2, "iterations": 3}),
    (4, "ring", {"rank": 1, "iterations": 2, "overlap": True}),
    (4, "star", {"rank": 2}),
    (4, "star", {"rank": 4, "iterations": 2}),
    (3, "complete", {"rank": 4}),
    (3, [[0, 1], [1, 2]], {"rank": {"conv.*": 3, "linear.*": 0, "*": 1}, "seed": 5}),
    (4, "one_peer_exponential", {"rank": 2}),
    (4, "one_peer_exponential", {"rank": 1, "iterations": 2, "overlap": True}),
    (2, "ring", {"rank": 4}),
    (2, "ring", {"rank": 2, "min_compression_ratio": 4.0, "iterations": 2}),
]


@pytest.mark.parametrize(("world_size", "topology", "config"), CASES, ids=str)
def test_every_step_equals_the_reference_in_float64(ranks, world_size, topology, config):
    runs = ranks[world_size].run(gossip, topology, **config)
    expected = simulate(world_size, topology, 6, **config)
    # Rounding is 1e-16; a basis whose rows are nearly dependent amplifies it by up to four digits (1e-12 was seen).
    assert worst_deviation(runs, expected) < 1e-10


@pytest.mark.parametrize(("world_size", "topology", "config"), CASES[1:10:3], ids=str)
def test_every_step_equals_the_reference_in_float32(ranks, world_size, topology, config):
    runs = ranks[world_size].run(gossip, topology, dtype=torch.float32, **config)
    # The same amplification of 6e-8.
    assert worst_deviation(runs, simulate(world_size, topology, 6, **config)) < 1e-3


def test_the_reference_would_notice_another_basis(two_ranks):
    runs = two_ranks.run(gossip, "ring", rank=2, seed=1)
    assert worst_deviation(runs, simulate(2, "ring", 6, rank=2, seed=2)) > 1e-3


# The mean of the models


def check_mean(runs: list[Run], tolerance: float) -> None:
    """Check that no step has moved the mean of the models by more than its rounding."""
    for step in range(len(runs[0].before)):
        for name in runs[0].before[step]:
            before = torch.stack([run.before[step][name] for run in runs])
            after = torch.stack([run.after[step][name] for run in runs])
            assert not torch.equal(before, after) or not before.numel() or len(runs) == 1, "nothing was exchanged"
            deviation = (before.mean(dim=0) - after.mean(dim=0)).norm()
            assert deviation <= tolerance * before.norm(), f"{name} in step {step}"


# Rounding of a few additions.
ROUNDING = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("overlap", [False, True], ids=["at once", "overlapping"])
@pytest.mark.parametrize("topology", ["star", "one_peer_exponential"])
def test_the_mean_of_the_models_stays(four_ranks, topology, overlap, dtype):
    # Shapes without an even number in them, so that the parts of a mailbox lie at any place in memory.
    kinds = {"a": Kind((13, 17)), "b": Kind((7,)), "c": Kind((9, 11), "transposed"), "d": Kind((19, 21))}
    config = {"overlap": overlap, "iterations": 2, "rank": {"a": 1, "*": 3}}
    check_mean(four_ranks.run(gossip, topology, kinds=kinds, dtype=dtype, **config), ROUNDING[dtype])


def test_differences_of_a_low_rank_leave_the_mean_and_both_ends_alike(four_ranks):
    """Below the rank of the factors, rounding alone chooses what completes a basis: it must choose alike at both ends.

    The ends of a link keep its factors at different places in memory, where BLAS may round otherwise.
    """
    runs = four_ranks.run(_gossip_a_line)
    check_mean(runs, ROUNDING[torch.float32])
    check_ends(runs)
    for run in runs:
        assert all(value.isfinite().all() for model in run.after for value in model.values())


def _gossip_a_line() -> Run:
    def line(rank: int, name: str) -> Tensor:
        n, m = kinds[name].shape
        return 100 * draw(name, (n, m), 7) + rank * torch.outer(draw(name, (n,), 8), draw(name, (m,), 9))

    kinds = {f"{'w' * k}": Kind((11 + 2 * k, 12 + 5 * k)) for k in range(1, 9)}
    return gossip("star", steps=12, dtype=torch.float32, kinds=kinds, size=0, values=line, rank=3)


@pytest.mark.parametrize("difference", ["one row", "two rows", "a line", "full"])
def test_ends_with_unlike_processors_find_the_same_basis(two_ranks, difference):
    """One end rounds otherwise, and its library gives a basis other signs."""
    runs = two_ranks.run(_gossip_on_another_processor, difference)
    first, last = sum(run.before[0]["weight"] for run in runs), sum(run.after[-1]["weight"] for run in runs)
    assert (last - first).norm() < 1e-5 * first.norm()
    apart = distances(runs)
    assert all(after < before + 1e-4 for before, after in itertools.pairwise(apart))
    assert apart[-1] < 0.01 * apart[0]


def _gossip_on_another_processor(difference: str) -> Run:
    def values(rank: int, name: str) -> Tensor:
        own = draw(name, ONE[name].shape, rank)
        kept = {"one row": own[3:4], "two rows": own[3:5], "a line": own[:, :1] @ own[:1], "full": own}[difference]
        return draw(name, ONE[name].shape, 7) + torch.cat((kept, torch.zeros_like(own)))[: len(own)]

    original = torch.linalg.qr

    def qr(matrix: Tensor, mode: str) -> Any:
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
        basis, triangle = original(matrix * (1 + torch.finfo(matrix.dtype).eps * noise), mode=mode)
        signs = torch.tensor([-1.0, 1.0, -1.0], dtype=matrix.dtype)[: matrix.shape[1]]
        return torch.return_types.linalg_qr((basis * signs, triangle * signs[:, None]))

    with mock.patch.object(torch.linalg, "qr", qr) if dist.get_rank() else contextlib.nullcontext():
        return gossip(steps=30, dtype=torch.float32, kinds=ONE, size=0, values=values, rank=3)


def check_ends(runs: list[Run]) -> None:
    """Check that both ends of every link remember the same factors, bit for bit."""
    links = [link for rank, run in enumerate(runs) for link in run.factors if link[0] == rank]
    assert links
    for link in links:
        i, j = link[:2]
        assert torch.equal(runs[i].factors[link], runs[j].factors[link]), link


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_both_ends_of_a_link_remember_the_same_factors(four_ranks, dtype):
    config = {"rank": 3, "dtype": dtype, "steps": 25}
    check_ends(four_ranks.run(gossip, [[0, 1], [0, 2], [0, 3], [2, 3]], **config))


# How fast models agree


def distances(runs: list[Run]) -> list[float]:
    """How far the models are from their mean, before and after every step."""
    models = [[run.before[0], *run.after] for run in runs]
    found = []
    for step in range(len(models[0])):
        flat = torch.stack([torch.cat([v.flatten() for v in model[step].values()]) for model in models])
        found.append(float((flat - flat.mean(dim=0)).norm()))
    return found


def slope(values: list[float]) -> float:
    """The slope of the logarithms of values, which must lie on a line."""
    logs = torch.tensor(values, dtype=torch.float64).log()
    steps = torch.arange(len(logs), dtype=torch.float64) - (len(logs) - 1) / 2
    rate = float((steps * logs).sum() / (steps * steps).sum())
    assert float((logs - logs.mean() - rate * steps).abs().max()) < 0.15, "not a line: not a linear rate"
    return rate


@pytest.mark.parametrize("rank", [{"*": 0}, 12], ids=["rank 0", "a rank above the dimensions"])
@pytest.mark.parametrize("topology", NAMES)
def test_whole_models_agree_as_the_mixing_matrix_says(eight_ranks, topology, rank):
    runs = eight_ranks.run(gossip, topology, steps=7, kinds=ONE, size=0, rank=rank)
    made = make_topology(topology, 8)
    expected = torch.stack([run.before[0]["weight"] for run in runs])
    for step in range(7):
        expected = torch.einsum("ij,jnm->inm", made.rounds[step % len(made.rounds)], expected)
        found = torch.stack([run.after[step]["weight"] for run in runs])
        # Some sums of float64.
        assert (found - expected).abs().max() < 1e-14 * 8
    apart = distances(runs)
    bound = apart[0] * (1 - made.spectral_gap) ** 6
    assert apart[6] <= bound * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("topology", ["ring", "star", "complete"])
def test_low_ranks_agree_at_a_linear_rate_between_two_bounds(eight_ranks, topology):
    apart = distances(eight_ranks.run(gossip, topology, steps=30, kinds=ONE, size=0, rank=2))
    assert all(after < before for before, after in itertools.pairwise(apart))
    gap = make_topology(topology, 8).spectral_gap
    # No faster than with whole models; and no slower than with a random one of the 12 dimensions for each of the rank,
    # since the power method finds larger ones.
    assert math.log(max(1 - gap, 1e-9)) < slope(apart[10:]) < math.log(1 - gap * 2 / 12)


def test_one_peer_at_a_time_agrees_at_a_linear_rate(eight_ranks):
    apart = distances(eight_ranks.run(gossip, "one_peer_exponential", steps=30, kinds=ONE, size=0, rank=2))
    assert all(after < before for before, after in itertools.pairwise(apart))
    # A third of the links of a hypercube in a step, of which each finds two of twelve dimensions; or at least half.
    assert slope(apart[12:]) < math.log(1 - 2 / 12) / 6


def test_more_rank_and_more_iterations_agree_sooner(eight_ranks):
    settings = [{"rank": 1}, {"rank": 2}, {"rank": 4}, {"rank": 2, "iterations": 2}]
    one, two, four, twice = (
        distances(eight_ranks.run(gossip, "ring", steps=20, kinds=ONE, size=0, **config))[-1] for config in settings
    )
    # Half of the 12 dimensions more is seen at once.
    assert four < 0.7 * two < 0.7 * 0.9 * one
    assert twice < 0.7 * two


@pytest.mark.parametrize("topology", ["star", "complete"])
def test_differences_of_the_factors_rank_agree_as_fast_as_whole_models(eight_ranks, topology):
    apart = distances(eight_ranks.run(_gossip_multiples, topology))
    gap = make_topology(topology, 8).spectral_gap
    if gap == 1:
        # The second step has the differences' columns, all of them but for the trace that is added to these.
        assert apart[2] < 1e-8 * apart[0]
        assert apart[4] < 1e-12 * apart[0]
    else:
        # Full differences come to a sixth of that.
        assert slope(apart[4:]) < 0.9 * math.log(1 - gap)


def _gossip_multiples(topology: str) -> Run:
    def multiples(rank: int, name: str) -> Tensor:
        return draw(name, (12, 15), 7) + (rank**2 - 9) * draw(name, (12, 2), 8) @ draw(name, (2, 15), 9)

    return gossip(topology, steps=14, kinds=ONE, size=0, values=multiples, rank=2)


# Equal models, and such as are not finite


def test_equal_models_stay_and_what_parts_them_later_is_found(four_ranks):
    for kept, finite, apart in four_ranks.run(_part_later):
        # Products may round otherwise at either end of a link.
        assert kept < 1e-5
        assert finite
        assert apart[1] < 0.01 * apart[0]


def _part_later() -> tuple[float, bool, list[float]]:
    parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, 0), torch.float32)
    first = model_of(parameters)
    exchange = GossipExchange(parameters.items(), make_topology("star", 4), PowerGossipConfig(rank=2))
    for _ in range(5):
        exchange.step()
    kept = max(float((first[name] - value).norm()) for name, value in model_of(parameters).items())
    apart = []
    for name, parameter in parameters.items():
        parameter.data += draw(name, tuple(parameter.shape), dist.get_rank(), 1).float()
    apart.append(float(consensus_distance(parameters)))
    for _ in range(150):
        exchange.step()
    apart.append(float(consensus_distance(parameters)))
    return kept, all(p.isfinite().all() for p in parameters.values()), apart


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["linear.weight", "conv.bias"], ids=["of a factor", "sent whole"])
def test_a_model_that_is_not_finite_stays_alone_until_it_is(four_ranks, where, value):
    results = four_ranks.run(_break_and_heal, where, value)
    for rank, (finite, before, after, healed) in enumerate(results):
        assert finite == (rank != 1)
        # The others go on, around it.
        assert after < 0.7 * before
        assert healed < 0.5 * before


def _break_and_heal(where: str, value: float) -> tuple[bool, float, float, float]:
    others = dist.new_group([0, 2, 3])
    rank = dist.get_rank()
    parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, rank), torch.float32)
    exchange = GossipExchange(parameters.items(), make_topology("ring", 4), PowerGossipConfig(rank=2, iterations=2))
    exchange.step()
    before = float(consensus_distance(parameters))
    if rank == 1:
        parameters[where].data.view(-1)[3] = value
    for _ in range(20):
        exchange.step()
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters.values())
    after = torch.zeros(()) if rank == 1 else consensus_distance(parameters, others)
    if rank == 1:
        parameters[where].data.view(-1)[3] = 0.0
    for _ in range(20):
        exchange.step()
    return finite, before, float(after), float(consensus_distance(parameters))


# What travels


@pytest.mark.parametrize("overlap", [False, True], ids=["at once", "overlapping"])
@pytest.mark.parametrize("topology", ["ring", "star", "one_peer_exponential"])
def test_the_bytes_are_those_that_are_sent(four_ranks, topology, overlap):
    for degree, steps, dense in four_ranks.run(_count_bytes, topology, overlap):
        total = 0
        for sent, exchange in steps:
            assert len(sent) == degree
            assert len(set(sent.values())) == 1, "every link carries the same"
            total += sum(sent.values())
            assert exchange == (sum(sent.values()), next(iter(sent.values())), degree * dense, total)


def _count_bytes(topology: str, overlap: bool) -> tuple[int, list[Any], int]:
    rank = dist.get_rank()
    parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, rank), torch.float32)
    parameters["half"] = nn.Parameter(torch.randn(20, 20, dtype=torch.bfloat16))
    made = make_topology(topology, 4)
    exchange = GossipExchange(parameters.items(), made, PowerGossipConfig(rank=2, iterations=3, overlap=overlap))
    steps = []
    for _ in range(4):
        with counted_sends() as sent:
            exchange.step()
        found = (exchange.sent_bytes, exchange.link_bytes, exchange.dense_bytes, exchange.total_sent_bytes)
        steps.append((dict(sent), found))
    exchange.finish()  # the memory that a message is on its way to must not be gone when it comes
    dense = sum(parameter.nbytes for parameter in parameters.values())
    return len(made.neighbors(rank)[0]), steps, dense


def test_the_summary_says_what_a_link_carries():
    parameters = parameters_of(MIXED, lambda name: torch.zeros(MIXED[name].shape), torch.float32)
    text = PowerGossipConfig(rank=2, min_compression_ratio=1.0, iterations=2).summary(parameters.items())
    # Columns and rows of the three that are compressed, in turn; and the biases and the like, whole.
    factors = 2 * (12 + 36 + 14 + 30 + 20 + 33 + 24 + 15) * 4
    dense = sum(parameter.nbytes for parameter in parameters.values())
    sent = factors + 2 * (12 + 12 + 1) * 4
    assert text == (
        f"PowerGossip compresses 4 of 8 trainable parameters: over each link go {sent / 1e6:,.3f} MB a step instead of"
        f" {dense / 1e6:,.2f} MB ({dense / sent:,.1f}×)"
    )


def test_finish_lets_what_is_under_way_take_effect_once(two_ranks):
    for early, late, again, sent in two_ranks.run(_finish):
        assert early == 0, "what a step sends takes effect with the next one"
        assert late > 0
        assert again == 0
        assert not sent


def _finish() -> tuple[float, float, float, dict[int, int]]:
    parameters = parameters_of(ONE, lambda name: draw(name, (12, 15), dist.get_rank()), torch.float32)
    exchange = GossipExchange(parameters.items(), make_topology("ring", 2), PowerGossipConfig(overlap=True))
    seen = [model_of(parameters)]
    with counted_sends():
        exchange.step()
    seen.append(model_of(parameters))
    with counted_sends() as sent:
        exchange.finish()
        seen.append(model_of(parameters))
        exchange.finish()
        seen.append(model_of(parameters))
    moved = [float((b["weight"] - a["weight"]).norm()) for a, b in itertools.pairwise(seen)]
    return moved[0], moved[1], moved[2], sent


# Graphs


def random_graph(seed: int) -> tuple[list[int], nx.Graph]:
    """Four to eight of eight ranks, and a connected graph of them."""
    generator = torch.Generator().manual_seed(seed)
    size = 4 + seed % 5
    members = sorted(torch.randperm(8, generator=generator)[:size].tolist())
    graph = nx.empty_graph(size)
    for rank in range(1, size):
        graph.add_edge(rank, int(torch.randint(rank, (), generator=generator)))
    for a, b in torch.randint(size, (seed % 7, 2), generator=generator).tolist():
        graph.add_edges_from([(a, b)] if a != b else [])
    return members, graph


def test_random_graphs_of_some_of_the_ranks_neither_wait_for_ever_nor_move_the_mean(eight_ranks):
    for results in eight_ranks.run(_gossip_on_graphs, 12):
        assert len(results) > 3
        for mean, apart in results:
            assert mean < 1e-6
            assert apart[1] < apart[0]


def _gossip_on_graphs(number: int) -> list[tuple[float, list[float]]]:
    results = []
    for seed in range(number):
        members, graph = random_graph(seed)
        group = dist.new_group(members)
        if dist.get_rank() not in members:
            continue
        parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, dist.get_rank()), torch.float32)
        config = PowerGossipConfig(rank=1 + seed % 3, iterations=1 + seed % 2, overlap=bool(seed % 4))
        exchange = GossipExchange(parameters.items(), make_topology(graph, len(members)), config, process_group=group)
        means, apart = [], []
        for steps in (0, 6):
            for _ in range(steps):
                exchange.step()
            exchange.finish()
            means.append(torch.cat([mean.flatten() for _, mean in mean_over_ranks(parameters, CPU, group)]))
            apart.append(float(consensus_distance(parameters, group)))
        results.append((float((means[1] - means[0]).abs().max()), apart))
    return results


# Parameters of all sorts


def test_parameters_of_several_dtypes_gossip_beside_each_other(two_ranks):
    for apart, unchanged in two_ranks.run(_mixed_dtypes):
        assert all(later < 0.02 * sooner for sooner, later in apart.values()), apart
        assert unchanged


def _mixed_dtypes() -> tuple[dict[str, tuple[float, float]], bool]:
    def values(name: str) -> Tensor:
        return draw(name, (12, 15), dist.get_rank())

    dtypes = {"double": torch.float64, "single": torch.float32, "bf": torch.bfloat16, "complex": torch.complex64}
    parameters = {name: nn.Parameter(values(name).to(dtype)) for name, dtype in dtypes.items()}
    parameters["frozen"] = nn.Parameter(values("frozen"), requires_grad=False)
    exchange = GossipExchange(parameters.items(), make_topology("ring", 2), PowerGossipConfig(rank=2))
    assert set(exchange.parameters) == set(dtypes)
    before = {name: float(consensus_distance({name: parameters[name]})) for name in dtypes}
    for _ in range(60):
        exchange.step()
    after = {name: float(consensus_distance({name: parameters[name]})) for name in dtypes}
    unchanged = torch.equal(parameters["frozen"], values("frozen"))
    return {name: (before[name], after[name]) for name in dtypes}, unchanged


def test_only_the_parameters_that_are_asked_for_take_part(two_ranks):
    assert two_ranks.run(_among) == [(["a"], True, False)] * 2


def _among() -> tuple[list[str], bool, bool]:
    parameters = {name: nn.Parameter(draw(name, (12, 15), dist.get_rank())) for name in ("a", "bb", "ccc")}
    parameters["ccc"].requires_grad_(False)
    among = [parameters["a"], parameters["ccc"]]
    config = PowerGossipConfig(rank={"bb": 2, "*": 1})
    exchange = GossipExchange(parameters.items(), make_topology("ring", 2), config, among)
    exchange.step()
    left_alone = all(torch.equal(parameters[name], draw(name, (12, 15), dist.get_rank())) for name in ("bb", "ccc"))
    assert exchange.is_among(reversed(among))
    return list(exchange.parameters), left_alone, exchange.is_among(parameters.values())


def test_a_rank_alone_has_nobody_to_talk_to(ranks):
    assert ranks[1].run(_alone) == [(True, 0, 0, 0)]


def _alone() -> tuple[bool, int, int, int]:
    parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, 0), torch.float32)
    before = model_of(parameters)
    exchange = GossipExchange(parameters.items(), make_topology("ring", 1), PowerGossipConfig(rank=2, overlap=True))
    for _ in range(3):
        exchange.step()
    exchange.finish()
    same = all(torch.equal(before[name], value) for name, value in model_of(parameters).items())
    return same, exchange.sent_bytes, exchange.link_bytes, exchange.dense_bytes


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank=0` is below 1"),
        ({"rank": {"*": -1}}, ValueError, r"`rank\['\*'\]=-1` is below 0"),
        ({"rank": "auto"}, TypeError, "`rank='auto'` is not an integer"),
        ({"rank": {"*": "auto"}}, TypeError, "`rank='auto'` is not an integer"),
        ({"rank": "2"}, TypeError, "`rank='2'` is not an integer"),
        ({"iterations": 0}, ValueError, "`iterations=0` is below 1. Use 1 for one round"),
        ({"iterations": 2.0}, TypeError, "`iterations=2.0` is not an integer"),
        ({"min_compression_ratio": 0.9}, ValueError, "`min_compression_ratio=0.9` is below 1"),
        ({"overlap": 1}, TypeError, "`overlap=1` is not a bool. Use True or False"),
        ({"seed": -1}, ValueError, "`seed=-1` is below 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        PowerGossipConfig(**config)


@pytest.mark.parametrize(
    ("size", "rank", "message"),
    [
        (3, 1, "The topology 'ring' has 3 ranks, but 2 are running. Make it for 2"),
        (2, {"decoder.*": 2}, "`rank` has the pattern 'decoder.*', which matches no parameter"),
    ],
)
def test_an_exchange_that_does_not_fit_is_refused(two_ranks, size, rank, message):
    for text in two_ranks.run_to_errors(_misfit, size, rank):
        assert message in text


def _misfit(size: int, rank: Any) -> None:
    parameters = parameters_of(ONE, lambda name: torch.zeros(12, 15), torch.float32)
    GossipExchange(parameters.items(), make_topology("ring", size), PowerGossipConfig(rank=rank))


# How far models are apart


def test_the_distance_is_that_to_the_mean_and_a_sketch_comes_close(ranks):
    runs = ranks[3].run(_measure)
    models = [torch.cat([value.flatten() for value in model.values()]) for model, _ in runs]
    flat = torch.stack(models)
    expected = float((flat - flat.mean(dim=0)).norm()) / math.sqrt(3)
    for _, found in runs:
        assert found["exact"] == pytest.approx(expected, rel=1e-6)
        # The squared length of one sketch has a standard deviation of √(2 / 1024), and the distance half of that.
        assert found["sketch"] == pytest.approx(expected, rel=4 * 0.022)
        assert found["half"] == pytest.approx(2**-7 * math.sqrt(2 / 9), rel=1e-6)
        assert found["equal"] < 1e-12
        assert found["equal sketch"] < 1e-12
    assert runs[0][1] == runs[1][1] == runs[2][1]


def _measure() -> tuple[dict[str, Tensor], dict[str, float]]:
    rank = dist.get_rank()
    shapes = {"a": (40, 30), "bb": (7,), "ccc": (3, 5, 2, 2), "dddd": (), "eeeee": (0, 3), "ffffff": (1500,)}
    parameters = {name: nn.Parameter(draw(name, shape, rank).float()) for name, shape in shapes.items()}
    same = {name: nn.Parameter(draw(name, shape, 0).float()) for name, shape in shapes.items()}
    # A mean between two numbers of this dtype.
    half = {"half": torch.tensor([1.0 + 2**-7 * (rank == 2), 5.0]).bfloat16()}
    found = {
        "exact": consensus_distance(parameters),
        "sketch": consensus_distance(parameters, exact=False),
        "half": consensus_distance(half),
        "equal": consensus_distance(same),
        "equal sketch": consensus_distance(same, exact=False),
    }
    return model_of(parameters), {name: float(value) for name, value in found.items()}


def test_sketches_are_right_on_average(two_ranks):
    ratios = two_ranks.run(_sketch_often, 12)[0]
    # Of two ranks, both have the same distance to the mean: 2.2 % of each, and a fourth of that of a dozen's mean.
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.03)
    assert all(ratio == pytest.approx(1.0, abs=4 * 0.022) for ratio in ratios)


def _sketch_often(number: int) -> list[float]:
    ratios = []
    for index in range(number):
        model = {"a": draw("a", (50, 40 + index), dist.get_rank(), index), "b": draw("b", (9,), dist.get_rank(), index)}
        ratios.append(float(consensus_distance(model, exact=False) / consensus_distance(model)))
    return ratios


# Ranks that do not come


def test_a_neighbour_that_does_not_come_in_time_is_named(ranks):
    waiting, late, beside = ranks[3].run(_come_late)
    assert not late
    for text, rank, peer in ((waiting, 0, "1"), (beside, 2, "1")):
        assert f"Rank {rank} could not gossip with its neighbours ({peer}). One of them has ended, or has not" in text
        assert "within the `timeout`. Look for the first error in the logs of all ranks. The reason given here" in text


def _come_late() -> str:
    group, text = dist.new_group(timeout=timedelta(seconds=3)), ""
    parameters = parameters_of(ONE, lambda name: draw(name, (12, 15), dist.get_rank()), torch.float32)
    topology = make_topology([[0, 1], [1, 2]], 3)
    exchange = GossipExchange(parameters.items(), topology, PowerGossipConfig(), process_group=group)
    exchange.step()
    dist.barrier()
    if dist.get_rank() != 1:
        with pytest.raises(RuntimeError) as caught:
            exchange.step()
        assert exchange.exchanging
        text = str(caught.value)
    dist.barrier()
    return text


def test_when_a_rank_ends_its_neighbours_do_with_a_reason(tmp_path):
    processes = [SERVER.Process(target=_end, args=(rank, str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 3, 0]
    for rank in (0, 2):
        text = (tmp_path / f"rank{rank}.txt").read_text()
        assert f"Rank {rank} could not gossip with its neighbours" in text
        assert "One of them has ended" in text


def _end(rank: int, folder: str) -> None:
    """Gossip on a ring of three, of which rank 1 ends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3)
    parameters = parameters_of(MIXED, lambda name: draw(name, MIXED[name].shape, rank), torch.float32)
    exchange = GossipExchange(parameters.items(), make_topology("ring", 3), PowerGossipConfig(rank=2))
    try:
        for step in range(100):
            if step == 4 and rank == 1:
                os._exit(3)
            exchange.step()
    except RuntimeError as error:
        Path(folder, f"rank{rank}.txt").write_text(str(error))
    os._exit(0)
