"""Tier one: which setting is the best one on a link, and what is said of it."""

from __future__ import annotations

import re

import pytest
from torch import nn

from lightning_powersgd import PowerSGDConfig, forecast_exchange
from lightning_powersgd.planner.answer import Answer, Option, seconds_with_ddp


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
    found = answer(1e8)
    best = found.best
    assert best.rank == "8"
    assert found.saved_seconds(best) == best.times.bf16_seconds - best.times.powersgd_seconds


def test_on_a_link_where_computing_counts_a_lower_one_is():
    # They take 32 ms, and computing 2 or 16.
    assert answer(1e9, compress_seconds=0.001).best.rank == "2"


def test_on_a_fast_link_it_is_plain_ddp():
    fast = answer(1e12)
    assert fast.best is None
    (said,) = fast.verdict()
    assert re.fullmatch(
        r"Stay with DDP with the bf16 hook\. Its exchange takes 216 µs, and at rank 1 PowerSGD's would take 1\.4 ms\.",
        said,
    )
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
    assert said.startswith("Stay with DDP with the bf16 hook.")


@pytest.mark.parametrize(("rank", "written"), [(8, "rank=8"), ("auto", "")])
def test_the_verdict_is_what_to_type(rank, written):
    said = list(answer(1e8, ranks=[rank]).verdict())
    assert said[0].startswith(f"Best setting: PowerSGDStrategy({written}). Its exchange takes ")
    assert " instead of 160 ms with DDP with the bf16 hook, " in said[0]
    assert said[1].startswith("Each direction of a gradient has its turn within about ")
    assert len(said) == 2


def test_ranks_by_patterns_are_named_as_they_were_given():
    found = answer(1e8, ranks=[2])
    renamed = Answer((Option("*=2", found.options[0].forecast, found.options[0].times),), None)
    assert next(renamed.verdict()).startswith("Best setting: PowerSGDStrategy(...), --rank *=2. Its exchange takes ")


def test_a_step_hides_what_it_can_of_an_all_reduce():
    # Computing takes less than the all-reduce saves, but that is mostly hidden.
    exchange = answer(1e9, ranks=[2], compress_seconds=0.005)
    assert exchange.best.rank == "2"
    hidden = answer(1e9, ranks=[2], compress_seconds=0.01, step_seconds=1.0)
    assert hidden.best is None
    (said,) = hidden.verdict()
    assert said == (
        "Stay with DDP with the bf16 hook. Its step takes 1.02 s, and at rank 2 PowerSGD's would take 1.02 s."
    )


def test_a_step_of_ddp_sends_while_it_computes():
    model = nn.Sequential(*(nn.Linear(2000, 2000, bias=False) for _ in range(4)))  # a bucket of 16 MB, and two more
    forecast = forecast_exchange(model, world_size=2, latency=0.0, compress_seconds=0.0)
    assert forecast.dense_payloads == (16_000_000, 32_000_000, 16_000_000)
    # A second a bucket: the network waits for the forward pass and the first bucket, and then no more.
    assert seconds_with_ddp(forecast, 128e6, 0.3) == pytest.approx(0.1 + 0.05 + 4)
    # A hundredth of a second a bucket: all but the last one are hidden.
    assert seconds_with_ddp(forecast, 12.8e9, 3.0) == pytest.approx(3.0 + 0.01)
    assert seconds_with_ddp(forecast, 12.8e9, 0.0) == pytest.approx(0.04)


def test_json_has_all_of_it():
    content = answer(1e8, step_seconds=0.1).to_json()
    assert content["best_rank"] == "8"
    assert content["step_seconds"] == 0.1
    assert content["dense_bytes"] == 4_004_000
    assert content["all_reduce_seconds"] < content["ddp_step_seconds"]
    assert [option["rank"] for option in content["options"]] == ["1", "2", "8"]
    for option in content["options"]:
        assert option["saved_seconds"] == content["bf16_step_seconds"] - option["step_seconds"]
        assert option["step_seconds"] == pytest.approx(0.1 + option["powersgd_seconds"])
        assert option["powersgd_seconds"] == option["compress_seconds"] + option["network_seconds"]
    alone = answer(1e8).to_json()
    assert alone["ddp_step_seconds"] is None
    assert alone["options"][0]["step_seconds"] is None
    assert alone["options"][0]["saved_seconds"] == alone["bf16_seconds"] - alone["options"][0]["powersgd_seconds"]
