"""Search over LoRA ranks; the best by validation AUC is tested once: ``boldforge sweep``."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator

from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.classifier import Classifier, save_adapter
from boldforge.finetune.cohort import ClipSet, OnProgress, Subject
from boldforge.finetune.evaluation import best_threshold, bootstrap_intervals
from boldforge.finetune.fit import TrainingConfig, predict_subjects
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.networks import BackboneSpec
from boldforge.finetune.ray_driver import AshaConfig, TrialResult, run_on_ray
from boldforge.finetune.results import Prediction, write_json, write_predictions, write_table
from boldforge.finetune.study import Study, StudyConfig, open_study
from boldforge.finetune.tasks import describe_labels
from boldforge.finetune.trial import TrialSpec

logger = logging.getLogger(__name__)


class SweepConfig(StudyConfig):
    """A sweep: one split of the subjects, one trial per rank, ASHA stops the ones that fall behind."""

    ranks: tuple[int, ...] = Field(
        (2, 4, 8), min_length=1, description="LoRA ranks to try, one trial each; 0 is the head alone."
    )
    grace: int = Field(3, ge=1, description="Epochs that every trial may train before ASHA compares it.")
    reduction: int = Field(2, ge=2, description="At every rung ASHA lets the best 1/reduction of the trials go on.")
    concurrency: int = Field(2, ge=1, description="Trials at a time.")
    cpus: int = Field(1, ge=1, description="CPU threads per trial.")
    gpus: float = Field(
        0.0, ge=0, description="GPUs per trial; a fraction lets trials share one, 0 trains them on CPU threads."
    )

    @field_validator("backbone")
    @classmethod
    def _pretrained(cls, backbone: BackboneSpec) -> BackboneSpec:
        if not isinstance(backbone, Path):
            raise ValueError("a sweep over LoRA ranks adapts pretrained weights; give their folder")
        return backbone

    @field_validator("adapter")
    @classmethod
    def _no_rank(cls, adapter: AdapterConfig) -> AdapterConfig:
        if "rank" in adapter.model_fields_set:
            raise ValueError("a sweep tries several ranks, so adapter.rank has no meaning; remove it and set ranks")
        return adapter

    @field_validator("training")
    @classmethod
    def _no_patience(cls, training: TrainingConfig) -> TrainingConfig:
        if "patience" in training.model_fields_set:
            raise ValueError(
                "in a sweep ASHA stops trials, so training.patience has no meaning; remove it and set grace instead"
            )
        return training

    @field_validator("ranks")
    @classmethod
    def _each_once(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ranks)) != len(ranks) or min(ranks) < 0 or max(ranks) > 256:
            raise ValueError("ranks must differ and lie between 0 and 256")
        return ranks


def sweep(config: SweepConfig, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Train one adapter per rank, choose by validation AUC (ties: the lower rank), and test the chosen one once.

    Trials get a folder that holds training and validation subjects only; the test subjects' clips and labels are read
    after the choice is made. A trial's own curve is a pure function of the config; which of the trials behind the best
    ASHA stops first depends on which finishes an epoch first.

    Parameters
    ----------
    config
        The recipe.
    on_progress
        Called with clips read and epochs done (each counted in clips), and the most there can be.

    Returns
    -------
    dict
        The content of ``sweep.json``.

    Raises
    ------
    BoldForgeError
        If shards, backbone and task do not fit together, there are too few subjects, or a trial fails.
    """
    study = open_study(config)
    if not config.gpus and torch.cuda.is_available():
        logger.warning("There is a GPU, but gpus=0 trains the trials on CPU threads; gpus=0.5 lets two share it.")
    fold = study.folds[0]
    parts = {
        name: [study.cohort.subjects[i] for i in study.positions(subjects)]
        for name, subjects in (("train", fold.train), ("validation", fold.validation), ("test", fold.test))
    }
    seen = parts["train"] + parts["validation"]
    reading, epoch_size = len(seen) * config.clips, len(parts["train"]) * config.clips
    total = reading + epoch_size * config.training.epochs * len(config.ranks)
    done = dict.fromkeys(config.ranks, 0)

    def on_epoch(rank: int, epoch: int) -> None:
        done[rank] = epoch
        if on_progress:
            on_progress(reading + epoch_size * sum(done.values()), total)

    with study.claim_out("running a sweep") as folder:
        study.gather(seen, folder / "seen", on_progress and (lambda read, _: on_progress(read, total)))
        spec = _trial_spec(config, study.task.classes, folder / "seen", len(parts["train"]), len(seen))
        asha = AshaConfig(
            study.task.selects_by, config.grace, config.reduction, config.concurrency, config.cpus, config.gpus
        )
        trials = run_on_ray(spec, config.ranks, asha, folder / "ray", on_epoch)
        best = _choose(trials, study.task.selects_by)
        classifier = study.classifier(config.adapter.model_copy(update={"rank": best.rank}))
        classifier.load_state(best.state)
        validation = ClipSet.load(folder / "seen").select(range(len(parts["train"]), len(seen)))
        checked = predict_subjects(classifier, validation, config.training.batch_size)
        threshold = best_threshold(validation.labels, checked) if study.task.kind == "binary" else 0.5
        clips = study.gather(parts["test"], folder / "unseen")
        scores = predict_subjects(classifier, clips, config.training.batch_size)
        if on_progress:
            on_progress(total, total)
        return _write(study, config, parts, trials, best, classifier, scores, threshold)


