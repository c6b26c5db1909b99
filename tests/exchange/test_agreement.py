"""Tier two: what the ranks must have in common."""

from __future__ import annotations

import torch.distributed as dist

from lightning_powersgd.exchange.agreement import require_agreement


def test_ranks_that_disagree_are_all_told_how(two_ranks):
    for text in two_ranks.run_to_errors(_disagree):
        assert "The ranks disagree on the argument `rank`: rank 0 has 1, rank 1 has 2." in text


def _disagree() -> None:
    require_agreement({"the argument `rank`": str(1 + dist.get_rank())})
