"""Adapt an encoder to a task and measure it on subjects it has not seen: ``boldforge finetune``."""

import logging
import statistics
from collections.abc import Callable
from typing import Any

from boldforge.finetune.classifier import Classifier, save_adapter
from boldforge.finetune.cohort import ClipSet, OnProgress
from boldforge.finetune.fit import fit, predict_subjects
from boldforge.finetune.folds import Fold
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.results import Prediction, count_classes, write_json, write_predictions
from boldforge.finetune.study import Study, StudyConfig, open_study

logger = logging.getLogger(__name__)


class FinetuneConfig(StudyConfig):
    """A cross-validated fine-tuning: ``folds`` outer folds, every subject tested once."""


def finetune(config: FinetuneConfig, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Cross-validate an adapter, then train it on all subjects.

    In every outer fold the validation subjects choose the epoch and the test subjects are scored once, by the mean over
    their clips. The adapter that is written is trained on all labelled subjects for the median of the epochs that
    the folds chose; the figures are those of the folds, which estimate how the same procedure does on new subjects.

    Parameters
    ----------
    config
        The recipe.
    on_progress
        Called with clip passes done and the most there can be.

    Returns
    -------
    dict
        The content of ``metrics.json``. ``figures`` pools all test subjects; ``folds`` has each fold's own.

    Raises
    ------
    BoldForgeError
        If shards, backbone and task do not fit together, or there are too few subjects.
    """
    study = open_study(config)
    subjects = study.cohort.subjects
    passes = sum(len(fold.train) for fold in study.folds) + len(subjects)
    bar = _Progress(on_progress, config.clips * (len(subjects) + config.training.epochs * passes))
    predictions: list[Prediction] = []
    per_fold: list[dict[str, Any]] = []
    with study.claim_out("fine-tuning") as scratch:
        clips = study.gather(subjects, scratch, lambda done, total: bar.add(1))
        for number, fold in enumerate(study.folds, start=1):
            classifier = study.classifier(config.adapter)
            scores, described = _run_fold(study, classifier, clips, fold, bar.add)
            predictions += [Prediction(subjects[i], score, number) for i, score in scores]
            per_fold.append({"fold": number, **described})
            logger.info("fold %d of %d: %s", number, len(study.folds), described["figures"])
        epochs = round(statistics.median(fold["best_epoch"] for fold in per_fold))
        final = study.classifier(config.adapter)
        for _ in fit(final, clips, None, config.training, epochs, config.seed):
            bar.add(len(clips))
        bar.finish()
        return _write(study, predictions, per_fold, final, epochs)


class _Progress:
    """Counts clip passes, so that reading, training and skipped epochs move one bar at one pace."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress = on_progress
        self._total = total
        self._done = 0

    def add(self, clips: int) -> None:
        self._done = min(self._done + clips, self._total)
        if self._on_progress:
            self._on_progress(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total - self._done)


def _run_fold(
    study: Study, classifier: Classifier, clips: ClipSet, fold: Fold, advance: Callable[[int], None]
) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """Train on the fold's training subjects, keep the validation's best epoch, score the test subjects once."""
    train, validation, test = (study.positions(part) for part in (fold.train, fold.validation, fold.test))
    train_clips, training, seed = clips.select(train), study.config.training, study.config.seed
    best, best_state = None, classifier.state()
    last = 0
    for epoch in fit(classifier, train_clips, clips.select(validation), training, training.epochs, seed):
        advance(len(train_clips))
        last = epoch.number
        if epoch.improved:
            best, best_state = epoch, classifier.state()
        elif best is not None and epoch.number - best.number >= training.patience:
            break
    advance((training.epochs - last) * len(train_clips))
    assert best is not None, "the first epoch always improves"
    classifier.load_state(best_state)
    test_clips = clips.select(test)
    scores = predict_subjects(classifier, test_clips, training.batch_size)
    described = {
        "figures": classifier.task.metrics(test_clips.labels.tolist(), scores),
        "validation": best.figures,
        "best_epoch": best.number,
        "epochs": last,
        "n_train": len(train),
        "n_validation": len(validation),
        "n_test": len(test),
    }
    return list(zip(test, scores, strict=True)), described


def _write(
    study: Study, predictions: list[Prediction], per_fold: list[dict[str, Any]], final: Classifier, epochs: int
) -> dict[str, Any]:
    config, cohort = study.config, study.cohort
    labels = [prediction.subject.label for prediction in predictions]
    scores = [prediction.score for prediction in predictions]
    figures = study.task.metrics(labels, scores)
    results = {
        "task": study.task.name,
        "simulated": cohort.simulated,
        "pretrained_on_these_shards": study.pretrained_on_these_shards,
        "measured_by": f"{config.folds}-fold cross-validation over subjects",
        "figures": figures,
        "roc": roc_points(labels, scores),
        "folds": per_fold,
        "subjects": count_classes(cohort.subjects),
        "n_unlabelled": cohort.n_unlabelled,
        "n_too_short": cohort.n_too_short,
        "trainable_parameters": final.trainable,
        "total_parameters": final.total,
        "epochs_of_adapter": epochs,
        "settings": config.model_dump(mode="json"),
    }
    kept = ("figures", "measured_by", "simulated", "pretrained_on_these_shards", "subjects")
    shared = {key: results[key] for key in kept}
    save_adapter(final, config.out / "adapter", {**shared, "clips_per_subject": config.clips})
    write_predictions(config.out / "predictions.tsv", predictions, config.seed)
    write_json(config.out / "metrics.json", results)
    return results
