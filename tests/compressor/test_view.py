"""Tier one: tensors seen as matrices."""

from __future__ import annotations

import pytest
import torch
from nets import randn

from lightning_powersgd.compressor.view import as_matrix, matrix_order, permute_columns


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
