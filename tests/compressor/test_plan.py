"""Tier one: what is compressed, and how many bytes it takes."""

from __future__ import annotations

import math

import pytest
import torch
from nets import resnet18_parameters
from torch import nn

from lightning_powersgd import PowerSGDConfig, make_plan


@pytest.mark.parametrize(("rank", "paper"), [(1, 243), (2, 136), (4, 72)])
def test_the_ratio_of_a_resnet18_is_the_papers(rank, paper):
    plan = make_plan(resnet18_parameters(), PowerSGDConfig(rank=rank))
    assert sum(slot.numel for slot in plan.slots) == 11_173_962
    # The paper's table 3, from 1023 MB an epoch; it rounds to whole MB, of which there are 4 at rank 1.
    assert plan.dense_bytes / plan.sent_bytes(alternate=False) == pytest.approx(paper, rel=0.01)


def named(**shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("_", "."), nn.Parameter(torch.empty(shape))) for name, shape in shapes.items()]


def ranks(parameters: list[tuple[str, nn.Parameter]], **config) -> dict[str, int]:
    return {slot.name: slot.rank for slot in make_plan(parameters, PowerSGDConfig(**{"rank": 2, **config})).slots}


def test_vectors_small_matrices_and_what_would_not_shrink_enough_are_sent_whole():
    parameters = named(scalar=(), vector=(100,), wide=(2, 1000), square=(100, 100), four=(8, 8), empty=(0, 5))
    # 8 × 8 at rank 2 shrinks 2-fold; a rank of min(n, m) or more shrinks nothing.
    assert ranks(parameters) == {"scalar": 0, "vector": 0, "wide": 0, "square": 2, "four": 2, "empty": 0}
    assert ranks(parameters, min_compression_ratio=2.01)["four"] == 0
    assert ranks(parameters, rank=100, min_compression_ratio=1.0)["square"] == 0
    assert ranks(parameters, rank=49, min_compression_ratio=1.0)["square"] == 49
    # Half the bytes of a step, twice the ratio.
    assert ranks(parameters, rank=51, alternate=True)["square"] == 0
    assert ranks(parameters, rank=50, alternate=True)["square"] == 50
    # As does half the wire dtype.
    assert ranks(parameters, rank=50, comm_dtype="bfloat16")["square"] == 50


def test_the_first_matching_pattern_wins_and_no_match_is_sent_whole():
    parameters = named(embed_weight=(50, 50), body_a_weight=(50, 50), body_b_weight=(50, 50), head_weight=(50, 50))
    found = ranks(parameters, rank={"embed.*": 0, "body.a.*": 4, "body.*": 3})
    assert found == {"embed.weight": 0, "body.a.weight": 4, "body.b.weight": 3, "head.weight": 0}
    assert ranks(parameters, rank={"embed*": 0, "*": 1}) == dict.fromkeys(found, 1) | {"embed.weight": 0}


def test_a_pattern_without_a_match_is_refused_with_names_that_come_close():
    parameters = named(encoder_weight=(50, 50), decoder_weight=(50, 50))
    with pytest.raises(ValueError, match=r"pattern 'encodr\.weight'.*encoder\.weight"):
        make_plan(parameters, PowerSGDConfig(rank={"encodr.weight": 2}))
    make_plan(parameters, PowerSGDConfig(rank={"*coder*": 2, "*": 2}))


def test_a_pattern_may_name_what_is_frozen_until_later():
    parameters = named(encoder_weight=(50, 50), decoder_weight=(50, 50))
    parameters[0][1].requires_grad_(False)
    assert ranks(parameters, rank={"encoder*": 1, "*": 2}) == {"decoder.weight": 2}


def test_compiled_names_are_those_of_the_module():
    module = nn.Sequential(nn.Linear(50, 50))
    compiled = [(f"_orig_mod.{name}", parameter) for name, parameter in module.named_parameters()]
    plan = make_plan(compiled, PowerSGDConfig(rank={"0.weight": 3, "*": 1}))
    assert {slot.name: slot.rank for slot in plan.slots} == {"0.weight": 3, "0.bias": 0}


def test_groups_close_when_full_and_lead_with_the_last_parameters():
    parameters = named(a=(50, 50), b=(50, 50), c=(50,), d=(50, 50))
    plan = make_plan(parameters, PowerSGDConfig(rank=2), group_bytes=10_001)
    assert [[slot.name for slot in group.slots] for group in plan.groups] == [["c", "d"], ["b", "a"]]
    one = make_plan(parameters, PowerSGDConfig(rank=2), group_bytes=1)
    assert [[slot.name for slot in group.slots] for group in one.groups] == [["d"], ["c"], ["b"], ["a"]]


