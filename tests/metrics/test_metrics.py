"""Tier one: the metrics alone."""

from __future__ import annotations

import pytest
import torch

from lightning_powersgd import BytesSaved, BytesSent, CompressionRatio, ConsensusDistance, ResidualRatio


def test_byte_metrics_add_up_exactly():
    large = 2**40 + 1  # float32 would lose the one
    for metric, expected in (
        (CompressionRatio(), 2 * large / (large + 3)),
        (BytesSent(), large + 3),
        (BytesSaved(), large - 3),
    ):
        metric.update(large, 3)
        metric.update(dense_bytes=large, sent_bytes=large)
        assert metric.compute() == expected
        metric.reset()
        metric.update(4, 2)
        assert metric.compute() == 2


def test_nothing_exchanged_is_a_ratio_of_one():
    metric = CompressionRatio()
    metric.update(0, 0)
    assert metric.compute() == 1


def test_residual_ratio():
    metric = ResidualRatio()
    metric.update(torch.tensor(0.0), torch.tensor(0.0))
    assert metric.compute() == 0
    metric.update(error=torch.tensor(9.0), matrix=torch.tensor(36.0))
    assert metric.compute() == 0.5


@pytest.mark.parametrize("matrix", [torch.inf, torch.nan])
def test_the_residual_ratio_of_a_step_that_was_not_finite_is_nan(matrix):
    metric = ResidualRatio()
    metric.update(torch.tensor(1.0), torch.tensor(matrix))
    assert metric.compute().isnan()


def test_consensus_distance_is_a_root_mean_square():
    metric = ConsensusDistance()
    metric.update(torch.tensor(1.0, dtype=torch.float64))
    metric.update(distance=torch.tensor(7.0, dtype=torch.float64))
    assert metric.compute() == 5


def test_metrics_of_several_ranks(two_ranks):
    assert two_ranks.run(_synchronised) == [(2.0, 0.5)] * 2


def _synchronised() -> tuple[float, float]:
    ratio, residual = CompressionRatio(), ResidualRatio()
    ratio.update(40, 20)
    # Norms add up over ranks; bytes, alike on every rank, do not.
    residual.update(torch.tensor(0.5 * torch.distributed.get_rank()), torch.tensor(1.0))
    return float(ratio.compute()), float(residual.compute())
