"""The program ``lightning-powersgd``.

    lightning-powersgd plan my_package.models:Net --init width=512 --rank 4 --link 1gbit --world-size 8
    torchrun --nproc-per-node 1 --nnodes 2 ... -m lightning_powersgd probe my_package.models:Net

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_powersgd.compressor.config import AUTO, PowerSGDConfig, Rank, require_int
from lightning_powersgd.compressor.turnaround import ASSUMED_STEPS, turnaround_of
from lightning_powersgd.exchange.link import Link
from lightning_powersgd.planner import figure, report
from lightning_powersgd.planner.answer import Answer, print_probe
from lightning_powersgd.planner.forecast import DEFAULT_LATENCY, Forecast, forecast_exchange
from lightning_powersgd.planner.link_file import link_content, read_link, write_link
from lightning_powersgd.planner.probe import (
    Medium,
    OnProgress,
    answer_for,
    choose_medium,
    configs_to_try,
    probe,
    settings_of,
)
from lightning_powersgd.planner.rendezvous import Meeting, RendezvousError, find_place, open_store, start_ranks
from lightning_powersgd.planner.targets import load_target
from lightning_powersgd.planner.units import parse_rate
from lightning_powersgd.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_LINKS = ("100mbit", "1gbit", "10gbit", "100gbit")
DEFAULT_WORLD_SIZE = 8
DEFAULT_PROCESSES = 2

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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan, parser_of_probe = _add_plan(commands), _add_probe(commands)
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    if arguments.command == "probe":
        return _probe(parser_of_probe, arguments, given)
    return _plan(plan, arguments)


def _plan(plan: _Parser, arguments: argparse.Namespace) -> int:
    _require_packages(plan, arguments)
    try:
        measured = _read_link(arguments)
        forecast = _forecast(arguments)
        links = [forecast.over(link) for link in [*measured, *(arguments.links or ())] or DEFAULT_LINKS]
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


def _read_link(arguments: argparse.Namespace) -> list[float]:
    """Take the link of a file for what the command line does not say; give its bits per second."""
    link = None if arguments.link_file is None else read_link(arguments.link_file)
    if arguments.world_size is None:
        arguments.world_size = link.world_size if link else DEFAULT_WORLD_SIZE
    if arguments.latency is None:
        arguments.latency = link.latency if link else DEFAULT_LATENCY
    return [link.bits_per_second] if link else []


def _probe(parser: _Parser, arguments: argparse.Namespace, given: Sequence[str]) -> int:
    _require_packages(parser, arguments)
    try:
        _check_probe(arguments)
        place = find_place(os.environ)
        if place is not None:
            with Meeting(open_store(place, arguments.timeout), place, arguments.timeout) as meeting:
                _probe_as_rank(arguments, meeting)
            return 0
        processes = arguments.processes or DEFAULT_PROCESSES
        # What is wrong here is so in every process, and said before they start.
        prepared = _prepare(arguments, processes, rank=0)
        with (
            start_ranks(processes, given, arguments.timeout) as (place, store),
            Meeting(store, place, arguments.timeout) as meeting,
        ):
            _probe_as_rank(arguments, meeting, prepared)
    except (OSError, ValueError, RendezvousError) as error:
        parser.error(str(error))
    return 0


def _check_probe(arguments: argparse.Namespace) -> None:
    for name in ("seconds", "timeout"):
        if not 0 < getattr(arguments, name) < math.inf:
            raise ValueError(f"`{name}={getattr(arguments, name)}` is not a time. Give seconds, such as 10.")
    if arguments.processes is not None:
        require_int("processes", arguments.processes, minimum=2, remedy="A single rank has nobody to send to.")
    _require_step_seconds(arguments)
    if arguments.target is None and (arguments.rank or arguments.init or arguments.step_seconds is not None):
        raise ValueError("--rank, --init and --step-seconds are about a model. Name one, such as path/to/file.py:Net.")


_Prepared = tuple[Medium, "nn.Module | Mapping[str, Tensor] | None"]


def _prepare(arguments: argparse.Namespace, local_ranks: int | None, *, rank: int) -> _Prepared:
    """Do what needs no other rank."""
    medium = choose_medium(arguments.backend, arguments.device, local_ranks)
    if rank == 0 and arguments.link_file is not None and not arguments.link_file.resolve().parent.is_dir():
        raise ValueError(f"--link-file {arguments.link_file}: there is no such folder. Make it first.")
    if arguments.target is None:
        return medium, None
    _config(arguments)
    return medium, _load(arguments)


def _probe_as_rank(arguments: argparse.Namespace, meeting: Meeting, prepared: _Prepared | None = None) -> None:
    place = meeting.place
    if arguments.processes not in (None, place.world_size):
        meeting.refuse(f"--processes {arguments.processes}: a launcher has started {place.world_size}. Leave it out.")
    try:
        medium, model = prepared or _prepare(arguments, place.local_world_size, rank=place.rank)
    except (OSError, ValueError) as error:
        meeting.refuse(f"Rank {place.rank}: {error}")
    named = "none" if model is None else f"{arguments.target} {dict(arguments.init)} {_config(arguments)}"
    machines = meeting.gather(settings_of(place, medium, arguments.seconds, named))
    with _progress(silent=arguments.json or place.rank > 0) as on_progress:

        def answer(link: Link, device: torch.device, on_share: OnProgress) -> Answer:
            assert model is not None
            return answer_for(
                model,
                configs_to_try(_config(arguments), ", ".join(arguments.rank) if arguments.rank else None),
                link,
                device,
                compress_seconds=arguments.compress_seconds,
                step_seconds=arguments.step_seconds,
                on_progress=on_share,
            )

        link, found = probe(
            meeting,
            medium,
            seconds=arguments.seconds,
            timeout=arguments.timeout,
            answer=None if model is None else answer,
            on_progress=on_progress,
        )
    if place.rank == 0:
        _report_probe(arguments, medium, machines, link, found)


def _report_probe(
    arguments: argparse.Namespace, medium: Medium, machines: int, link: Link, answer: Answer | None
) -> None:
    if arguments.link_file is not None:
        write_link(arguments.link_file, link)
    if arguments.json:
        content = {
            **link_content(link),
            "machines": machines,
            "backend": medium.backend,
            "device": medium.device,
            "target": arguments.target,
            "answer": None if answer is None else answer.to_json(),
        }
        print(json.dumps(content, indent=1))
        return
    console = _console()
    where = f"{link.world_size} processes on {machines} machine{'s' if machines > 1 else ''}"
    print_probe(console, f"{where}, {medium.backend}, {medium.device}", link, answer)
    if machines == 1:
        alone = (
            "All processes give their machine the same name. If it is one, no network between machines was measured."
        )
        console.print(alone, style="yellow", highlight=False)
    if arguments.link_file is not None:
        file = f"Link: {arguments.link_file}"
        console.print(file, highlight=False, markup=False)


def _add_plan(commands: Any) -> _Parser:
    plan: _Parser = commands.add_parser(
        "plan",
        help="show what PowerSGD would do for a model",
        description="Show what PowerSGD would do for a model: which parameters it compresses, how many bytes that"
        " saves, and how long an exchange of gradients would take, beside plain all-reduce.",
        epilog="How the times are computed, and what they leave out, is in the documentation: docs/planner.md.",
        allow_abbrev=False,
    )
    _add_model(plan)
    _add_settings(plan)
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
        "--link-file",
        type=Path,
        metavar="FILE",
        help="a link that `lightning-powersgd probe` has measured, with its world size and latency",
    )
    network.add_argument(
        "--world-size",
        "--nodes",
        type=int,
        metavar="W",
        help="number of processes; of a sharded model, of machines with a replica each"
        f" (default {DEFAULT_WORLD_SIZE}, or that of --link-file)",
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
        metavar="SECONDS",
        help=f"of a message between neighbours (default {DEFAULT_LATENCY}, or that of --link-file)",
    )
    times = _add_times(plan)
    times.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to measure compression (default: CUDA if it is there)"
    )
    output = plan.add_argument_group("output")
    output.add_argument("--all", action="store_true", help="a row for every parameter, also of layers that are alike")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw time over speed of the link, as .png, .svg or .pdf"
    )
    return plan


def _add_probe(commands: Any) -> _Parser:
    probe: _Parser = commands.add_parser(
        "probe",
        help="measure the network between processes, and what PowerSGD would bring on it",
        description="Measure what the network between processes does: under torchrun, under SLURM, or with processes of"
        " its own on this machine. With a model, also show what PowerSGD would bring on it.",
        epilog="What is measured, and what it leaves out, is in the documentation: docs/planner.md.",
        allow_abbrev=False,
    )
    _add_model(probe, nargs="?")
    _add_settings(probe)
    network = probe.add_argument_group("the network")
    network.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help=f"to start on this machine, where no launcher has (default {DEFAULT_PROCESSES})",
    )
    network.add_argument("--backend", choices=("gloo", "nccl"), help="(default: nccl if each process has a GPU)")
    network.add_argument("--device", choices=("cpu", "cuda"), help="(default: CUDA if it is there)")
    network.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="that measuring may take (default %(default)g)"
    )
    network.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="for which processes wait for each other (default %(default)g)",
    )
    _add_times(probe)
    output = probe.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    output.add_argument(
        "--link-file", type=Path, metavar="FILE", help="write the link, for `lightning-powersgd plan --link-file FILE`"
    )
    return probe


def _add_model(parser: _Parser, nargs: str | None = None) -> None:
    parser.add_argument(
        "target",
        nargs=nargs,
        help="package.module:Class or path/to/file.py:Class (also a function that returns a module), or a checkpoint",
    )
    parser.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_assignment,
        help="an argument of the class, such as --init width=512; repeat it for more",
    )


def _add_settings(parser: _Parser) -> None:
    settings = parser.add_argument_group("PowerSGD's settings")
    settings.add_argument(
        "--rank",
        action="append",
        metavar="RANK",
        help="a number, or auto (default), or PATTERN=NUMBER of parameter names, repeated: the first match wins, 0 is"
        " whole",
    )
    automatic = settings.add_mutually_exclusive_group()
    automatic.add_argument(
        "--steps",
        type=int,
        metavar="T",
        help=f"of the training, for --rank auto (default: {ASSUMED_STEPS}, as with AdamW)",
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


def _add_times(parser: _Parser) -> Any:
    times = parser.add_argument_group("computing")
    times.add_argument(
        "--compress-seconds", type=float, metavar="SECONDS", help="of compression, instead of measuring it"
    )
    times.add_argument(
        "--step-seconds",
        type=float,
        metavar="SECONDS",
        help="of forward and backward without exchange: also shows the speed-up of a step",
    )
    return times


def _forecast(arguments: argparse.Namespace) -> Forecast:
    _require_step_seconds(arguments)
    config, model = _config(arguments), _load(arguments)
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


def _require_step_seconds(arguments: argparse.Namespace) -> None:
    if arguments.step_seconds is not None and not 0 < arguments.step_seconds < math.inf:
        raise ValueError(
            f"`step_seconds={arguments.step_seconds}` is not the time of a step. Give seconds, such as 0.25."
        )


def _config(arguments: argparse.Namespace) -> PowerSGDConfig:
    rank = _rank(arguments.rank)
    if arguments.steps is not None and not PowerSGDConfig(rank=rank).automatic:
        raise ValueError(f"--steps has no effect beside --rank {' --rank '.join(arguments.rank)}. Use --rank auto.")
    return PowerSGDConfig(
        rank=rank,
        turnaround=_turnaround(arguments),
        max_bytes=arguments.max_bytes,
        min_compression_ratio=arguments.min_compression_ratio,
        alternate=arguments.alternate,
        comm_dtype=arguments.comm_dtype,
    )


def _load(arguments: argparse.Namespace) -> nn.Module | Mapping[str, Tensor]:
    # What the user's code prints must not get into the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        return load_target(arguments.target, dict(arguments.init))


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


def _require_packages(parser: _Parser, arguments: argparse.Namespace) -> None:
    needed = ["matplotlib"] if getattr(arguments, "plot", None) is not None else []
    needed += [] if arguments.json else ["rich"]
    for package in needed:
        if importlib.util.find_spec(package) is None:
            parser.error(f"this output needs {package}: pip install 'lightning-powersgd[plan]' (or use --json alone)")


def _status(message: str) -> contextlib.AbstractContextManager[Any]:
    """Show on a terminal that something is going on."""
    from rich.console import Console

    return Console(stderr=True).status(message)


@contextlib.contextmanager
def _progress(*, silent: bool) -> Iterator[OnProgress]:
    """Show on a terminal how far measuring is: a function of what is measured, and the share of it that is done."""
    if silent:
        yield lambda _, __: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"Measuring {what}", total=1.0)
            progress.update(tasks[what], completed=share)

        show("network", 0.0)
        yield show


def _console() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
