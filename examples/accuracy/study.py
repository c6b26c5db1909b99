"""Train the same network with plain DDP and with PowerSGD in many settings, and write down how well each learns.

    torchrun --standalone --nproc-per-node 2 examples/accuracy/study.py images --data-dir FASHION_MNIST
    torchrun --standalone --nproc-per-node 2 examples/accuracy/study.py text --data-dir TEXTS
    python examples/accuracy/report.py

The processes train one network after another, every variant with one seed before the next seed. All variants of a seed
begin with the same weights and see the same batches; they differ in nothing but the strategy. Every finished run is a
line of ``RESULTS/TASK.jsonl``, and what stands there already is not run again: a study may be stopped at any time and
goes on where it was. `report.py` makes the tables and the figure.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar

# The example programs, and what the benchmarks share.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "benchmarks")]

from common import machine
from image_classification import ignore_expected_warnings
from tasks import TASKS, Task

RESULTS = Path(__file__).parents[2] / "docs" / "accuracy"


def train(task: Task, variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test once. Called on all ranks at once.

    Returns:
        What was done and what came of it: numbers and strings only. A metric that is not finite is ``None``.
    """
    seed_everything(seed, workers=True, verbose=False)
    module, data = task.module_of(variant), task.data(arguments.data_dir)
    strategy = task.strategy(variant, arguments.steps)
    trainer = Trainer(
        accelerator=arguments.accelerator,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=strategy,
        precision=arguments.precision,
        max_epochs=-1,
        max_steps=arguments.steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar(refresh_rate=20)],
        **task.trainer,
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    dense_bytes = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    (tested,) = trainer.test(module, data, verbose=False)
    value = tested[f"test_{task.metric}"] * task.scale
    return {
        "variant": variant,
        "seed": seed,
        task.metric: value if math.isfinite(value) else None,
        "bytes_per_step": task.bytes_per_step(strategy, dense_bytes, arguments.steps),
        "dense_bytes": dense_bytes,
        "steps": arguments.steps,
        "ranks": trainer.world_size,
        "precision": arguments.precision,
        "seconds": round(seconds, 1),
        "device": trainer.strategy.root_device.type,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Read the runs that were done; none, where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Start it with torchrun: torchrun --standalone --nproc-per-node 2 examples/accuracy/study.py ...",
    )
    parser.add_argument("task", choices=TASKS, help="what is learnt")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="Fashion-MNIST's four files, or files *.txt; without it MNIST's 5,000 images, or the help texts of Python",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and batches")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of them only, by their names")
    parser.add_argument("--steps", type=int, help="of each training; the task's own if not given")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer")
    parser.add_argument("--precision", default="bf16-mixed", help="of the Trainer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results, the same on all machines")
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    arguments.variants = arguments.variants or list(task.variants)
    arguments.steps = arguments.steps or task.steps
    unknown = [name for name in arguments.variants if name not in task.variants]
    if unknown:
        parser.error(f"--variants: {unknown[0]!r} is none of {', '.join(task.variants)}")
    if "LOCAL_WORLD_SIZE" not in os.environ:
        parser.error("there is only this process. " + str(parser.epilog))
    return arguments


def main() -> None:
    """Run what was not run yet."""
    ignore_expected_warnings()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    arguments = parse()
    path = arguments.results / f"{arguments.task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(run["variant"], run["seed"], run["steps"], run["precision"]) for run in read(path)}
    runs = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    first = os.environ["RANK"] == "0"
    for number, (variant, seed) in enumerate(runs, start=1):
        if (variant, seed, arguments.steps, arguments.precision) in done:
            continue
        if first:
            print(f"Run {number} of {len(runs)}: {variant}, seed {seed}", flush=True)
        result = train(TASKS[arguments.task], variant, seed, arguments)
        if first:
            with path.open("a") as file:
                file.write(json.dumps({**result, **machine(result["device"])}) + "\n")
    if torch.distributed.is_initialized():  # unless all was done before
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
