"""Tier one: bases and factors."""

from __future__ import annotations

import math

import pytest
import torch
from nets import like_an_accelerator, randn
from reference import orth
from torch import Tensor

from lightning_powersgd.compressor.basis import (
    normalize_rows,
    orthonormal,
    orthonormal_each,
    random_factor,
    unique_basis,
)


@pytest.mark.parametrize("rank", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_orthonormal_rows_at_every_condition(rank, condition):
    left = torch.linalg.qr(randn(500, rank, dtype=torch.float64)).Q.T
    scales = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), rank, dtype=torch.float64)
    factor = (torch.linalg.qr(randn(rank, rank, dtype=torch.float64)).Q * scales) @ left
    basis = orthonormal(factor.float(), torch.float32)
    assert (basis @ basis.T - torch.eye(rank)).abs().max() < 1e-5
    # The span is the input's: projecting the input onto the basis loses its rounding to float32 at most.
    lost = factor - (factor @ basis.double().T) @ basis.double()
    assert lost.norm() < 1e-5 * factor.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["zero", "equal rows", "tiny", "huge", "square"])
def test_orthonormal_rows_of_awkward_input(case, dtype):
    factor = {
        "zero": torch.zeros(3, 10),
        "equal rows": randn(1, 10).expand(3, 10),
        "tiny": randn(3, 10) * 1e-30,
        "huge": randn(3, 10) * 1e30,
        "square": randn(3, 3),
    }[case].to(torch.float32)
    basis = orthonormal(factor, dtype)
    assert basis.dtype == dtype
    assert basis.is_contiguous()
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    assert (basis.double() @ basis.double().T - torch.eye(3)).abs().max() < tolerance


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("case", ["full", "zero", "equal rows", "one entry"])
def test_a_basis_is_the_same_whatever_the_rounding(case, rank):
    factor = {
        "full": randn(rank, 10),
        "zero": torch.zeros(rank, 10),
        "equal rows": randn(1, 10).expand(rank, 10),
        "one entry": torch.eye(10)[4].expand(rank, 10),
    }[case]
    trace = 1e-9 * randn(rank, 10)
    basis = unique_basis(factor, trace, torch.float32)
    assert basis.dtype == torch.float32
    assert basis.is_contiguous()
    assert (basis @ basis.T - torch.eye(rank)).abs().max() < 1e-6
    assert (basis - orth((factor.double() + trace).T).T).abs().max() < 1e-6
    rounded = (factor.double() + trace) * (1 + 1e-16 * randn(10, rank, dtype=torch.float64).T)
    assert (basis - orth(rounded.T).T).abs().max() < 1e-6


def test_a_random_factor_is_the_same_whatever_the_defaults_are():
    expected = random_factor("a draw", 2, 30)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = random_factor("a draw", 2, 30)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_rows_are_scaled_and_rows_of_zeros_give_way():
    factor = torch.tensor([[2.0, -4.0], [0.0, 0.0], [1e-38, 0.0]])
    fallback = torch.tensor([[9.0, 9.0], [0.5, 1.0], [9.0, 9.0]])
    assert torch.equal(normalize_rows(factor, fallback), torch.tensor([[0.5, -1.0], [0.5, 1.0], [1.0, 0.0]]))


# On an accelerator

AWKWARD = {
    "random": lambda rank: randn(rank, 300),
    "condition 1e4": lambda rank: conditioned(rank, 1e4),
    "condition 1e8": lambda rank: conditioned(rank, 1e8),
    "rank 1": lambda rank: randn(rank, 1) @ randn(1, 300),
    "zero": lambda rank: torch.zeros(rank, 300),
    "a zero row": lambda rank: randn(rank, 300) * (torch.arange(rank) > 0).unsqueeze(1),
    "equal rows": lambda rank: randn(1, 300).repeat(rank, 1),
    "tiny": lambda rank: randn(rank, 300) * 1e-38,
    "huge": lambda rank: randn(rank, 300) * 1e37,
}


def conditioned(rank: int, condition: float) -> Tensor:
    scales = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    rows = torch.linalg.qr(randn(300, rank, dtype=torch.float64)).Q.T
    return ((torch.linalg.qr(randn(rank, rank, dtype=torch.float64)).Q * scales) @ rows).float()


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("case", AWKWARD)
def test_an_accelerators_bases_are_orthonormal_and_keep_the_span(case, rank):
    factor = torch.stack([AWKWARD[case](rank), randn(rank, 300)])
    with like_an_accelerator(True):
        basis = orthonormal(factor, torch.float32).double()
    assert (basis @ basis.mT - torch.eye(rank)).abs().max() <= 1e-7
    # What the input has in other directions than these, for its largest row.
    wide = factor.double() / factor.double().norm(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    lost = wide - (wide @ basis.mT) @ basis
    assert lost.norm(dim=(1, 2)).max() <= 1e-6


def test_an_accelerators_bases_do_not_depend_on_what_is_stacked_with_them():
    factors = torch.stack([randn(4, 300) for _ in range(5)])
    with like_an_accelerator(True):
        together, alone = orthonormal(factors, torch.float32), [orthonormal(f, torch.float32) for f in factors]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("accelerator", [False, True])
def test_factors_of_several_shapes_have_the_bases_that_each_has(accelerator):
    shapes = [(2, 3, 40), (1, 2, 40), (3, 3, 300), (2, 3, 90), (1, 3, 5), (4, 2, 7)]
    factors = [randn(*shape) for shape in shapes]
    factors[3][:, :, 8] = 0
    factors[3][1] = 0
    factors[0][1, 2] = factors[0][1, 0]
    with like_an_accelerator(accelerator):
        bases, alone = orthonormal_each(factors, torch.float32), [orthonormal(f, torch.float32) for f in factors]
    for basis, other in zip(bases, alone, strict=True):
        assert basis.is_contiguous()
        assert (basis @ basis.mT - torch.eye(basis.shape[1])).abs().max() <= 1e-6
        torch.testing.assert_close(basis, other, rtol=0, atol=1e-6)
    assert not bases[3][0, :, 8].any()


@pytest.mark.parametrize("accelerator", [False, True])
def test_columns_of_zeros_stay_zero(accelerator):
    factor = randn(2, 3, 20)
    factor[0, :, 5] = 0
    factor[1, :, 2:] = 0
    with like_an_accelerator(accelerator):
        basis = orthonormal(factor, torch.float32)
    assert not basis[0, :, 5].any()
    assert not basis[1, :, 2:].any()
    assert basis.isfinite().all()
