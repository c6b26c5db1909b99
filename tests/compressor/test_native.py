"""Tier one: the compiled passes: how they are built, and what they promise beyond `passes`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence

import pytest
import torch
from nets import randn

from lightning_powersgd.compressor import native
from lightning_powersgd.compressor.native import NativePasses, passes_for
from lightning_powersgd.compressor.operands import Decompression, Dtypes, Projection
from lightning_powersgd.compressor.passes import decompress, project
from lightning_powersgd.compressor.plan import SIDES, Side

needs_compiler = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


@pytest.fixture
def rebuild(monkeypatch):
    """Build anew, with other settings."""

    def build(**environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        native.library.cache_clear()
        return native.library()

    yield build
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("shape", [(130, 1500), (1500, 130)])
@pytest.mark.parametrize("rank", [2, 5])
@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads(shape, rank):
    n, m = shape
    gradient, residual, left, right = randn(n, m), randn(n, m), randn(rank, n), randn(rank, m)
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        matrix, error, p, q = gradient.clone(), residual.clone(), torch.empty(rank, n), torch.empty(rank, m)
        project(matrix.t(), right, p, error.t())
        project(matrix, left, q, error)
        decompress(matrix, (left, right), (left, q), error)
        results.append((p, q, matrix, error))
    torch.set_num_threads(threads)
    for result in results:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


def test_it_can_be_switched_off(rebuild, caplog):
    assert rebuild(LIGHTNING_POWERSGD_NATIVE="0") is None
    assert not caplog.records


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", "sh -c 'echo the reason >&2; exit 1'"])
def test_without_a_compiler_pytorch_computes_and_the_log_says_so(rebuild, caplog, compiler):
    with caplog.at_level(logging.WARNING):
        assert rebuild(CC=compiler) is None
    (record,) = caplog.records
    assert "Install a C compiler such as gcc, or set LIGHTNING_POWERSGD_NATIVE=0" in record.getMessage()
    if "reason" in compiler:
        assert "the reason" in record.getMessage()
    matrix, out = randn(3, 4), torch.empty(2, 4)
    project(matrix, randn(2, 3), out)
    torch.testing.assert_close(out, randn(2, 3) @ matrix)


@needs_compiler
def test_compilers_that_know_fewer_options_do(rebuild, tmp_path, caplog):
    plain = tmp_path / "plain-cc"
    plain.write_text('#!/bin/sh\ncase "$*" in *-march=*|*-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    plain.chmod(0o755)
    assert rebuild(CC=str(plain)) is not None
    assert not caplog.records
    test_results_do_not_depend_on_the_number_of_threads((130, 1500), 2)


@needs_compiler
def test_building_leaves_nothing_on_disk(rebuild, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert rebuild() is not None
    assert not list(tmp_path.iterdir())


def group_of(ranks: Sequence[int], shapes: Sequence[tuple[int, int]], side: Side) -> list[Decompression]:
    """Matrices with errors; every second one lies column by column."""
    group = []
    for number, (r, (n, m)) in enumerate(zip(ranks, shapes, strict=True)):
        shape = (m, n) if number % 2 else (n, m)
        gradient, error = randn(*shape), randn(*shape).flip(0)
        if number % 2:
            gradient, error = gradient.t(), error.t()
        basis, average = randn(r, m if side == "left" else n), randn(r, n if side == "left" else m)
        group.append(Decompression(gradient, error, basis, average, torch.empty_like(average)))
    return group


@pytest.mark.parametrize("side", SIDES)
@needs_compiler
def test_passes_over_a_group_are_those_over_each_matrix(side):
    ranks, shapes = (1, 2, 3, 4, 9, 5), ((64, 64), (20, 33), (300, 310), (65, 130), (400, 200), (1, 7))
    keep = torch.tensor([True, False, True, True, False, True])
    passes, threads = NativePasses(native.library()), torch.get_num_threads()
    for number in (1, 2, 5):
        one_by_one, together = (group_of(ranks, shapes, side) for _ in range(2))
        torch.set_num_threads(number)
        passes.project(side, [Projection(one.gradient, one.error, one.basis, one.own) for one in together], 0.5)
        passes.decompress(side, together, keep=keep)
        torch.set_num_threads(threads)
        for (gradient, error, basis, average, own), keep_this in zip(one_by_one, keep.tolist(), strict=True):
            left = side == "left"
            project(gradient.t() if left else gradient, basis, own, error.t() if left else error, 0.5)
            factors = [(one, basis) if left else (basis, one) for one in (average, own)]
            decompress(gradient, factors[0], factors[1], error, keep_this)
        for ours, theirs in zip(together, one_by_one, strict=True):
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@needs_compiler
def test_passes_over_a_group_are_for_single_precision_on_a_cpu():
    single, double, brain = torch.float32, torch.float64, torch.bfloat16
    assert passes_for(torch.device("cpu"), Dtypes(single, None, single)) is not None
    assert passes_for(torch.device("cpu"), Dtypes(double, double, double)) is None
    assert passes_for(torch.device("cpu"), Dtypes(single, brain, single)) is None
    assert passes_for(torch.device("meta"), Dtypes(single, single, single)) is None
