"""The plain models of a study, measured fold by fold beside what is trained."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.baselines import BASELINES, baseline_scores, baseline_scores_over, tells_apart
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.evaluation import best_threshold
from boldforge.finetune.folds import Fold, inner_folds
from boldforge.finetune.harmonise import can_harmonise
from boldforge.finetune.study import Study
from boldforge.finetune.summary import Scores
from boldforge.finetune.tasks import Task

logger = logging.getLogger(__name__)


def plain_models(study: Study, asked: tuple[str, ...] | None, folds: Sequence[Fold]) -> tuple[str, ...]:
    """Return the names of the baselines: those asked for, or else the task's own.

    Those that would harmonise sites are left out, with a warning, where no fold's training subjects allow it: they
    would be the plain ones under another name.
    """
    if asked is not None:
        return _harmonising(study, asked, folds)
    return study.task.baselines if study.config.images is None else ("site", "demographics", "volume")


def _harmonising(study: Study, asked: tuple[str, ...], folds: Sequence[Fold]) -> tuple[str, ...]:
    named = [name for name in asked if BASELINES[name].harmonised]
    if not named:
        return asked
    sites = [row.site for row in study.cohort.subjects]
    able = sum(can_harmonise([sites[row] for row in study.positions(fold.train)]) for fold in folds)
    if able == len(folds):
        return asked
    told = "harmonising takes two sites with three training subjects each"
    if able:
        logger.warning(
            "%s, and %d of %d folds have them; in the others nothing is harmonised (%s).",
            told,
            able,
            len(folds),
            ", ".join(named),
        )
        return asked
    logger.warning("%s, and no fold has them: %s left out; set folds higher.", told, " and ".join(named))
    return tuple(name for name in asked if name not in named)


def threshold_of(task: Task, labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> float:
    """Return the threshold that validation subjects choose; 0.5 where there are not two classes."""
    return best_threshold(labels, scores) if task.kind == "binary" else 0.5


class Beside:
    """Baselines in the folds of a study.

    Parameters
    ----------
    study
        Whose rows.
    names
        Keys of `BASELINES`.
    repeats
        Of the cross-validation.
    anew
        See `baseline_scores`.
    """

    def __init__(self, study: Study, names: Sequence[str], repeats: int = 1, anew: bool = False) -> None:
        rows = study.cohort.subjects
        self.scores = {name: Scores.empty(study.task, repeats, len(rows)) for name in names}
        self._study, self._anew = study, anew
        self._inner_folds: int = getattr(study.config, "inner_folds", 1)
        self._labels, self._sites = [row.label for row in rows], [row.site for row in rows]
        self._features: dict[str, npt.NDArray[Any]] = {}

    def read(self, advance: Callable[[], None], clips: Callable[[], tuple[ClipSet, AdapterConfig]]) -> None:
        """Compute the features of every row.

        Parameters
        ----------
        advance
            Called after each.
        clips
            Called where a baseline reads embeddings; returns every row's clips and the adapter they were gathered for.
        """
        kinds = {BASELINES[name].features for name in self.scores}
        self._features = self._study.features(sorted(kinds - {"embedding"}), advance)
        if "embedding" in kinds:
            self._features["embedding"] = self._study.embeddings(*clips())
        for name, kept in self.scores.items():
            kept.blind = not tells_apart(name, self._features[BASELINES[name].features])

    def run(self, fold: Fold, repeat: int = 0) -> None:
        """Fit all of them on a fold, or on its inner folds as a search does, and enter its test rows' scores."""
        if self._inner_folds > 1:
            self._run_inner(fold, repeat)
            return
        study = self._study
        train, validation, test = (study.positions(part) for part in (fold.train, fold.validation, fold.test))
        for name, kept in self.scores.items():
            rows = self._features[BASELINES[name].features]
            checked, tested = baseline_scores(
                name, study.task, rows, self._labels, train, validation, test, self._sites, self._anew
            )
            line = threshold_of(study.task, np.asarray(self._labels)[validation], checked)
            kept.put(repeat, test, tested, line)

    def _run_inner(self, fold: Fold, repeat: int) -> None:
        study, labels = self._study, np.asarray(self._labels)
        test = study.positions(fold.test)
        splits = [
            (study.positions(part.train), study.positions(part.validation))
            for part in inner_folds(fold, self._inner_folds)
        ]
        validating = [i for _, validation in splits for i in validation]
        for name, kept in self.scores.items():
            rows = self._features[BASELINES[name].features]
            checked, tested = baseline_scores_over(name, study.task, rows, self._labels, splits, test, self._sites)
            kept.put(repeat, test, tested, threshold_of(study.task, labels[validating], checked))


def beside_chosen(
    study: Study,
    folds: Sequence[Fold],
    asked: tuple[str, ...] | None,
    scratch: Path,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Measure baselines beside what a search has chosen: like that, fitted anew on all subjects but those of the test.

    Everybody's scans are read for it, so it comes after the choice.

    Parameters
    ----------
    study
        Whose rows.
    folds
        Those with a test.
    asked
        See `plain_models`.
    scratch
        Folder for clips, where a baseline reads embeddings.
    advance
        Called after each subject.
    """
    beside = Beside(study, plain_models(study, asked, folds), anew=True)
    alone = study.lifted(AdapterConfig(kind="probe"))
    beside.read(advance, lambda: (study.gather(study.cohort.subjects, scratch / "beside", adapter=alone), alone))
    for fold in folds:
        beside.run(fold)
    return beside.scores
