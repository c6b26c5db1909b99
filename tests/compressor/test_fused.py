"""Tier one: the passes over all matrices of a group with Triton's kernels, which Triton interprets on a CPU.

`make triton` installs Triton and runs what is skipped otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import randn
from test_basis import AWKWARD
from torch import Tensor

from lightning_powersgd.compressor import fused, kernels
from lightning_powersgd.compressor.basis import normalize_rows, orthonormal_by_gram
from lightning_powersgd.compressor.fused import FusedPasses, passes_for
from lightning_powersgd.compressor.operands import Decompression, Dtypes, Judgement, Projection

COMPILING = Path(__file__).parents[1] / "programs" / "compiled_kernels.py"
CPU = torch.device("cpu")
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
ALL_SINGLE = Dtypes(SINGLE, SINGLE, SINGLE)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: the extra `triton`, or `make triton`"
)
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and TRITON_INTERPRET=1: `make triton`",
)

# More and fewer rows and columns than a tile has; rank; and whether the transpose is what lies row by row.
GROUP = [
    (70, 3, 1, False),
    (5, 130, 2, True),
    (9, 17, 3, False),
    (66, 65, 2, False),
    (40, 33, 17, True),
    (7, 9, 5, True),
]


class Case:
    """A matrix, what it is projected onto, and what comes of it in float64."""

    def __init__(self, n: int, m: int, r: int, transposed: bool, dtypes: Dtypes, side: str, offset: int = 0) -> None:
        def laid_out(values: Tensor, dtype: torch.dtype) -> Tensor:
            values = values.t() if transposed else values
            flat = torch.empty(values.numel() + 16, dtype=dtype)[offset : offset + values.numel()]
            matrix = flat.view(values.shape).copy_(values)
            return matrix.t() if transposed else matrix

        k, length = (m, n) if side == "left" else (n, m)
        self.side, self.dtypes = side, dtypes
        self.gradient = laid_out(randn(n, m), dtypes.gradient)
        self.error = None if dtypes.error is None else laid_out(randn(n, m + 1)[:, 1:], dtypes.error)
        self.basis, self.average = randn(r, k).to(dtypes.matrix), randn(r, length).to(dtypes.matrix)
        self.own = torch.full((r, length), torch.nan, dtype=dtypes.matrix)

    def projection(self) -> Projection:
        return Projection(self.gradient, self.error, self.basis, self.own)

    def decompression(self) -> Decompression:
        return Decompression(self.gradient, self.error, self.basis, self.average, self.own)

    def results(self) -> list[Tensor]:
        return [self.own, self.gradient, *([] if self.error is None else [self.error])]

    def exact(self, scale: float, keep: bool) -> list[Tensor]:
        """The own projection, the averaged gradient and the error."""
        matrix = self.gradient.double() + (0 if self.error is None else scale * self.error.double())
        basis, average = self.basis.double(), self.average.double()
        if self.side == "left":
            own = basis @ matrix.t()
            return [own, average.t() @ basis, *self._error(matrix - own.t() @ basis, keep)]
        own = basis @ matrix
        return [own, basis.t() @ average, *self._error(matrix - basis.t() @ own, keep)]

    def _error(self, rest: Tensor, keep: bool) -> list[Tensor]:
        return [] if self.error is None else [rest if keep else self.error.double()]


def step(cases: list[Case], scale: float | Tensor = 1.0, keep: Tensor | None = None, passes: FusedPasses | None = None):
    passes = FusedPasses(CPU, cases[0].dtypes) if passes is None else passes
    passes.project(cases[0].side, [case.projection() for case in cases], scale)
    passes.decompress(cases[0].side, [case.decompression() for case in cases], scale, keep)


def require_close(case: Case, exact: list[Tensor]) -> None:
    """Within the rounding of the coarsest dtype; the error also holds that of its own projection."""
    eps = max(torch.finfo(dtype).eps for dtype in case.dtypes if dtype is not None)
    for ours, theirs in zip(case.results(), exact, strict=True):
        assert (ours.double() - theirs).abs().max() <= 8 * eps * theirs.abs().max()


@interpreted
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "dtypes",
    [
        ALL_SINGLE,
        Dtypes(SINGLE, None, SINGLE),
        Dtypes(SINGLE, BRAIN, SINGLE),
        Dtypes(BRAIN, BRAIN, BRAIN),
        Dtypes(BRAIN, SINGLE, SINGLE),
        Dtypes(HALF, HALF, SINGLE),
    ],
    ids=str,
)
def test_a_groups_matrices_are_projected_and_written_as_in_float64(dtypes, side):
    cases = [Case(*shape, dtypes, side) for shape in GROUP]
    keep = torch.tensor([number != 3 for number in range(len(GROUP))])
    exact = [case.exact(0.5, bool(kept)) for case, kept in zip(cases, keep, strict=True)]
    step(cases, torch.tensor(0.5), keep)
    for case, expected in zip(cases, exact, strict=True):
        require_close(case, expected)


@interpreted
@pytest.mark.parametrize("rank", [1, 2, 4, 7, 8, 16, 31, 32])
def test_every_rank_is_as_in_float64(rank):
    case = Case(40, 66, rank, False, ALL_SINGLE, "right")
    exact = case.exact(1.0, True)
    step([case])
    require_close(case, exact)


@interpreted
@pytest.mark.parametrize("side", ["left", "right"])
def test_bits_depend_neither_on_alignment_nor_on_the_rest_of_the_group(side):
    alone = [Case(*shape, ALL_SINGLE, side) for shape in GROUP[:4]]
    for case in alone:
        step([case])
    passes = FusedPasses(CPU, ALL_SINGLE)
    for offset in (0, 1, 3):
        # In the same tables, so that those must be made anew.
        cases = [Case(*shape, ALL_SINGLE, side, offset) for shape in GROUP]
        step(cases, passes=passes)
        for ours, first in zip(cases, alone, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(ours.results(), first.results(), strict=True))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as NumPy says, which interprets
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_every_projection_and_in_no_other_matrix(value):
    for side in ("left", "right"):
        cases = [Case(*shape, ALL_SINGLE, side) for shape in GROUP[:3]]
        cases[1].gradient[2, 100] = value
        before = cases[1].error.clone()
        cases[1].average.fill_(torch.nan)
        # As one answer for all comes, and as one for each.
        keep = torch.tensor(False).expand(3) if side == "left" else torch.tensor([True, False, True])
        step(cases, keep=keep)
        assert not cases[1].own[:, 2 if side == "left" else 100].isfinite().any()
        assert cases[1].gradient.isnan().all()
        assert torch.equal(cases[1].error, before)
        assert all(result.isfinite().all() for case in (cases[0], cases[2]) for result in case.results())


@interpreted
def test_what_float16_cannot_hold_is_cut():
    case = Case(9, 17, 2, False, Dtypes(HALF, HALF, SINGLE), "right")
    case.average *= 1e6
    case.gradient.fill_(6e4)
    case.error.fill_(6e4)
    step([case])
    assert case.gradient.isfinite().all()
    assert case.error.isfinite().all()
    assert case.gradient.abs().max() == torch.finfo(HALF).max


@interpreted
def test_nothing_is_written_beside_a_matrix():
    memory = torch.zeros(2, 200)
    case = Case(9, 17, 2, False, ALL_SINGLE, "right")
    case.gradient, case.error = (row[5 : 5 + 9 * 17].view(9, 17).copy_(randn(9, 17)) for row in memory)
    step([case])
    assert memory[:, :5].count_nonzero() == memory[:, 5 + 9 * 17 :].count_nonzero() == 0


def require_rounded(ours: Tensor, theirs: Tensor) -> None:
    """To the last bit; to the last but one in bfloat16, to which Triton's interpreter cuts instead of rounding."""
    allowed = 2 * torch.finfo(BRAIN).eps if ours.dtype == BRAIN else 0.0
    torch.testing.assert_close(ours, theirs, rtol=allowed, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("wire", [SINGLE, BRAIN, HALF])
def test_shares_are_rounded_as_the_wire_rounds_and_whole_gradients_lie_beside_them(wire, world_size):
    cases = [Case(*shape, ALL_SINGLE, "right") for shape in GROUP[:4]]
    plain = [torch.empty_like(case.own) for case in cases]
    passes = FusedPasses(CPU, ALL_SINGLE)
    before = [case.projection()._replace(out=out) for case, out in zip(cases, plain, strict=True)]
    passes.project("right", before)
    again = [
        Projection(case.gradient, None, case.basis, torch.empty_like(out, dtype=wire), torch.empty_like(out))
        for case, out in zip(cases, plain, strict=True)
    ]
    whole = randn(700).to(wire)
    place = torch.zeros(702, dtype=wire)
    passes.project("right", again, world_size=world_size, whole=[(whole, place[1:-1])])
    for out, one in zip(plain, again, strict=True):
        require_rounded(one.out, out.to(wire).div_(world_size))
        assert torch.equal(one.own, one.out.float() * world_size)
    require_rounded(place[1:-1], whole / world_size)
    assert not place[0]
    assert not place[-1]


# Bases and warm starts


def of_bases(factors: list[Tensor], dtype: torch.dtype = SINGLE) -> list[Tensor]:
    bases = [torch.empty(factor.shape, dtype=dtype) for factor in factors]
    passes = FusedPasses(CPU, Dtypes(dtype, dtype, dtype))
    passes.orthonormalize("left", list(zip(factors, bases, strict=True)))
    return bases


@interpreted
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 32])
@pytest.mark.parametrize("case", AWKWARD)
def test_bases_are_orthonormal_and_keep_the_span(case, rank):
    factor = AWKWARD[case](rank)
    (basis,) = of_bases([factor])
    basis = basis.double()
    assert (basis @ basis.T - torch.eye(rank)).abs().max() <= 4e-8
    wide = factor.double() / factor.double().norm().clamp_min(1e-300)
    assert (wide - (wide @ basis.T) @ basis).norm() <= 4.4e-7
    if case in ("random", "a zero row", "tiny", "huge"):
        # Of rows that are independent, or nearly, also the basis is the same.
        reference = orthonormal_by_gram(factor, torch.float64)
        assert (basis - reference).abs().max() <= 1e-6


