"""Error buffers that grow without end, which a learning rate brings about that compression makes too high."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_powersgd.compressor.state import PowerSGDState

# How much larger than what gradients of the first one's size can fill them with, and growing in so many measurements.
_FACTOR, _IN_A_ROW = 10.0, 3


class ErrorGrowth:
    """Warns, once, if error buffers grow far beyond what compression leaves of gradients that do not grow.

    A direction waits about as many steps as a turnaround takes (`Plan.turnaround`), so a healthy error is shorter than
    that many gradients.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._last = float("inf")
        self._risen = 0
        self._warned = False

    def measured(self, state: PowerSGDState, squared_error: float, squared_matrix: float) -> None:
        """Note a measurement.

        Args:
            state: of what was measured.
            squared_error: ‖e‖² of this rank.
            squared_matrix: ‖M‖² alike.
        """
        error, matrix = (squared**0.5 / float(state.loss_scale) for squared in (squared_error, squared_matrix))
        if self._first is None:
            self._first = matrix
        self._risen = self._risen + 1 if error > self._last else 0
        self._last = error
        limit = _FACTOR * self._first * max(1.0, state.plan.turnaround(alternate=state.config.alternate))
        if not self._warned and self._risen >= _IN_A_ROW and error > limit > 0:
            self._warned = True
            rank_zero_warn(
                f"After {state.step} steps PowerSGD's error buffers are {error / self._first:,.0f} times as long as the"
                " first gradient, and still grow: what compression leaves of a gradient is sent later than this"
                " learning rate allows. Lower the learning rate, or raise `rank`."
            )
