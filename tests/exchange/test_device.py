"""Tier two: what a step asks of an accelerator, on a device that has no values and counts (see `simulated_device`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "programs" / "simulated_device.py"

# Settings; launches for each matrix; for all together; and copies.
FULL = {"rank": 4}
BUDGETS: list[tuple[dict[str, Any], int, int, dict[str, int]]] = [
    (FULL, 5, 47, {}),
    ({**FULL, "alternate": True}, 4, 50, {"to the host": 1}),
    ({**FULL, "comm_dtype": "bfloat16"}, 5, 61, {}),
    ({**FULL, "comm_dtype": "float16"}, 5, 149, {}),
    ({**FULL, "comm_dtype": "int8"}, 7, 243, {}),
    ({**FULL, "dtype": "bfloat16"}, 5, 50, {}),
    ({**FULL, "error_feedback": False}, 3, 46, {}),
    ({**FULL, "follow": True}, 5, 59, {"to the device": 1}),
    ({**FULL, "scaler": True}, 6, 57, {}),
    ({**FULL, "warm_start": False}, 5, 48, {"to the device": 1}),
    ({**FULL, "start_step": 99}, 0, 3, {}),
    # With Triton's kernels nothing is done for each matrix, but where PyTorch's operations are left to do it.
    ({**FULL, "triton": True}, 0, 8, {}),
    ({**FULL, "triton": True, "alternate": True}, 0, 10, {"to the host": 1}),
    ({**FULL, "triton": True, "comm_dtype": "bfloat16"}, 0, 15, {}),
    ({**FULL, "triton": True, "comm_dtype": "float16"}, 0, 155, {}),
    ({**FULL, "triton": True, "dtype": "bfloat16"}, 0, 8, {}),
    ({**FULL, "triton": True, "dtype": "float16"}, 0, 151, {}),
    ({**FULL, "triton": True, "follow": True}, 0, 17, {"to the device": 1}),
    ({**FULL, "triton": True, "scaler": True}, 0, 24, {}),
    ({"rank": 33, "triton": True}, 5, 51, {}),
]
# Twelve layers: with PyTorch's operations, and with Triton's kernels in one group and in several.
TWELVE = [
    {**FULL, "layers": 12},
    {**FULL, "layers": 12, "triton": True},
    {**FULL, "layers": 12, "triton": True, "group_bytes": 2 * 10**6},
]
# What keeps the exchange's stream and that of the backward pass in order.
LEFT_OUT = [{**FULL, "left_out": out, "triton": triton} for triton in (False, True) for out in ("wait", "join")]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What steps with these settings ask of the device. Whoever asks it for a value gets an error."""
    settings = json.dumps([budget[0] for budget in BUDGETS] + TWELVE + LEFT_OUT)
    done = subprocess.run([sys.executable, PROGRAM, settings], check=False, capture_output=True, text=True, timeout=240)
    # PyTorch says of an operation that a device lacks where it is registered, for each of all others.
    said = [line for line in done.stderr.splitlines() if "registered at" not in line]
    assert done.returncode == 0, "\n".join(said[-30:])
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("index", range(len(BUDGETS)), ids=[str(budget[0]) for budget in BUDGETS])
def test_a_step_has_a_budget_of_launches_and_copies(found, index):
    _, of_each_matrix, of_all, copies = BUDGETS[index]
    step = found[index]
    assert step["matrices"] == 24
    assert sum(step["launches"].values()) <= 24 * of_each_matrix + of_all, step["launches"]
    assert step["copies"] == copies


def test_no_matrix_is_a_call_of_the_solver(found):
    for (settings, _, _, _), step in zip(BUDGETS, found, strict=False):
        solver = [count for name, count in step["launches"].items() if "linalg_cholesky" in name or "solve" in name]
        assert "linalg_qr" not in step["launches"]
        # Twice for all shapes, and not for each of 24 matrices; never where a kernel makes all bases.
        assert all(count <= 2 for count in solver)
        assert not (solver and "orthonormalize" in step["launches"]), settings


def test_a_step_with_twelve_layers_is_few_launches_for_each_matrix_and_group(found):
    plain, together, grouped = found[len(BUDGETS) : len(BUDGETS) + len(TWELVE)]
    assert [step["groups"] for step in (plain, together, grouped)] == [1, 1, 5]
    assert sum(plain["launches"].values()) <= 6 * plain["matrices"]
    for step in (together, grouped):
        assert sum(step["launches"].values()) <= 8 * step["groups"]
        assert step["after the last gradient"] <= 8 * step["groups"]


def test_no_two_streams_use_the_same_memory_at_once(found):
    sound, unsound = found[: -len(LEFT_OUT)], found[-len(LEFT_OUT) :]
    assert not any(step["races"] for step in sound)
    # And it would be found out.
    assert all(step["races"] for step in unsound)


def test_a_pass_over_a_group_is_a_launch_or_two_and_its_tables_of_addresses_are_made_once(found):
    for (settings, _, _, _), step in zip(BUDGETS, found, strict=False):
        if settings.get("triton") and settings["rank"] == 4:
            projections = 1 if settings.get("alternate") else 2
            assert step["launches"]["project"] == step["launches"]["add_up"] == projections
            assert step["launches"]["decompress"] == 1
            # Where tables are told anew, that is a copy to the device.
            assert step["copies"].get("to the device", 0) == (1 if settings.get("follow") else 0)
