"""What PowerSGD would bring to a model over the link that was measured: by rank, and which rank is the best one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_powersgd.compressor.config import AUTO
from lightning_powersgd.exchange.link import Link
from lightning_powersgd.planner.forecast import Forecast, LinkForecast
from lightning_powersgd.planner.report import LEFT_OUT
from lightning_powersgd.planner.tables import make_table
from lightning_powersgd.planner.units import format_bytes, format_rate, format_ratio, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# A setting that saves this share of what the fastest saves is as good as that, and loses less of the gradients.
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Option:
    """A setting, and what it would bring.

    Attributes:
        rank: as a user writes it, such as "auto" or "4".
        forecast: of the model.
        times: over the link.
    """

    rank: str
    forecast: Forecast
    times: LinkForecast

    @property
    def saved_seconds(self) -> float:
        """Seconds that a step is shorter than with the faster rival, if nothing overlaps; negative if it is longer."""
        return self.times.rival_seconds - self.times.powersgd_seconds


@dataclass(frozen=True)
class Answer:
    """Whether PowerSGD pays for a model on a link, and with which setting.

    Attributes:
        options: the settings that were tried.
        step_seconds: of forward and backward without any exchange, if they are known.
    """

    options: tuple[Option, ...]
    step_seconds: float | None

    @property
    def best(self) -> Option | None:
        """The setting that sends most among those that save nearly as much as the fastest; ``None``: plain DDP."""
        fastest = max(self.options, key=lambda option: option.saved_seconds)
        if not fastest.times.pays:
            return None
        good = [option for option in self.options if option.saved_seconds >= _NEARLY_ALL * fastest.saved_seconds]
        return max(good, key=lambda option: option.forecast.sent_bytes)

    def verdict(self) -> Iterator[str]:
        """Say what to do, in sentences."""
        best = self.best
        if best is None:
            times = self.options[0].times
            hook = " with the bf16 hook" if times.bf16_seconds < times.all_reduce_seconds else ""
            yield f"Stay with DDP{hook}. On {times}"
            return
        setting = f"PowerSGDStrategy(rank={best.rank})"
        if not best.rank.isdecimal():
            setting = "PowerSGDStrategy()" if best.rank == AUTO else f"PowerSGDStrategy(...), --rank {best.rank}"
        saved = f"saves {format_seconds(best.saved_seconds)} a step beside {best.times.rival}"
        if self.step_seconds is not None:
            least, most = best.times.least_speedup(self.step_seconds), best.times.speedup(self.step_seconds)
            saved += f", which makes a step {least:.2f} to {most:.2f} times as fast"
        yield f"Best setting: {setting}. It {saved}."
        if self.step_seconds is not None and least <= 1:
            yield f"If all of {best.times.rival} hides behind the backward pass, it stays the faster one: measure both."
        turn = best.forecast.plan.turnaround(alternate=best.forecast.config.alternate)
        yield (
            f"Each direction of a gradient has its turn within about {turn:,.0f} steps. Accuracy asks for a training"
            " that is many times as long: docs/accuracy.md has figures."
        )

    def to_json(self) -> dict[str, Any]:
        """Give everything that is known, in types that JSON has. docs/planner.md describes it."""
        first = self.options[0]
        step = self.step_seconds
        return {
            "step_seconds": step,
            "dense_bytes": first.forecast.dense_bytes,
            "all_reduce_seconds": first.times.all_reduce_seconds,
            "bf16_seconds": first.times.bf16_seconds,
            "best_rank": None if self.best is None else self.best.rank,
            "options": [
                {
                    "rank": option.rank,
                    "sent_bytes": option.forecast.sent_bytes,
                    "turnaround_steps": option.forecast.plan.turnaround(alternate=option.forecast.config.alternate),
                    "powersgd_seconds": option.times.powersgd_seconds,
                    "compress_seconds": option.times.compress_seconds,
                    "network_seconds": option.times.network_seconds,
                    "saved_seconds": option.saved_seconds,
                    "pays": option.times.pays,
                    "step_speedup": None if step is None else option.times.speedup(step),
                    "least_step_speedup": None if step is None else option.times.least_speedup(step),
                }
                for option in self.options
            ],
        }


def sample_table(link: Link) -> Table:
    """Make the table of the all-reduces that were measured."""
    table = make_table()
    table.add_column("all-reduce of", no_wrap=True)
    for heading in ("median", "quartiles", "each way", "fitted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sample in link.samples:
        table.add_row(
            format_bytes(sample.payload_bytes),
            format_seconds(sample.seconds),
            f"{format_seconds(sample.low)} to {format_seconds(sample.high)}",
            format_rate(link.bits_per_second_of(sample)),
            format_seconds(link.all_reduce_seconds(sample.payload_bytes)),
        )
    return table


def option_table(options: Sequence[Option], step_seconds: float | None) -> Table:
    """Make the table of what plain DDP and each setting take on the link."""
    first = options[0]
    table = make_table()
    table.add_column("exchange", no_wrap=True)
    for heading in ("sent", "takes", "= computing", "+ network", "saves", *([] if step_seconds is None else ["step"])):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, sent, seconds in (
        ("DDP", first.forecast.dense_bytes, first.times.all_reduce_seconds),
        ("DDP, bf16 hook", sum(first.forecast.bf16_payloads), first.times.bf16_seconds),
    ):
        step = [] if step_seconds is None else [format_seconds(step_seconds + seconds)]
        table.add_row(name, format_bytes(sent), format_seconds(seconds), "", "", "", *step)
    for option in options:
        times = option.times
        gain = format_seconds(option.saved_seconds) if option.saved_seconds > 0 else "nothing"
        step = [] if step_seconds is None else [format_seconds(step_seconds + times.powersgd_seconds)]
        table.add_row(
            f"PowerSGD, rank {option.rank}",
            f"{format_bytes(option.forecast.sent_bytes)} ({format_ratio(option.forecast.compression_ratio)})",
            *map(format_seconds, (times.powersgd_seconds, times.compress_seconds, times.network_seconds)),
            f"[{'green' if times.pays else 'yellow'}]{gain}",
            *step,
        )
    return table


def print_probe(console: Console, where: str, link: Link, answer: Answer | None) -> None:
    """Print what was measured, and what it means for a model.

    Args:
        console: where to.
        where: was measured.
        link: that was measured.
        answer: for a model, if one was named.
    """

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, markup=False)

    say(where, "bold")
    console.print(sample_table(link))
    console.print()
    say(
        f"Latency {format_seconds(link.latency)}, bandwidth {format_rate(link.bits_per_second)} each way"
        f" (the quartiles of the largest message are {link.spread:.0%} apart)."
    )
    say(
        "Fitted to a ring: every process sends to one neighbour while it receives from the other. These are bytes of"
        " gradients. Headers come on top, over TCP and Ethernet about 5 %.",
        "dim",
    )
    if answer is None:
        return
    console.print()
    say("Exchange of one step's gradients on this network", "bold")
    console.print(option_table(answer.options, answer.step_seconds))
    console.print()
    for line in answer.verdict():
        say(line, "" if answer.best else "yellow")
    measured_on = answer.options[0].forecast.measured_on
    origin = f"was measured on {measured_on}, by all processes at once" if measured_on else "was given"
    say(f"Computing {origin}. {LEFT_OUT}", "dim")
