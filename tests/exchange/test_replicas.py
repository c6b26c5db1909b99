"""Tiers one and two: checksums, and replicas that drifted."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import gather_equal

from lightning_powersgd.exchange.replicas import checksum, repair_replicas, replicas_agree

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "odd": torch.arange(7, dtype=torch.bfloat16),
    "channels_last": torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.empty(0, 5),
    "unaligned": torch.arange(10.0)[1:],
    "strided": torch.arange(20.0)[::2],
}


def copies() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in TENSORS.items()}


def test_equal_tensors_have_equal_checksums():
    assert checksum(TENSORS) == checksum(copies())


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_the_last_bit_of_any_tensor_changes_the_checksum(name):
    changed = copies()
    last = (-1,) * changed[name].dim()
    changed[name][last] = torch.nextafter(changed[name][last], torch.full_like(changed[name][last], 1e9))
    assert checksum(changed) != checksum(TENSORS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [5, 48, 5000])
def test_differences_that_cancel_out_change_the_checksum(count, dtype):
    """Rounding leaves a last bit up here and a last bit down there."""
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    generator = torch.Generator().manual_seed(count)
    whole = torch.randn(count, generator=generator).to(dtype)
    for _ in range(200):
        up, down = torch.randperm(count, generator=generator)[:2].tolist()
        changed = whole.clone()
        changed.view(bits)[up] += 1
        changed.view(bits)[down] -= 1
        assert checksum({"a": changed}) != checksum({"a": whole}), (up, down)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_sign_changes_the_checksum(dtype):
    whole = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for place in range(0, 5000, 37):
        changed = whole.clone()
        changed[place] *= -1
        assert checksum({"a": changed}) != checksum({"a": whole}), place


def test_tensors_that_changed_places_change_the_checksum():
    a, b = torch.zeros(3), torch.ones(3)
    assert checksum({"a": a, "b": b}) != checksum({"a": b, "b": a})


@pytest.mark.parametrize("drifted", [[], [0], [1], [3], [1, 2, 3], [0, 1, 2, 3]])
def test_replicas_that_drifted_are_found_and_repaired(four_ranks, drifted):
    for agreed, deviations, equal in four_ranks.run(_drift, drifted):
        assert agreed == (not drifted)
        assert set(deviations) == ({"matrix", "odd"} if drifted else set())
        assert all(1e-8 < deviation < 1e-2 for deviation in deviations.values())
        assert equal


def _drift(drifted: list[int]) -> tuple[bool, dict[str, float], bool]:
    tensors = copies()
    if dist.get_rank() in drifted:
        tensors["matrix"][1, 2] *= 1 + 2**-20 * (1 + dist.get_rank())
        tensors["odd"][3] *= 1 + 2**-7 * (1 + dist.get_rank())
    agreed = replicas_agree(tensors)
    deviations = repair_replicas(tensors)
    return agreed, deviations, gather_equal(list(tensors.values())) and replicas_agree(tensors)


def test_a_replica_that_is_not_finite_deviates_without_end(two_ranks):
    for deviations in two_ranks.run(_not_finite):
        assert deviations == {"a": float("inf")}


def _not_finite() -> dict[str, float]:
    return repair_replicas({"a": torch.full((3,), torch.nan if dist.get_rank() else 1.0), "b": torch.ones(2)})


def test_tensors_that_not_all_ranks_have_alike_are_left_alone(two_ranks):
    for rank, (deviations, values) in enumerate(two_ranks.run(_sharded)):
        assert set(deviations) == {"b"}
        assert values == {"b": 0.0, "a" if rank else "c": float(rank), "shape": float(rank)}


def _sharded() -> tuple[dict[str, float], dict[str, float]]:
    rank = dist.get_rank()
    names = ["b", "a"] if rank else ["c", "b"]
    tensors = {name: torch.full((3,), float(rank)) for name in names} | {"shape": torch.full((2 + rank,), float(rank))}
    deviations = repair_replicas(tensors)
    return deviations, {name: float(tensor[0]) for name, tensor in tensors.items()}


def test_nothing_to_compare_agrees(two_ranks):
    assert two_ranks.run(replicas_agree, {}) == [True, True]


def test_an_imaginary_part_that_drifted_is_seen(two_ranks):
    assert two_ranks.run(_drift_in_the_imaginary_part) == [{"a": pytest.approx(0.5)}] * 2


def _drift_in_the_imaginary_part() -> dict[str, float]:
    return repair_replicas({"a": torch.tensor([3 + (4 + 2.5 * dist.get_rank()) * 1j])})
