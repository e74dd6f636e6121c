"""ComBat: take the sites' own means and spreads out of features, as estimated from training subjects alone.

Johnson et al. 2007; Fortin et al. 2018, NeuroImage 167; Pomponio et al. 2020, NeuroImage 208, whose package does it.
"""

import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from boldforge.finetune.errors import FinetuneError

logger = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
_PACKAGES = ("neuroHarmonize", "neuroCombat", "statsmodels")
_FEWEST = 3


def check_installed() -> None:
    """Make sure that the packages are there.

    Raises
    ------
    FinetuneError
        Naming what is missing and how to get it.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FinetuneError(
            f"harmonising sites needs {' and '.join(missing)}, not installed here; run pip install "
            "boldforge[harmonise], or take the baselines that end in +combat out."
        )


def can_harmonise(sites: Sequence[str | None]) -> bool:
    """Whether two sites have as many training subjects as their effects take to be estimated; one site per subject."""
    counts = Counter(site or "" for site in sites)
    return sum(count >= _FEWEST for count in counts.values()) >= 2


class ComBat:
    """Site effects estimated from some rows, to be taken out of these and of others.

    A site with fewer than three rows, and features that do not vary inside every site, cannot be estimated and stay as
    they are; so do rows of sites that were not among those estimated. No covariate is kept: diagnosis is what is to be
    found, so it may not be told to the harmonisation.

    Parameters
    ----------
    rows
        float [N, C], of training subjects alone.
    sites
        One per row, None where unknown.
    """

    def __init__(self, rows: npt.ArrayLike, sites: Sequence[str | None]) -> None:
        check_installed()
        values, names = np.asarray(rows, dtype=np.float64), np.array([site or "" for site in sites])
        found, counts = np.unique(names, return_counts=True)
        self.sites = tuple(str(site) for site in found[counts >= _FEWEST])
        self._features: npt.NDArray[np.bool_] = np.zeros(values.shape[1], dtype=bool)
        self._model: Any = None
        if len(self.sites) < 2:
            logger.info(
                "%d of the %d sites of these %d training subjects have %d of them, and harmonising takes two that do: "
                "nothing is harmonised in this fold.",
                len(self.sites),
                len(found),
                len(names),
                _FEWEST,
            )
            return
        kept = np.isin(names, self.sites)
        spread = np.stack([values[names == site].std(axis=0) for site in self.sites])
        self._features = np.asarray((spread > 1e-9 * max(float(spread.max()), 1e-30)).all(axis=0))
        if self._features.any():
            # A seed is not used, but without one the package would seed numpy's global generator anew.
            with _quiet():
                from neuroHarmonize import harmonizationLearn

                self._model, _ = harmonizationLearn(values[kept][:, self._features], _table(names[kept]), seed=0)

    def apply(self, rows: npt.ArrayLike, sites: Sequence[str | None]) -> Floats:
        """Return rows [N, C] without the effects of their sites."""
        values, names = np.array(rows, dtype=np.float64), np.array([site or "" for site in sites])
        known = np.isin(names, self.sites)
        if self._model is None or not known.any():
            return values
        with _quiet():
            from neuroHarmonize import harmonizationApply

            # The package mistakes one site for another unless all of them are there.
            none = np.zeros((len(self.sites), self._features.sum()))
            filled = np.concatenate([none, values[known][:, self._features]])
            table = _table(np.concatenate([self.sites, names[known]]))
            inside = harmonizationApply(filled, table, self._model)[len(self.sites) :]
        values[np.ix_(known, self._features)] = inside
        if not known.all():
            logger.info("%d of %d rows are of sites too small or new to be harmonised", (~known).sum(), len(known))
        return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Pass over that the package uses numpy's matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        yield


def _table(sites: npt.NDArray[Any]) -> Any:
    import pandas as pd

    return pd.DataFrame({"SITE": sites.astype(object)})
