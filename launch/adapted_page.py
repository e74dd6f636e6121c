"""What the report shows of a fine-tuning or a sweep: the question, its figures, and where they come from."""

from collections.abc import Mapping, Sequence
from typing import Any

from boldforge.launch import figures
from boldforge.launch.figure_names import call_figure, show_interval, show_number, show_p, tested_figures
from boldforge.launch.model_card import describe_overlap, describe_simulated

# Measured with the pipeline's own folds and logistic regression: 40 and 100 subjects, 5 and 10 folds or four sites.
FOLDS_SAY = (
    "Under cross-validation the intervals treat the fold models as given, though these have trained on each other's "
    "test subjects: in made-up cohorts without an effect they held chance in 85 to 92 % and not in 95 %, so the "
    "verdict asks for p below 0.01; 1.3 to 2.8 % of these cohorts then passed for better than chance, where 2.5 % are "
    "intended."
)
_SITE_FIGURES = ("auc", "balanced_accuracy", "sensitivity", "specificity", "r2", "r", "mae", "top1", "top5")


def describe_adapted(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template draws of a ``metrics.json`` or ``sweep.json``."""
    tested = results["figures"]
    selects_by = results.get("compared_by") or next((name for name in ("auc", "r2", "top1") if name in tested), None)
    if selects_by is None:
        raise ValueError("the figures hold none of auc, r2 and top1, by which models are compared")
    roc, curve = results.get("roc"), results.get("calibration")
    return {
        "question": describe_question(results),
        "planted": describe_simulated(results),
        "figures": tested_figures(results),
        "n": tested["n"],
        "n_positive": tested.get("n_positive"),
        "positive": _positive(results),
        "accuracy": "accuracy" in tested,
        "overlap": describe_overlap(results),
        "selects_by": selects_by,
        "compared_by": call_figure(selects_by, results),
        "rows": results.get("rows", "subjects"),
        "beside": _beside(results),
        "folds_say": _folds_say(results),
        "sites": _sites(results),
        "confusion": _confusion(results),
        "roc": figures.inline(figures.roc_figure(roc["fpr"], roc["tpr"], tested["auc"], tested["n"])) if roc else None,
        "equally": _equally(results) if curve else "",
        "calibration": figures.inline(figures.calibration_figure(curve)) if curve else None,
    }


def _folds_say(results: Mapping[str, Any]) -> str:
    """Say what folds do to intervals of subjects; of a plain sweep's one model, and of blocks, nothing."""
    if results.get("level", 0.05) >= 0.05 or results.get("clusters"):
        return ""
    repeated = results.get("settings", {}).get("repeats", 1) > 1
    return FOLDS_SAY + (" That was measured without repetitions, with which p is smaller still." if repeated else "")


def _equally(results: Mapping[str, Any]) -> str:
    """Say that scores are probabilities where both classes are as frequent, which the cohort's need not be."""
    n, share = results["figures"]["n"], results["figures"]["n_positive"] / results["figures"]["n"]
    return (
        "Scores are probabilities as if both classes were as frequent, since the loss weighs them equally; calibration "
        f"and Brier score are of these. Of the {n} here {100 * share:.0f} % are {_positive(results)}: saying so of "
        f"everybody would have a Brier score of {show_number(share * (1 - share))}, and where that is far from 50 % "
        "the groups leave the diagonal for this reason, too. AUC and threshold do not depend on it."
    )


def describe_question(results: Mapping[str, Any]) -> str:
    """Say what was predicted, out of which column, and which class counts as positive."""
    task, column, classes = results.get("task", ""), results.get("column"), results.get("classes") or []
    asked = f"Task {task}"
    if "n_positive" in results["figures"] and len(classes) == 2:
        other, positive = classes
        asked += f": {positive} or {other}" + _of(column)
        return (
            f"{asked}. Positive is {positive}: sensitivity is the share of {positive} that was called so, specificity "
            f"that of {other}."
        )
    if "confusion" in results["figures"] and classes:
        return f"{asked}: which of {len(classes)} classes ({', '.join(classes)})" + _of(column) + "."
    if "r2" in results["figures"] and column:
        spread = results.get("subjects", {})
        about = (
            f" (mean {show_number(spread['mean'], 2)}, standard deviation {show_number(spread['deviation'], 2)})"
            if "mean" in spread
            else ""
        )
        return f"{asked}: the number in column {column}{about}."
    return f"{asked}."


def _of(column: str | None) -> str:
    return f", by column {column}" if column else ""


def _positive(results: Mapping[str, Any]) -> str:
    classes = results.get("classes") or []
    return str(classes[1]) if len(classes) == 2 else "positive"


def _beside(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table that puts the model beside the baselines; empty where none were measured."""
    if not results.get("baselines"):
        return []
    compared_by = results["compared_by"]
    entries = [("this model", results), *((entry["says"], entry) for entry in results["baselines"].values())]
    rows = []
    for name, entry in entries:
        against = entry.get("model_minus_baseline")
        row = {
            "name": name,
            "interval": show_interval(entry["intervals"].get(compared_by)) or "none",
            "difference": "",
            "p": "",
        }
        if against:
            sign = "+" if against["difference"] >= 0 else ""
            row |= {"difference": sign + show_number(against["difference"], 2), "p": show_p(against["p"])}
        rows.append(row | {"figure": entry["figures"][compared_by]})
    return rows


def _sites(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of sites; None where there are not two of them."""
    sites: Sequence[Mapping[str, Any]] = results.get("sites") or []
    if len(sites) < 2:
        return None
    shown = [name for name in _SITE_FIGURES if name in sites[0]]
    return {
        "head": [call_figure(name, results) for name in shown],
        "rows": [
            {"name": row["site"] or "unknown", "n": row["n"], "n_positive": row.get("n_positive")}
            | {"cells": [row[name] for name in shown]}
            for row in sites
        ],
    }


def _confusion(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the table of several classes, rows the truth; None for other tasks."""
    counts = results["figures"].get("confusion")
    if counts is None:
        return None
    classes = results.get("classes") or [str(number) for number in range(len(counts))]
    return {
        "classes": classes,
        "rows": list(zip(classes, counts, strict=True)),
        "repeated": results.get("settings", {}).get("repeats", 1) > 1,
    }
