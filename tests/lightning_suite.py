"""Run Lightning's own tests of DDP with PowerSGD in its place. Optional: it needs a checkout of Lightning's repository.

    python tests/lightning_suite.py /path/to/pytorch-lightning

The checkout should be of the version that is installed. Its tests are copied, and in the copy the strategy's names and
its class are exchanged for ours; those about DDP are run, on the CPU. What compares arguments to the letter fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Names that the trainer knows, and the class, where a test makes an instance or asks for the type.
SWAPPED = {
    r'(["\'])ddp((?:_spawn|_fork|_notebook)?(?:_find_unused_parameters_true)?)\1': r'"powersgd\2"',
    r"\bDDPStrategy\(": "PowerSGDStrategy(",
    r"isinstance\(([^()]+), DDPStrategy\)": r"isinstance(\1, PowerSGDStrategy)",
}


def swap(tests: Path) -> None:
    """Exchange plain DDP for PowerSGD in all tests of a folder."""
    for path in tests.rglob("*.py"):
        text = swapped = path.read_text()
        for plain, ours in SWAPPED.items():
            swapped = re.sub(plain, ours, swapped)
        if swapped != text:
            # After what must stand first in a file.
            place = re.search(r"^(?:import|from) (?!__future__)", swapped, re.MULTILINE)
            begin = place.start() if place else 0
            swapped = swapped[:begin] + "from lightning_powersgd import PowerSGDStrategy\n" + swapped[begin:]
            path.write_text(swapped)


def main() -> int:
    """Run the tests, with further arguments of the command line for pytest."""
    checkout, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder, "tests", "tests_pytorch")
        shutil.copytree(Path(checkout, "tests", "tests_pytorch"), tests)
        shutil.copy(Path(checkout, "pyproject.toml"), folder)
        swap(tests)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(tests.parent)])}
        # Markers of plugins, and files that need more than is installed, are passed over.
        lenient = ["-o", "addopts=", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", ".", "-k", "ddp", "-q", *lenient, *arguments]
        return subprocess.run(command, cwd=tests, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
