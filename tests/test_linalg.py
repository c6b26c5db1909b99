"""Tier one: the matrix arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_powersgd.linalg import (
    as_matrix,
    matrix_order,
    normalize_rows,
    orthonormal,
    permute_columns,
    project_rows,
    reconstruct,
    residual,
)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize(
    ("tensor", "order"),
    [
        (torch.zeros(()), None),
        (torch.zeros(5), None),
        (torch.zeros(0, 4), None),
        (torch.zeros(5, 4), (0, 1)),
        (torch.zeros(4, 5).t(), (0, 1)),
        (torch.zeros(4, 3, 2, 2), (0, 1, 2, 3)),
        (torch.zeros(4, 3, 2, 2, 2), (0, 1, 2, 3, 4)),
        (torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last), (0, 2, 3, 1)),
        (torch.zeros(4, 6)[:, ::2], None),
        (torch.zeros(1, 4).expand(3, 4), None),
        (torch.zeros(3, 4, 2).permute(1, 0, 2), None),
    ],
    ids=[
        "scalar",
        "vector",
        "empty",
        "2-D",
        "transposed",
        "4-D",
        "5-D",
        "channels last",
        "gaps",
        "expanded",
        "interleaved",
    ],
)
def test_which_tensors_have_a_matrix_view(tensor, order):
    assert matrix_order(tensor) == order
    if order is not None:
        matrix = as_matrix(tensor, order)
        assert matrix.shape == (tensor.shape[0], tensor.numel() // tensor.shape[0])
        assert matrix.data_ptr() == tensor.data_ptr()


def test_columns_can_be_put_into_the_order_of_the_shape_and_back():
    weight = randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    order = matrix_order(weight)
    in_memory_order = as_matrix(weight, order)
    in_shape_order = permute_columns(in_memory_order, weight.shape, order, to_shape_order=True)
    assert torch.equal(in_shape_order, weight.flatten(1))
    assert torch.equal(permute_columns(in_shape_order, weight.shape, order, to_shape_order=False), in_memory_order)


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


def test_rows_are_scaled_and_rows_of_zeros_give_way():
    factor = torch.tensor([[2.0, -4.0], [0.0, 0.0], [1e-38, 0.0]])
    fallback = torch.tensor([[9.0, 9.0], [0.5, 1.0], [9.0, 9.0]])
    assert torch.equal(normalize_rows(factor, fallback), torch.tensor([[0.5, -1.0], [0.5, 1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (64, 64), (33, 129)])
def test_products_equal_those_in_float64(shape, rank):
    n, m = shape
    matrix, left, right = randn(n, m), randn(rank, n), randn(rank, m)
    exact, p, q = matrix.double(), left.double(), right.double()

    projected = torch.empty(rank, m)
    project_rows(matrix, left, projected)
    torch.testing.assert_close(projected.double(), p @ exact, rtol=1e-5, atol=1e-4)
    projected = torch.empty(rank, n)
    project_rows(matrix.t(), right, projected)
    torch.testing.assert_close(projected.double(), q @ exact.T, rtol=1e-5, atol=1e-4)

    product = torch.empty(n, m)
    reconstruct(left, right, product)
    torch.testing.assert_close(product.double(), p.T @ q, rtol=1e-5, atol=1e-5)
    rest = torch.empty(n, m)
    residual(matrix, left, right, out=rest)
    torch.testing.assert_close(rest.double(), exact - p.T @ q, rtol=1e-5, atol=1e-5)
    residual(matrix, left, right, out=matrix)
    assert torch.equal(matrix, rest)


def test_products_write_into_views_and_other_dtypes():
    buffer = torch.zeros(100)
    view = buffer[3:33].view(5, 6)
    reconstruct(randn(2, 5), randn(2, 6), view)
    assert buffer[:3].count_nonzero() == buffer[33:].count_nonzero() == 0
    assert view.count_nonzero() == 30
    out = torch.empty(2, 6, dtype=torch.bfloat16)
    project_rows(view, randn(2, 5), out)
    torch.testing.assert_close(out.float(), randn(2, 5) @ view, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(10, 33), (64, 64), (48, 100)])
def test_projections_do_not_depend_on_the_alignment_of_the_matrix(shape, rank):
    # DDP's buckets put a gradient at another offset after a resume than before.
    n, m = shape
    matrix, left, right = randn(n, m), randn(rank, n), randn(rank, m)
    results = []
    for offset in range(17):
        moved = torch.empty(n * m + 32)[offset : offset + n * m].view(n, m).copy_(matrix)
        p, q = torch.empty(rank, n), torch.empty(rank, m)
        project_rows(moved.t(), right, p)
        project_rows(moved, left, q)
        results.append((p, q))
    assert all(torch.equal(p, results[0][0]) and torch.equal(q, results[0][1]) for p, q in results)


def test_a_convolution_in_channels_last_is_seen_as_its_matrix():
    conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    order = matrix_order(conv.weight)
    assert as_matrix(conv.weight, order).is_contiguous()
