"""One compressed parameter in one step, from its gradient to the averaged one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_powersgd.compressor import fused, native, verdict
from lightning_powersgd.compressor.codec import saturated
from lightning_powersgd.compressor.fused import FusedPasses
from lightning_powersgd.compressor.native import NativePasses
from lightning_powersgd.compressor.operands import Decompression, Dtypes, Projection
from lightning_powersgd.compressor.passes import add_scaled, decompress, project
from lightning_powersgd.compressor.plan import Side, Slot
from lightning_powersgd.compressor.state import PowerSGDState
from lightning_powersgd.compressor.view import as_matrix

_NOTHING = torch.empty(0)


class Matrix:
    """One compressed parameter in one step: M = g + e, and the basis that it is projected onto.

    M is formed in the gradient's own memory, so that it costs none. Only where M is wider than the gradient it is a
    temporary, formed anew for each use.

    Attributes:
        dtypes: of the gradient, the error and M (see `PowerSGDState.matrix_dtype`).
        basis: orthonormal rows, or the held factor itself in the first half of a full step; of M's dtype.
    """

    def __init__(self, slot: Slot, state: PowerSGDState) -> None:
        self._slot = slot
        self._state = state
        error = state.errors.get(slot.name)
        self.dtypes = Dtypes(slot.dtype, None if error is None else error.dtype, state.matrix_dtype(slot))
        self._in_place = self.dtypes.matrix == slot.dtype
        self._scale: float | Tensor = 1.0
        self.forget()

    def forget(self) -> None:
        """Let go of what belongs to one step."""
        self._gradient = self.basis = _NOTHING
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

    def decompress(self, side: Side, own: Tensor, average: Tensor, keep: bool | Tensor) -> None:
        """Write the averaged gradient over this rank's, and the local residual into the error.

        Args:
            side: of the factors.
            own: this rank's projection, in M's dtype.
            average: the mean of the ranks' projections, alike.
            keep: whether to update the error.
        """
        matrix, pending = self._sum()
        if pending is not None:
            add_scaled(matrix, pending, self._scale)
        decompress(matrix, self.factors(side, average), self.factors(side, own), self._error, keep)
        if not self._in_place:
            self._gradient.copy_(saturated(matrix, self._gradient.dtype))

    def factors(self, side: Side, projection: Tensor) -> tuple[Tensor, Tensor]:
        """Give the factors of what a projection of that side stands for, (r, n) and (r, m)."""
        return (self.basis, projection) if side == "right" else (projection, self.basis)

    def to_be_projected(self, out: Tensor, own: Tensor | None = None) -> Projection:
        """Give what `passes_for`'s `project` takes. It leaves M in the gradient, if that has M's dtype."""
        pending = None if self._summed else self._error
        self._summed = self._in_place
        return Projection(self._gradient, pending, self.basis, out, own)

    def to_be_decompressed(self, own: Tensor, average: Tensor) -> Decompression:
        """Give what `passes_for`'s `decompress` takes."""
        return Decompression(self._gradient, self._error, self.basis, average, own)

    def fits(self, fused: NativePasses | FusedPasses | None) -> bool:
        """Whether passes over many matrices take this one."""
        return fused is not None and fused.takes(self._slot.rows, self._slot.columns, self._slot.rank)

    def _sum(self) -> tuple[Tensor, Tensor | None]:
        """Give M, (n, m), or the gradient in M's dtype and the error that is yet to be added to it in its place."""
        if not self._in_place:
            return self._gradient.to(self.dtypes.matrix), self._error
        pending = None if self._summed else self._error
        self._summed = True
        return self._gradient, pending


def passes_for(device: torch.device, dtypes: Dtypes) -> NativePasses | FusedPasses | None:
    """Give the passes over all matrices of a group at once; ``None`` where each is made for each of them."""
    return native.passes_for(device, dtypes) or fused.passes_for(device, dtypes)


def project_each(
    matrices: Mapping[str, Matrix],
    side: Side,
    projections: Mapping[str, Tensor],
    fused: NativePasses | FusedPasses | None,
) -> None:
    """Project matrices of one step.

    Args:
        matrices: by name.
        side: of the projections.
        projections: by name, (r, n) or (r, m), to be written.
        fused: the passes over all of them; ``None`` where each is made for each of them.
    """
    together = {name: matrix for name, matrix in matrices.items() if matrix.fits(fused)}
    if fused is not None and together:
        operands = [matrix.to_be_projected(projections[name]) for name, matrix in together.items()]
        fused.project(side, operands, next(iter(together.values()))._scale)
    others = {name: matrix for name, matrix in matrices.items() if name not in together}
    _add_errors(others.values())
    for name, matrix in others.items():
        matrix.project(side, projections[name])


def decompress_each(
    matrices: Mapping[str, Matrix],
    side: Side,
    own: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    keep: Tensor | None,
    fused: NativePasses | FusedPasses | None,
) -> None:
    """Write the averaged gradients over those of this rank, and the local residuals into the errors.

    Args:
        matrices: by name.
        side: of the factors.
        own: this rank's projections, by name.
        average: the means of the ranks' projections, by name.
        keep: (b,) bools, whether to update the error of each; ``None``: all of them.
        fused: as in `project_each`.
    """
    together = {name: matrix for name, matrix in matrices.items() if matrix.fits(fused)}
    alone = len(together) < len(matrices)
    keep_each: Sequence[bool | Tensor] = [True] * len(matrices)
    if alone and keep is not None:
        keep_each = verdict.known_each(keep)
    if fused is not None and together:
        operands = [matrix.to_be_decompressed(own[name], average[name]) for name, matrix in together.items()]
        if alone and keep is not None:
            fitting = [kept for name, kept in zip(matrices, keep.unbind(), strict=True) if name in together]
            keep = torch.stack(fitting)
        fused.decompress(side, operands, next(iter(together.values()))._scale, keep)
    for (name, matrix), keep_this in zip(matrices.items(), keep_each, strict=True):
        if name not in together:
            matrix.decompress(side, own[name], average[name], keep_this)


def _add_errors(matrices: Iterable[Matrix]) -> None:
    """Form M in the gradients' memory, of several matrices of one step in as few launches as a device allows.

    A CPU does it while it projects, in the same journey through memory.
    """
    pending = [matrix for matrix in matrices if matrix._in_place and matrix._error is not None and not matrix._summed]
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
    left, right = factors
    # Without an error: it makes no difference to the average.
    fused = passes_for(view.device, Dtypes(view.dtype, None, left.dtype))
    if fused is not None and fused.takes(slot.rows, slot.columns, slot.rank):
        fused.decompress("right", [Decompression(view, None, left, right, right)])
        return
    matrix = view if view.dtype == left.dtype else torch.empty_like(view, dtype=left.dtype)
    decompress(matrix, factors, factors)
    if matrix is not view:
        view.copy_(saturated(matrix, view.dtype))
