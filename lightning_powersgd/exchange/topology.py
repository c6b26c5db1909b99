"""Who talks to whom when there is no server: graphs of ranks, and how much neighbours move towards each other.

A round of gossip replaces the models x of W ranks by A x with a mixing matrix A, (W, W): symmetric, with non-negative
entries and rows that sum to 1 (*doubly stochastic*), so that the mean of the models stays what it was. ``A[i][j]`` is
the weight of the link between ranks i and j, and zero where there is none.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

# The name of the topology without links, in which all ranks average together.
ALL = "all"

# How far rows of the mixing matrix may be from a sum of 1, and its halves from each other: rounding, not mistakes.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Topology:
    """A graph of ranks with its mixing weights; several of them in turn where it changes from step to step.

    Attributes:
        name: for messages.
        rounds: the mixing matrices of successive steps, each (W, W), float64; after the last comes the first again.
    """

    name: str
    rounds: tuple[Tensor, ...]

    @property
    def world_size(self) -> int:
        """The number of ranks, W."""
        return len(self.rounds[0])

    @property
    def links(self) -> list[tuple[int, int]]:
        """All pairs of ranks (i, j) that exchange anything in any round, i < j, in ascending order."""
        linked = torch.stack(self.rounds).amax(dim=0).triu(diagonal=1)
        return [(int(i), int(j)) for i, j in linked.nonzero()]

    def neighbors(self, rank: int) -> list[dict[int, float]]:
        """Give the weights of a rank's links in each round, by the rank at the other end, in ascending order."""
        return [
            {other: float(weight) for other, weight in enumerate(matrix[rank]) if other != rank and weight > 0}
            for matrix in self.rounds
        ]

    @property
    def spectral_gap(self) -> float:
        """How fast the ranks come to agree, from 0 (never) to 1 (at once).

        An exact round of gossip shrinks the distance from the mean model at least by the factor 1 − gap. With one round
        that is the second largest magnitude among the eigenvalues of the mixing matrix; with several, their geometric
        mean over the product of all. What low-rank gossip leaves out of a round makes it slower.
        """
        product = torch.eye(self.world_size, dtype=torch.float64)
        for matrix in self.rounds:
            product = matrix @ product
        rest = float(torch.linalg.matrix_norm(product - 1 / self.world_size, ord=2))
        # What is left when the ranks agree exactly is rounding.
        return 1.0 - math.pow(0.0 if rest < 1e-12 else rest, 1 / len(self.rounds))

    def summary(self) -> str:
        """Say in one line what connects the ranks, and how well."""
        if self.name == ALL:
            return f"{self.world_size} ranks in a topology named {ALL!r}: they average together, without links"
        links, per_rank = self.links, 0.0
        for matrix in self.rounds:
            per_rank += 2 * int((matrix.triu(diagonal=1) > 0).sum()) / self.world_size / len(self.rounds)
        return (
            f"{self.world_size} ranks in a topology named {self.name!r}: {len(links)}"
            f" link{'s' if len(links) != 1 else ''}, {per_rank:.3g} used by a rank in a step, spectral gap"
            f" {self.spectral_gap:.3g}"
        )


def make_topology(
    topology: str | Iterable[Sequence[int]] | nx.Graph,
    world_size: int,
    weights: Sequence[Sequence[float]] | Tensor | None = None,
) -> Topology:
    """Make the topology of a number of ranks.

    Args:
        topology: a name of `TOPOLOGIES`; or pairs of ranks that are linked; or a networkx graph of ranks.
        world_size: the number of ranks, W.
        weights: the mixing matrix, (W, W), zero where there is no link. ``None`` takes Metropolis-Hastings weights,
            ``1 / (1 + the larger degree of the two)``, which suit every graph.

    Raises:
        TypeError: for a graph that is not one.
        ValueError: for an unknown name; a number of ranks that the graph does not have; a graph that is directed, or in
            which some ranks have no way to others; weights that are not symmetric, non-negative, with rows that sum to
            1, or that link ranks which the graph does not.
    """
    name = topology if isinstance(topology, str) else "custom"
    graphs = _named_graphs(topology, world_size) if isinstance(topology, str) else [_as_graph(topology, world_size)]
    together = nx.compose_all(graphs)
    if weights is None:
        _require_connected(together, name)
        return Topology(name, tuple(_metropolis_hastings(graph) for graph in graphs))
    if len(graphs) > 1:
        raise ValueError(
            f"`weights` cannot be given for topology={name!r}, which changes from step to step. Leave `weights` out."
        )
    matrix = _checked_weights(weights, together, name)
    used = nx.empty_graph(world_size)
    used.add_edges_from(_nonzero(matrix))
    _require_connected(used, f"{name}, with these weights,")
    weighted = Topology(name, (matrix,))
    if weighted.spectral_gap < _TOLERANCE:
        raise ValueError(
            "With these `weights` the ranks would never agree: neighbours only swap their models. Let each rank keep"
            " something of its own: give the diagonal positive weights."
        )
    return weighted


