"""The picture of a run: its latency distribution, and IOPS over time.

How it works: matplotlib, without pyplot (whose import and global state a command needs not). The distribution has the axis that HdrHistogram's plots have: each step to the right
is ten times rarer; latencies are logarithmic. Text in SVG stays text.

Errors: `Unsupported` where matplotlib is not installed; `InvalidArgument` for a kind of file that it does not write, or a path that cannot be written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from qpair.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from qpair.bdev.latency import Latencies
    from qpair.bdev.perf import PerfResult

__all__ = ["KINDS", "Point", "check", "draw"]

KINDS = (".svg", ".png", ".pdf")
INK, LINE, WARN, FAINT = "#24292f", "#0f5fbf", "#c02020", "#d0d7de"
MARKED = (50.0, 99.0, 99.9, 99.99, 99.999)


@dataclass(frozen=True, slots=True)
class Point:
    """One interval of a run, which ends at ``elapsed_s``."""

    elapsed_s: float
    iops: float
    mb_per_s: float
    errors: int


def check(path: str) -> None:
    """Whether a picture can be drawn there: to be asked before measuring."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in KINDS:
        raise InvalidArgument(f"--plot {path}: {kind or 'a name without an ending'} is none of {', '.join(KINDS)}")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise InvalidArgument(f"--plot {path}: {folder} is no directory that may be written to")
    if find_spec("matplotlib") is None:
        raise Unsupported("--plot needs matplotlib, which is not installed: pip install 'qpair[plot]'")


def draw(path: str, *, title: str, result: PerfResult, latencies: Latencies, points: Sequence[Point]) -> None:
    """Write the picture to ``path``."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 7.6), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(3, 2))
        figure.suptitle(title, fontsize=13, fontweight="bold")
        _distribution(upper, latencies)
        _over_time(lower, result, points)
        try:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.lower().endswith(".svg") else None)
        except OSError as error:
            raise InvalidArgument(f"--plot {path}: {error.strerror}") from error


def _distribution(axes: Any, latencies: Latencies) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_title("Latency by percentile", loc="left", fontsize=11)
    axes.set_ylabel("latency")
    found = latencies.distribution()
    if not found:
        axes.text(0.5, 0.5, "no I/O was done", transform=axes.transAxes, ha="center")
        return
    rarest = max(1.0, math.log10(latencies.total))
    xs = [0.0, *(_rarity(percent, rarest) for percent, _ in found)]
    ys = [found[0][1], *(value for _, value in found)]
    axes.plot(xs, ys, color=LINE, linewidth=1.8, drawstyle="steps-pre")
    axes.set_yscale("log")
    # the few that were much quicker than all others would take half of the picture
    low, high = max(1, latencies.percentile(1.0)), ys[-1]
    axes.set_ylim(low / 1.8, high * 2.2)
    axes.set_xlim(0, rarest * 1.05)
    nines = range(int(rarest) + 1)
    axes.set_xticks([*nines], ["0 %", *(f"{_percent(number)} %" for number in nines if number)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_time(value)))
    few = math.log10(high / low) < 1.2
    if few:  # less than a decade has one tick or none
        from matplotlib.ticker import LogLocator

        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for percent in (*(mark for mark in MARKED if _rarity(mark, 99) <= rarest - 0.25), 100.0):
        x, y = _rarity(percent, rarest), latencies.percentile(percent)
        name = "max" if percent == 100.0 else f"p{percent:g}"
        axes.plot([x], [y], "o", color=LINE, markersize=5, clip_on=False)
        axes.annotate(
            f"{name}\n{short_time(y)}",
            (x, y),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right" if percent == 100.0 else "center",
            va="bottom",
            fontsize=9,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )


def _over_time(axes: Any, result: PerfResult, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_title("IOPS over time", loc="left", fontsize=11)
    axes.set_xlabel("seconds")
    axes.set_ylabel("IOPS")
    times = [point.elapsed_s for point in points]
    rates = [point.iops for point in points]
    axes.plot([0.0, *times], [*rates[:1], *rates], color=LINE, linewidth=1.5, drawstyle="steps-pre")
    axes.axhline(result.iops, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(0, max([*times, result.elapsed_s]))
    axes.set_ylim(0, max([*rates, result.iops, 1.0]) * 1.22)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    mean = f"mean {short_count(result.iops)} IOPS, {result.mb_per_s:,.0f} MB/s"
    axes.text(0.995, 0.97, mean, transform=axes.transAxes, ha="right", va="top", fontsize=9)
    failed = [point for point in points if point.errors]
    if failed:
        axes.plot([point.elapsed_s for point in failed], [point.iops for point in failed], "v", color=WARN, markersize=7)
        axes.text(
            0.005,
            0.97,
            f"{sum(point.errors for point in failed)} errors",
            transform=axes.transAxes,
            ha="left",
            va="top",
            fontsize=9,
            color=WARN,
        )
    if result.bytes and result.ios:
        bytes_each = result.bytes / result.ios
        right = axes.secondary_yaxis("right", functions=(lambda iops: iops * bytes_each / 1e6, lambda rate: rate * 1e6 / bytes_each))
        right.set_ylabel("MB/s")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"))


def _rarity(percent: float, most: float) -> float:
    """0 for none, 1 for 90 %, 2 for 99 % ...; at most ``most``, where 100 % is."""
    left = 1 - percent / 100
    return most if left <= 10**-most else -math.log10(left)


def _percent(nines: int) -> str:
    return "90" if nines == 1 else "99" if nines == 2 else "99." + "9" * (nines - 2)


def short_count(value: float) -> str:
    """``1.5 M``."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"


def short_time(nanoseconds: float) -> str:
    """``12.3 µs``."""
    for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if nanoseconds >= scale:
            return f"{nanoseconds / scale:.3g} {unit}"
    return f"{nanoseconds:.3g} ns"
