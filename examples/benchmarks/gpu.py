"""Run on a GPU what needs one: the tests that are marked so, and then the benchmarks. `make gpu` does this.

    python examples/benchmarks/gpu.py

Each table is written to ``gpu_results/`` as soon as it is finished, and ``gpu_results/summary.md`` says what ran,
failed or was skipped, and why. All of it takes ``--minutes`` at most: what does not fit is ended, or skipped. Without a
GPU everything is skipped; pytest then names the tests and the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


@dataclass(frozen=True)
class Job:
    """A program to run.

    Args:
        name: of its files.
        command: after the interpreter.
        minutes: that it may take.
        table: what the program calls its files, where it writes a table.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    table: str | None = None


def benchmark(name: str, program: str, options: str, minutes: float) -> Job:
    """Describe a benchmark on the GPU."""
    command = (str(BENCHMARKS / f"{program}.py"), "--device=cuda", *options.split())
    return Job(name, command, minutes, program)


# The tests first; then what tells most.
JOBS = (
    Job("tests", ("-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"), 7),
    benchmark("step_gpt2", "step", "--model gpt2 --ranks 1 4 --repeats 20", 3),
    benchmark("step_resnet50", "step", "--model resnet50 --ranks 1 4 --repeats 20", 3),
    benchmark("step_1b", "step", "--model 1b --ranks 4 --repeats 10", 4),
    *(benchmark(f"memory_{model}", "memory", f"--models {model} --ranks 4", 2) for model in ("resnet50", "gpt2", "1b")),
    benchmark("kernel", "kernel", "--ranks 1 4 32 --shapes 256x256 1024x1024 4096x4096", 4),
    benchmark("kernel_small", "kernel", "--ranks 1 4 --shapes 64x64", 3),
)


def why_not() -> str:
    """Say why nothing can run on a GPU; empty if it can."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    return f"torch {torch.__version__} finds no CUDA device"


def run(job: Job, folder: Path, seconds: float) -> str:
    """Run a program, leave what it says and its table in a folder, and give how it ended."""
    command = [sys.executable, *job.command]
    if job.table:
        command.append(f"--output-dir={folder / job.name}")
    with (folder / f"{job.name}.log").open("w") as log:
        started = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )
        try:
            code = started.wait(seconds)
            ended = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {seconds / 60:.1f} minutes"
        finally:
            # Also the ranks that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    for path in (folder / job.name).glob(f"{job.table}.*"):
        path.replace(folder / f"{job.name}{path.suffix}")
    with contextlib.suppress(OSError):
        (folder / job.name).rmdir()
    return ended


def main() -> int:
    """Run everything that can be run, and say what cannot."""
    parser = argparse.ArgumentParser(description="Run on a GPU what needs one.", allow_abbrev=False)
    parser.add_argument("--output-dir", type=Path, default=Path("gpu_results"), help="folder of tables and logs")
    parser.add_argument("--minutes", type=float, default=20, help="that all of it may take (default: 20)")
    arguments = parser.parse_args()
    folder: Path = arguments.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reason = why_not()
    end = time.monotonic() + 60 * arguments.minutes
    lines = [
        "# On a GPU",
        "",
        f"{torch.cuda.get_device_name() if not reason else 'No GPU'}, torch {torch.__version__}",
        "",
    ]
    failed = False
    for job in JOBS:
        left = end - time.monotonic()
        if reason and job.table:
            ended = f"skipped: {reason}"
        elif left <= 0:
            ended = f"skipped: the {arguments.minutes:g} minutes are over"
        else:
            ended = run(job, folder, min(60 * job.minutes, left))
            failed = failed or ended != "done"
            if reason and ended == "done":
                ended = f"skipped: {reason}; `tests.log` names them"
        lines.append(f"- {job.name}: {ended}")
        print(lines[-1], flush=True)
        (folder / "summary.md").write_text("\n".join(lines) + "\n")
    print(f"Tables, logs and summary: {folder}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