def _trial_spec(config: SweepConfig, classes: tuple[str, ...], clips: Path, n_train: int, n_seen: int) -> TrialSpec:
    assert isinstance(config.backbone, Path)
    return TrialSpec(
        backbone=config.backbone.resolve(),
        pool=config.pool,
        task=config.task,
        classes=classes,
        clips=clips.resolve(),
        train=tuple(range(n_train)),
        validation=tuple(range(n_train, n_seen)),
        adapter=config.adapter,
        training=config.training,
        seed=config.seed,
        threads=config.cpus,
        device="cuda" if config.gpus else "cpu",
    )


def _best_epoch(trial: TrialResult) -> dict[str, Any]:
    return next(epoch for epoch in reversed(trial.history) if epoch["improved"])


def _choose(trials: Sequence[TrialResult], figure: str) -> TrialResult:
    return max(trials, key=lambda trial: (_best_epoch(trial)[figure], -trial.rank))


def _write(
    study: Study,
    config: SweepConfig,
    parts: dict[str, list[Subject]],
    trials: list[TrialResult],
    best: TrialResult,
    classifier: Classifier,
    scores: np.ndarray,
    threshold: float,
) -> dict[str, Any]:
    figure = study.task.selects_by
    labels = [subject.label for subject in parts["test"]]
    figures = study.task.metrics(labels, scores, threshold)
    rows = [_row(trial, figure, config.training.epochs) for trial in trials]
    shared: dict[str, Any] = {
        "task": study.task.name,
        "simulated": study.cohort.simulated,
        "pretrained_on_these_shards": study.pretrained_on_these_shards,
        "measured_by": "test subjects held out of a sweep, scored once",
        "figures": figures,
        "intervals": bootstrap_intervals(
            labels, scores, lambda truth, score: study.task.metrics(truth, score, threshold), config.seed
        ),
        "threshold": threshold,
        "subjects": {
            name: describe_labels(study.task, [subject.label for subject in subjects])
            for name, subjects in parts.items()
        },
    }
    chosen = next(row for row in rows if row["rank"] == best.rank)
    results = {
        **shared,
        "sentence": _sentence(rows, chosen, figures, shared["intervals"], parts, study),
        "best": chosen,
        "trials": rows,
        "roc": roc_points(labels, scores) if study.task.kind == "binary" else None,
        "n_unlabelled": study.cohort.n_unlabelled,
        "n_too_short": study.cohort.n_too_short,
        "n_duplicates": study.cohort.n_duplicates,
        "selected_by": f"validation {figure}, ties to the lower rank",
        "settings": config.model_dump(mode="json", exclude={"adapter": {"rank"}, "training": {"patience"}}),
    }
    folder = config.out / "best"
    save_adapter(classifier, folder / "adapter", {**shared, "clips_per_subject": config.clips})
    line = threshold if study.task.kind == "binary" else None
    predictions = [Prediction(subject, score, line, 1) for subject, score in zip(parts["test"], scores, strict=True)]
    write_predictions(folder / "predictions.tsv", predictions, study.task.classes, config.seed)
    own = {"roc": results["roc"], "adapter_rank": best.rank, "trainable_parameters": classifier.trainable}
    write_json(folder / "metrics.json", {**shared, **own, "total_parameters": classifier.total})
    columns = [name for name in rows[0] if not name.endswith("_by_epoch")]
    write_table(config.out / "trials.tsv", columns, [[row[name] for name in columns] for row in rows])
    write_json(config.out / "sweep.json", results)
    return results


def _row(trial: TrialResult, figure: str, epochs: int) -> dict[str, Any]:
    best = _best_epoch(trial)
    return {
        "rank": trial.rank,
        "trainable_parameters": best["trainable_parameters"],
        "total_parameters": best["total_parameters"],
        "epochs": len(trial.history),
        "stopped_early": len(trial.history) < epochs,
        "best_epoch": best["epoch"],
        f"validation_{figure}": best[figure],
        "validation_loss": best["validation_loss"],
        f"validation_{figure}_by_epoch": [epoch[figure] for epoch in trial.history],
        "train_loss_by_epoch": [epoch["train_loss"] for epoch in trial.history],
    }


def _sentence(
    rows: list[dict[str, Any]],
    chosen: dict[str, Any],
    figures: dict[str, Any],
    intervals: dict[str, list[float]],
    parts: dict[str, list[Subject]],
    study: Study,
) -> str:
    figure = study.task.selects_by
    low, high = intervals[figure]
    interval = f" (95 % interval {low:.2f} to {high:.2f})"
    called = {"auc": "AUC", "r2": "R²"}.get(figure, figure)
    beside = f" and its balanced accuracy {figures['balanced_accuracy']:.2f}" if "balanced_accuracy" in figures else ""
    ranks = ", ".join(str(row["rank"]) for row in rows)
    sentence = (
        f"Of the LoRA ranks {ranks}, rank {chosen['rank']} had the highest validation {called} "
        f"({chosen[f'validation_{figure}']:.2f}, {len(parts['validation'])} subjects); tested once on "
        f"{len(parts['test'])} subjects that no trial has seen, "
        f"its {called} is {figures[figure]:.2f}{interval}{beside}."
    )
    if study.pretrained_on_these_shards:
        sentence += (
            " The encoder was pretrained on these same shards, so it has seen those subjects' scans, unlabelled."
        )
    return sentence + (" The subjects are simulated." if study.cohort.simulated else "")
