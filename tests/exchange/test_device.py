"""Tier two: what a step asks of an accelerator, on a device that has no values and counts (see `simulated_device`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "programs" / "simulated_device.py"

# Settings; launches for each matrix; for all together, whose factors have three shapes on either side; and copies.
FULL = {"rank": 4}
BUDGETS: list[tuple[dict[str, Any], int, int, dict[str, int]]] = [
    (FULL, 5, 120, {}),
    ({**FULL, "alternate": True}, 4, 105, {"to the host": 1}),
    ({**FULL, "comm_dtype": "bfloat16"}, 5, 140, {}),
    ({**FULL, "comm_dtype": "float16"}, 5, 225, {}),
    ({**FULL, "comm_dtype": "int8"}, 5, 310, {}),
    ({**FULL, "dtype": "bfloat16"}, 5, 125, {}),
    ({**FULL, "error_feedback": False}, 3, 120, {}),
    ({**FULL, "follow": True}, 5, 130, {"to the device": 1}),
    ({**FULL, "scaler": True}, 6, 105, {}),
    ({**FULL, "warm_start": False}, 5, 120, {"to the device": 1}),
    ({**FULL, "start_step": 99}, 0, 3, {}),
    # With Triton's kernels nothing is done for each matrix, but where PyTorch's operations are left to do it.
    ({**FULL, "triton": True}, 0, 125, {}),
    ({**FULL, "triton": True, "alternate": True}, 0, 110, {"to the host": 1}),
    ({**FULL, "triton": True, "comm_dtype": "bfloat16"}, 0, 145, {}),
    ({**FULL, "triton": True, "comm_dtype": "float16"}, 0, 230, {}),
    ({**FULL, "triton": True, "dtype": "bfloat16"}, 0, 130, {}),
    ({**FULL, "triton": True, "dtype": "float16"}, 0, 220, {}),
    ({**FULL, "triton": True, "follow": True}, 0, 135, {"to the device": 1}),
    ({**FULL, "triton": True, "scaler": True}, 0, 110, {}),
    ({"rank": 33, "triton": True}, 5, 125, {}),
]
# What keeps the exchange's stream and that of the backward pass in order.
LEFT_OUT = [{**FULL, "left_out": out, "triton": triton} for triton in (False, True) for out in ("wait", "join")]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What steps with these settings ask of the device. Whoever asks it for a value gets an error."""
    settings = json.dumps([budget[0] for budget in BUDGETS] + LEFT_OUT)
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
    for step in found:
        solver = [count for name, count in step["launches"].items() if "linalg_cholesky" in name or "solve" in name]
        assert "linalg_qr" not in step["launches"]
        # Twice for each of three shapes, not for each of 24 matrices.
        assert all(count <= 6 for count in solver)


def test_no_two_streams_use_the_same_memory_at_once(found):
    sound, unsound = found[: len(BUDGETS)], found[len(BUDGETS) :]
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
