"""A nested sweep's figures: those of its searches in one, a colour for each outer fold, and the pooled test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from boldforge.launch.figures import INK, ORANGE, inline_svg, plot_axes
from boldforge.launch.sweep_figures import draw_axis, label_ranks, place

# Mid-tones that read on white and on near-black and stay apart for colour-blind eyes (after Okabe and Ito); orange is
# the test's.
_COLOURS = ("#3d7fc1", "#0fa37f", "#b8619b", "#7a6fd0", "#a3912a", "#8a8f98")
_MARKS = ("o", "s", "^", "v", "P", "X")


def nested_rank_figure(
    searches: Mapping[int, Mapping[str, Any]], figure: str, called: str, results: Mapping[str, Any]
) -> str:
    """Draw the best validation figure of each rank, a line for each outer fold, their mean, and the pooled test.

    Parameters
    ----------
    searches
        The ``sweep.json`` of each outer fold, by its number.
    figure, called
        ``auc`` or ``r2``, and how it is written.
    results
        The ``metrics.json`` that pools their tests.
    """
    key = f"validation_{figure}"
    best = {number: _best_of_ranks(search["trials"], key) for number, search in searches.items()}
    ranks = sorted({rank for curve in best.values() for rank in curve})
    plot, axes = plot_axes(6.0, 3.8)
    for number, (search, curve) in enumerate(zip(searches.values(), best.values(), strict=True)):
        colour, mark = _look(number)
        # Side by side, since folds often reach the same figure.
        at = [place(rank) + 0.05 * (number - (len(best) - 1) / 2) for rank in curve]
        axes.plot(at, list(curve.values()), color=colour, marker=mark, ms=4, lw=1, alpha=0.8)
        chosen = place(search["best"]["rank"]) + 0.05 * (number - (len(best) - 1) / 2)
        axes.plot([chosen], [search["best"][key]], mark, ms=10, mfc="none", mec=colour, mew=1.8)
    shared = [rank for rank in ranks if all(rank in curve for curve in best.values())]
    means = [float(np.mean([curve[rank] for curve in best.values()])) for rank in shared]
    axes.plot([place(rank) for rank in shared], means, color=INK, lw=2.2, label="mean of the outer folds")
    tested, (low, high) = results["figures"][figure], results["intervals"][figure]
    if tested is not None and low is not None:
        axes.axhline(tested, color=ORANGE, lw=1.8, label="test, winners pooled, with its interval")
        axes.axhspan(low, high, color=ORANGE, alpha=0.12, lw=0)
    if figure == "auc":
        axes.axhline(0.5, color=INK, lw=1, ls=(0, (4, 3)), label="chance")
    label_ranks(axes, ranks)
    axes.set(ylabel=called)
    _add_legend(axes, list(searches), marks=True)
    return inline_svg(plot, "nested-rank")


def nested_parallel_figure(
    searches: Mapping[int, Mapping[str, Any]], searched: Mapping[str, str], figure: str, called: str
) -> str:
    """Draw every trial of every search as a line in its outer fold's colour, the winners thick; empty below two axes.

    A trial that diverged ends before the last axis.
    """
    names = list(searched)
    if len(names) < 2:
        return ""
    trials = [
        (number, trial, trial == search["best"]) for number, search in searches.items() for trial in search["trials"]
    ]
    plot, axes = plot_axes(1.5 * (len(names) + 1) + 0.6, 3.4)
    heights = np.empty((len(trials), len(names) + 1))
    for column, name in enumerate(names):
        heights[:, column] = draw_axis(axes, column, [trial[name] for _, trial, _ in trials], searched[name])
    reached = [trial[f"validation_{figure}"] for _, trial, _ in trials]
    heights[:, -1] = draw_axis(axes, len(names), reached, f"validation {called}")
    place_of = {number: at for at, number in enumerate(searches)}
    for row in sorted(range(len(trials)), key=lambda row: trials[row][2]):
        number, _, chosen = trials[row]
        at = place_of[number]
        # A little apart, or the folds would hide each other: all of them tried the same points.
        shown = heights[row][np.isfinite(heights[row])] + 0.018 * (at - (len(searches) - 1) / 2)
        style: dict[str, Any] = {"lw": 2.6, "alpha": 1.0} if chosen else {"lw": 0.9, "alpha": 0.35}
        axes.plot(range(len(shown)), shown, color=_look(at)[0], **style)
    axes.set(xlim=(-0.3, len(names) + 0.5), ylim=(-0.14, 1.12))
    axes.set_axis_off()
    _add_legend(axes, list(searches), marks=False)
    return inline_svg(plot, "nested-parallel")


def _best_of_ranks(trials: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Return the best figure of each rank, ranks ascending; trials that diverged have none."""
    best: dict[int, float] = {}
    for trial in trials:
        if trial[key] is not None:
            best[trial["rank"]] = max(trial[key], best.get(trial["rank"], -np.inf))
    return dict(sorted(best.items()))


def _look(number: int) -> tuple[str, str]:
    """Return a fold's colour and mark; six colours take other marks when they come round again."""
    return _COLOURS[number % len(_COLOURS)], _MARKS[(number + number // len(_COLOURS)) % len(_MARKS)]


def _add_legend(axes: Axes, folds: Sequence[int], marks: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    for at, fold in enumerate(folds):
        colour, mark = _look(at)
        handles.append(Line2D([], [], color=colour, marker=mark if marks else "", ms=4, lw=1.4))
        labels.append(f"outer fold {fold}")
    axes.legend(
        handles,
        labels,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17 if marks else 0.02),
        ncols=3,
    )
