"""Tier one: bases and factors."""

from __future__ import annotations

import pytest
import torch
from nets import randn
from reference import orth

from lightning_powersgd.compressor.basis import normalize_rows, orthonormal, random_factor, unique_basis


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
