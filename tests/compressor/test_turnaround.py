"""Tier one: automatic ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_powersgd import PowerSGDConfig, make_plan, turnaround_for
from lightning_powersgd.compressor.turnaround import rank_for

NAMED = [
    ("wide", nn.Parameter(torch.empty(100, 400))),
    ("square", nn.Parameter(torch.empty(300, 300))),
    ("kernel", nn.Parameter(torch.empty(64, 32, 3, 3))),
    ("bias", nn.Parameter(torch.empty(300))),
]


def plan_of(**config):
    return make_plan(NAMED, PowerSGDConfig(**config))


def ranks(**config) -> dict[str, int]:
    return {slot.name: slot.rank for slot in plan_of(**config).slots}


def adam(*kinds: type[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    return [kind([nn.Parameter(torch.empty(1))]) for kind in kinds]


def test_the_rank_is_that_of_the_matrix_that_would_wait_longest():
    assert ranks(turnaround=50) == {"wide": 6, "square": 6, "kernel": 6, "bias": 0}
    assert ranks(turnaround=1000) == {"wide": 1, "square": 1, "kernel": 1, "bias": 0}
    # A step of alternating ones sends half as many.
    assert ranks(turnaround=50, alternate=True) == {"wide": 12, "square": 12, "kernel": 12, "bias": 0}
    assert plan_of(turnaround=50).turnaround(alternate=False) <= 50
    assert plan_of(turnaround=50, alternate=True).turnaround(alternate=True) <= 50


def test_a_matrix_that_would_save_too_little_is_sent_whole():
    # Of 300 × 300, 75 columns save half; of 64 × 288, 26 do, and of 100 × 400, 40.
    assert ranks(turnaround=12) == {"wide": 25, "square": 25, "kernel": 25, "bias": 0}
    assert ranks(turnaround=8) == {"wide": 38, "square": 38, "kernel": 0, "bias": 0}
    assert ranks(turnaround=4) == {"wide": 0, "square": 75, "kernel": 0, "bias": 0}
    assert set(ranks(turnaround=3).values()) == {0}


def test_the_default_is_automatic_and_patterns_may_be():
    assert PowerSGDConfig().rank == "auto"
    assert ranks() == ranks(turnaround=25)
    # The rank follows from the matrices that have it.
    found = ranks(rank={"square": 3, "bias": 0, "*": "auto"}, turnaround=25)
    assert found == {"wide": 4, "square": 3, "kernel": 4, "bias": 0}


@pytest.mark.parametrize("directions", [1, 7, 384, 1000, 4096])
def test_ranks_that_divide_evenly_are_not_rounded_up(directions):
    for rank in range(1, directions + 1, 1 + directions // 50):
        assert rank_for(directions / rank, directions, alternate=False) == rank


def test_how_long_a_training_is_decides_with_its_optimizers():
    assert turnaround_for(20_000, adam(torch.optim.SGD)) == 500
    assert turnaround_for(2_000, adam(torch.optim.AdamW)) == 10
    # The harder case decides, and is that of what nobody has tried.
    mixed, untried = adam(torch.optim.SGD, torch.optim.AdamW), adam(torch.optim.RMSprop)
    for optimizers in (adam(torch.optim.AdamW)[0], mixed, untried, []):
        assert turnaround_for(2_000, optimizers) == 10


def test_a_long_training_may_let_directions_wait_longer_but_not_in_proportion():
    assert turnaround_for(2_500, adam(torch.optim.AdamW)) == 12.5
    assert turnaround_for(10_000, adam(torch.optim.AdamW)) == 25
    assert turnaround_for(1_000_000, adam(torch.optim.AdamW)) == 250


@pytest.mark.parametrize("steps", [0, -5, math.inf, math.nan])
def test_no_length_is_an_error(steps):
    with pytest.raises(ValueError, match="`steps="):
        turnaround_for(steps, [])


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("comm_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.4, 0.2, 0.05, 0.02])
def test_a_budget_is_kept_and_used(share, comm_dtype, alternate):
    settings = {"alternate": alternate, "comm_dtype": comm_dtype}
    budget = round(share * plan_of(**settings).dense_bytes)
    plan = plan_of(max_bytes=budget, **settings)
    sent = plan.sent_bytes(alternate=alternate)
    assert sent <= budget
    if share == 1.0:
        assert not any(plan.compressed)
        return
    # One column more would not fit.
    rank = max(slot.rank for slot in plan.compressed) + 1
    assert plan_of(rank=rank, **settings).sent_bytes(alternate=alternate) > budget


def test_too_small_a_budget_names_the_smallest():
    with pytest.raises(ValueError, match=r"`max_bytes=100` is too little: .* (\d+) bytes") as caught:
        plan_of(max_bytes=100)
    least = int(str(caught.value).split(" bytes")[0].split()[-1])
    assert set(ranks(max_bytes=least).values()) == {0, 1}
    with pytest.raises(ValueError, match="too little"):
        plan_of(max_bytes=least - 1)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"rank": "automatic"}, TypeError, "neither an integer nor 'auto'"),
        ({"rank": {"*": "two"}}, TypeError, r"rank\['\*'\]"),
        ({"rank": 2, "turnaround": 50}, ValueError, "`turnaround=50` has no effect beside `rank=2`"),
        ({"rank": {"*": 2}, "max_bytes": 50}, ValueError, "`max_bytes=50` has no effect"),
        ({"turnaround": 50, "max_bytes": 50}, ValueError, "Give one of them"),
        ({"turnaround": 0}, ValueError, "turnaround"),
        ({"turnaround": -1.5}, ValueError, "turnaround"),
        ({"turnaround": math.inf}, ValueError, "turnaround"),
        ({"turnaround": math.nan}, ValueError, "turnaround"),
        ({"turnaround": "50"}, TypeError, "turnaround"),
        ({"turnaround": True}, TypeError, "turnaround"),
        ({"max_bytes": 0}, ValueError, "max_bytes"),
        ({"max_bytes": 1e6}, TypeError, "max_bytes"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, kind, message):
    with pytest.raises(kind, match=message):
        PowerSGDConfig(**settings)
