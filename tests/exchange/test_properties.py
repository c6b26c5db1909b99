"""Tiers one and two: what holds for any parameters, settings and gradients; Hypothesis looks for where it does not.

The examples are the same in every run (see `conftest.py`).
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from cases import Case, Parameter, Run, Spot, laid_out, play
from hypothesis import assume, event, given
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from lightning_powersgd import PowerSGDConfig, PowerSGDState, make_plan
from lightning_powersgd.compressor.basis import normalize_rows, orthonormal
from lightning_powersgd.compressor.checkpoint import require_readable
from lightning_powersgd.compressor.codec import format_of, half_gain, saturated
from lightning_powersgd.compressor.passes import decompress, project
from lightning_powersgd.compressor.plan import SIDES, Slot
from lightning_powersgd.compressor.view import as_matrix, matrix_order, permute_columns

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "transposed"]


# What may come


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    size = st.integers(0, 12)
    odd = st.just(()) | st.tuples(size) | st.tuples(size, size)
    matrices = st.tuples(st.integers(4, 12), st.integers(4, 12))
    convolutions = st.lists(st.integers(1, 4), min_size=3, max_size=5).map(tuple)
    return st.one_of(matrices, matrices.map(lambda shape: (*shape, 1)), convolutions, odd)


def parameters(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Parameter]:
    drawn = {
        "shape": shapes(),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "gradient": st.sampled_from(["dense", "one row", "rank one"]),
    }
    return st.builds(Parameter, **(drawn | fixed))


@st.composite
def patterns(draw: st.DrawFn, names: list[str]) -> str:
    """A pattern that matches one of the names at least."""
    name = draw(st.sampled_from(names))
    cut = draw(st.integers(0, len(name) - 1))
    return draw(st.sampled_from([name, name[:cut] + "*", "*" + name[cut:], name[:cut] + "?" + name[cut + 1 :], "*"]))


def settings_for(names: list[str], **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    drawn = {
        "rank": st.integers(1, 3) | st.integers(1, 6) | st.dictionaries(patterns(names), st.integers(0, 4), min_size=1),
        "min_compression_ratio": st.sampled_from([1.0, 1.0, 2.0]),
        "alternate": st.booleans(),
        "error_feedback": st.sampled_from([True, True, False]),
        "warm_start": st.sampled_from([True, True, False]),
        "error_dtype": st.sampled_from([None, *DTYPES]),
        "comm_dtype": st.sampled_from([None, *DTYPES, "int8", "int4", {"P": "int4", "Q": "int8"}]),
        "start_step": st.sampled_from([0, 0, 0, 1, 2]),
        "seed": st.integers(0, 3),
    }
    return st.fixed_dictionaries(drawn | fixed)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Parameter]:
    """Parameters by name, some of them frozen."""
    names = draw(st.lists(st.text("ab.01_", min_size=1, max_size=5), min_size=1, max_size=6, unique=True))
    return {name: draw(parameters(requires_grad=st.sampled_from([True, True, True, False]))) for name in names}


def made(model: dict[str, Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter.make()) for name, parameter in model.items()]


# Plans


@given(st.data(), models(), st.sampled_from([1, 100, 1000, 10**9]))
def test_every_trainable_parameter_is_in_one_group_and_counted_once(data, model, group_bytes):
    config = PowerSGDConfig(**data.draw(settings_for(list(model))))
    plan = make_plan(made(model), config, group_bytes)
    trainable = {name: parameter for name, parameter in model.items() if parameter.requires_grad}
    assert sorted(slot.name for group in plan.groups for slot in group.slots) == sorted(trainable)
    dense = sent = 0.0
    for slot, formats in [(slot, group.formats) for group in plan.groups for slot in group.slots]:
        shape, dtype = trainable[slot.name].shape, trainable[slot.name].dtype
        assert (slot.shape, slot.dtype) == (shape, dtype)
        assert slot.rank in (0, _asked_for(slot.name, config.rank))
        whole = payload = math.prod(shape) * dtype.itemsize
        if slot.rank:
            lengths = (math.prod(shape[: slot.split]), math.prod(shape[slot.split :]))
            sides = [math.ceil(slot.rank * size * wire.bits / 8) for size, wire in zip(lengths, formats, strict=True)]
            payload = sum(sides) / (2 if config.alternate else 1)
            assert whole >= config.min_compression_ratio * payload
        given = config.comm_dtype if slot.rank and config.comm_dtype is not None else dtype
        each = (given["P"], given["Q"]) if isinstance(given, dict) else (given, given)
        assert formats == tuple(map(format_of, each))
        dense, sent = dense + whole, sent + payload
    assert plan.dense_bytes == dense
    assert plan.sent_bytes(alternate=config.alternate) == sent <= dense


def _asked_for(name: str, rank: int | dict[str, int]) -> int:
    if isinstance(rank, int):
        return rank
    return next((value for pattern, value in rank.items() if fnmatchcase(name, pattern)), 0)


# Matrices


@given(parameters(), st.integers(1, 6), st.integers(0, 9))
def test_a_matrix_view_shares_memory_and_its_columns_find_back_to_their_places(parameter, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = laid_out(torch.randn(parameter.shape, generator=generator), parameter.layout)
    order = matrix_order(tensor)
    if order is None:
        assert tensor.dim() < 2 or not tensor.numel() or (parameter.layout == "transposed" and tensor.dim() > 2)
        return
    assert sorted(order) == list(range(tensor.dim()))
    matrix = as_matrix(tensor, order)
    assert matrix.data_ptr() == tensor.data_ptr()
    assert torch.equal(matrix, tensor.permute(order).flatten(1))
    factor = torch.randn(rank, matrix.shape[1], generator=generator)
    shaped = permute_columns(factor, parameter.shape, order, to_shape_order=True)
    assert torch.equal(permute_columns(shaped, parameter.shape, order, to_shape_order=False), factor)
    torch.testing.assert_close(matrix @ factor.T, tensor.flatten(1) @ shaped.T)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.0, 1e-40, 1e-20, 1.0, 1e20]),
    st.sampled_from(DTYPES),
    st.sampled_from(["dense", "equal rows", "a row of zeros", "one entry"]),
)
def test_rows_of_any_factor_become_orthonormal_or_of_largest_entry_one(rank, length, size, dtype, form):
    assume(rank <= length)
    factor = torch.randn(rank, length, generator=torch.Generator().manual_seed(0)) * size
    if form == "equal rows":
        factor[:] = factor[0].clone()
    if form == "a row of zeros":
        factor[0] = 0
    if form == "one entry":
        factor[:, 1:] = 0
    basis = orthonormal(factor, dtype).double()
    tolerance = 8 * torch.finfo(dtype).eps
    zero = ~factor.any(dim=0)
    if zero.all() or not zero.any():
        assert (basis @ basis.T - torch.eye(rank)).abs().max() < tolerance
    else:
        assert not basis[:, zero].any()
        assert torch.linalg.matrix_norm(basis, 2) < 1 + tolerance, "no direction is taken more than once"
        rows = factor.double() / factor.abs().max()
        assert (rows @ basis.T @ basis - rows).abs().max() < tolerance, "what the factor has is taken"
    fallback = torch.full((rank, length), 0.5, dtype=dtype)
    scaled = normalize_rows(factor.to(torch.promote_types(dtype, torch.float32)), fallback)
    zero = ~factor.any(dim=1)
    assert torch.equal(scaled[zero], fallback[zero])
    assert torch.equal(scaled[~zero].abs().amax(dim=1), torch.ones(int((~zero).sum()), dtype=dtype))


@given(st.floats(0, torch.finfo(torch.float32).max, width=32))
def test_what_travels_in_float16_is_of_a_size_that_it_holds(magnitude):
    gain = half_gain(torch.tensor([[magnitude]]))
    assert torch.frexp(gain).mantissa == 0.5, "a power of two does not round"
    if 2.0**-90 < magnitude < 2.0**90:
        assert 2.0**4 <= magnitude * float(gain) < 2.0**5


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(LAYOUTS),
    st.sampled_from([None, 0.0, 1.0, 0.25]),
)
def test_projection_and_decompression_are_those_of_the_mathematics(shape, rank, dtype, layout, scale):
    n, m = shape
    generator = torch.Generator().manual_seed(n * 100 + m)
    gradient, residual = torch.randn(2, n, m, generator=generator, dtype=dtype)
    left, right = (torch.randn(rank, size, generator=generator, dtype=dtype) for size in shape)
    exact = gradient.double() + (0 if scale is None else scale) * residual.double()
    matrix, error = laid_out(gradient.clone(), layout), laid_out(residual.clone(), layout)
    p, q = torch.empty(rank, n, dtype=dtype), torch.empty(rank, m, dtype=dtype)
    project(matrix.t(), right, p, None if scale is None else error.t(), 1.0 if scale is None else scale)
    project(matrix, left, q)
    torch.testing.assert_close(p.double(), right.double() @ exact.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.double(), left.double() @ exact, rtol=1e-4, atol=1e-4)
    decompress(matrix, (left, right), (left, q), error)
    torch.testing.assert_close(matrix.double(), left.double().T @ right.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(error.double(), exact - left.double().T @ q.double(), rtol=1e-3, atol=1e-3)


# Saving and loading


def filled(state: PowerSGDState, seed: int) -> PowerSGDState:
    """Let a state be as if it had been trained with."""
    generator = torch.Generator().manual_seed(seed)
    for error in state.errors.values():
        largest = min(torch.finfo(error.dtype).max, 2.0**60)
        error.copy_((torch.randn(error.shape, generator=generator) * 2.0 ** (seed % 30)).clamp(-largest, largest))
    for index, group in enumerate(state.plan.groups):
        for side in SIDES:
            shapes = group.block_shapes(side)
            factors = [torch.randn(shape, generator=generator) * 2.0 ** (seed % 30) for shape in shapes]
            state.keep_factors(index, side, factors, [True] * len(factors))
    state.step, state.total_dense_bytes, state.total_sent_bytes = seed, seed * 100, seed * 10
    state.loss_scale.fill_(2.0 ** (seed % 17))
    state.keep_step([bool(seed % 2)])
    return state


def contents(state: PowerSGDState) -> dict[str, Any]:
    """All that a state holds, in a form that can be compared."""
    found: dict[str, Any] = {"loss_scale": float(state.loss_scale), "averaged": state.averaged, "held": state.held}
    found |= {name: getattr(state, name) for name in ("step", "total_dense_bytes", "total_sent_bytes")}
    for name, error in state.errors.items():
        found[f"error of {name}"] = (error.dtype, error.tolist())
    for kind in (state.factors, state.scales.magnitudes, state.scales.profiles):
        for name, sides in kind.items():
            found |= {f"{side} of {name}, {t.shape}": (t.dtype, t.tolist()) for side, t in sides.items()}
    return found


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(st.data(), models(), st.integers(0, 40), st.sampled_from([1, 10**9]))
def test_state_goes_through_a_file_bit_for_bit(data, model, seed, group_bytes):
    config = PowerSGDConfig(**data.draw(settings_for(list(model))))
    state = filled(PowerSGDState(made(model), config), seed)
    loaded = PowerSGDState(made(model), config, group_bytes)
    assert loaded.load_state_dict(through_a_file(state.state_dict())) == []
    assert contents(loaded) == contents(state)


@given(st.data(), models(), st.integers(0, 40))
def test_state_fits_other_settings_and_layouts(data, model, seed):
    configs = [PowerSGDConfig(**data.draw(settings_for(list(model)))) for _ in range(2)]
    layout = data.draw(st.sampled_from(LAYOUTS))
    saved = filled(PowerSGDState(made(model), configs[0]), seed).state_dict()
    loaded = PowerSGDState(made({name: replace(old, layout=layout) for name, old in model.items()}), configs[1])
    dropped = loaded.load_state_dict(through_a_file(saved))
    require_sound(loaded)
    assert loaded.step == seed
    for name, entry in saved["parameters"].items():
        assert name in loaded.factors or f"{name}: no longer compressed" in dropped
        if "error" in entry and name in loaded.errors:
            error = loaded.errors[name]
            assert torch.equal(error, saturated(entry["error"].clone(), error.dtype).to(error.dtype))
        for side, factor in loaded.state_dict()["parameters"].get(name, entry)["factors"].items():
            there = entry["factors"].get(side, torch.empty(0))
            assert there.shape != factor.shape or torch.equal(factor, there.to(factor.dtype))


def require_sound(state: PowerSGDState) -> None:
    """Check that a state is one that training can go on with."""
    saved = state.state_dict()
    require_readable(saved)
    assert all(type(saved[key]) is int for key in ("step", "total_dense_bytes", "total_sent_bytes"))


NUMBERS = [True, -1, 3, 2**80, 1.5, -1.0, math.nan, math.inf, 1e300, 1e-300]
NOT_A_TENSOR = [None, "text", b"", [], [1], {}, {"a": 1}, *NUMBERS]
NOT_THIS_TENSOR = [
    torch.ones(()),
    torch.ones(3),
    torch.ones(2, 2, dtype=torch.int64),
    torch.full((2,), math.nan),
    torch.empty(0),
    torch.ones(2, dtype=torch.complex64),
]


def damaged(tensor: Tensor) -> dict[str, Tensor]:
    """A saved tensor in other forms."""
    spoilt = tensor.clone(memory_format=torch.contiguous_format)
    spoilt.view(-1)[-1] = math.nan
    return {
        "not a number": spoilt,
        "infinite": torch.full_like(tensor, math.inf),
        "of zeros": torch.zeros_like(tensor),
        "negative": -tensor.abs(),
        "a row less": tensor[1:],
        "a dimension more": tensor[None],
        "flat": tensor.flatten(),
        "transposed": tensor.transpose(0, 1),
        "not contiguous": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "integers": tensor.long(),
        "bools": tensor.bool(),
        "complex": tensor.to(torch.complex64),
        "too large for another dtype": torch.full_like(tensor, 1e300, dtype=torch.float64),
        "sparse": tensor.to_sparse(),
        "without values": tensor.to("meta"),
    }


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where all the leaves and branches of a saved state are."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return ([path] if path else []) + [found for key, value in items for found in paths(value, (*path, key))]


def damage(draw: Any, state: dict[str, Any]) -> None:
    """Delete, rename or replace one thing somewhere in a saved state."""
    *way, key = draw(st.sampled_from(paths(state)))
    node: Any = state
    for step in way:
        node = node[step]
    ways = ["delete", "rename", "replace", "replace", *(["damage"] * 4 * isinstance(node[key], Tensor))]
    match draw(st.sampled_from(ways)):
        case "delete":
            del node[key]
        case "rename" if isinstance(node, dict):
            node[draw(st.sampled_from(["other", "left", 5, None]))] = node.pop(key)
        case "damage":
            forms = damaged(node[key])
            node[key] = forms[draw(st.sampled_from(sorted(forms)))]
        case _:
            node[key] = draw(st.sampled_from([*NOT_A_TENSOR, *NOT_THIS_TENSOR]))


@given(st.data(), models(), st.integers(0, 40))
def test_a_damaged_state_is_refused_as_a_whole_or_loads_as_a_sound_one(data, model, seed):
    config = data.draw(settings_for(list(model)))
    other = data.draw(st.just(config) | settings_for(list(model)))
    broken = copy.deepcopy(
        filled(PowerSGDState(made(model), PowerSGDConfig(**{"rank": 2, **config})), seed).state_dict()
    )
    damage(data.draw, broken)
    loading = filled(PowerSGDState(made(model), PowerSGDConfig(**{"rank": 2, **other})), seed + 1)
    before = contents(loading)
    refusal = ""
    try:
        loading.load_state_dict(broken)
    except ValueError as error:
        refusal = str(error)
    event("refused" if refusal else "loaded")
    if refusal:
        assert "'powersgd' entry" in refusal
        assert contents(loading) == before
    else:
        require_sound(loading)


# Real ranks


@st.composite
def cases(
    draw: st.DrawFn,
    world_sizes: tuple[int, ...] = (2, 3, 4),
    parameter: st.SearchStrategy[Parameter] | None = None,
    sizes: tuple[float, ...] = (1.0, 1.0, 1.0, 1e-3, 50.0, 0.0),
    saved: bool = False,
    spoilt: bool = False,
    **config: st.SearchStrategy[Any],
) -> Case:
    world_size = draw(st.sampled_from(world_sizes))
    drawn = tuple(draw(st.lists(parameters() if parameter is None else parameter, min_size=1, max_size=5)))
    steps = draw(st.integers(3, 6))
    step, rank, index = (st.integers(0, end - 1) for end in (steps, world_size, len(drawn)))
    spots = st.builds(Spot, step, rank, index, st.integers(0, 200), st.sampled_from([math.inf, -math.inf, math.nan]))
    unused = st.frozensets(st.tuples(step, st.none() | rank, index), min_size=2, max_size=12)
    case = Case(
        world_size,
        drawn,
        draw(settings_for([f"p{index}" for index in range(len(drawn))], **config)),
        draw(st.tuples(*[st.sampled_from(sizes)] * steps)),
        seed=draw(st.integers(0, 10**6)),
        bucket_cap_mb=draw(st.sampled_from([None, 1e-6, 1e-3])),
        spots=tuple(draw(st.lists(spots, min_size=1, max_size=4))) if spoilt else (),
        scales=draw(st.none() | st.tuples(*[st.sampled_from([1.0, 2.0**4, 2.0**-4])] * steps)),
        unused=draw(st.none() | unused),
        compiled=draw(st.sampled_from([True, True, False])),
        accelerator=draw(st.booleans()),
        gradients_are_views=draw(st.booleans()),
        save_after=draw(st.integers(1, steps - 1)) if saved else None,
    )
    assume(all(ddp_broadcasts(parameter, case) for parameter in drawn))
    return case


def ddp_broadcasts(parameter: Parameter, case: Case) -> bool:
    """DDP fails to broadcast a contiguous parameter with the strides of another layout, if no other has its dtype."""
    alone = sum(parameter.dtype == other.dtype for other in case.parameters) == 1
    usual = replace(parameter, layout="contiguous").make().stride()
    return not alone or not parameter.make().is_contiguous() or parameter.make().stride() == usual


def played(ranks: dict[int, Ranks], case: Case, **kwargs: Any) -> list[Run]:
    runs = ranks[case.world_size].run(play, case, **kwargs)
    for run in runs:
        run.averaged, run.errors, run.factors = map(torch.from_numpy, (run.averaged, run.errors, run.factors))
    return runs


def same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal bit for bit; all that is not a number is alike."""
    return a.shape == b.shape and torch.equal(*[t.masked_fill(t.isnan(), math.nan).view(torch.int64) for t in (a, b)])


