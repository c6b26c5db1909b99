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
]
# What keeps the exchange's stream and that of the backward pass in order.
LEFT_OUT = [{**FULL, "left_out": "wait"}, {**FULL, "left_out": "join"}]


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
    *sound, without_wait, without_join = found
    assert not any(step["races"] for step in sound)
    # And it would be found out.
    assert without_wait["races"]
    assert without_join["races"]
