"""What a cross-validation may say: figures with intervals, beside the baselines, and one honest sentence.

Array suffixes: N subjects · R repetitions of the cross-validation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from boldforge.finetune.baselines import BASELINES
from boldforge.finetune.evaluation import bootstrap_intervals, calibration, compare, per_site, permutation_test
from boldforge.finetune.intervals import FEWEST_CLUSTERS, cluster_intervals, score_intervals
from boldforge.finetune.metrics import auc
from boldforge.finetune.tasks import Task, named_classes

Floats = npt.NDArray[np.float64]
_CALLED = {"auc": "AUC", "r2": "R²", "top1": "top-1"}
# Of one fixed model about subjects new to it, p is what it says. The models of folds have trained on each other's test
# subjects: of cohorts without an effect 7 to 11 % had p < 0.05, and the verdict below, which is to be wrong in 2.5 %,
# was so in 4 to 8 %; at 0.01 in 1.3 to 2.8 % (tested).
LEVEL, LEVEL_OF_FOLDS = 0.05, 0.01


@dataclass
class Scores:
    """One model's test scores, every subject tested once per repetition, and where each fold drew its line.

    ``score`` is [R, N] or, for several classes, [R, N, K]; ``threshold_RN`` is the threshold that the fold's validation
    subjects chose, of use where there are two classes. ``blind``: a baseline whose features are the same for every row.
    """

    task: Task
    score: Floats
    threshold_RN: Floats
    blind: bool = False

    @classmethod
    def empty(cls, task: Task, repeats: int, subjects: int) -> "Scores":
        """Make one to be filled fold by fold."""
        shape = (repeats, subjects, task.n_scores) if task.n_scores > 1 else (repeats, subjects)
        return cls(task, np.full(shape, np.nan), np.full((repeats, subjects), np.nan))

    def put(self, repeat: int, subjects: Sequence[int], scores: npt.ArrayLike, threshold: float) -> None:
        """Enter a fold's test subjects."""
        self.score[repeat, list(subjects)] = scores
        self.threshold_RN[repeat, list(subjects)] = threshold

    def select(self, subjects: Sequence[int]) -> "Scores":
        """Return those of some subjects, by position."""
        return replace(self, score=self.score[:, list(subjects)], threshold_RN=self.threshold_RN[:, list(subjects)])

    def by_row(self) -> Floats:
        """Return every subject's scores of all repetitions, [N, R] or [N, R, K]."""
        return np.moveaxis(self.score, 0, 1)

    def mean(self) -> Floats:
        """Return every subject's mean over repetitions, [N] or [N, K]."""
        return self.score.mean(axis=0)

    def figures(self, labels: npt.ArrayLike) -> dict[str, Any]:
        """Return the task's figures of all subjects, the mean over repetitions."""
        truth = np.asarray(labels)
        return self.figures_of(truth, np.arange(len(truth)))

    def intervals(
        self, labels: npt.ArrayLike, seed: int, clusters: Sequence[str] | None = None
    ) -> dict[str, list[float]]:
        """Return the figures' 95 % intervals, see `score_intervals`; none where there are too few clusters."""
        truth = np.asarray(labels)
        if clusters is None:
            resampled = bootstrap_intervals(truth, np.arange(len(truth)), self.figures_of, seed)
        else:
            resampled = cluster_intervals(lambda rows: self.figures_of(truth[rows], rows), clusters)
        return score_intervals(resampled, self.figures(labels), labels, clusters)

    def figures_of(self, truth: npt.NDArray[Any], subjects: npt.NDArray[np.int64]) -> dict[str, Any]:
        """Return the figures of some subjects, given by position and with their labels, as `figures` does of all."""
        per_repeat = [
            self.task.metrics(truth, score[subjects], line[subjects])
            for score, line in zip(self.score, self.threshold_RN, strict=True)
        ]
        return {name: _mean([row[name] for row in per_repeat]) for name in per_repeat[0]}


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean over repetitions; None if it is undefined in one, and the first of what is no figure."""
    if any(value is None for value in values):
        return None
    return float(np.mean(values)) if isinstance(values[0], float) else values[0]


@dataclass(frozen=True)
class Blocks:
    """What rows hang together where they are parts of subjects, one entry per row.

    ``clusters`` count as a whole: people or, of one person, runs; ``called`` says which. Labels are permuted inside
    ``runs`` only.
    """

    clusters: Sequence[str]
    runs: Sequence[str]
    called: str = "people"


def summarise(
    model: Scores,
    baselines: Mapping[str, Scores],
    labels: Sequence[float],
    sites: Sequence[str | None],
    seed: int,
    blocks: Blocks | None = None,
    cross_validated: bool = True,
) -> dict[str, Any]:
    """Put a model's figures beside the baselines'.

    Parameters
    ----------
    model, baselines
        On the same subjects, in the same folds.
    labels, sites
        One per subject.
    seed
        Of resampling and permutations.
    blocks
        Where rows are parts of subjects.
    cross_validated
        Whether the scores are those of several folds' models, whose ``level`` is stricter.

    Returns
    -------
    dict
        The task's ``column`` and ``classes``, ``figures``, ``intervals``, ``permutation``, ``level`` (below which a p
        counts), ``clusters`` (of blocks), ``sites``, ``baselines`` and ``verdict``, as ``metrics.json`` holds them;
        ``calibration`` where there are two classes.
    """
    truth, score, task = np.asarray(labels), model.by_row(), model.task
    clusters = None if blocks is None else blocks.clusters
    permuted = permutation_test(truth, score, sites if blocks is None else blocks.runs, seed, headline=_headline(task))
    if hasattr(task, "chance_test"):
        permuted = {"p_within_sites": task.chance_test(truth, score, seed)["p"]}
    figures = model.figures(truth)
    summary: dict[str, Any] = {
        "rows": task.rows,
        "column": task.column,
        "classes": named_classes(task),
        "compared_by": task.selects_by,
        "chance": figures.get("chance", task.chance),
        "figures": figures,
        "intervals": model.intervals(truth, seed, clusters),
        "level": LEVEL_OF_FOLDS if cross_validated else LEVEL,
        "clusters": None if blocks is None else {"n": len(set(blocks.clusters)), "called": blocks.called},
        # Nothing can be permuted inside runs of one class each, so nothing is shown.
        "permutation": permuted if blocks is None else {"p": permuted["p_within_sites"] or 1.0},
        "calibration": calibration(truth, score) if task.kind == "binary" else None,
        "sites": per_site(truth, np.arange(len(truth)), sites, model.figures_of),
        "baselines": {},
    }
    for name, other in baselines.items():
        # A margin is no probability, so what measures probabilities says nothing of it.
        undefined = {"brier"} if BASELINES[name].model == "svm" else set()
        intervals = other.intervals(truth, seed, clusters)
        summary["baselines"][name] = {
            "says": BASELINES[name].says(task.kind, task.column)
            + (", the same for everybody here" if other.blind else ""),
            "blind": other.blind,
            "figures": {key: None if key in undefined else value for key, value in other.figures(truth).items()},
            "intervals": {key: ends for key, ends in intervals.items() if key not in undefined},
            "model_minus_baseline": compare(
                truth, score, other.by_row(), seed, headline=_headline(task), clusters=clusters
            ),
        }
    summary["verdict"] = verdict(summary)
    return summary


def verdict(summary: Mapping[str, Any]) -> str:
    """Say in one or two sentences what the figures allow to be said.

    Parameters
    ----------
    summary
        What `summarise` gathers.
    """
    key, chance, permuted = summary["compared_by"], summary["chance"], summary["permutation"]
    called = _CALLED.get(key, key)
    figures = summary["figures"]
    of = f"{figures['n']} {summary['rows']}" + ("" if chance in (0.0, 0.5) else f"; chance is {chance:.3g}")
    if key not in summary["intervals"]:
        return _without_interval(summary, f"{called} {figures[key]:.2f} ({of})")
    low, high = summary["intervals"][key]
    found = f"{called} {figures[key]:.2f} (95 % interval {low:.2f} to {high:.2f}, {of})"
    level = summary["level"]
    if high < chance:
        return f"{found}: below chance. Where nothing was learned few subjects may give that; look at the labels, too."
    if permuted["p"] >= level or low <= chance:
        nearly = level < LEVEL and permuted["p"] < LEVEL and low > chance
        why = f" (p = {permuted['p']:.3f}, where folds ask for less than {level:g})" if nearly else ""
        return f"{found}: not shown to be better than chance{why}."
    site = summary["baselines"].get("site")
    within = permuted.get("p_within_sites", 0.0)
    beside = f"site alone reaches {called} {site['figures'][key]:.2f}" if site else "labels differ between sites"
    if within is None:
        return f"{found}, but {beside}, and every site has one class: what site explains of it cannot be told."
    if within >= LEVEL:
        inside = f"inside the sites it is not shown to be better than chance (p = {within:.3f})"
        return f"{found}, but {beside}, and {inside}: site may explain the result."
    if within >= level:
        return f"{found}: better than chance, but not surely so inside the sites (p = {within:.3f})."
    if site and site["intervals"][key][0] > chance and not _beaten(site, level):
        return f"{found}, but {beside}, which it does not surely beat: site may explain the result."
    seeing = [entry for entry in summary["baselines"].values() if not entry.get("blind")]
    unbeaten = [
        f"{entry['says']} ({called} {entry['figures'][key]:.2f})" for entry in seeing if not _beaten(entry, level)
    ]
    if unbeaten:
        return f"{found}: better than chance, but not surely better than {'; '.join(unbeaten)}."
    beaten = " and than every baseline" if seeing else ""
    return f"{found}: better than chance{beaten}."


def _beaten(baseline: Mapping[str, Any], level: float) -> bool:
    """Whether the model is surely better: both the interval and the p of the difference must say so."""
    against = baseline["model_minus_baseline"]
    return bool(against["interval"] and against["interval"][0] > 0 and against["p"] < level)


def _without_interval(summary: Mapping[str, Any], found: str) -> str:
    """Say what labels permuted inside runs allow: it is about these people and no others."""
    p, clusters = summary["permutation"]["p"], summary["clusters"]
    few = "there is no interval"
    if clusters and clusters["n"] < FEWEST_CLUSTERS:
        few = f"{clusters['n']} {clusters['called']} are too few for an interval"
    these = clusters["called"] if clusters else summary["rows"]
    if p >= summary["level"]:
        return f"{found}, and {few}: not shown to be better than chance (p = {p:.3f})."
    return (
        f"{found}: better than chance in these {these} ({'p < 0.001' if p < 0.001 else f'p = {p:.3f}'}), but {few}, so "
        "nothing is said of others, nor of which model is better."
    )


def _headline(task: Task) -> Callable[[npt.ArrayLike, npt.ArrayLike], float]:
    """Return what models are compared by: of labels and of scores by row, the mean over repetitions."""
    if task.kind == "binary":
        return auc
    return lambda truth, score: float(
        np.mean([task.headline(truth, one) for one in np.moveaxis(np.asarray(score), 1, 0)])
    )