@given(cases(error_feedback=st.just(True)) | cases(error_feedback=st.just(True), spoilt=True))
def test_what_came_in_went_out_or_waits_in_the_errors(ranks, case):
    require_balance(case, played(ranks, case))


def require_balance(case: Case, runs: list[Run]) -> None:
    for index, slot in enumerate(case.slots):
        eps, smallest = roundoff(case, slot)
        largest = 0.0
        for row, step in enumerate(range(runs[0].start, case.steps)):
            came_in, went_out = case.came_in(step, index), case.split(runs[0].averaged[row])[index]
            if not went_out.isfinite().all():
                continue
            before, after = torch.stack([case.split(run.errors[row])[index] for run in runs]).unbind(dim=1)
            lost = came_in.mean(dim=0) - went_out - (after - before).mean(dim=0)
            # By half an eps each: the sum M, its parts, its product with each column of a factor, and the sum over
            # ranks. A wire in float16 has the range of the step before.
            largest = max(largest, float((came_in.abs() + before.abs()).amax(dim=0).norm()))
            allowed = (2 + slot.rank + case.world_size) * eps / 2 * (largest + smallest * math.sqrt(slot.numel))
            assert float(lost.norm()) <= allowed, f"parameter {index}, step {step}"


def roundoff(case: Case, slot: Slot) -> tuple[float, float]:
    """How the coarsest dtype on a gradient's way rounds, and the smallest number that it rounds no coarser."""
    # What is rounded to integers stays, but the first steps travel in bfloat16.
    wire = case.config["comm_dtype"]
    wire = torch.bfloat16 if isinstance(wire, str | dict) else wire
    others = [case.config["error_dtype"], wire] if slot.rank else []
    infos = [torch.finfo(dtype) for dtype in (slot.dtype, *others) if dtype is not None]
    return max(info.eps for info in infos), max(info.smallest_normal for info in infos) / min(case.scales or [1.0])


