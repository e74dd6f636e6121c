"""A sweep's figures: the validation figure against the rank, and all that was searched as parallel coordinates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from boldforge.launch.figures import BLUE, GREY, INK, ORANGE, inline_svg, legend_below, plot_axes

_CALLED = {
    "rank": "rank",
    "alpha": "alpha",
    "dropout": "dropout",
    "targets": "layers",
    "lr": "step size",
    "head_lr": "head's step",
    "weight_decay": "decay",
}
_SHADES = colormaps["viridis"]
_MOST_CHOICES = 8


def searched(results: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between the trials of a ``sweep.json`` because it was searched, and how it is called."""
    space = results.get("settings", {}).get("space", {})
    # alpha follows the rank where it is not searched itself.
    asked = ["rank", *(name for name in _CALLED if space.get(name) is not None and name != "rank")]
    return {name: _CALLED[name] for name in asked if len({str(trial[name]) for trial in results["trials"]}) > 1}


def say(value: Any) -> str:
    """Write a value that was searched; of a list of layers their number and the first, which is all that fits."""
    if isinstance(value, list | tuple):
        return str(value[0]) if len(value) == 1 else f"{len(value)}: {value[0]} …"
    return f"{value:.3g}"


def rank_figure(trials: Sequence[Mapping[str, Any]], figure: str, called: str, results: Mapping[str, Any]) -> str:
    """Draw every trial's validation figure against its rank, the best of each rank with its interval, and the test.

    Parameters
    ----------
    trials
        As in ``sweep.json``; those that diverged have no figure and are left out.
    figure, called
        ``auc`` or ``r2``, and how it is written.
    results
        The content of ``sweep.json``.
    """
    drawn = [trial for trial in trials if trial[f"validation_{figure}"] is not None]
    ranks = sorted({trial["rank"] for trial in drawn})
    plot, axes = plot_axes(6.0, 3.8)
    axes.scatter(
        [place(trial["rank"]) for trial in drawn],
        [trial[f"validation_{figure}"] for trial in drawn],
        color=GREY,
        s=14,
        alpha=0.7,
        lw=0,
        label="trials (validation)" if len(drawn) > len(ranks) else None,
    )
    best = [max((t for t in drawn if t["rank"] == rank), key=lambda t: t[f"validation_{figure}"]) for rank in ranks]
    values = np.array([trial[f"validation_{figure}"] for trial in best])
    places = [place(rank) for rank in ranks]
    intervals = [trial.get(f"validation_{figure}_interval") for trial in best]
    label = "validation, best of the rank" if len(drawn) > len(ranks) else "validation"
    if all(intervals):
        ends = np.abs(np.array(intervals).T - values)
        axes.errorbar(places, values, ends, fmt="o-", color=BLUE, ms=4, lw=1.5, elinewidth=1, capsize=3, label=label)
    else:
        axes.plot(places, values, "o-", color=BLUE, ms=4, lw=1.5, label=label)
    tested, (low, high) = results["figures"][figure], results["intervals"][figure]
    if tested is not None and low is not None:
        at = place(results["best"]["rank"]) + 0.12
        width = [[tested - low], [high - tested]]
        axes.errorbar([at], [tested], width, fmt="D", color=ORANGE, ms=5, capsize=3, label="test, the chosen one")
    if figure == "auc":
        axes.axhline(0.5, color=INK, lw=1, ls=(0, (4, 3)), label="chance")
    label_ranks(axes, ranks)
    axes.set(ylabel=called)
    legend_below(axes)
    return inline_svg(plot, "rank")


