"""The algorithms, slow and obvious: all ranks in one process, in float64, one matrix at a time, as in the papers.

Everything fast is compared with this. It keeps P as (n, r) and Q as (m, r), copies freely, and knows no buckets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mean(tensors: list[Tensor]) -> Tensor:
    """The mean over ranks."""
    return torch.stack(tensors).mean(dim=0)


def orth(matrix: Tensor) -> Tensor:
    """Gram–Schmidt, in the order of the columns."""
    columns: list[Tensor] = []
    for column in matrix.unbind(dim=1):
        rest = column
        for _ in range(2):  # twice is enough, whatever the condition
            for done in columns:
                rest = rest - done * (done @ rest)
        columns.append(rest / rest.norm())
    return torch.stack(columns, dim=1)


class Reference:
    """PowerSGD for one matrix on W ranks.

    Args:
        first_factor: gives the first P, (n, r), or Q, (m, r), for the side "left" or "right".
        world_size: W.
        alternate: send only one factor a step.
    """

    def __init__(self, first_factor: Callable[[str], Tensor], world_size: int, alternate: bool = False) -> None:
        self.Q = first_factor("right").double()
        self.P = first_factor("left").double()
        self.e = [torch.zeros(len(self.P), len(self.Q), dtype=torch.float64) for _ in range(world_size)]
        self.alternate = alternate
        self.step = 0

    def __call__(self, gradients: list[Tensor]) -> Tensor:
        """Give ĝ, which every rank receives, for the matrices g_w of the ranks."""
        # M_w = g_w + e_w
        M = [g.double().reshape(e.shape) + e for g, e in zip(gradients, self.e, strict=True)]
        if not self.alternate:
            # P̄ = mean_w M_w Q,  P̂ = orth(P̄)
            P_hat = orth(mean([M_w @ self.Q for M_w in M]))
            # Q_w = M_wᵀ P̂,  Q = mean_w Q_w,  ĝ = P̂ Qᵀ,  e_w = M_w − P̂ Q_wᵀ
            Q = [M_w.T @ P_hat for M_w in M]
            self.Q = mean(Q)
            self.e = [M_w - P_hat @ Q_w.T for M_w, Q_w in zip(M, Q, strict=True)]
            return P_hat @ self.Q.T
        if self.step % 2 == 0:
            # Q̂ = orth(Q),  P_w = M_w Q̂,  ĝ = P̄ Q̂ᵀ
            Q_hat = orth(self.Q)
            P = [M_w @ Q_hat for M_w in M]
            self.P = mean(P)
            self.e = [M_w - P_w @ Q_hat.T for M_w, P_w in zip(M, P, strict=True)]
            self.step += 1
            return self.P @ Q_hat.T
        # The mirror image.
        P_hat = orth(self.P)
        Q = [M_w.T @ P_hat for M_w in M]
        self.Q = mean(Q)
        self.e = [M_w - P_hat @ Q_w.T for M_w, Q_w in zip(M, Q, strict=True)]
        self.step += 1
        return P_hat @ self.Q.T


class GossipReference:
    """PowerGossip for one matrix on W ranks.

    Args:
        first_factor: gives the first Q, (m, r), of the link between ranks i < j. ``None``: whole matrices travel.
        rounds: the mixing matrices A of successive steps, each (W, W).
        traces: what is added to a Q and a P, whose columns have a largest entry of 1, before it becomes a basis.
    """

    def __init__(
        self,
        first_factor: Callable[[int, int], Tensor] | None,
        rounds: list[Tensor],
        traces: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.rounds, self.traces = rounds, traces
        self.links = [
            [(i, j) for i in range(len(A)) for j in range(i + 1, len(A)) if A[i, j] > 0]  # i < j
            for A in rounds
        ]
        self.whole = first_factor is None
        self.Q = {} if self.whole else {link: first_factor(*link).double() for links in self.links for link in links}
        self.P: dict[tuple[int, int], Tensor] = {}
        self.uses = [0 for _ in rounds]

    def __call__(self, X: list[Tensor], number: int) -> list[Tensor]:
        """Give what each rank adds to its matrix in a round.

        Args:
            X: the ranks' matrices.
            number: of the mixing matrix.
        """
        A, add = self.rounds[number], [torch.zeros_like(x) for x in X]
        for i, j in self.links[number]:
            D = X[i] - X[j]
            if self.whole:
                D_hat = D
            elif self.uses[number] % 2 == 0:
                # Q̂ = orth(Q),  P = (X_i − X_j) Q̂,  D̂ = P Q̂ᵀ
                Q_hat = orth(self.Q[i, j] + self.traces[0])
                P = D @ Q_hat
                D_hat, self.P[i, j] = P @ Q_hat.T, P / P.abs().amax(dim=0)
            else:
                # The mirror image.
                P_hat = orth(self.P[i, j] + self.traces[1])
                Q = D.T @ P_hat
                D_hat, self.Q[i, j] = P_hat @ Q.T, Q / Q.abs().amax(dim=0)
            # X_i ← X_i − a D̂,  X_j ← X_j + a D̂
            add[i] = add[i] - A[i, j] * D_hat
            add[j] = add[j] + A[i, j] * D_hat
        self.uses[number] += 1
        return add


class AveragingReference:
    """Low-rank averaging for one matrix on W ranks.

    Args:
        reference: the first ρ, (n, m).
        draw: gives Ω, (m, r), by the number of the round. ``None``: whole matrices are averaged.
        signs: gives s, one for each rank, by the number of the round.
    """

    def __init__(
        self, reference: Tensor, draw: Callable[[int], Tensor] | None, signs: Callable[[int], list[float]]
    ) -> None:
        self.rho, self.draw, self.signs, self.round = reference.double(), draw, signs, 0

    def __call__(self, theta: list[Tensor]) -> list[Tensor]:
        """Give the ranks' matrices after a round."""
        s, number = self.signs(self.round), self.round
        self.round += 1
        if self.draw is None:
            return [mean(theta) for _ in theta]
        # M_w = θ_w − ρ,  P̂ = orth(mean_w s_w M_w Ω)
        M = [theta_w - self.rho for theta_w in theta]
        P_hat = orth(mean([s_w * M_w @ self.draw(number).double() for s_w, M_w in zip(s, M, strict=True)]))
        # Q_w = M_wᵀ P̂,  θ_w ← θ_w + P̂ (Q̄ − Q_w)ᵀ,  ρ ← ρ + P̂ Q̄ᵀ
        Q = [M_w.T @ P_hat for M_w in M]
        self.rho = self.rho + P_hat @ mean(Q).T
        return [theta_w + P_hat @ (mean(Q) - Q_w).T for theta_w, Q_w in zip(theta, Q, strict=True)]