@given(cases(saved=True) | cases(saved=True, spoilt=True))
def test_replicas_hold_the_same_gradients_and_factors_and_save_the_same(ranks, case):
    require_equal(played(ranks, case))


def require_equal(runs: list[Run]) -> None:
    first, *others = runs
    for other in others:
        assert same(first.averaged, other.averaged)
        assert same(first.factors, other.factors)
        assert (first.sent, first.saved, first.dropped) == (other.sent, other.saved, other.dropped)


@given(cases(spoilt=True, warm_start=st.just(True)))
def test_a_step_that_is_not_finite_shows_everywhere_and_is_remembered_nowhere(ranks, case):
    require_no_trace(case, played(ranks, case))


def require_no_trace(case: Case, runs: list[Run]) -> None:
    for row, step in enumerate(range(runs[0].start, case.steps)):
        exact = [case.came_in(step, index).mean(dim=0) for index in range(len(case.parameters))]
        compressed = not runs[0].alone and step >= case.config["start_step"]
        # With a scaler, which would skip it, a step is judged as a whole; without one, each parameter by itself.
        all_finite = all(gradient.isfinite().all() for gradient in exact)
        finite = [all_finite if case.scales else bool(gradient.isfinite().all()) for gradient in exact]
        for index, gradient in enumerate(case.split(runs[0].averaged[row])):
            if not compressed or not case.slots[index].rank:
                assert torch.equal(gradient.isfinite(), exact[index].isfinite())
            elif case.used(step, index):
                assert gradient.isfinite().all() if finite[index] else not gradient.isfinite().any()
            if not compressed or not finite[index]:
                assert all(same(*case.split(run.errors[row])[index]) for run in runs)
        if not compressed or not any(finite):
            assert all(same(*run.factors[row]) for run in runs)


