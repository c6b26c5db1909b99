"""Tier two: ranks that come, and ranks that do not."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_powersgd.exchange.presence import all_ranks_come, forget_position, position_of


def test_all_ranks_that_come_hear_so(four_ranks):
    assert four_ranks.run(_come, missing=[], patience=60) == [True] * 4


@pytest.mark.parametrize("missing", [[3], [1, 2], [0]])
def test_nobody_waits_long_for_ranks_that_do_not_come(four_ranks, missing):
    assert four_ranks.run(_come, missing=missing, patience=0.2) == [False] * 4


def _come(missing: list[int], patience: float) -> bool:
    # A collective before, so that this is a position of its own.
    dist.barrier()
    position = position_of("step 7")
    here = dist.get_rank() not in missing
    answer = here and all_ranks_come(position, timedelta(seconds=patience))
    dist.barrier()
    # Those who come when it is over hear what the others heard.
    if dist.get_rank() != 0 or here:
        assert all_ranks_come(position, timedelta(seconds=patience)) == answer or 0 in missing
    dist.barrier()
    return answer


def test_ranks_at_different_steps_do_not_meet(two_ranks):
    assert two_ranks.run(_come_at_different_steps) == [False, False]


def _come_at_different_steps() -> bool:
    return all_ranks_come(position_of(f"step {10 + dist.get_rank()}"), timedelta(seconds=0.2))


def test_groups_beside_each_other_do_not_hear_each_others_answers(four_ranks):
    # Rank 3 never asks.
    assert four_ranks.run(_ask_in_pairs) == [True, True, False, None]


def _ask_in_pairs() -> bool | None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[dist.get_rank() // 2]
    answer = None
    if dist.get_rank() != 3:
        answer = all_ranks_come(position_of("step 7", group), timedelta(seconds=1), group)
    dist.barrier()
    return answer


def test_what_was_asked_before_can_be_forgotten(two_ranks):
    # The answer, and the word of rank 1.
    assert two_ranks.run(_forget) == [(2, 2, True)] * 2


def _forget() -> tuple[int, int, bool]:
    store, patience = dist.distributed_c10d._get_default_store(), timedelta(seconds=60)
    counts = []
    dist.barrier()
    before = store.num_keys()
    for position in ("forgotten", "kept"):
        dist.barrier()
        assert all_ranks_come(position, patience)
        if position == "kept" and dist.get_rank() == 0:
            forget_position("forgotten")
        dist.barrier()
        counts.append(store.num_keys() - before)
    return counts[0], counts[1], all_ranks_come("kept", patience)