@interpreted
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_bases_depend_neither_on_alignment_nor_on_the_rest_of_the_group(dtype):
    factors = [randn(r, k).to(dtype) for r, k in [(2, 70), (5, 2100), (1, 3), (8, 8), (2, 70)]]
    alone = [of_bases([factor], dtype)[0] for factor in factors]
    shifted = [torch.cat((factor.new_zeros(3), factor.flatten()))[3:].view(factor.shape) for factor in factors]
    for ours, theirs, factor in zip(of_bases(shifted, dtype), alone, factors, strict=True):
        assert torch.equal(ours, theirs)
        rounded = orthonormal_by_gram(factor, dtype)
        assert (ours.double() - rounded.double()).abs().max() <= 8 * torch.finfo(dtype).eps


@interpreted
def test_columns_of_zeros_stay_zero_in_bases():
    factor = randn(3, 20)
    factor[:, 5] = 0
    basis, of_zeros = of_bases([factor, torch.zeros(3, 20)])
    assert not basis[:, 5].any()
    assert (of_zeros @ of_zeros.T - torch.eye(3)).abs().max() <= 1e-6


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # as NumPy says, which interprets
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_its_basis_and_in_no_other(value):
    factors = [randn(4, 30), randn(4, 30)]
    factors[0][2, 7] = value
    spoilt, sound = of_bases(factors)
    assert spoilt.isnan().all()
    assert sound.isfinite().all()


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF])
def test_each_matrix_is_judged_and_kept_by_itself(dtype):
    passes = FusedPasses(CPU, Dtypes(dtype, dtype, SINGLE if dtype == HALF else dtype))
    shapes = [(2, 700), (3, 5), (1, 40), (2, 9), (4, 513)]
    factors, kept, others = ([randn(r, k).to(dtype) for r, k in shapes] for _ in range(3))
    factors[0][1] = 0
    factors[1][2, 3] = torch.nan
    others[2][0, 39] = -torch.inf
    expected = [normalize_rows(*pair) for pair in zip(factors, kept, strict=True)]
    before = [one.clone() for one in kept]
    flags = torch.tensor([1, 1, 1, 0, 2], dtype=dtype)
    given = [Judgement(*three) for three in zip(factors, kept, others, strict=True)]
    keep = passes.keep("right", given, flags=flags)
    assert keep.tolist() == [True, False, False, False, True]
    for number, (ours, kept_now) in enumerate(zip(kept, keep.tolist(), strict=True)):
        require_rounded(ours, expected[number] if kept_now else before[number])
    assert [bool(factor.isnan().all()) for factor in factors] == [False, True, True, False, False]