@given(cases())
def test_what_is_sent_whole_is_the_mean(ranks, case):
    run, *_ = played(ranks, case)
    for step in range(case.steps):
        for index, slot in enumerate(case.slots):
            if slot.rank and step >= case.config["start_step"]:
                continue
            gradients, averaged = case.came_in(step, index), case.split(run.averaged[step])[index]
            eps, smallest = roundoff(case, replace(slot, rank=0))
            allowed = case.world_size * eps * (gradients.abs().amax(dim=0) + smallest)
            assert ((averaged - gradients.mean(dim=0)).abs() <= allowed).all(), f"parameter {index}, step {step}"


@given(cases(comm_dtype=st.sampled_from([None, *DTYPES])))
def test_the_bytes_are_those_of_the_plan(ranks, case):
    run, *_ = played(ranks, case)
    first, alternate = case.config["start_step"], case.config["alternate"]
    # Where DDP looks for unused parameters, an element tells of each whether it was used.
    flags = sum(len(group.compressed) * group.dtype.itemsize for group in case.plan.groups)
    expected = case.plan.sent_bytes(alternate=alternate) + (flags if case.unused is not None else 0)
    assert run.sent[:first] == [case.plan.dense_bytes] * min(first, case.steps)
    compressed = [sent - supports for sent, supports in zip(run.sent[first:], run.supports[first:], strict=True)]
    if alternate:
        compressed = [(a + b) / 2 for a, b in itertools.pairwise(compressed)]
    assert compressed == [expected] * len(compressed)


