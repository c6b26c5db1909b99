"""One compressed parameter in one step, from its gradient to the averaged one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_powersgd.compressor import verdict
from lightning_powersgd.compressor.codec import saturated
from lightning_powersgd.compressor.passes import add_scaled, decompress, project
from lightning_powersgd.compressor.plan import Side, Slot
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.view import as_matrix


class Matrix:
    """One compressed parameter in one step: M = g + e, and the basis that it is projected onto.

    M is formed in the gradient's own memory, so that it costs none. Only where M is wider than the gradient it is a
    temporary, formed anew for each use.

    Attributes:
        dtype: of M (see `PowerSGDState.matrix_dtype`).
        basis: orthonormal rows, or the held factor itself in the first half of a full step; of M's dtype.
    """

    def __init__(self, slot: Slot, state: PowerSGDState) -> None:
        self._slot = slot
        self._state = state
        self.dtype = state.matrix_dtype(slot)
        self._in_place = self.dtype == slot.dtype
        self._scale: float | Tensor = 1.0
        self.forget()

    def forget(self) -> None:
        """Let go of what belongs to one step."""
        self._gradient = self.basis = torch.empty(0)
        self._error: Tensor | None = None
        self._summed = False

    def take(self, gradient: Tensor, scale: float | Tensor) -> None:
        """Take in the gradient.

        Args:
            gradient: of the parameter's shape and memory layout.
            scale: of its loss, in units of the error's.
        """
        self._scale = scale
        slot, error = self._slot, self._state.errors.get(self._slot.name)
        self._gradient = as_matrix(gradient, slot.order, slot.split)
        self._error = None if error is None else as_matrix(error, slot.order, slot.split)

    def project(self, side: Side, out: Tensor) -> None:
        """Project M onto the basis: the factor of that side, (r, n) or (r, m)."""
        matrix, error = self._sum()
        if side == "left":
            matrix, error = matrix.t(), None if error is None else error.t()
        project(matrix, self.basis, out, error, self._scale)

    def support(self, side: Side) -> Tensor:
        """Tell where M has anything but zeros: (n,) bools for its rows, the left side, or (m,) for its columns."""
        parts = [part for part in self._sum() if part is not None]
        # A norm makes no temporary of the matrix's size, where a comparison would.
        largest = [torch.linalg.vector_norm(part, torch.inf, dim=1 if side == "left" else 0) for part in parts]
        return torch.stack(largest).sum(dim=0) != 0

    def decompress(self, side: Side, own: Tensor, average: Tensor, keep: bool | Tensor) -> tuple[Tensor, Tensor]:
        """Write the averaged gradient over this rank's, and the local residual into the error.

        Args:
            side: of the factors.
            own: this rank's projection.
            average: the mean of the ranks' projections.
            keep: whether to update the error.

        Returns:
            The factors of the average, (r, n) and (r, m).
        """
        matrix, pending = self._sum()
        if pending is not None:
            add_scaled(matrix, pending, self._scale)
        factors = [(self.basis, factor) if side == "right" else (factor, self.basis) for factor in (average, own)]
        decompress(matrix, factors[0], factors[1], self._error, keep)
        if not self._in_place:
            self._gradient.copy_(saturated(matrix, self._gradient.dtype))
        left, right = factors[0]
        return left.to(matrix.dtype), right.to(matrix.dtype)

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        """Give M, (n, m), or the gradient in M's dtype and the error that is yet to be added to it in its place."""
        if not self._in_place:
            return self._gradient.to(self.dtype), self._error
        pending = None if self._summed else self._error
        self._summed = True
        return self._gradient, pending


def add_errors(matrices: Iterable[Matrix]) -> None:
    """Form M in the gradients' memory, of several matrices of one step in as few launches as a device allows.

    A CPU does it while it projects, in the same journey through memory.
    """
    pending = [matrix for matrix in matrices if matrix._in_place and matrix._error is not None]
    if not pending or verdict.host_waits_for(pending[0]._gradient.device):
        return
    scale = pending[0]._scale
    if isinstance(scale, Tensor):
        return  # it is on the device, and an operation on several tensors cannot take it from there
    errors = [matrix._error for matrix in pending if matrix._error is not None]
    torch._foreach_add_([matrix._gradient for matrix in pending], errors, alpha=scale)
    for matrix in pending:
        matrix._summed = True


def write_average(gradient: Tensor, slot: Slot, factors: tuple[Tensor, Tensor]) -> None:
    """Write an averaged gradient, as a rank does that took part in averaging it: bit for bit.

    Args:
        gradient: of the parameter's shape and memory layout; overwritten.
        slot: of the parameter.
        factors: (r, n) and (r, m), from `GradientExchange.end_step`.
    """
    view = as_matrix(gradient, slot.order, slot.split)
    matrix = view if view.dtype == factors[0].dtype else torch.empty_like(view, dtype=factors[0].dtype)
    decompress(matrix, factors, factors)
    if matrix is not view:
        view.copy_(saturated(matrix, view.dtype))
