"""The program ``lightning-powersgd``.

    lightning-powersgd plan my_package.models:Net --init width=512 --rank 4 --link 1gbit --world-size 8

Everything that a user can mistake ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_powersgd.compressor.config import AUTO, PowerSGDConfig, Rank
from lightning_powersgd.compressor.turnaround import turnaround_of
from lightning_powersgd.planner import figure, report
from lightning_powersgd.planner.forecast import DEFAULT_LATENCY, Forecast, forecast_exchange
from lightning_powersgd.planner.targets import load_target
from lightning_powersgd.planner.units import parse_rate
from lightning_powersgd.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_LINKS = ("100mbit", "1gbit", "10gbit", "100gbit")

# Where the output is no terminal, nothing says how wide it is.
_WIDTH_OF_FILES = 120

_WORDS = {"true": True, "false": False, "null": None, "none": None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: its arguments; ``None`` are those of the process.

    Returns:
        The exit status.
    """
    parser = _Parser("lightning-powersgd", description="PowerSGD gradient compression for PyTorch Lightning.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    plan = _add_plan(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    arguments = parser.parse_args(argv)
    _require_packages(plan, arguments)
    try:
        forecast = _forecast(arguments)
        links = [forecast.over(link) for link in arguments.links or DEFAULT_LINKS]
        if arguments.plot is not None:
            figure.draw(forecast, links, _title(forecast, arguments)).savefig(arguments.plot, dpi=150)
    except (OSError, ValueError) as error:
        plan.error(str(error))
    if arguments.json:
        content = {"target": arguments.target, **report.to_json(forecast, links, arguments.step_seconds)}
        print(json.dumps(content, indent=1))
        return 0
    console = _console()
    title = _title(forecast, arguments)
    report.print_report(console, title, forecast, links, arguments.step_seconds, fold=not arguments.all)
    if arguments.plot is not None:
        console.print(f"Figure: {arguments.plot}", highlight=False, markup=False)
    return 0


def _add_plan(commands: Any) -> _Parser:
    plan: _Parser = commands.add_parser(
        "plan",
        help="show what PowerSGD would do for a model",
        description="Show what PowerSGD would do for a model: which parameters it compresses, how many bytes that"
        " saves, and how long an exchange of gradients would take, beside plain all-reduce.",
        epilog="How the times are computed, and what they leave out, is in the documentation: docs/planner.md.",
        allow_abbrev=False,
    )
    plan.add_argument(
        "target",
        help="package.module:Class or path/to/file.py:Class (also a function that returns a module), or a checkpoint",
    )
    plan.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_assignment,
        help="an argument of the class, such as --init width=512; repeat it for more",
    )
    settings = plan.add_argument_group("PowerSGD's settings")
    settings.add_argument(
        "--rank",
        action="append",
        metavar="RANK",
        help="a number, or auto (default), or PATTERN=NUMBER of parameter names, repeated: the first match wins, 0 is"
        " whole",
    )
    automatic = settings.add_mutually_exclusive_group()
    automatic.add_argument(
        "--steps", type=int, metavar="T", help="of the training, for --rank auto (default: 10000, as with AdamW)"
    )
    automatic.add_argument(
        "--turnaround", type=float, metavar="STEPS", help="for --rank auto, instead of --steps: see docs/settings.md"
    )
    automatic.add_argument("--max-bytes", type=int, metavar="BYTES", help="a step, for --rank auto, instead of --steps")
    settings.add_argument(
        "--optimizer",
        choices=("adam", "sgd"),
        default="adam",
        help="of the training, for --steps: sgd can do with a fifth of the rank (default %(default)s; also for others)",
    )
    settings.add_argument("--alternate", action="store_true", help="send one factor a step instead of both")
    settings.add_argument(
        "--min-compression-ratio",
        type=float,
        default=PowerSGDConfig.min_compression_ratio,
        metavar="RATIO",
        help="send a matrix whole that shrinks less (default %(default)s)",
    )
    settings.add_argument("--comm-dtype", metavar="DTYPE", help="of factors on the wire, such as bfloat16")
    network = plan.add_argument_group("the network")
    network.add_argument(
        "--link",
        dest="links",
        action="append",
        metavar="SPEED",
        type=_link,
        help=f"such as 1gbit or 400mbit; repeat it for more (default {' '.join(DEFAULT_LINKS)})",
    )
    network.add_argument(
        "--world-size",
        "--nodes",
        type=int,
        default=8,
        metavar="W",
        help="number of processes; of a sharded model, of machines with a replica each (default %(default)s)",
    )
    network.add_argument(
        "--shards",
        type=int,
        default=1,
        metavar="S",
        help="devices of a machine that the model is sharded over: figures are those of one of them",
    )
    network.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="L",
        help="of each machine, for a model that is not sharded: also shows what hierarchical=True would bring",
    )
    network.add_argument(
        "--latency",
        type=float,
        default=DEFAULT_LATENCY,
        metavar="SECONDS",
        help="of a message between neighbours (default %(default)s)",
    )
    times = plan.add_argument_group("computing")
    times.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to measure compression (default: CUDA if it is there)"
    )
    times.add_argument(
        "--compress-seconds", type=float, metavar="SECONDS", help="of compression, instead of measuring it"
    )
    times.add_argument(
        "--step-seconds",
        type=float,
        metavar="SECONDS",
        help="of forward and backward without exchange: also shows the speed-up of a step",
    )
    output = plan.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="a row for every parameter, also of layers that are alike")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw time over speed of the link, as .png, .svg or .pdf"
    )
    return plan