@given(cases((1,), saved=True) | cases((1,), saved=True, spoilt=True))
def test_a_rank_that_was_always_alone_passes_gradients_through(ranks, case):
    [run] = played(ranks, case)
    [resumed] = played(ranks, case, start=case.save_after, saved=run.saved)
    for found in (run, resumed):
        steps = range(found.start, case.steps)
        assert found.alone
        assert found.sent == [0] * len(steps)
        came_in = [torch.cat([case.came_in(step, index)[0] for index in range(len(case.slots))]) for step in steps]
        assert same(found.averaged, torch.stack(came_in))


@given(cases(saved=True) | cases(saved=True, spoilt=True))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, case):
    run, *_ = played(ranks, case)
    resumed, *others = played(ranks, case, start=case.save_after, saved=run.saved)
    require_equal([resumed, *others])
    assert resumed.dropped == []
    for step in range(case.save_after, case.steps):
        # Exact steps go through DDP's own buckets, in which more than two ranks may be summed in another order.
        if step < case.config["start_step"] and case.world_size > 2:
            continue
        rows = run.averaged[step], resumed.averaged[step - resumed.start]
        for slot, a, b in zip(case.slots, *map(case.split, rows), strict=True):
            # PyTorch's products in float64 depend on where a matrix lies in memory.
            assert same(a, b) or (slot.rank > 4 and torch.float64 in (slot.dtype, case.config["error_dtype"]))


