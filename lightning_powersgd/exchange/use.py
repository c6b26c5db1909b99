"""Which parameters a rank's loss reaches, where that differs between steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class ReachedParameters:
    """The parameters that this rank's loss reaches, in a step and in the passes that were accumulated for it.

    A gradient does not tell: DDP hands over what an unused parameter still has in `grad` from the step before.

    Args:
        parameters: to be followed, by name.

    Attributes:
        last: names of those that the last step reached.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.last = set(parameters)
        self._now: set[str] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._now.add(name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
        ]

    def __contains__(self, name: str) -> bool:
        return name in self._now

    def end_step(self) -> None:
        """Begin anew for the next step."""
        self.last, self._now = self._now, set()

    def retire(self) -> None:
        """Follow the parameters no longer."""
        for handle in self._handles:
            handle.remove()
