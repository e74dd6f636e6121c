"""How figures are called and written where people read them."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# In the order in which they are shown.
FIGURES = {
    "top1": "top-1",
    "top5": "top-5",
    "auc": "AUC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier score (both classes weighed equally)",
    "r2": "R²",
    "r": "correlation r",
    "mae": "mean absolute error",
}


def call_figure(name: str, results: Mapping[str, Any]) -> str:
    """Return a figure's name; an error in the unit of what was predicted says the unit."""
    called = FIGURES.get(name, name.replace("_", " "))
    return f"{called}, years" if name == "mae" and results.get("task") == "age" else called


def tested_figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of a test in their order: ``key``, ``name``, ``value`` and ``interval``, None without one."""
    figures, intervals = results.get("figures", {}), results.get("intervals", {})
    return [
        {"key": key, "name": call_figure(key, results), "value": figures[key], "interval": intervals.get(key)}
        for key in FIGURES
        if key in figures
    ]


def show_number(value: float | None, digits: int = 3) -> str:
    """Write a figure for a table; an undefined one is a dash, a minus no hyphen."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "\u2212")


def show_interval(ends: Sequence[float] | None, digits: int = 2) -> str:
    """Write an interval in words, so that no dash stands beside a minus; nothing where there is none."""
    return "" if ends is None else f"{show_number(ends[0], digits)} to {show_number(ends[1], digits)}"


def show_p(p: float | None) -> str:
    """Write a p value: of permutations it is never 0."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.0005 + 1e-9 else f"{p:.3f}"


def say_p(p: float) -> str:
    """Write a p value in a sentence: ``p = 0.020`` or ``p < 0.001``."""
    shown = show_p(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


def true_minus(text: str) -> str:
    """Write the negative numbers of a sentence with a minus in place of a hyphen."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", text)