def test_dtypes_travel_apart():
    parameters = [*named(a=(50, 50), b=(50,)), ("half", nn.Parameter(torch.empty(50, 50, dtype=torch.bfloat16)))]
    together = make_plan(parameters, PowerSGDConfig(rank=2))
    assert [group.dtype for group in together.groups] == [torch.bfloat16, torch.float32]
    apart = make_plan(parameters, PowerSGDConfig(rank=2, comm_dtype="bfloat16"))
    assert [(group.dtype, [slot.name for slot in group.slots]) for group in apart.groups] == [
        (torch.bfloat16, ["half"]),
        (torch.float32, ["b"]),
        (torch.bfloat16, ["a"]),
    ]


def test_bytes_and_summary():
    plan = make_plan(named(a=(100, 50), b=(10,)), PowerSGDConfig(rank=2))
    assert plan.dense_bytes == 4 * (5000 + 10)
    assert plan.sent_bytes(alternate=False) == 4 * (2 * 150 + 10)
    assert plan.sent_bytes(alternate=True) == 4 * (150 + 10)
    assert plan.summary(alternate=False) == (
        "PowerSGD compresses 1 of 2 trainable parameters: 0.02 MB of gradients a step become 0.001 MB (16.2×)"
    )
    assert "none of the 1" in make_plan(named(b=(10,)), PowerSGDConfig(rank=2)).summary(alternate=False)


def test_the_turnaround_is_that_of_the_slowest_matrix():
    config = PowerSGDConfig(rank={"b": 8, "d": 0, "*": 2})
    plan = make_plan(named(a=(100, 50), b=(120, 300), c=(10,), d=(900, 900)), config)
    # 50 directions of a, 2 a step; 120 of b, 8 a step.
    assert plan.turnaround(alternate=False) == 25
    assert plan.turnaround(alternate=True) == 50
    assert make_plan(named(c=(10,)), PowerSGDConfig(rank=2)).turnaround(alternate=False) == 0


def test_what_travels_together():
    # Groups of (c, d), then (b, a); matrices of 50 × 50 at rank 2, so that a factor has 400 bytes.
    parameters = named(a=(50, 50), b=(50, 50), c=(50,), d=(50, 50))
    plan = make_plan(parameters, PowerSGDConfig(rank=2), group_bytes=10_001)
    assert plan.payloads(alternate=False) == [200 + 400, 800 + 400, 800]
    assert plan.payloads(alternate=True) == [200 + 400, 800]
    # A right factor does not travel with what has another dtype.
    parameters += [("half", nn.Parameter(torch.empty(50, 50, dtype=torch.bfloat16)))]
    plan = make_plan(parameters, PowerSGDConfig(rank=2), group_bytes=10_001)
    assert sorted(plan.payloads(alternate=False)) == [200, 200, 600, 800, 1200]
    assert make_plan(named(b=(10,)), PowerSGDConfig(rank=2)).payloads(alternate=False) == [40]


def test_what_is_sent_whole_and_large_travels_alone_after_its_group():
    # 1 MiB and just less; the matrices are of 50 × 50 at rank 2.
    parameters = named(a=(50, 50), less=(2**18 - 1,), large=(2**18,), b=(50, 50), c=(50,))
    plan = make_plan(parameters, PowerSGDConfig(rank=2), group_bytes=10_001)
    assert plan.payloads(alternate=False) == [200 + 400, 400, 2**20, 2**20 - 4, 400, 400]
    assert sum(plan.payloads(alternate=False)) == plan.sent_bytes(alternate=False)


def test_complex_parameters_are_sent_whole():
    parameter = nn.Parameter(torch.empty(50, 50, dtype=torch.complex64))
    assert ranks([("c", parameter)]) == {"c": 0}


@pytest.mark.parametrize(
    ("shape", "split", "ratio"),
    [
        ((8, 512, 512), 2, 228),  # fused experts: 8 · 512 × 512
        ((2, 512, 512), 2, 171),
        ((512, 512, 8), 1, 228),
        ((64, 32, 3, 3), 1, 26),  # a convolution keeps its kernel whole
        ((4, 4, 256, 256), 3, None),
        ((64, 64), 1, 16),
    ],
)
def test_a_tensor_is_split_where_the_least_is_sent(shape, split, ratio):
    plan = make_plan([("weight", nn.Parameter(torch.empty(shape)))], PowerSGDConfig(rank=2))
    (slot,) = plan.compressed
    assert slot.split == split
    sent = [math.prod(shape[:at]) + math.prod(shape[at:]) for at in range(1, len(shape))]
    assert slot.rows + slot.columns == min(sent)
    assert ratio is None or plan.dense_bytes / plan.sent_bytes(alternate=False) == pytest.approx(ratio, abs=0.6)