@given(
    cases(
        parameter=parameters(dtype=st.just(torch.float64), gradient=st.just("dense")),
        sizes=(1.0, 1e-3, 50.0),
        saved=True,
        error_dtype=st.none(),
        comm_dtype=st.none(),
    ),
    st.integers(1, 4),
)
def test_a_run_that_resumes_on_other_ranks_goes_on_as_before(ranks, case, world_size):
    case = replace(case, alike=True, unused=None)
    run, *_ = played(ranks, case)
    resumed, *others = played(ranks, replace(case, world_size=world_size), start=case.save_after, saved=run.saved)
    require_equal([resumed, *others])
    assert resumed.dropped == []
    assert not resumed.alone or not case.plan.dense_bytes
    for before, after in zip(run.averaged[case.save_after :], resumed.averaged, strict=True):
        # Rounding is 1e-16; the warm start amplifies it (3e-12 was seen).
        assert (before - after).norm() <= 1e-8 * before.norm()


@given(cases((1, 2, 3, 4), saved=True) | cases((1, 2, 3, 4), saved=True, spoilt=True), st.integers(1, 4))
def test_a_run_goes_on_soundly_on_any_number_of_ranks(ranks, case, world_size):
    before, *_ = played(ranks, case)
    case = replace(case, world_size=world_size)
    runs = played(ranks, case, start=case.save_after, saved=before.saved)
    assert runs[0].alone == (world_size == 1 and not any(before.sent[: case.save_after]))
    require_equal(runs)
    if case.config["error_feedback"]:
        require_balance(case, runs)
    if case.config["warm_start"]:
        require_no_trace(case, runs)
