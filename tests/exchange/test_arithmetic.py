"""Tier one: the arithmetic of a step, measured."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_powersgd import PowerSGDConfig, forecast_exchange, make_plan
from lightning_powersgd.exchange import arithmetic


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.float32),
        ({"alternate": True, "start_step": 3}, torch.float32),
        ({"rank": {"*2.weight": 0, "*": 4}, "error_feedback": False}, torch.float32),
        ({"comm_dtype": "float16", "error_dtype": "bfloat16"}, torch.float32),
        ({}, torch.bfloat16),
        ({}, torch.float16),
    ],
)
def test_measuring_goes_through_the_exchange_of_training(config, dtype):
    module = nn.Sequential(*[nn.Linear(60, 60) for _ in range(3)]).to(dtype)
    result = forecast_exchange(module, PowerSGDConfig(**{"rank": 2, **config}), device="cpu")
    assert result.compress_seconds > 0
    assert result.measured_on == "this CPU with 1 thread"


@pytest.mark.parametrize("limit", ["_MOST_BYTES", "_MOST_OPERATIONS"])
def test_a_large_model_is_measured_in_part(monkeypatch, limit):
    # Every look at the clock is a second later than the last, so two steps of any size take a second.
    monkeypatch.setattr(arithmetic.time, "perf_counter", itertools.count().__next__)
    module = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)], nn.Linear(64, 256, bias=False))
    plan, config, device = (
        make_plan(module.named_parameters(), PowerSGDConfig(rank=2)),
        PowerSGDConfig(rank=2),
        torch.device("cpu"),
    )
    whole = arithmetic.measure_compression(plan, config, device)
    assert whole == 0.5
    costs = {"_MOST_BYTES": 2 * plan.dense_bytes, "_MOST_OPERATIONS": 12 * plan.dense_bytes // 4}
    # Half: two matrices of four, and half the rows of the last.
    monkeypatch.setattr(arithmetic, limit, costs[limit] // 2)
    assert arithmetic.measure_compression(plan, config, device) == 2 * whole
    # However little it may be, every shape is there, with rows enough to be compressed.
    monkeypatch.setattr(arithmetic, limit, 1)
    assert arithmetic.measure_compression(plan, config, device) > 10 * whole


def test_of_a_narrow_matrix_enough_is_measured(monkeypatch):
    monkeypatch.setattr(arithmetic, "_MOST_BYTES", 1)
    config = PowerSGDConfig(rank=4, min_compression_ratio=1.0)
    # Its factors are smaller than itself from 20 rows on.
    assert forecast_exchange(nn.Linear(5, 1000, bias=False), config, device="cpu").compress_seconds > 0


def test_casts_are_measured_on_a_bucket_of_each_dtype(monkeypatch):
    # As above: the casts of any bucket take a second.
    monkeypatch.setattr(arithmetic.time, "perf_counter", itertools.count().__next__)
    monkeypatch.setattr(arithmetic, "DEFAULT_GROUP_BYTES", 4000)
    module = nn.ParameterList([torch.empty(1500), torch.empty(1000), torch.empty(50, dtype=torch.float64)])
    slots = make_plan(module.named_parameters(), PowerSGDConfig()).slots
    assert arithmetic.measure_casts(slots, torch.device("cpu")) == 2.5 + 1
    assert arithmetic.measure_casts([], torch.device("cpu")) == 0
    # Vectors only: nothing is compressed, and the hook casts all the same.
    assert forecast_exchange(module, device="cpu").cast_seconds == 3.5
