"""Programs, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def run(command: list[str], root: Path) -> str:
    """Run a program in a directory; give what it printed."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    # Not the surroundings of this test run, which may itself have been started by a launcher.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
