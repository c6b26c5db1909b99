"""Tier one: factors in few bits."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_powersgd import PowerSGDConfig, make_plan
from lightning_powersgd.compressor.codec import (
    PROFILE_STEP,
    format_of,
    integer_gain,
    most_levels,
    pack,
    profile_of,
    refinement,
    sums_fit,
    to_levels,
    unpack,
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(2,), (6,), (3, 10), (2, 3, 4)])
def test_every_integer_arrives_as_it_was_sent(bits, shape):
    largest = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-largest, largest + 1, shape, generator=generator).float()
    packed = pack(levels, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == levels.numel() * bits
    assert torch.equal(unpack(packed, bits), levels)


@pytest.mark.parametrize("bits", [4, 8])
def test_all_levels_are_told_apart(bits):
    largest = 2 ** (bits - 1) - 1
    levels = torch.arange(-largest - 1, largest + 1).float()
    assert torch.equal(unpack(pack(levels, bits), bits), levels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 9, 64, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_sum_leaves_its_field(bits, world_size):
    most = most_levels(bits, world_size)
    assert 7 <= most <= 127
    if world_size > 2 and sums_fit(bits, world_size):
        assert world_size * most <= 127


def test_up_to_four_ranks_sum_eight_bits_in_place():
    assert sums_fit(8, 4)
    assert not sums_fit(8, 5)
    assert not sums_fit(4, 2)


def test_levels_are_whole_and_in_range_whatever_comes():
    part = torch.tensor([0.4, -0.6, 1.5, 2.5, 1e9, -1e9, math.inf, -math.inf, math.nan, 1e-40])
    to_levels(part, 8, 3)
    assert part.tolist() == [0, -1, 2, 2, 42, -42, 42, -42, 0, 0]


@pytest.mark.parametrize("world_size", [2, 8, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_rounded_off_is_small_beside_a_gaussian_factor(bits, world_size):
    # All ranks have the same signal, and noise of their own that is as large.
    generator = torch.Generator().manual_seed(0)
    # Some entries are a hundred times as large as others, in all rows.
    scale = torch.tensor([[1e-6], [1.0], [1e6]]) * torch.logspace(-2, 0, 4000)
    mean = scale * torch.randn(3, 4000, generator=generator)
    own = [mean + scale * torch.randn(3, 4000, generator=generator) for _ in range(world_size)]
    mean = torch.stack(own).mean(dim=0)
    magnitude, profile = format_of(f"int{bits}").magnitude(mean), torch.zeros(1, 4000)
    for _ in range(30):
        # As in steps before, with other noise.
        before = scale * torch.randn(3, 4000, generator=generator)
        profile = torch.lerp(profile, profile_of(before, format_of(f"int{bits}").magnitude(before)), PROFILE_STEP)
    gain = integer_gain(magnitude, profile, bits, world_size)
    total = torch.zeros_like(mean)
    for factor in own:
        levels = factor * gain
        to_levels(levels, bits, world_size)
        total += levels
    received = total / world_size
    if world_size > 2 and not sums_fit(bits, world_size):
        finer = refinement(world_size)
        received *= finer
        to_levels(received, bits, world_size)
        received /= finer
    # Of the small entries no more is lost than of the large ones.
    for part in (slice(0, 1000), slice(3000, 4000)):
        error = ((received / gain - mean) / scale)[:, part].norm(dim=1) / (mean / scale)[:, part].norm(dim=1)
        assert (error < (0.06 if bits == 8 else 0.3)).all(), error


def test_a_row_without_a_magnitude_stays_zero():
    gain = integer_gain(torch.zeros(2, 1), torch.zeros(1, 5), 8, 2)
    assert torch.equal(torch.zeros(2, 5) * gain, torch.zeros(2, 5))


def test_a_profile_is_the_mean_of_the_rows_squares():
    factor = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    profile = profile_of(factor, format_of("int8").magnitude(factor))
    assert torch.allclose(profile, torch.tensor([[9.0, 16.0]]) / 12.5 / 2)
    assert torch.equal(profile_of(torch.zeros(2, 2), torch.zeros(2, 1)), torch.zeros(1, 2))


def test_of_a_profile_only_the_shape_counts():
    magnitude, profile = torch.tensor([[2.0]]), torch.tensor([[1.0, 4.0, 0.0]])
    gain = integer_gain(magnitude, profile, 8, 2)
    assert torch.allclose(integer_gain(magnitude, profile * 1e-12, 8, 2), gain)
    assert gain[0, 0] == 2 * gain[0, 1] < gain[0, 2] < math.inf


def test_magnitudes_are_root_mean_squares_for_integers_and_largest_entries_for_float16():
    factor = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert format_of("int8").magnitude(factor).tolist() == [[2.5], [0.0]]
    assert format_of(torch.float16).magnitude(factor).tolist() == [[4.0], [0.0]]


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("int8", "int8"),
        ("int4", "int4"),
        ("torch.int8", "int8"),
        (torch.int8, "int8"),
        ({"Q": "int8", "P": "int4"}, {"P": "int4", "Q": "int8"}),
        ("float16", torch.float16),
        (None, None),
    ],
    ids=str,
)
def test_how_a_wire_is_given(given, held):
    assert PowerSGDConfig(comm_dtype=given).comm_dtype == held
    assert PowerSGDConfig(**PowerSGDConfig(comm_dtype=given).to_dict()).comm_dtype == held


@pytest.mark.parametrize(
    "given",
    ["int16", "uint8", torch.int16, {"P": "int4"}, {"P": "int4", "Q": "float16"}, {"P": 4, "Q": 8}, {}, {"p": "int8"}],
    ids=str,
)
def test_no_wire_for_gradients_is_refused(given):
    with pytest.raises(ValueError, match=r"`comm_dtype=.*int8"):
        PowerSGDConfig(comm_dtype=given)


def test_bytes_are_those_of_the_bits():
    named = [("weight", torch.nn.Parameter(torch.empty(101, 300)))]

    def sent(comm_dtype, **config):
        return make_plan(named, PowerSGDConfig(rank=3, comm_dtype=comm_dtype)).sent_bytes(
            **{"alternate": False, **config}
        )

    assert sent("int8") == 3 * 401
    assert sent("int4") == math.ceil(3 * 101 / 2) + 3 * 150
    assert sent({"P": "int4", "Q": "int8"}) == math.ceil(3 * 101 / 2) + 3 * 300
    assert sent("int8", alternate=True) == 3 * 401 / 2
    assert sent(None) == 4 * sent("int8")


def test_a_smaller_wire_lets_more_matrices_be_compressed():
    named = [("weight", torch.nn.Parameter(torch.empty(300, 300)))]
    assert [slot.rank for slot in make_plan(named, PowerSGDConfig(rank=100)).slots] == [0]
    assert [slot.rank for slot in make_plan(named, PowerSGDConfig(rank=100, comm_dtype="int8")).slots] == [100]