def require_known(topology: object) -> None:
    """Check what can be checked of a topology before the number of ranks is known.

    Raises:
        TypeError: if it is neither a name nor a graph.
        ValueError: if it is a name that is not one of `TOPOLOGIES`.
    """
    if isinstance(topology, str) and topology not in TOPOLOGIES:
        close = difflib.get_close_matches(topology, TOPOLOGIES, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else "Pairs of linked ranks, or a networkx graph, do as well."
        raise ValueError(f"`topology={topology!r}` is not one of {', '.join(map(repr, TOPOLOGIES))}. {hint}")
    if not isinstance(topology, str | nx.Graph | Iterable):
        raise TypeError(
            f"`topology={topology!r}` is no graph. Use one of {', '.join(map(repr, TOPOLOGIES))}, pairs of linked ranks"
            " such as [[0, 1], [1, 2]], or a networkx graph."
        )


def _ring(world_size: int) -> list[nx.Graph]:
    return [nx.cycle_graph(world_size)]


def _torus(world_size: int) -> list[nx.Graph]:
    rows = max(size for size in range(1, math.isqrt(world_size) + 1) if world_size % size == 0)
    if rows == 1 and world_size > 3:
        raise ValueError(
            f"`topology='torus'` arranges ranks in a rectangle, and {world_size} ranks do not fill one. Use a number of"
            " ranks that is a product, or topology='ring'."
        )
    return [nx.grid_2d_graph(rows, world_size // rows, periodic=True)]


def _dimensions(world_size: int, name: str) -> int:
    dimensions = world_size.bit_length() - 1
    if world_size != 2**dimensions:
        raise ValueError(
            f"`topology={name!r}` needs a number of ranks that is a power of two, not {world_size}. Use"
            " topology='exponential', which suits every number."
        )
    return dimensions


def _hypercube(world_size: int) -> list[nx.Graph]:
    return [nx.compose_all(_one_peer(world_size, "hypercube"))]


def _exponential(world_size: int) -> list[nx.Graph]:
    distances = [2**power for power in range(max(world_size - 1, 0).bit_length())]
    return [nx.circulant_graph(world_size, distances)]


def _one_peer(world_size: int, name: str = "one_peer_exponential") -> list[nx.Graph]:
    steps = []
    for dimension in range(_dimensions(world_size, name)):
        graph = nx.empty_graph(world_size)
        graph.add_edges_from((rank, rank ^ 2**dimension) for rank in range(world_size))
        steps.append(graph)
    return steps or [nx.empty_graph(world_size)]


def _star(world_size: int) -> list[nx.Graph]:
    return [nx.star_graph(world_size - 1)]


def _complete(world_size: int) -> list[nx.Graph]:
    return [nx.complete_graph(world_size)]


# By name, the graphs of successive steps.
TOPOLOGIES: dict[str, Callable[[int], list[nx.Graph]]] = {
    "ring": _ring,
    "torus": _torus,
    "hypercube": _hypercube,
    "exponential": _exponential,
    "one_peer_exponential": _one_peer,
    "star": _star,
    "complete": _complete,
    ALL: _complete,
}


def _named_graphs(name: str, world_size: int) -> list[nx.Graph]:
    require_known(name)
    graphs = []
    for graph in TOPOLOGIES[name](world_size):
        graph = nx.convert_node_labels_to_integers(graph, ordering="sorted")
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))  # of a ring of one
        graphs.append(graph)
    return graphs


def _as_graph(topology: Iterable[Sequence[int]] | nx.Graph, world_size: int) -> nx.Graph:
    require_known(topology)
    if isinstance(topology, nx.Graph):
        if topology.is_directed():
            raise ValueError("`topology` is a directed graph, but links work both ways. Use `graph.to_undirected()`.")
        nodes, edges = set(topology.nodes), list(topology.edges())
        if nodes != set(range(world_size)):
            raise ValueError(
                f"`topology` has {len(nodes)} nodes ({_some(sorted(nodes, key=str))}), and they are not the"
                f" {world_size} ranks from 0 to {world_size - 1}. Give it one node for each rank, named by its number."
            )
    else:
        edges = list(topology)
    graph = nx.empty_graph(world_size)
    for edge in edges:
        if not isinstance(edge, Sequence) or len(edge) != 2 or not all(type(end) is int for end in edge):
            raise TypeError(f"`topology` holds {edge!r}, which is no pair of ranks. Give pairs such as [0, 1].")
        if not all(0 <= end < world_size for end in edge) or edge[0] == edge[1]:
            raise ValueError(
                f"`topology` links {edge[0]} and {edge[1]}, which are not two of the {world_size} ranks from 0 to"
                f" {world_size - 1}. Correct the pair, or start as many ranks as the graph needs."
            )
        graph.add_edge(*edge)
    return graph


def _require_connected(graph: nx.Graph, name: str) -> None:
    reached = nx.node_connected_component(graph, 0)
    if len(reached) < len(graph):
        apart = sorted(set(graph) - reached)
        raise ValueError(
            f"`topology` ({name}) is not connected: rank 0 has no way to {_some(apart)}, and they would never agree."
            " Link them."
        )


def _metropolis_hastings(graph: nx.Graph) -> Tensor:
    matrix = torch.zeros(len(graph), len(graph), dtype=torch.float64)
    for i, j in graph.edges:
        matrix[i, j] = matrix[j, i] = 1 / (1 + max(graph.degree[i], graph.degree[j]))
    return matrix + torch.diag(1 - matrix.sum(dim=1))


def _checked_weights(weights: Sequence[Sequence[float]] | Tensor, graph: nx.Graph, name: str) -> Tensor:
    world_size = len(graph)
    try:
        matrix = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`weights` is no matrix of numbers: {error}") from error
    if matrix.shape != (world_size, world_size):
        raise ValueError(
            f"`weights` has the shape {tuple(matrix.shape)}, but there are {world_size} ranks. Give a row and a column"
            " for each of them."
        )
    for (i, j), weight in zip(_every_pair(matrix), matrix.flatten().tolist(), strict=True):
        where = f"`weights[{i}][{j}]={weight:.6g}`"
        if not weight >= 0:
            raise ValueError(f"{where} is not a weight. Weights are zero or positive numbers.")
        if abs(weight - matrix[j, i]) > _TOLERANCE:
            raise ValueError(
                f"{where} differs from `weights[{j}][{i}]={matrix[j, i]:.6g}`. Both ends of a link move equally far, or"
                " the mean of the models would change: give both the same weight."
            )
        if weight and i != j and not graph.has_edge(i, j):
            raise ValueError(
                f"{where} is a weight between ranks that the topology ({name}) does not link. Set it to 0."
            )
    for i, total in enumerate(matrix.sum(dim=1).tolist()):
        if abs(total - 1) > _TOLERANCE:
            raise ValueError(
                f"`weights[{i}]` sums to {total:.6g} instead of 1. `weights[{i}][{i}]` is what rank {i} keeps of its"
                " own model: set it to what the others leave."
            )
    # Both ends of a link must have the same weight to the last bit; or one would have a link that the other has not.
    return (matrix + matrix.T) / 2


def _every_pair(matrix: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(matrix)) for j in range(len(matrix))]


def _nonzero(matrix: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i, j in _every_pair(matrix) if i != j and matrix[i, j] > 0]


def _some(values: Iterable[object]) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")
