"""A tensor as an (n, m) matrix that shares its memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matrix_order(tensor: Tensor, split: int = 1) -> tuple[int, ...] | None:
    """Find the order of dimensions in which a tensor can be seen as an (n, m) matrix without a copy.

    The first ``split`` dimensions make the rows and the others the columns. With one dimension of rows, the others come
    in memory order, so that a convolution's weight in ``channels_last`` has a matrix view too; its columns are then
    permuted, which changes nothing in the algorithm.

    Args:
        tensor: a parameter or its gradient, of at least two dimensions.
        split: how many dimensions make the rows.

    Returns:
        A permutation of the dimensions, or ``None`` where no such view exists (fewer than two dimensions, or a memory
        layout that has gaps or interleaves rows and columns).
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span != tensor.numel():
        return None
    in_shape_order = tuple(range(tensor.dim()))
    in_memory_order = (0, *sorted(range(1, tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True))
    for order in (in_shape_order, in_memory_order) if split == 1 else (in_shape_order,):
        try:
            as_matrix(tensor, order, split)
        except (RuntimeError, ValueError):  # the latter where a tensor has no memory, as in tracing
            continue
        return order
    return None


def as_matrix(tensor: Tensor, order: tuple[int, ...], split: int = 1) -> Tensor:
    """View a tensor as its (n, m) matrix, in the order that `matrix_order` found. Shares the tensor's memory."""
    if tensor.dim() == 2:
        return tensor  # as most are: of small ones the two views would take as long as the arithmetic
    return tensor.permute(order).view(math.prod(tensor.shape[:split]), -1)


def permute_columns(factor: Tensor, shape: tuple[int, ...], order: tuple[int, ...], *, to_shape_order: bool) -> Tensor:
    """Reorder the columns of a right factor between memory order and the order of the parameter's shape.

    Checkpoints hold factors in the order of the shape, so that they fit a model in any memory format. Only where one
    dimension makes the rows, the two orders may differ.

    Args:
        factor: (r, m).
        shape: of the parameter, (n, ...).
        order: as `matrix_order` gave it.
        to_shape_order: the direction.

    Returns:
        (r, m), contiguous.
    """
    rank = factor.shape[0]
    if list(order) == sorted(order):
        return factor.contiguous()
    if to_shape_order:
        columns = factor.view(rank, *(shape[axis] for axis in order[1:]))
        inverse = sorted(range(len(order)), key=lambda axis: order[axis])
        return columns.permute(inverse).reshape(rank, -1)
    return factor.view(rank, *shape[1:]).permute(order).reshape(rank, -1)


def as_real(tensor: Tensor) -> Tensor:
    """View complex numbers as pairs of real ones; give real ones back as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
