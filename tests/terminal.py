"""Programs, started as a user starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def run(command: list[str], root: Path, fails: bool = False) -> str:
    """Run a program in a directory; give what it printed. It must succeed, or fail."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    # Not the surroundings of this test run, which may itself have been started by a launcher.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, cwd=root, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as started:
        try:
            said, _ = started.communicate(timeout=240)
        finally:
            # Also the ranks that a launcher started, which would outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    assert (started.returncode != 0) is fails, said
    return said
