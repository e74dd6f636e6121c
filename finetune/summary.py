"""What a cross-validation may say: figures with intervals, beside the baselines, and one honest sentence.

Array suffixes: N subjects · R repetitions of the cross-validation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from boldforge.finetune.baselines import BASELINES
from boldforge.finetune.evaluation import bootstrap_intervals, calibration, compare, per_site, permutation_test
from boldforge.finetune.metrics import binary_metrics

Floats = npt.NDArray[np.float64]


@dataclass
class Scores:
    """One model's test scores, every subject tested once per repetition, and where each fold drew its line.

    ``score_RN`` and ``threshold_RN``; the threshold is the one that the fold's validation subjects chose.
    """

    score_RN: Floats
    threshold_RN: Floats

    @classmethod
    def empty(cls, repeats: int, subjects: int) -> "Scores":
        """Make one to be filled fold by fold."""
        return cls(np.full((repeats, subjects), np.nan), np.full((repeats, subjects), np.nan))

    def put(self, repeat: int, subjects: Sequence[int], scores: npt.ArrayLike, threshold: float) -> None:
        """Enter a fold's test subjects."""
        self.score_RN[repeat, list(subjects)] = scores
        self.threshold_RN[repeat, list(subjects)] = threshold

    def mean(self) -> Floats:
        """Return every subject's mean over repetitions, [N]."""
        return self.score_RN.mean(axis=0)

    def figures(self, labels: npt.ArrayLike) -> dict[str, Any]:
        """Return `binary_metrics` of all subjects, the mean over repetitions."""
        both_NR2 = np.stack([self.score_RN.T, self.threshold_RN.T], axis=-1)
        return _mean_figures(np.asarray(labels), both_NR2)

    def intervals(self, labels: npt.ArrayLike, seed: int) -> dict[str, list[float]]:
        """Return the figures' 95 % intervals over resampled subjects."""
        both_NR2 = np.stack([self.score_RN.T, self.threshold_RN.T], axis=-1)
        return bootstrap_intervals(np.asarray(labels), both_NR2, _mean_figures, seed)


def summarise(
    model: Scores, baselines: Mapping[str, Scores], labels: Sequence[int], sites: Sequence[str | None], seed: int
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

    Returns
    -------
    dict
        ``figures``, ``intervals``, ``permutation``, ``calibration``, ``sites``, ``baselines`` and ``verdict``, as
        ``metrics.json`` holds them.
    """
    truth, score = np.asarray(labels), model.mean()
    summary: dict[str, Any] = {
        "figures": model.figures(truth),
        "intervals": model.intervals(truth, seed),
        "permutation": permutation_test(truth, score, sites, seed),
        "calibration": calibration(truth, score),
        "sites": per_site(truth, score, sites, binary_metrics),
        "baselines": {},
    }
    for name, other in baselines.items():
        summary["baselines"][name] = {
            "says": BASELINES[name].says,
            "figures": other.figures(truth),
            "intervals": other.intervals(truth, seed),
            "model_minus_baseline": compare(truth, score, other.mean(), seed),
        }
    summary["verdict"] = verdict(summary)
    return summary


def verdict(summary: Mapping[str, Any]) -> str:
    """Say in one or two sentences what the figures allow to be said.

    Parameters
    ----------
    summary
        ``figures``, ``intervals``, ``permutation`` and ``baselines`` of `summarise`.
    """
    figures, chance = summary["figures"], summary["permutation"]
    low, high = summary["intervals"]["auc"]
    found = f"AUC {figures['auc']:.2f} (95 % interval {low:.2f} to {high:.2f}, {figures['n']} subjects)"
    if chance["p"] >= 0.05 or low <= 0.5:
        return f"{found}: not told apart from chance."
    site = summary["baselines"].get("site")
    explained = chance["p_within_sites"] >= 0.05
    if explained or (
        site is not None and site["model_minus_baseline"]["interval"][0] <= 0 < site["figures"]["auc"] - 0.5
    ):
        beside = f"site alone reaches AUC {site['figures']['auc']:.2f}" if site else "labels differ between sites"
        if explained:
            return f"{found}, but {beside}, and inside the sites it is at chance: site explains the result."
        if site is not None and site["intervals"]["auc"][0] > 0.5:
            return f"{found}, but {beside}, which it does not surely beat: site may explain the result."
    unbeaten = [
        f"{entry['says']} (AUC {entry['figures']['auc']:.2f})"
        for entry in summary["baselines"].values()
        if entry["model_minus_baseline"]["interval"][0] <= 0
    ]
    if unbeaten:
        return f"{found}: better than chance, but not surely better than {'; '.join(unbeaten)}."
    beaten = " and than every baseline" if summary["baselines"] else ""
    return f"{found}: better than chance{beaten}."


def _mean_figures(truth_N: npt.NDArray[Any], both_NR2: Floats) -> dict[str, Any]:
    per_repeat = [binary_metrics(truth_N, both[:, 0], both[:, 1]) for both in both_NR2.swapaxes(0, 1)]
    return {
        name: value if isinstance(value, int) or value is None else float(np.mean([row[name] for row in per_repeat]))
        for name, value in per_repeat[0].items()
    }
