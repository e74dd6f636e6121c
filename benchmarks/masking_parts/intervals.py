"""95 % intervals over seeds and over what was measured: clips of held-out frames, or subjects.

Seeds are drawn with replacement, and within each draw clips (run by run) or subjects. Three seeds are few: an interval
over them is too narrow rather than too wide.
"""

from collections.abc import Sequence

import numpy as np

from boldforge.finetune.metrics import auc
from masking_parts.cells import Cell

DRAWS = 2000
Estimate = tuple[float, float, float]
"""A figure and its interval."""


def error_ratios(cells: Sequence[Cell], tested: str, against: Sequence[Cell] | None = None) -> Estimate:
    """Error over that of the mean frame, pooled over clips and seeds; or its difference to other cells', paired.

    Parameters
    ----------
    cells
        One per seed, of one training strategy.
    tested
        Strategy of the masks.
    against
        Of another strategy, the same seeds.
    """
    n_seeds, runs = len(cells), np.array([run for run, _ in cells[0]["clips"]])
    baseline_C = np.array(cells[0]["baseline"][tested])
    errors_SC = np.array([cell["error"][tested] for cell in cells])
    if against is not None:
        errors_SC = errors_SC - np.array([cell["error"][tested] for cell in against])
    generator = np.random.default_rng(0)
    places = [np.flatnonzero(runs == run) for run in np.unique(runs)]
    drawn = []
    for _ in range(DRAWS):
        seeds = generator.integers(n_seeds, size=n_seeds)
        clips = np.concatenate([generator.choice(place, len(place)) for place in places])
        drawn.append(errors_SC[np.ix_(seeds, clips)].sum() / (n_seeds * baseline_C[clips].sum()))
    return _estimate(errors_SC.sum() / (n_seeds * baseline_C.sum()), drawn)


def aucs(cells: Sequence[Cell], kind: str, against: Sequence[Cell] | None = None) -> Estimate:
    """AUC, the mean over seeds and repeats of the folds; or its difference to other cells', paired.

    Parameters
    ----------
    cells
        One per seed, each with a cohort of its own.
    kind
        Which features.
    against
        On the same cohorts.
    """
    generator = np.random.default_rng(0)
    labels = [np.array(cell["labels"]) for cell in cells]

    def figure(seed: int, subjects: np.ndarray) -> float:
        found = _mean_auc(labels[seed], cells[seed]["scores"][kind], subjects)
        return found - _mean_auc(labels[seed], against[seed]["scores"][kind], subjects) if against else found

    drawn = []
    for _ in range(DRAWS // 2):
        parts = []
        for seed in generator.integers(len(cells), size=len(cells)):
            groups = [np.flatnonzero(labels[seed] == label) for label in (0, 1)]
            parts.append(figure(seed, np.concatenate([generator.choice(group, len(group)) for group in groups])))
        drawn.append(np.mean(parts))
    whole = [figure(seed, np.arange(len(labels[seed]))) for seed in range(len(cells))]
    return _estimate(float(np.mean(whole)), drawn)


def _mean_auc(labels: np.ndarray, scores: Sequence[Sequence[float]], subjects: np.ndarray) -> float:
    return float(np.mean([auc(labels[subjects], np.array(row)[subjects]) for row in scores]))


def _estimate(value: float, drawn: Sequence[float]) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value), float(low), float(high)
