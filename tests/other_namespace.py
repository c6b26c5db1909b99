"""Run tests of the trainer once more, as a program that imports `pytorch_lightning`: what `make unit` does in the end.

    python tests/other_namespace.py tests/strategies tests/metrics

The tests are copied with the names of the one namespace replaced by those of the other, so that nothing in a test's
process imports `lightning`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def copy_renamed(folder: Path) -> None:
    """Copy the tests, and the files that they look for beside them, into a folder."""
    for name in ("tests", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, folder)
    for path in (folder / "tests").rglob("*.py"):
        text = path.read_text()
        for ours, theirs in NAMES.items():
            text = text.replace(ours, theirs)
        path.write_text(text.replace("import lightning\n", "import pytorch_lightning as lightning\n"))
    # Whatever imports the first namespace all the same fails.
    guard = "\n\ndef pytest_sessionfinish():\n    import sys\n    assert 'lightning' not in sys.modules\n"
    with (folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(guard)


def main() -> int:
    """Run pytest on the copy, with the arguments of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        copy_renamed(Path(folder))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