def _forecast(arguments: argparse.Namespace) -> Forecast:
    if arguments.step_seconds is not None and not 0 < arguments.step_seconds < math.inf:
        raise ValueError(
            f"`step_seconds={arguments.step_seconds}` is not the time of a step. Give seconds, such as 0.25."
        )
    rank = _rank(arguments.rank)
    if arguments.steps is not None and not PowerSGDConfig(rank=rank).automatic:
        raise ValueError(f"--steps has no effect beside --rank {' --rank '.join(arguments.rank)}. Use --rank auto.")
    config = PowerSGDConfig(
        rank=rank,
        turnaround=_turnaround(arguments),
        max_bytes=arguments.max_bytes,
        min_compression_ratio=arguments.min_compression_ratio,
        alternate=arguments.alternate,
        comm_dtype=arguments.comm_dtype,
    )
    # What the user's code prints must not get into the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        model = load_target(arguments.target, dict(arguments.init))
    silent = arguments.json or arguments.compress_seconds is not None
    with contextlib.nullcontext() if silent else _status("Measuring compression"):
        return forecast_exchange(
            model,
            config,
            world_size=arguments.world_size,
            latency=arguments.latency,
            compress_seconds=arguments.compress_seconds,
            device=arguments.device,
            shards=arguments.shards,
            devices=arguments.devices,
        )


def _title(forecast: Forecast, arguments: argparse.Namespace) -> str:
    name = Path(arguments.target).name.rpartition(":")[2]
    ranks = ", ".join(arguments.rank or [AUTO])
    options = f", {arguments.steps:,} steps" if arguments.steps is not None else ""
    options += ", alternating" if arguments.alternate else ""
    options += f", {arguments.comm_dtype} on the wire" if arguments.comm_dtype else ""
    where = f"{forecast.world_size} processes"
    if forecast.shards > 1:
        where = f"one of {forecast.shards} devices in each of {forecast.world_size} machines"
    return f"{name}, rank {ranks}{options}, {where}"


def _turnaround(arguments: argparse.Namespace) -> float | None:
    if arguments.steps is None:
        turnaround: float | None = arguments.turnaround
        return turnaround
    return turnaround_of(arguments.steps, sgd=arguments.optimizer == "sgd")


def _rank(values: list[str] | None) -> Rank | Mapping[str, Rank]:
    if values is None:
        return AUTO
    pairs = [value.rpartition("=")[::2] for value in values]
    for value, (_, number) in zip(values, pairs, strict=True):
        if number != AUTO and not number.removeprefix("-").isdecimal():
            raise ValueError(
                f"--rank {value} is neither auto nor a number, such as 2, nor PATTERN=NUMBER, such as 'embed*=0'."
            )
    if len(pairs) == 1 and not pairs[0][0]:
        return _number(pairs[0][1])
    if any(not pattern for pattern, _ in pairs):
        raise ValueError(f"--rank {' --rank '.join(values)} mixes numbers and patterns. Use '*=NUMBER' for the rest.")
    ranks: dict[str, Rank] = {}
    for pattern, number in pairs:
        ranks.setdefault(pattern, _number(number))
    return ranks


def _number(text: str) -> Rank:
    return AUTO if text == AUTO else int(text)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as width=512")
    if value.lower() in _WORDS:
        return name, _WORDS[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _link(text: str) -> str:
    try:
        parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _require_packages(plan: _Parser, arguments: argparse.Namespace) -> None:
    needed = ["matplotlib"] if arguments.plot is not None else []
    needed += [] if arguments.json else ["rich"]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            plan.error(f"this output needs {package}: pip install 'lightning-powersgd[plan]' (or use --json alone)")


def _status(message: str) -> contextlib.AbstractContextManager[Any]:
    """Show on a terminal that something is going on."""
    from rich.console import Console

    return Console(stderr=True).status(message)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