@interpreted
def test_all_matrices_are_judged_by_one_answer():
    passes = FusedPasses(CPU, ALL_SINGLE)
    for answer in (True, False):
        factor, kept = randn(2, 30), randn(2, 30)
        before, scaled = kept.clone(), normalize_rows(factor, kept)
        keep = passes.keep("left", [Judgement(factor, kept, None)], finite=torch.tensor(answer))
        assert bool(keep) == answer
        assert torch.equal(kept, scaled if answer else before)
        assert bool(factor.isnan().all()) != answer


# Where they are used


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if this CPU were a GPU."""
    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    fused._works.cache_clear()
    yield monkeypatch
    fused._works.cache_clear()


def test_they_are_only_for_gpus_and_can_be_switched_off(monkeypatch):
    assert passes_for(CPU, ALL_SINGLE) is None
    assert fused.runs_on(torch.device("cuda"))
    monkeypatch.setenv(fused.SWITCH, "0")
    assert not fused.runs_on(torch.device("cuda"))


def test_where_triton_is_missing_pytorch_computes_and_the_log_says_so_once(on_a_gpu, caplog):
    on_a_gpu.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING):
        assert passes_for(CPU, ALL_SINGLE) is None
        assert passes_for(CPU, ALL_SINGLE) is None
        assert fused.arithmetic(CPU) == "PyTorch's operations"
    (record,) = caplog.records
    assert "triton" in record.getMessage()
    assert f"set {fused.SWITCH}=0 to silence this" in record.getMessage()


@needs_triton
def test_kernels_that_do_not_agree_are_not_used(on_a_gpu, caplog):
    on_a_gpu.setattr(fused, "launch", lambda *args, **constants: None)
    with caplog.at_level(logging.WARNING):
        assert passes_for(CPU, ALL_SINGLE) is None
    (record,) = caplog.records
    assert "differs by" in record.getMessage()


@interpreted
def test_kernels_that_agree_are_used(on_a_gpu):
    assert passes_for(CPU, ALL_SINGLE) is not None
    assert passes_for(CPU, Dtypes(BRAIN, SINGLE, SINGLE)) is not None
    assert fused.arithmetic(CPU).startswith("Triton ")


def test_what_they_do_not_take_is_left_to_pytorch(on_a_gpu):
    double = torch.float64
    assert passes_for(CPU, Dtypes(double, double, double)) is None
    assert passes_for(CPU, Dtypes(SINGLE, double, double)) is None
    passes = FusedPasses(CPU, ALL_SINGLE)
    assert not passes.takes(100, 100, fused.LARGEST_RANK + 1)
    assert passes.takes(100, 100, fused.LARGEST_RANK)
    assert not passes.takes(2, 2**25, 1)
    assert not fused.travels(double)


# As code for a GPU


@needs_triton
def test_a_compiler_makes_code_for_a_gpu_that_stays_in_registers(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, COMPILING], check=False, capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {code["kernel"] for code in found} == {"project", "add_up", "decompress", "orthonormalize", "keep_factors"}
    for code in found:
        assert code["stack"] == code["local"] == 0, code
        assert not code["spills"], code
        assert not code["atomics"], code
        # Products and sums are rounded one by one. What a GPU divides with, fuses them.
        assert not code["asked to fuse"], code
        assert not code["fused"] or code["kernel"] in ("add_up", "orthonormalize", "keep_factors"), code
        assert code["multiplies"] or code["kernel"] in ("add_up", "keep_factors"), code
        assert not code["tensor cores"], code


def test_the_kernels_can_be_imported_without_triton():
    assert callable(kernels.project)