def parallel_figure(
    trials: Sequence[Mapping[str, Any]], searched: Mapping[str, str], figure: str, called: str, best: Mapping[str, Any]
) -> str:
    """Draw every trial as a line through what was searched and what came of it; empty where only one thing was.

    A trial that diverged ends before the last axis.
    """
    names = list(searched)
    if len(names) < 2:
        return ""
    plot, axes = plot_axes(1.5 * (len(names) + 1) + 0.6, 3.4)
    heights = np.empty((len(trials), len(names) + 1))
    for column, name in enumerate(names):
        heights[:, column] = draw_axis(axes, column, [trial[name] for trial in trials], searched[name])
    reached = [trial[f"validation_{figure}"] for trial in trials]
    heights[:, -1] = draw_axis(axes, len(names), reached, f"validation {called}")
    order = sorted(range(len(trials)), key=lambda row: (trials[row] == best, heights[row, -1]))
    for row in order:
        line, chosen = heights[row], trials[row] == best
        shown = line[np.isfinite(line)]
        colour = GREY if len(shown) < len(line) else to_hex(_SHADES(0.15 + 0.7 * line[-1]))
        style: dict[str, Any] = (
            {"color": ORANGE, "lw": 2.6, "alpha": 1.0} if chosen else {"color": colour, "lw": 1.1, "alpha": 0.75}
        )
        axes.plot(range(len(shown)), shown, label="the chosen one" if chosen else None, **style)
    axes.set(xlim=(-0.3, len(names) + 0.5), ylim=(-0.14, 1.12))
    axes.set_axis_off()
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.0, -0.02))
    return inline_svg(plot, "parallel")


def place(rank: int) -> float:
    """Ranks at even steps per doubling; 0, which has no logarithm, one step before 1."""
    return math.log2(rank) if rank else -1.0


def label_ranks(axes: Axes, ranks: Sequence[int]) -> None:
    """Write rising ranks below their places, but for those whose labels would lie over another."""
    places = [place(rank) for rank in ranks]
    legible = _apart(places, (places[-1] - places[0]) / 25)
    axes.set_xticks(places, [str(rank) if written else "" for rank, written in zip(ranks, legible, strict=True)])
    axes.set(xlabel="LoRA rank (0: the head alone)" if 0 in ranks else "LoRA rank")


def _apart(places: Sequence[float], least: float) -> list[bool]:
    """Say of rising places which ones' labels are written, so that none lies over another: the ends first."""
    legible, last = [True] * len(places), places[0]
    for number in range(1, len(places) - 1):
        legible[number] = places[number] - last >= least and places[-1] - places[number] >= least
        last = places[number] if legible[number] else last
    return legible


def draw_axis(axes: Axes, column: int, values: Sequence[Any], called: str) -> np.ndarray:
    """Draw a vertical axis with its name and ends, or its choices; return the values' heights, 0 to 1."""
    axes.plot([column, column], [0, 1], color=INK, lw=0.8, alpha=0.5)
    axes.text(column, 1.07, called, color=INK, ha="center", fontsize=10)
    shown = [value for value in values if value is not None]
    words = not all(isinstance(value, int | float) for value in shown)
    choices: list[Any] = sorted({say(value) for value in shown} if words else set(shown))
    if words:
        ticks = {choice: _height(number, 0, len(choices) - 1) for number, choice in enumerate(choices)}
        heights = [ticks[say(value)] for value in values]
    else:
        low, high = choices[0], choices[-1]
        log = low > 0 and high / low >= 10
        scale = math.log if log else float
        of = {value: _height(scale(value), scale(low), scale(high)) for value in choices}
        ticks = {say(value): of[value] for value in (choices if len(choices) <= _MOST_CHOICES else [low, high])}
        heights = [math.nan if value is None else of[value] for value in values]
    rising = sorted(ticks.items(), key=lambda tick: tick[1])
    legible = _apart([height for _, height in rising], 0.05)
    for text, height in (tick for tick, written in zip(rising, legible, strict=True) if written):
        axes.text(column + 0.06, height, text, color=INK, va="center", fontsize=8, alpha=0.85)
    return np.array(heights)


def _height(value: float, low: float, high: float) -> float:
    return 0.5 if high == low else (value - low) / (high - low)
