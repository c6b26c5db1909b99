"""Tier one: the settings."""

from __future__ import annotations

import numpy as np
import torch

from lightning_powersgd import PowerSGDConfig


def test_settings_are_plain_types():
    settings = PowerSGDConfig(rank={"a*": 1}, error_dtype=torch.bfloat16).to_dict()
    assert settings["rank"] == {"a*": 1}
    assert settings["error_dtype"] == "torch.bfloat16"
    assert PowerSGDConfig(rank=2, error_dtype="bfloat16") == PowerSGDConfig(rank=2, error_dtype=torch.bfloat16)
    assert PowerSGDConfig(rank=2, error_dtype="torch.bfloat16") == PowerSGDConfig(rank=2, error_dtype=torch.bfloat16)


def test_settings_from_numpy_are_saved_as_plain_types():
    assert type(PowerSGDConfig(rank=2, min_compression_ratio=np.float64(2)).to_dict()["min_compression_ratio"]) is float
