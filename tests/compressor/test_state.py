"""Tier one: what is remembered, saved and taken over."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lightning_powersgd import PowerSGDConfig, PowerSGDState


def make_state(rows: int = 40, **config: Any) -> PowerSGDState:
    net = nn.ModuleDict({"a": nn.Linear(30, rows), "b": nn.Conv2d(8, 20, 3, bias=False)})
    return PowerSGDState(net.named_parameters(), PowerSGDConfig(**{"rank": 2, **config}))


def filled(**config: Any) -> PowerSGDState:
    state = make_state(**config)
    generator = torch.Generator().manual_seed(1)
    for error in state.errors.values():
        error.copy_(torch.randn(error.shape, generator=generator))
    for index, held in enumerate(state.held_factors):
        for side, stacks in held.items():
            factors = [torch.randn(block.shape, generator=generator) for block in stacks.blocks]
            state.keep_factors(index, side, factors, [True] * len(factors))
    state.step, state.total_dense_bytes, state.total_sent_bytes = 7, 100, 10
    return state


def test_buffers_are_there_for_compressed_parameters_only():
    state = make_state(rank=3, error_dtype="bfloat16")
    assert {name: (e.shape, e.dtype) for name, e in state.errors.items()} == {
        "b.weight": ((20, 8, 3, 3), torch.bfloat16),
        "a.weight": ((40, 30), torch.bfloat16),
    }
    assert {name: dict(f) for name, f in state.factors.items()}["a.weight"]["right"].shape == (3, 30)
    assert make_state(error_feedback=False).errors == {}
    assert set(make_state(alternate=True).factors["a.weight"]) == {"left", "right"}


def test_first_factors_depend_on_the_seed_and_the_name_alone():
    first = make_state().factors
    assert torch.equal(first["a.weight"]["right"], make_state().factors["a.weight"]["right"])
    assert not torch.equal(first["a.weight"]["right"], make_state(seed=1).factors["a.weight"]["right"])
    torch.manual_seed(5)
    net = nn.ModuleDict({"c": nn.Linear(9, 9), "a": nn.Linear(30, 40)})
    other = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2), group_bytes=1)
    assert torch.equal(first["a.weight"]["right"], other.factors["a.weight"]["right"])


def test_drawing_factors_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    net = nn.utils.skip_init(nn.Linear, 30, 40)
    PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2))
    assert torch.equal(torch.rand(1), expected)


def test_without_warm_start_every_step_draws_anew():
    state = make_state(warm_start=False)
    first = state.start_factors(0).named["a.weight"].clone()
    state.finish_step(0, 0)
    assert not torch.equal(state.start_factors(0).named["a.weight"], first)


@pytest.mark.parametrize("config", [{}, {"alternate": True}, {"error_dtype": "bfloat16"}, {"rank": {"a*": 3}}], ids=str)
def test_state_survives_a_file_bit_for_bit(config):
    state = filled(**config)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    loaded = make_state(**config)
    assert loaded.load_state_dict(torch.load(file, weights_only=True)) == []
    assert loaded.step == 7
    assert (loaded.total_dense_bytes, loaded.total_sent_bytes) == (100, 10)
    for name, error in state.errors.items():
        assert torch.equal(error, loaded.errors[name])
    for name, sides in state.factors.items():
        assert all(torch.equal(factor, loaded.factors[name][side]) for side, factor in sides.items())


def test_keys_of_the_checkpoint_are_a_contract():
    saved = filled(rank={"a*": 3, "*": 2}).state_dict()
    assert set(saved) == {
        "format_version",
        "settings",
        "step",
        "averaged",
        "held",
        "loss_scale",
        "total_dense_bytes",
        "total_sent_bytes",
        "parameters",
    }
    assert set(saved["parameters"]["a.weight"]) == {"shape", "rank", "factors", "error"}
    assert saved["parameters"]["a.weight"]["rank"] == 3
    assert saved["parameters"]["b.weight"]["shape"] == [20, 8, 3, 3]


def test_a_factor_saved_in_another_memory_format_is_taken_over_in_place():
    contiguous = filled()
    net = nn.ModuleDict({"a": nn.Linear(30, 40), "b": nn.Conv2d(8, 20, 3, bias=False)})
    net.to(memory_format=torch.channels_last)
    other = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2))
    assert other.load_state_dict(contiguous.state_dict()) == []
    assert not torch.equal(other.factors["b.weight"]["right"], contiguous.factors["b.weight"]["right"])
    factors = [state.state_dict()["parameters"]["b.weight"]["factors"]["right"] for state in (contiguous, other)]
    assert torch.equal(*factors)
    assert torch.equal(other.errors["b.weight"], contiguous.errors["b.weight"])


def test_another_rank_keeps_the_errors_and_says_what_was_not_kept():
    state = filled(rank=2)
    loaded = make_state(rank={"a*": 3, "b*": 0})
    untouched = loaded.factors["a.weight"]["right"].clone()
    dropped = loaded.load_state_dict(state.state_dict())
    assert dropped == [
        "b.weight: no longer compressed",
        "a.weight: right factor of shape (2, 30) where (3, 30) is needed",
    ]
    assert torch.equal(loaded.errors["a.weight"], state.errors["a.weight"])
    assert torch.equal(loaded.factors["a.weight"]["right"], untouched)


def test_a_factor_of_the_other_side_is_not_mistaken_for_this_one():
    net = nn.Linear(30, 30)
    alternating = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2, alternate=True))
    alternating.keep_step([True])
    saved = alternating.state_dict()
    del saved["parameters"]["weight"]["factors"]["right"]
    full = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2, seed=1))
    untouched = full.factors["weight"]["right"].clone()
    assert full.load_state_dict(saved) == ["weight: right factor of shape None where (2, 30) is needed"]
    assert full.held == "right"
    assert torch.equal(full.factors["weight"]["right"], untouched)


def test_a_new_parameter_and_missing_errors_start_empty():
    loaded = filled()
    saved = copy.deepcopy(filled().state_dict(error_feedback=False))
    del saved["parameters"]["b.weight"]
    assert loaded.load_state_dict(saved) == [
        "b.weight: nothing saved, starts with an empty error buffer",
        "a.weight: no error buffer saved",
    ]
    assert not any(error.any() for error in loaded.errors.values())


def test_another_shape_is_an_error_that_names_the_parameter():
    with pytest.raises(ValueError, match=r"'a\.weight' of shape \(40, 30\).*shape \(41, 30\)"):
        make_state(rows=41).load_state_dict(filled().state_dict())


def test_another_format_is_an_error_that_names_the_remedy():
    saved = filled().state_dict() | {"format_version": 99}
    with pytest.raises(ValueError, match=r"format version 99.*delete its 'powersgd' entry"):
        make_state().load_state_dict(saved)


def test_parameters_without_values_or_on_several_devices_are_refused():
    meta = nn.Linear(8, 8, device="meta")
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        PowerSGDState(meta.named_parameters(), PowerSGDConfig(rank=2))
    with FakeTensorMode():
        parameters = [("here", nn.Parameter(torch.empty(3))), ("there", nn.Parameter(torch.empty(3, device="cuda")))]
    with pytest.raises(ValueError, match="several devices: 'here' on cpu, 'there' on cuda"):
        PowerSGDState(parameters, PowerSGDConfig(rank=2))


def test_a_model_without_trainable_parameters_has_an_empty_plan():
    net = nn.Linear(30, 40).requires_grad_(False)
    state = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2))
    assert list(state.plan.slots) == []
    assert state.load_state_dict(state.state_dict()) == []


def test_a_frozen_parameter_keeps_its_errors_at_the_present_loss_scale():
    state = filled(comm_dtype="float16")
    state.loss_scale.fill_(2.0**16)
    before = state.state_dict()["parameters"]["a.weight"]
    net = nn.ModuleDict({"a": nn.Linear(30, 40), "b": nn.Conv2d(8, 20, 3, bias=False)})
    net["a"].weight.requires_grad_(False)
    frozen = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2, comm_dtype="float16"))
    assert frozen.load_state_dict(state.state_dict()) == []
    frozen.loss_scale.fill_(2.0**8)
    after = frozen.state_dict()["parameters"]["a.weight"]
    assert torch.equal(after["error"] * 2**8, before["error"])
    assert torch.equal(after["magnitudes"]["left"] * 2**8, before["magnitudes"]["left"])
    assert torch.equal(after["factors"]["right"], before["factors"]["right"])
    assert "error" not in frozen.state_dict(error_feedback=False)["parameters"]["a.weight"]


def test_a_frozen_parameter_of_another_shape_is_an_error_at_once():
    net = nn.ModuleDict({"a": nn.Linear(31, 40), "b": nn.Conv2d(8, 20, 3, bias=False)})
    net["a"].weight.requires_grad_(False)
    state = PowerSGDState(net.named_parameters(), PowerSGDConfig(rank=2))
    with pytest.raises(ValueError, match=r"'a.weight' of shape \(40, 30\)"):
        state.load_state_dict(filled().state_dict())


def test_what_a_state_gives_out_is_its_own_and_loads_into_itself():
    state = PowerSGDState(nn.Linear(40, 30).named_parameters(), PowerSGDConfig(rank=2, error_dtype=torch.float32))
    state.errors["weight"].fill_(1.0)
    snapshot = state.state_dict()
    state.load_state_dict(state.state_dict())
    assert (state.errors["weight"] == 1).all()
    state.errors["weight"].zero_()
    assert (snapshot["parameters"]["weight"]["error"] == 1).all()
    state.load_state_dict(snapshot)
    state.errors["weight"].zero_()
    assert (snapshot["parameters"]["weight"]["error"] == 1).all()


def test_what_waits_for_a_frozen_parameter_is_the_states_own_too():
    layer = nn.Linear(40, 30)
    saved = PowerSGDState(layer.named_parameters(), PowerSGDConfig(rank=2)).state_dict()
    layer.weight.requires_grad_(False)
    state = PowerSGDState(layer.named_parameters(), PowerSGDConfig(rank=2))
    state.load_state_dict(saved)
    saved["parameters"]["weight"]["error"].fill_(1.0)
    given = state.state_dict()
    assert (given["parameters"]["weight"]["error"] == 0).all()
    given["parameters"]["weight"]["error"].fill_(1.0)
    assert (state.state_dict()["parameters"]["weight"]["error"] == 0).all()
