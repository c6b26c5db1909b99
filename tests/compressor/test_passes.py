"""Tier one: the passes over matrices."""

from __future__ import annotations

import pytest
import torch
from nets import randn
from torch import nn

from lightning_powersgd.compressor import native
from lightning_powersgd.compressor.passes import decompress, project
from lightning_powersgd.compressor.view import as_matrix, matrix_order


@pytest.fixture(params=["compiled", "with PyTorch"])
def arithmetic(request, monkeypatch):
    """Both ways in which matrices are computed."""
    if request.param == "with PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("needs a C compiler")


SHAPES = [(1, 7), (7, 1), (4, 16), (64, 64), (33, 129), (130, 515)]


@pytest.mark.parametrize("with_error", [False, True], ids=["", "adding an error"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("arithmetic")
def test_projections_equal_those_in_float64(shape, rank, with_error):
    n, m = shape
    gradient, error = randn(n, m), randn(n, m) / 3 if with_error else None
    exact = gradient.double() + (error.double() if with_error else 0)
    for side, basis in (("right", randn(rank, n)), ("left", randn(rank, m))):
        matrix, out = gradient.clone(), torch.full((rank, m if side == "right" else n), torch.nan)
        if side == "right":
            project(matrix, basis, out, error)
            expected = basis.double() @ exact
        else:
            project(matrix.t(), basis, out, None if error is None else error.t())
            expected = basis.double() @ exact.T
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(matrix.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("arithmetic")
def test_decompression_equals_that_in_float64(shape, rank):
    n, m = shape
    matrix, left, own, right = randn(n, m), randn(rank, n), randn(rank, m), randn(rank, m + 1)[:, 1:].contiguous()
    rest = matrix.double() - left.double().T @ own.double()
    average = left.double().T @ right.double()

    error = torch.full((n, m), torch.nan)
    decompress(matrix, (left, right), (left, own), error)
    torch.testing.assert_close(error.double(), rest, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(matrix.double(), average, rtol=1e-5, atol=2e-5)

    decompress(matrix.fill_(torch.nan), (left, right), (left, own))
    torch.testing.assert_close(matrix.double(), average, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("arithmetic")
def test_products_stay_within_their_views_and_take_other_dtypes():
    buffer, errors = torch.zeros(100), torch.zeros(100)
    matrix, error = buffer[3:33].view(5, 6), errors[7:37].view(5, 6)
    factors = (randn(2, 5), randn(2, 6))
    decompress(matrix, factors, factors, error)
    for flat, first in ((buffer, 3), (errors, 7)):
        assert flat[:first].count_nonzero() == flat[first + 30 :].count_nonzero() == 0
        assert flat.count_nonzero() == 30

    gradient, narrow = randn(5, 6), randn(5, 6).bfloat16()
    matrix, out = gradient.clone(), torch.empty(2, 6, dtype=torch.bfloat16)
    project(matrix, factors[0], out, narrow)
    assert torch.equal(matrix, gradient + narrow)
    torch.testing.assert_close(out.float(), factors[0] @ matrix, rtol=0.01, atol=0.01)
    rest = matrix - factors[0].T @ factors[1]
    decompress(matrix, factors, factors, narrow)
    torch.testing.assert_close(narrow.float(), rest, rtol=0.01, atol=0.01)
    torch.testing.assert_close(matrix, factors[0].T @ factors[1])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.usefixtures("arithmetic")
def test_what_is_not_finite_shows_in_every_projection(value):
    for place in ((0, 0), (8, 16), (8, 3)):
        matrix = randn(9, 17)
        matrix[place] = value
        p, q = torch.empty(2, 9), torch.empty(2, 17)
        project(matrix.t(), randn(2, 17), p)
        project(matrix, randn(2, 9), q)
        assert not p[:, place[0]].isfinite().any()
        assert not q[:, place[1]].isfinite().any()


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(10, 33), (64, 64), (48, 100)])
@pytest.mark.usefixtures("arithmetic")
def test_projections_do_not_depend_on_the_alignment_of_the_matrix(shape, rank):
    # DDP's buckets put a gradient at another offset after a resume than before.
    n, m = shape
    matrix, left, right = randn(n, m), randn(rank, n), randn(rank, m)
    results = []
    for offset in range(17):
        moved = torch.empty(n * m + 32)[offset : offset + n * m].view(n, m).copy_(matrix)
        p, q = torch.empty(rank, n), torch.empty(rank, m)
        project(moved.t(), right, p)
        project(moved, left, q)
        error = torch.empty(n, m)
        decompress(moved, (left, right), (left, right), error)
        results.append((p, q, error, moved))
    for result in results:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


def test_a_convolution_in_channels_last_is_seen_as_its_matrix():
    conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
    order = matrix_order(conv.weight)
    assert as_matrix(conv.weight, order).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a_product_in_half_precision_is_rounded_once(dtype, rank):
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(rank, length, generator=generator).to(dtype) for length in (24, 40))
    matrix = torch.zeros(24, 40, dtype=dtype)
    decompress(matrix, (left, right), (left, right))
    exact = left.double().t() @ right.double()
    # Half of the last place; and what a sum in float32 may lose where large terms cancel.
    assert (matrix.double() - exact).abs().le(exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-5).all()
