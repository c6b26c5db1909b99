"""Tier one: which setting is the best one on a link, and what is said of it."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_powersgd import PowerSGDConfig, forecast_exchange
from lightning_powersgd.planner.answer import Answer, Option


def answer(rate: float, ranks=(1, 2, 8), compress_seconds=0.001, step_seconds=None) -> Answer:
    def option(rank) -> Option:
        config = PowerSGDConfig(rank=rank)
        seconds = compress_seconds * (rank if isinstance(rank, int) else 4)
        forecast = forecast_exchange(
            nn.Linear(1000, 1000), config, world_size=2, latency=1e-4, compress_seconds=seconds
        )
        return Option(str(rank), forecast, forecast.over(rate))

    return Answer(tuple(option(rank) for rank in ranks), step_seconds)


def test_on_a_slow_link_the_highest_rank_is_best():
    # The gradients take 160 ms in bfloat16, rank 8 takes 5 and rank 1 saves 2 more.
    best = answer(1e8).best
    assert best.rank == "8"
    assert best.saved_seconds == pytest.approx(best.times.rival_seconds - best.times.powersgd_seconds)


def test_on_a_link_where_computing_counts_a_lower_one_is():
    # They take 16 ms, and computing 1, 2 or 8.
    assert answer(1e9, compress_seconds=0.001).best.rank == "2"


def test_on_a_fast_link_it_is_plain_ddp():
    fast = answer(1e12)
    assert fast.best is None
    (said,) = fast.verdict()
    assert said.startswith("Stay with DDP with the bf16 hook. On 1 Tbit/s: PowerSGD would not pay here. It takes 1.4")
    assert fast.to_json()["best_rank"] is None


def test_where_nothing_is_compressed_it_is_plain_ddp():
    nothing = Answer(
        tuple(
            Option("1", forecast, forecast.over(1e8))
            for forecast in [forecast_exchange(nn.Linear(1, 9), world_size=2, compress_seconds=0.0)]
        ),
        None,
    )
    assert nothing.best is None
    (said,) = nothing.verdict()
    assert said.startswith("Stay with DDP with the bf16 hook. On 100 Mbit/s: PowerSGD would not pay here.")


@pytest.mark.parametrize(("rank", "written"), [(8, "rank=8"), ("auto", "")])
def test_the_verdict_is_what_to_type(rank, written):
    said = list(answer(1e8, ranks=[rank]).verdict())
    assert said[0].startswith(f"Best setting: PowerSGDStrategy({written}). It saves 14")
    assert said[1].startswith("Each direction of a gradient has its turn within about ")
    assert len(said) == 2


def test_ranks_by_patterns_are_named_as_they_were_given():
    found = answer(1e8, ranks=[2])
    renamed = Answer((Option("*=2", found.options[0].forecast, found.options[0].times),), None)
    assert next(renamed.verdict()).startswith("Best setting: PowerSGDStrategy(...), --rank *=2. It saves")


def test_a_step_that_hides_the_all_reduce_is_said():
    hidden = list(answer(1e9, ranks=[2], step_seconds=1.0).verdict())
    assert "beside the bf16 hook, which makes a step 1.00 to 1.01 times as fast" in hidden[0]
    assert hidden[1].startswith("If all of the bf16 hook hides behind the backward pass, it stays the faster one")
    short = list(answer(1e8, ranks=[2], step_seconds=0.01).verdict())
    assert not any("hides" in line for line in short)


def test_json_has_all_of_it():
    content = answer(1e8, step_seconds=0.1).to_json()
    assert content["best_rank"] == "8"
    assert content["step_seconds"] == 0.1
    assert content["dense_bytes"] == 4_004_000
    assert [option["rank"] for option in content["options"]] == ["1", "2", "8"]
    for option in content["options"]:
        assert option["saved_seconds"] == content["bf16_seconds"] - option["powersgd_seconds"]
        assert option["powersgd_seconds"] == option["compress_seconds"] + option["network_seconds"]
        assert option["pays"] is True
        assert option["step_speedup"] > option["least_step_speedup"] > 1
