"""95 % intervals over seeds and over what was measured: clips of held-out frames, or subjects.

Seeds are drawn with replacement, and within each draw clips (run by run) or subjects. Three seeds are few: an interval
over them is too narrow rather than too wide.
"""

from collections.abc import Sequence

import numpy as np

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
    seeds_DS = generator.integers(n_seeds, size=(DRAWS, n_seeds))
    clips_DC = np.concatenate([generator.choice(place, (DRAWS, len(place))) for place in places], axis=1)
    drawn_D = errors_SC[seeds_DS[:, :, None], clips_DC[:, None, :]].sum((1, 2)) / baseline_C[clips_DC].sum(1) / n_seeds
    return _estimate(errors_SC.sum() / (n_seeds * baseline_C.sum()), drawn_D)


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
    wins = [_wins(cell["labels"], cell["scores"][kind]) for cell in cells]
    if against is not None:
        others = [_wins(cell["labels"], cell["scores"][kind]) for cell in against]
        wins = [own_PN - other_PN for own_PN, other_PN in zip(wins, others, strict=True)]
    # A seed that is drawn twice is there with other subjects each time.
    resampled_KSD = np.array([[_resampled(generator, wins_PN) for wins_PN in wins] for _ in cells])
    seeds_DK = generator.integers(len(cells), size=(DRAWS, len(cells)))
    drawn_DK = resampled_KSD[np.arange(len(cells)), seeds_DK, np.arange(DRAWS)[:, None]]
    return _estimate(float(np.mean([wins_PN.mean() for wins_PN in wins])), drawn_DK.mean(axis=1))


def _wins(labels: Sequence[int], scores: Sequence[Sequence[float]]) -> np.ndarray:
    """How often each positive subject scores above each negative one, a tie being half; their mean is the AUC."""
    positive = np.array(labels) == 1
    above = [np.sign(np.subtract.outer(row[positive], row[~positive])) for row in np.array(scores)]
    return np.mean(above, axis=0) / 2 + 0.5


def _resampled(generator: np.random.Generator, wins_PN: np.ndarray) -> np.ndarray:
    """Return the mean [D] with subjects drawn with replacement, the positive and the negative ones apart."""
    times_DP, times_DN = (generator.multinomial(n, np.full(n, 1 / n), DRAWS) for n in wins_PN.shape)
    return np.asarray(((times_DP @ wins_PN) * times_DN).sum(1) / wins_PN.size)


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(value), float(low), float(high)
