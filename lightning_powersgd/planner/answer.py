"""What PowerSGD would bring to a model over the link that was measured: by rank, and which rank is the best one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_powersgd.compressor.config import AUTO
from lightning_powersgd.exchange.link import Link, ring_seconds
from lightning_powersgd.planner.forecast import Forecast, LinkForecast
from lightning_powersgd.planner.report import LEFT_OUT
from lightning_powersgd.planner.tables import make_table
from lightning_powersgd.planner.units import format_bytes, format_rate, format_ratio, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Of a step without exchange: it has about twice the arithmetic of the forward pass.
_BACKWARD_SHARE = 2 / 3

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
    def ddp_seconds(self) -> float:
        """Seconds of a step with plain DDP, or of its exchange alone if nothing is known of the step."""
        first = self.options[0]
        if self.step_seconds is None:
            return first.times.all_reduce_seconds
        return seconds_with_ddp(first.forecast, first.times.bits_per_second, self.step_seconds)

    @property
    def bf16_seconds(self) -> float:
        """The same with the bf16 hook, whose casts hide nowhere."""
        first = self.options[0]
        if self.step_seconds is None:
            return first.times.bf16_seconds
        forecast, rate = first.forecast, first.times.bits_per_second
        return forecast.cast_seconds + seconds_with_ddp(forecast, rate, self.step_seconds, forecast.bf16_payloads)

    @property
    def rival(self) -> str:
        """The faster one of plain DDP and DDP with the bf16 hook."""
        return "DDP with the bf16 hook" if self.bf16_seconds < self.ddp_seconds else "DDP"

    @property
    def rival_seconds(self) -> float:
        """Seconds of a step with that, or of its exchange alone if nothing is known of the step."""
        return min(self.ddp_seconds, self.bf16_seconds)

    def seconds(self, option: Option) -> float:
        """Give the seconds of a step with a setting, or of its exchange alone if nothing is known of the step.

        Nothing of it hides behind the backward pass: on processors that compute what they send, hardly anything does.
        """
        return (self.step_seconds or 0.0) + option.times.powersgd_seconds

    def saved_seconds(self, option: Option) -> float:
        """Give the seconds by which a step is shorter than with the faster rival; negative if it is longer."""
        return self.rival_seconds - self.seconds(option)

    @property
    def best(self) -> Option | None:
        """The setting that sends most among those that save nearly as much as the fastest; ``None``: plain DDP."""
        most = max(map(self.saved_seconds, self.options))
        if most <= 0 or not self.options[0].forecast.break_even:
            return None
        good = [option for option in self.options if self.saved_seconds(option) >= _NEARLY_ALL * most]
        return max(good, key=lambda option: option.forecast.sent_bytes)

    def verdict(self) -> Iterator[str]:
        """Say what to do, in sentences."""
        best = self.best
        what = "exchange" if self.step_seconds is None else "step"
        if best is None:
            fastest = min(self.options, key=self.seconds)
            yield (
                f"Stay with {self.rival}. Its {what} takes {format_seconds(self.rival_seconds)}, and at rank"
                f" {fastest.rank} PowerSGD's would take {format_seconds(self.seconds(fastest))}."
            )
            return
        setting = f"PowerSGDStrategy(rank={best.rank})"
        if not best.rank.isdecimal():
            setting = "PowerSGDStrategy()" if best.rank == AUTO else f"PowerSGDStrategy(...), --rank {best.rank}"
        yield (
            f"Best setting: {setting}. Its {what} takes {format_seconds(self.seconds(best))} instead of"
            f" {format_seconds(self.rival_seconds)} with {self.rival},"
            f" {format_ratio(self.rival_seconds / self.seconds(best))} faster."
        )
        turn = best.forecast.plan.turnaround(alternate=best.forecast.config.alternate)
        yield (
            f"Each direction of a gradient has its turn within about {turn:,.0f} steps. Accuracy asks for a training"
            " that is many times as long: docs/accuracy.md has figures."
        )

    def to_json(self) -> dict[str, Any]:
        """Give everything that is known, in types that JSON has. docs/planner.md describes it."""
        first = self.options[0]
        with_step = self.step_seconds is not None
        return {
            "step_seconds": self.step_seconds,
            "dense_bytes": first.forecast.dense_bytes,
            "all_reduce_seconds": first.times.all_reduce_seconds,
            "bf16_seconds": first.times.bf16_seconds,
            "ddp_step_seconds": self.ddp_seconds if with_step else None,
            "bf16_step_seconds": self.bf16_seconds if with_step else None,
            "best_rank": None if self.best is None else self.best.rank,
            "options": [
                {
                    "rank": option.rank,
                    "sent_bytes": option.forecast.sent_bytes,
                    "turnaround_steps": option.forecast.plan.turnaround(alternate=option.forecast.config.alternate),
                    "powersgd_seconds": option.times.powersgd_seconds,
                    "compress_seconds": option.times.compress_seconds,
                    "network_seconds": option.times.network_seconds,
                    "step_seconds": self.seconds(option) if with_step else None,
                    "saved_seconds": self.saved_seconds(option),
                }
                for option in self.options
            ],
        }


def seconds_with_ddp(
    forecast: Forecast, bits_per_second: float, step_seconds: float, payloads: Sequence[int] | None = None
) -> float:
    """Forecast a step with plain DDP, which sends a bucket while the backward pass computes the next ones.

    The backward pass takes two thirds of a step, and its time is spread over gradients by their bytes.

    Args:
        forecast: of the model.
        bits_per_second: of the link.
        step_seconds: of forward and backward without any exchange.
        payloads: bytes of each bucket on the network; ``None``: those of the gradients as they are.
    """
    payloads = forecast.dense_payloads if payloads is None else payloads
    done = begun = (1 - _BACKWARD_SHARE) * step_seconds
    computed = 0.0
    for payload in payloads:
        computed += payload / sum(payloads)
        ready = begun + computed * _BACKWARD_SHARE * step_seconds
        done = max(done, ready) + ring_seconds([payload], forecast.world_size, forecast.latency, bits_per_second)
    return done


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


def option_table(answer: Answer) -> Table:
    """Make the table of what plain DDP and each setting take on the link."""
    first = answer.options[0]
    with_step = answer.step_seconds is not None
    table = make_table()
    table.add_column("exchange", no_wrap=True)
    for heading in ("sent", "takes", "= computing", "+ network", *(["step"] if with_step else []), "saves"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, sent, exchange, step_with in (
        ("DDP", first.forecast.dense_bytes, first.times.all_reduce_seconds, answer.ddp_seconds),
        ("DDP, bf16 hook", sum(first.forecast.bf16_payloads), first.times.bf16_seconds, answer.bf16_seconds),
    ):
        step = [format_seconds(step_with)] if with_step else []
        table.add_row(name, format_bytes(sent), format_seconds(exchange), "", "", *step)
    for option in answer.options:
        times, saved = option.times, answer.saved_seconds(option)
        step = [format_seconds(answer.seconds(option))] if with_step else []
        table.add_row(
            f"PowerSGD, rank {option.rank}",
            f"{format_bytes(option.forecast.sent_bytes)} ({format_ratio(option.forecast.compression_ratio)})",
            *map(format_seconds, (times.powersgd_seconds, times.compress_seconds, times.network_seconds)),
            *step,
            f"[green]{format_seconds(saved)}" if saved > 0 else "[yellow]nothing",
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
    console.print(option_table(answer))
    console.print()
    for line in answer.verdict():
        say(line, "" if answer.best else "yellow")
    measured_on = answer.options[0].forecast.measured_on
    origin = f"was measured on {measured_on}, by all processes at once" if measured_on else "was given"
    overlap = "DDP's step hides what it can of the all-reduce behind the backward pass, PowerSGD's hides nothing. "
    say(f"Computing {origin}. {LEFT_OUT if answer.step_seconds is None else overlap}".strip(), "dim")
