"""One rank with NCCL that plays one of several: streams, bits, precision, memory, and what the host waits for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from handed import bits, draw, hand_over, make_exchange, one_of, pauses, places
from nets import attach, make_net
from ranks import counted_all_reduce
from torch import Tensor
from torch.utils._pytree import tree_map_only
from training import train, worst_deviation

pytestmark = pytest.mark.gpu

ALTERNATE = pytest.mark.parametrize("alternate", [False, True], ids=["full", "alternating"])
CONFIGS: list[dict[str, Any]] = [
    {"rank": 1},
    {"rank": 2},
    {"rank": 4, "alternate": True},
    {"rank": 8},
    {"comm_dtype": "bfloat16"},
    {"dtype": torch.bfloat16},
]


@ALTERNATE
@pytest.mark.parametrize("rank", [1, 4])
def test_nccl_averages_as_the_reference_does(ranks, device, rank, alternate):
    config = {"rank": rank, "alternate": alternate, "min_compression_ratio": 1.0}
    (found,) = ranks[1].run(_train_as_one_of_two, device, **config)
    for sent, counted, collectives in found["sent"]:
        assert sent == counted > 0
        assert collectives >= found["groups"]
    # The other rank has gradients and errors of zero. For the tolerance see `test_two_ranks`.
    silent = tree_map_only(Tensor, torch.zeros_like, found)
    assert worst_deviation([found, silent], resynchronise=True, **config) < 1e-4


def _train_as_one_of_two(device: str, **config: Any) -> dict[str, Any]:
    with one_of(2, device) as group:
        ddp = {"process_group": group}
        return train(steps=10, dtype=torch.float64, device=device, bucket_cap_mb=0.01, ddp=ddp, **config)


def test_a_run_of_several_ranks_goes_on_at_one(ranks, device):
    ((alone, before, after),) = ranks[1].run(_goes_on_alone, device)
    assert alone == [True, False]
    assert not torch.equal(before, after)


def _goes_on_alone(device: str) -> tuple[list[bool], Tensor, Tensor]:
    model, exchange = attach(make_net().to(device), ddp={"process_group": dist.group.WORLD})
    alone = [exchange.alone]
    exchange.state.total_sent_bytes = 1  # as the checkpoint of several ranks says
    alone.append(exchange.alone)
    x = torch.ones(4, 3, 8, 8, device=device)
    twin = make_net().to(device)
    for net in (model, twin):
        net(x).square().sum().backward()
    name = next(iter(exchange.state.errors))
    return alone, twin.get_parameter(name).grad.cpu(), model.module.get_parameter(name).grad.cpu()


# What the host waits for

UNASKED: list[dict[str, Any]] = [
    {},
    {"comm_dtype": "bfloat16"},
    {"comm_dtype": "float16"},
    {"comm_dtype": "int8"},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"error_dtype": "bfloat16"},
    {"error_feedback": False},
    {"follow": True},
    {"scaled": True},
    {"scaled": True, "comm_dtype": "int8"},
    {"warm_start": False},
    {"start_step": 99},
]


@pytest.mark.parametrize("settings", UNASKED, ids=str)
def test_the_host_waits_for_nothing_in_a_step(ranks, device, settings):
    assert ranks[1].run(_steps_without_waiting, device, **settings) == [True]


def _steps_without_waiting(device: str, scaled: bool = False, **settings: Any) -> bool:
    scaler = torch.amp.GradScaler(device) if scaled else None
    # Of four, among which integers are summed in one all-reduce.
    with one_of(4, device) as group:
        exchange = make_exchange(device, group, scaler=scaler, **settings)
        gradients = places(exchange)
        given = [[values.to(device) for values in draw(exchange, step)] for step in range(6)]
        for step, of_step in enumerate(given):
            if step == 3:  # what is made once is there
                torch.cuda.set_sync_debug_mode("error")
            try:
                hand_over(exchange, gradients, of_step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


# Streams


@pytest.mark.parametrize("settings", [{}, {"alternate": True}, {"comm_dtype": "int8", "world_size": 4}], ids=str)
def test_sleeping_streams_change_no_bit_in_twenty_runs(ranks, device, settings):
    assert ranks[1].run(_twenty_sleepy_runs, device, **settings) == [[True] * 20]


def _twenty_sleepy_runs(device: str, **settings: Any) -> list[bool]:
    # Several groups, so that collectives are under way while gradients come.
    awake = bits(device, group_bytes=2**14, **settings)
    equal = []
    for run in range(20):
        with pauses(run) as pause:
            equal.append(bits(device, group_bytes=2**14, pause=pause, **settings) == awake)
    return equal


@ALTERNATE
def test_sleeping_streams_change_no_bit_of_a_training_with_ddp(two_ranks, device, alternate):
    awake = two_ranks.run(train, steps=4, device=device, bucket_cap_mb=0.01, alternate=alternate)[0]["parameters"]
    for found in two_ranks.run(_sleepy_trainings, device, alternate):
        for parameters in found:
            assert all(torch.equal(parameters[name], values) for name, values in awake.items())


def _sleepy_trainings(device: str, alternate: bool) -> list[dict[str, Tensor]]:
    found = []
    for run in range(20):
        with pauses(run):
            found.append(train(steps=4, device=device, bucket_cap_mb=0.01, alternate=alternate)["parameters"])
    return found


# Bits


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_bit_depends_on_where_a_gradient_lies(ranks, device, config):
    aligned, *elsewhere = ranks[1].run(_at_offsets, device, config)[0]
    assert all(found == aligned for found in elsewhere)


def _at_offsets(device: str, config: dict[str, Any]) -> list[list[bytes]]:
    return [bits(device, offset=offset, **config) for offset in (0, 1, 2, 3, 5, 8)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_bit_depends_on_the_size_of_groups(ranks, device, config):
    together, *apart = ranks[1].run(_in_groups, device, config)[0]
    assert all(found == together for found in apart)


def _in_groups(device: str, config: dict[str, Any]) -> list[list[bytes]]:
    return [bits(device, group_bytes=size, **config) for size in (2**20, 2**16, 2**14, 1)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_no_bit_depends_on_what_a_program_asks_of_its_products(ranks, device, config):
    (found,) = ranks[1].run(_with_rounded_products, device, config)
    for setting, (equal, same) in found.items():
        assert equal, setting
        assert same, f"{setting} was not given back"


def _with_rounded_products(device: str, config: dict[str, Any]) -> dict[str, tuple[bool, bool]]:
    expected = bits(device, **config)
    found = {}
    for precision in ("high", "medium"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            equal = bits(device, **config) == expected
            found[precision] = equal, torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        found["allow_tf32"] = bits(device, **config) == expected, matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False
    with torch.autocast(device, torch.bfloat16):
        found["autocast"] = bits(device, **config) == expected, torch.is_autocast_enabled(device)
    return found


# Memory


@ALTERNATE
def test_a_step_holds_errors_and_needs_no_more_than_factors(ranks, device, alternate):
    ((held, peak, matrices),) = ranks[1].run(_memory_of_a_step, device, alternate)
    # Factors of rank 2 are a thousandth of these matrices. They are held, travel, and are float64 for a while.
    assert held <= 1.02 * matrices
    assert peak <= 0.02 * matrices


def _memory_of_a_step(device: str, alternate: bool) -> tuple[int, int, int]:
    sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    from memory import follow_allocations

    place = torch.device(device)
    made: list[Any] = []
    with one_of(2, device) as group:
        # A library's workspace is of this process, not of this exchange.
        first = make_exchange(device, group, [(2048, 2048)], alternate=alternate)
        for _ in range(2):
            hand_over(first, places(first), draw(first, 0))
        del first

        def make() -> None:
            made.append(make_exchange(device, group, [(2048, 2048)] * 4, alternate=alternate))

        held, _ = follow_allocations(make, place)
        (exchange,) = made
        matrices = sum(parameter.nbytes for parameter in exchange.parameters.values())
        gradients, given = places(exchange), [values.to(device) for values in draw(exchange, 0)]
        hand_over(exchange, gradients, given)
        hand_over(exchange, gradients, given)
        left, peak = follow_allocations(lambda: hand_over(exchange, gradients, given), place)
    assert left <= 0.001 * matrices
    # The parameters themselves are not the exchange's.
    return held - matrices, peak, matrices


def test_a_step_calls_the_process_group(ranks, device):
    ((calls, groups),) = ranks[1].run(_calls, device)
    assert calls == groups + 1


def _calls(device: str) -> tuple[int, int]:
    with one_of(2, device) as group, counted_all_reduce() as sent:
        exchange = make_exchange(device, group, group_bytes=2**14)
        hand_over(exchange, places(exchange), draw(exchange, 0))
        return len(sent), len(exchange.plan.groups)
