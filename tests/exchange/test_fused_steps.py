"""Tier two: whole steps with Triton's kernels, which Triton interprets on a CPU. `make triton` runs what is here."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from cases import Case, Parameter, Spot
from test_properties import played, require_balance, require_equal, require_no_trace, same

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: the extra `triton`"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1: `make triton`"),
]

PARAMETERS = (
    Parameter((9, 70)),
    Parameter((4, 3, 2, 2), layout="channels last"),
    Parameter((12, 7), layout="transposed"),
    Parameter((5,)),
)
CONFIG = {
    "rank": {"p0": 3, "*": 2},
    "min_compression_ratio": 1.0,
    "alternate": False,
    "error_feedback": True,
    "error_dtype": None,
    "comm_dtype": None,
    "warm_start": True,
    "start_step": 0,
}
CASE = Case(2, PARAMETERS, CONFIG, sizes=(1.0, 1.0, 1e-3, 1.0), accelerator=True, triton=True, save_after=2)


def half(dtype: torch.dtype) -> Case:
    return replace(CASE, parameters=tuple(replace(parameter, dtype=dtype) for parameter in PARAMETERS))


def with_config(case: Case, **config: object) -> Case:
    return replace(case, config={**case.config, **config})


CASES = {
    "full": CASE,
    "alternating": with_config(CASE, alternate=True),
    "a scaler": replace(CASE, scales=(1.0, 16.0, 16.0, 2.0)),
    "unused parameters": replace(CASE, unused=frozenset({(1, None, 0), (2, 0, 1), (2, None, 2)})),
    "bfloat16": half(torch.bfloat16),
    "float16": replace(half(torch.float16), scales=(1.0, 4.0, 4.0, 2.0)),
    "errors in bfloat16": with_config(CASE, error_dtype=torch.bfloat16),
    "wider errors": with_config(half(torch.bfloat16), error_dtype=torch.float32),
    "a narrow wire": with_config(CASE, comm_dtype=torch.float16),
    "no errors": with_config(CASE, error_feedback=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_is_that_of_pytorchs_operations(ranks, case):
    runs, others = played(ranks, case), played(ranks, replace(case, triton=False))
    require_equal(runs)
    if case.config["error_feedback"]:
        require_balance(case, runs)
    dtypes = {case.parameters[0].dtype, case.config["error_dtype"], case.config["comm_dtype"]} - {None}
    # The warm start amplifies roundoff.
    allowed = 32 * max(torch.finfo(dtype).eps for dtype in dtypes)
    for ours, theirs in zip(runs, others, strict=True):
        for step in range(case.steps):
            ours_of_step, theirs_of_step = ours.averaged[step], theirs.averaged[step]
            assert (ours_of_step - theirs_of_step).norm() <= allowed * theirs_of_step.norm(), step


@pytest.mark.parametrize("name", ["full", "alternating", "a scaler", "bfloat16"])
def test_a_step_that_is_not_finite_is_remembered_nowhere(ranks, name):
    spots = (Spot(1, 1, 0, 100, float("inf")), Spot(2, 0, 2, 3, float("nan")))
    case = replace(CASES[name], spots=spots)
    runs = played(ranks, case)
    require_equal(runs)
    require_no_trace(case, runs)


@pytest.mark.parametrize("name", ["full", "alternating"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, name):
    case = CASES[name]
    run, *_ = played(ranks, case)
    resumed, *_ = played(ranks, case, start=case.save_after, saved=run.saved)
    assert same(run.averaged[case.save_after :], resumed.averaged)


def test_one_rank_goes_on_with_the_run_of_two(ranks):
    case = replace(CASE, alike=True)
    run, *_ = played(ranks, case)
    [alone] = played(ranks, replace(case, world_size=1), start=case.save_after, saved=run.saved)
    assert not alone.alone
    for ours, theirs in zip(alone.averaged, run.averaged[case.save_after :], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
