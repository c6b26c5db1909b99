"""Tier one: the parameters of a module, and of a state dict."""

from __future__ import annotations

import torch

from lightning_powersgd.planner.parameters import parameters_of


def test_a_state_dict_holds_more_than_parameters():
    table = torch.zeros(30, 20)
    state = {
        "norm.running_mean": torch.zeros(5),
        "norm.running_var": torch.zeros(5),
        "norm.num_batches_tracked": torch.tensor(3),
        "ids": torch.arange(7),
        "extra": {"anything": 1},
        "embedding.weight": table,
        "head.weight": table,
        "transposed": table.t(),
        "neighbours": torch.eye(40).to_sparse(),
        "empty": torch.zeros(0),
        "empty_too": torch.zeros(0),
    }
    assert [name for name, _ in parameters_of(state)] == ["embedding.weight", "transposed", "empty", "empty_too"]
    assert all(tensor.is_meta and tensor.requires_grad for _, tensor in parameters_of(state))
