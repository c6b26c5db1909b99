"""The figure of a forecast, made with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_powersgd.planner.forecast import Forecast, LinkForecast
from lightning_powersgd.planner.units import format_rate, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#5F5F5F"
_SLOWEST, _FASTEST = 1e7, 1e11


def draw(forecast: Forecast, links: Sequence[LinkForecast], title: str) -> Figure:
    """Draw the time of an exchange over the speed of the link; each link with those of all-reduce and PowerSGD."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    slowest = min([_SLOWEST, *(link.bits_per_second / 2 for link in links)])
    fastest = max([_FASTEST, *(link.bits_per_second * 2 for link in links)])
    rates = np.geomspace(slowest, fastest, 200)
    over = [forecast.over(float(rate)) for rate in rates]
    plain, ours = [f.all_reduce_seconds for f in over], [f.powersgd_seconds for f in over]
    rival = [f.rival_seconds for f in over]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(rates, plain, "--", color=_ORANGE, linewidth=2, label="all-reduce (DDP)")
    axes.plot(rates, [f.bf16_seconds for f in over], ":", color=_PURPLE, linewidth=2, label="bf16 hook (DDP)")
    axes.plot(rates, ours, "-", color=_BLUE, linewidth=2, label="PowerSGD")
    axes.fill_between(rates, rival, ours, where=np.less(ours, rival), color=_BLUE, alpha=0.08, linewidth=0)

    if slowest < forecast.break_even < fastest:
        time = forecast.over(forecast.break_even).powersgd_seconds
        axes.plot(forecast.break_even, time, "o", color="black", zorder=3)
        axes.annotate(
            f"PowerSGD pays\nbelow {format_rate(forecast.break_even)}",
            (forecast.break_even, time),
            xytext=(24, 70),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": "black", "shrinkB": 4},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
        )
    for link in links:
        axes.axvline(link.bits_per_second, color=_GREY, linestyle=":", linewidth=1, zorder=0)
        times = ((link.all_reduce_seconds, _ORANGE, "s"), (link.powersgd_seconds, _BLUE, "o"))
        # Both curves fall, so there is room below and to the left of the lower one, and on the other side of the other.
        for (seconds, color, marker), side in zip(sorted(times), (-1, 1), strict=True):
            place = (link.bits_per_second, seconds)
            axes.plot(*place, marker, color=color)
            axes.annotate(
                format_seconds(seconds),
                place,
                xytext=(7 * side, 7 * side),
                textcoords="offset points",
                ha="right" if side < 0 else "left",
                va="top" if side < 0 else "bottom",
                color=color,
            )
    axes.set_xlim(slowest, fastest)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: format_rate(rate)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: format_seconds(seconds)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel="speed of the link", ylabel="exchange of one step's gradients")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    return figure
