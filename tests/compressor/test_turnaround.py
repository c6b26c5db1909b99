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


def test_every_matrix_has_the_rank_with_which_its_directions_have_their_turn_in_time():
    assert ranks(turnaround=50) == {"wide": 2, "square": 6, "kernel": 2, "bias": 0}
    assert ranks(turnaround=1000) == {"wide": 1, "square": 1, "kernel": 1, "bias": 0}
    # A step of alternating ones sends half as many.
    assert ranks(turnaround=50, alternate=True) == {"wide": 4, "square": 12, "kernel": 3, "bias": 0}
    assert plan_of(turnaround=50).turnaround(alternate=False) <= 50
    assert plan_of(turnaround=50, alternate=True).turnaround(alternate=True) <= 50


def test_a_matrix_that_would_save_too_little_is_sent_whole():
    # 300 / 4 = 75 columns of 300 × 300 save half, 100 / 4 = 25 of 100 × 400 more than that.
    assert ranks(turnaround=4) == {"wide": 25, "square": 75, "kernel": 16, "bias": 0}
    # Seen as 6144 × 3, the kernel has three directions, and rank 1 sends less than 22 columns of 64 × 288.
    assert ranks(turnaround=3) == {"wide": 34, "square": 0, "kernel": 1, "bias": 0}
    assert set(ranks(turnaround=0.1).values()) == {0}


def test_the_default_is_automatic_and_patterns_may_be():
    assert PowerSGDConfig().rank == "auto"
    assert ranks() == ranks(turnaround=50)
    found = ranks(rank={"square": 3, "bias": 0, "*": "auto"}, turnaround=25)
    assert found == {"wide": 4, "square": 3, "kernel": 3, "bias": 0}


@pytest.mark.parametrize("directions", [1, 7, 384, 1000, 4096])
def test_ranks_that_divide_evenly_are_not_rounded_up(directions):
    for rank in range(1, directions + 1, 1 + directions // 50):
        assert rank_for(directions / rank, directions, 5000, alternate=False) == rank


def test_how_long_a_training_is_decides_with_its_optimizers():
    assert turnaround_for(20_000, adam(torch.optim.SGD)) == 1000
    assert turnaround_for(20_000, adam(torch.optim.AdamW)) == 100
    assert turnaround_for(20_000, adam(torch.optim.AdamW)[0]) == 100
    # The harder case decides, and is that of what nobody has tried.
    assert turnaround_for(20_000, adam(torch.optim.SGD, torch.optim.AdamW)) == 100
    assert turnaround_for(20_000, adam(torch.optim.RMSprop)) == 100
    assert turnaround_for(20_000, []) == 100


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
    compressed = list(plan.compressed)
    if share == 1.0:
        assert not compressed
        return
    # One column more in the matrix that has waited longest would not fit, or not save enough.
    slowest = max(compressed, key=lambda slot: min(slot.rows, slot.columns) / slot.rank)
    directions = min(slowest.rows, slowest.columns)
    turnaround = (2 if alternate else 1) * directions / (slowest.rank + 1)
    assert plan_of(turnaround=turnaround, **settings).sent_bytes(alternate=alternate) > budget


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
