"""Tier one: who talks to whom, and how fast they come to agree."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_powersgd import Topology, make_topology
from lightning_powersgd.exchange.topology import TOPOLOGIES

SIZES = {
    "ring": (1, 2, 3, 4, 5, 8, 13),
    "torus": (1, 2, 3, 4, 6, 8, 9, 12, 15),
    "hypercube": (1, 2, 4, 8, 16),
    "exponential": (1, 2, 3, 5, 6, 8, 9, 16),
    "one_peer_exponential": (1, 2, 4, 8, 16),
    "star": (1, 2, 3, 4, 5, 8),
    "complete": (1, 2, 3, 4, 7, 8),
    "all": (1, 2, 3, 4, 8),
}
NAMED = [(name, size) for name, sizes in SIZES.items() for size in sizes]

# Sums of a dozen numbers of float64.
ROUNDING = 1e-12


def pairs(size: int, *distances: int) -> set[tuple[int, int]]:
    """Pairs of ranks that are some distances apart on a circle."""
    both = [(rank, (rank + distance) % size) for rank in range(size) for distance in distances]
    return {(min(pair), max(pair)) for pair in both if pair[0] != pair[1]}


def largest_but_one(matrix: torch.Tensor) -> float:
    """The second largest magnitude among the eigenvalues of a symmetric matrix; 0 for a single one."""
    magnitudes = sorted(abs(np.linalg.eigvalsh(matrix.numpy())))
    return 0.0 if len(magnitudes) == 1 else magnitudes[-2]


def check_mixing(topology: Topology) -> None:
    for matrix in topology.rounds:
        assert torch.equal(matrix, matrix.T)
        assert (matrix >= 0).all()
        assert matrix.sum(dim=0).sub(1).abs().max() < ROUNDING
    linked = nx.empty_graph(topology.world_size)
    linked.add_edges_from(topology.links)
    assert nx.is_connected(linked)


def test_every_name_is_tested():
    assert set(SIZES) == set(TOPOLOGIES)


@pytest.mark.parametrize(("name", "size"), NAMED)
def test_named_topologies_are_connected_and_keep_the_mean(name, size):
    topology = make_topology(name, size)
    assert topology.world_size == size
    check_mixing(topology)
    assert f"{size} ranks in a topology named '{name}'" in topology.summary()


@pytest.mark.parametrize(
    ("name", "size", "links"),
    [
        ("ring", 1, set()),
        ("ring", 2, {(0, 1)}),
        ("ring", 3, {(0, 1), (1, 2), (0, 2)}),
        ("ring", 5, pairs(5, 1)),
        ("torus", 2, {(0, 1)}),
        ("torus", 4, {(0, 1), (2, 3), (0, 2), (1, 3)}),
        ("torus", 6, {(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5), (0, 3), (1, 4), (2, 5)}),
        ("hypercube", 4, {(0, 1), (2, 3), (0, 2), (1, 3)}),
        ("hypercube", 8, {(rank, rank | bit) for rank in range(8) for bit in (1, 2, 4) if not rank & bit}),
        ("exponential", 8, pairs(8, 1, 2, 4)),
        ("exponential", 9, pairs(9, 1, 2, 4, 8)),
        ("one_peer_exponential", 8, {(rank, rank | bit) for rank in range(8) for bit in (1, 2, 4) if not rank & bit}),
        ("star", 5, {(0, 1), (0, 2), (0, 3), (0, 4)}),
        ("complete", 4, pairs(4, 1, 2, 3)),
    ],
)
def test_named_topologies_link_whom_they_say(name, size, links):
    topology = make_topology(name, size)
    assert topology.links == sorted(links)
    for rank in range(size):
        neighbors = topology.neighbors(rank)
        assert len(neighbors) == len(topology.rounds)
        for weights, matrix in zip(neighbors, topology.rounds, strict=True):
            assert list(weights) == sorted(weights)
            assert weights == {other: float(matrix[rank, other]) for other in weights}
        ends = {other for weights in neighbors for other in weights}
        assert ends == {a + b - rank for a, b in links if rank in (a, b)}


def on_a_circle(size: int) -> float:
    return 1 - (1 / 3 + 2 / 3 * math.cos(2 * math.pi / size))


@pytest.mark.parametrize(
    ("name", "size", "gap"),
    [
        *[("ring", size, on_a_circle(size)) for size in (3, 4, 5, 8, 13)],
        *[("complete", size, 1.0) for size in (1, 2, 3, 7, 8)],
        # Of d dimensions: eigenvalues 1 − 2 j / (d + 1).
        *[("hypercube", 2**d, 2 / (d + 1)) for d in (1, 2, 3, 4)],
        # The weight is 1 / W, and what leaves of a star disagree about passes through its centre.
        *[("star", size, 1 / size) for size in (3, 4, 5, 8)],
        # Of the angles a and b of two circles, of three ranks and three or four: (1 + 2 cos a + 2 cos b) / 5.
        ("torus", 9, 3 / 5),
        ("torus", 12, 2 / 5),
        # Of multiples a of an eighth of a turn: (1 + 2 cos a + 2 cos 2a + cos 4a) / 6.
        ("exponential", 8, 2 / 3),
        *[("one_peer_exponential", size, 1.0) for size in (2, 4, 8)],
    ],
)
def test_spectral_gaps_have_their_known_values(name, size, gap):
    assert make_topology(name, size).spectral_gap == pytest.approx(gap, abs=1e-9)


@pytest.mark.parametrize(("name", "size"), [pair for pair in NAMED if pair[0] != "one_peer_exponential"])
def test_the_spectral_gap_is_that_of_the_eigenvalues(name, size):
    topology = make_topology(name, size)
    assert topology.spectral_gap == pytest.approx(1 - largest_but_one(topology.rounds[0]), abs=1e-9)


@pytest.mark.parametrize("size", SIZES["one_peer_exponential"])
def test_one_peer_averages_exactly_in_as_many_rounds_as_it_has(size):
    topology = make_topology("one_peer_exponential", size)
    assert len(topology.rounds) == max(size.bit_length() - 1, 1)
    models = torch.randn(size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = models
    for number, matrix in enumerate(topology.rounds):
        assert all(len(topology.neighbors(rank)[number]) == (size > 1) for rank in range(size))
        found = matrix @ found
    assert torch.allclose(found, models.mean(dim=0).expand_as(models), atol=ROUNDING)


def test_pairs_and_graphs_are_topologies_too():
    square = [(0, 1), (1, 2), (2, 3), (3, 0)]
    ring = make_topology("ring", 4)
    shuffled = nx.Graph()
    shuffled.add_edges_from([(3, 2), (0, 3), (2, 1), (1, 0)], weight=7)
    for topology in (square, [list(pair) for pair in square], iter(square), nx.cycle_graph(4), shuffled):
        found = make_topology(topology, 4)
        assert found.name == "custom"
        assert found.links == ring.links
        assert torch.equal(found.rounds[0], ring.rounds[0])


def test_a_pair_given_twice_is_one_link():
    assert torch.equal(make_topology([[0, 1], [1, 0], [0, 1]], 2).rounds[0], torch.full((2, 2), 0.5).double())
    assert make_topology(nx.MultiGraph([(0, 1), (0, 1)]), 2).links == [(0, 1)]


def test_metropolis_hastings_weights_go_by_the_larger_degree():
    #  0 - 1 - 2, and 1 - 3 - 2
    matrix = make_topology([[0, 1], [1, 2], [1, 3], [2, 3]], 4).rounds[0]
    expected = torch.tensor([[9, 3, 0, 0], [3, 3, 3, 3], [0, 3, 5, 4], [0, 3, 4, 5]]).double() / 12
    assert torch.allclose(matrix, expected, atol=ROUNDING)


def test_weights_of_ones_own_are_taken():
    weights = [[0.9, 0.1, 0.0], [0.1, 0.4, 0.5], [0.0, 0.5, 0.5]]
    for given_as in (weights, torch.tensor(weights).double(), np.array(weights), tuple(map(tuple, weights))):
        topology = make_topology([[0, 1], [1, 2]], 3, given_as)
        assert torch.allclose(topology.rounds[0], torch.tensor(weights).double())
        assert topology.neighbors(1) == [{0: pytest.approx(0.1), 2: pytest.approx(0.5)}]
        assert topology.spectral_gap == pytest.approx(1 - largest_but_one(topology.rounds[0]), abs=1e-9)
    assert make_topology("ring", 1, [[1.0]]).links == []


def test_a_weight_of_zero_is_no_link():
    path = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]]
    assert make_topology("complete", 3, path).links == [(0, 1), (1, 2)]


def test_weights_that_differ_by_rounding_are_the_same_at_both_ends():
    # Or one end would wait for a message over a link that the other has not.
    weights = [[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [1e-7, 0.25, 0.75 - 1e-7]]
    topology = make_topology("complete", 3, weights)
    assert torch.equal(topology.rounds[0], topology.rounds[0].T)
    assert set(topology.neighbors(0)[0]) == {1, 2}
    assert set(topology.neighbors(2)[0]) == {0, 1}


@st.composite
def connected_graphs(draw: st.DrawFn) -> nx.Graph:
    size = draw(st.integers(1, 12))
    graph = nx.empty_graph(size)
    # Each rank but the first is linked to one before it, so that all are connected; and then some more.
    graph.add_edges_from((rank, draw(st.integers(0, rank - 1))) for rank in range(1, size))
    more = draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=20))
    graph.add_edges_from((a, b) for a, b in more if a != b)
    return graph


@given(connected_graphs())
def test_metropolis_hastings_weights_suit_every_connected_graph(graph):
    topology = make_topology(graph, len(graph))
    check_mixing(topology)
    assert topology.links == sorted((min(edge), max(edge)) for edge in graph.edges)
    assert 0 < topology.spectral_gap <= 1
    assert topology.spectral_gap == pytest.approx(1 - largest_but_one(topology.rounds[0]), abs=1e-9)


HALF = [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("topology", "size", "weights", "error", "message"),
    [
        ("rnig", 4, None, ValueError, r"`topology='rnig'` is not one of 'ring', .* Did you mean 'ring'\?"),
        ("lattice", 4, None, ValueError, "`topology='lattice'` is not one of .* Pairs of linked ranks, or a networkx"),
        (7, 4, None, TypeError, r"`topology=7` is no graph. Use one of 'ring'.*\[\[0, 1\], \[1, 2\]\], or a networkx"),
        (None, 4, None, TypeError, "`topology=None` is no graph"),
        ([[0, 1], [2, 3]], 4, None, ValueError, r"\(custom\) is not connected: rank 0 has no way to 2, 3.* Link them"),
        ([[0, 1]], 12, None, ValueError, "no way to 2, 3, 4, 5, 6, 7, …, and they would never agree"),
        ([], 2, None, ValueError, r"`topology` \(custom\) is not connected"),
        (nx.path_graph(3), 4, None, ValueError, r"has 3 nodes \(0, 1, 2\), and they are not the 4 ranks from 0 to 3"),
        (nx.path_graph(5), 4, None, ValueError, "has 5 nodes .*Give it one node for each rank, named by its number"),
        (nx.Graph([("a", "b")]), 2, None, ValueError, r"has 2 nodes \(a, b\), and they are not the 2 ranks"),
        (nx.DiGraph([(0, 1)]), 2, None, ValueError, r"is a directed graph.*Use `graph.to_undirected\(\)`"),
        (nx.Graph([(0, 1), (1, 1)]), 2, None, ValueError, "`topology` links 1 and 1, which are not two of the 2 ranks"),
        ([[0, 1, 2]], 3, None, TypeError, r"`topology` holds \[0, 1, 2\], which is no pair of ranks. Give pairs such"),
        ([0, 1], 2, None, TypeError, "`topology` holds 0, which is no pair"),
        (["01"], 2, None, TypeError, "`topology` holds '01', which is no pair"),
        ([[0, 1.0]], 2, None, TypeError, r"`topology` holds \[0, 1.0\], which is no pair"),
        ([[0, True]], 2, None, TypeError, r"`topology` holds \[0, True\], which is no pair"),
        ([[1, 1]], 2, None, ValueError, "`topology` links 1 and 1, which are not two of the 2 ranks from 0 to 1"),
        ([[0, 4]], 4, None, ValueError, "`topology` links 0 and 4, which are not .*or start as many ranks"),
        ([[-1, 0]], 4, None, ValueError, "`topology` links -1 and 0"),
        (
            "torus",
            7,
            None,
            ValueError,
            "`topology='torus'` arranges ranks in a rectangle, and 7 ranks.*topology='ring'",
        ),
        ("hypercube", 6, None, ValueError, "`topology='hypercube'` needs .*a power of two, not 6.*'exponential'"),
        ("one_peer_exponential", 6, None, ValueError, "`topology='one_peer_exponential'` needs .*not 6.*'exponential'"),
        ("one_peer_exponential", 4, torch.eye(4), ValueError, "`weights` cannot be given for topology='one_peer_exp"),
        ("ring", 3, HALF, ValueError, r"`weights` has the shape \(2, 2\), but there are 3 ranks. Give a row and"),
        ("ring", 2, [0.5, 0.5], ValueError, r"`weights` has the shape \(2,\)"),
        ("ring", 2, [[0.5, 0.5], [1.0]], TypeError, "`weights` is no matrix of numbers"),
        ("ring", 2, [["a", "b"], ["b", "a"]], TypeError, "`weights` is no matrix of numbers"),
        ("ring", 2, {"a": 1}, TypeError, "`weights` is no matrix of numbers"),
        ("ring", 2, "metropolis", TypeError, "`weights` is no matrix of numbers"),
        ("ring", 2, [[1.5, -0.5], [-0.5, 1.5]], ValueError, r"`weights\[0\]\[1\]=-0.5` is not a weight.*zero or pos"),
        ("ring", 2, [[0.5, math.nan], [math.nan, 0.5]], ValueError, r"`weights\[0\]\[1\]=nan` is not a weight"),
        ("ring", 2, [[0.5, math.inf], [math.inf, 0.5]], ValueError, r"`weights\[0\]` sums to inf instead of 1"),
        (
            "ring",
            2,
            [[0.6, 0.4], [0.5, 0.5]],
            ValueError,
            r"`weights\[0\]\[1\]=0.4` differs from `weights\[1\]\[0\]=0.5",
        ),
        ("ring", 2, [[0.5, 0.4], [0.4, 0.6]], ValueError, r"`weights\[0\]` sums to 0.9 instead of 1.*set it to what"),
        ([[0, 1], [1, 2]], 3, torch.full((3, 3), 1 / 3), ValueError, r"`weights\[0\]\[2\]=0.333333`.*Set it to 0"),
        ("ring", 2, [[0.0, 1.0], [1.0, 0.0]], ValueError, "never agree: neighbours only swap.*give the diagonal"),
        ("ring", 3, torch.eye(3), ValueError, "with these weights,.*not connected: rank 0 has no way to 1, 2"),
        (
            "complete",
            3,
            [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]],
            ValueError,
            "with these weights,.*not connected: rank 0 has no way to 2, and",
        ),
    ],
    ids=str,
)
def test_bad_topologies_are_refused_with_a_remedy(topology, size, weights, error, message):
    with pytest.raises(error, match=message):
        make_topology(topology, size, weights)


def test_what_is_used_of_a_topology_is_said_in_a_line():
    assert make_topology("ring", 8).summary() == (
        "8 ranks in a topology named 'ring': 8 links, 2 used by a rank in a step, spectral gap 0.195"
    )
    assert "4 links, 1 used by a rank in a step" in make_topology("one_peer_exponential", 4).summary()
    assert "1 link, 1 used" in make_topology("ring", 2).summary()
