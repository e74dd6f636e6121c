"""What a sweep found: the choice, the table of trials, and the chosen one's figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boldforge.configs import count_of
from boldforge.finetune.classifier import Classifier, save_adapter
from boldforge.finetune.cohort import Subject
from boldforge.finetune.intervals import mean_auc_interval
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.results import Prediction, write_json, write_predictions, write_table
from boldforge.finetune.study import Study
from boldforge.finetune.summary import Scores, summarise
from boldforge.finetune.sweep_journal import SweepError
from boldforge.finetune.sweep_rungs import Curve, Trial
from boldforge.finetune.tasks import describe_labels, named_classes
from boldforge.finetune.trial import has_diverged


@dataclass(frozen=True)
class TrialResult:
    """A trial and what it recorded epoch by epoch."""

    trial: Trial
    curve: Curve


@dataclass(frozen=True)
class Tested:
    """The chosen trial's classifier, trained anew, its scores on the test, and the threshold from validation."""

    classifier: Classifier
    scores: np.ndarray
    threshold: float


def choose(trials: Sequence[TrialResult], figure: str) -> TrialResult:
    """Return the trial with the highest figure in any epoch; ties go to the lower rank, then to the lower trial id.

    Raises
    ------
    SweepError
        If all trials have diverged.
    """
    left = [trial for trial in trials if not has_diverged(trial.curve)]
    if not left:
        raise SweepError(
            f"all {len(trials)} trials diverged: their training loss did not stay finite; set training.lr, space.lr or "
            "training.head_lr lower."
        )
    return max(left, key=lambda t: (best_epoch(t)[figure], -t.trial.values["rank"], -t.trial.number))


def write_results(
    study: Study,
    settings: dict[str, Any],
    parts: dict[str, list[Subject]],
    validating: Sequence[Sequence[Subject]],
    trials: Sequence[TrialResult],
    best: TrialResult,
    tested: Tested,
    scratch: Path,
    baselines: Mapping[str, Scores] | None = None,
    outer_fold: int | None = None,
) -> dict[str, Any]:
    """Write ``best/``, ``trials.tsv`` and, last, ``sweep.json``, whose content is returned.

    ``validating``: who validates, in every inner fold. Where there are several, ``train`` of the result's subjects
    counts all who are not tested, and ``validation`` those of them who validate in one of the folds. ``baselines`` are
    their scores on the same test subjects; None leaves all comparison out. ``outer_fold``: number from 1 of the fold of
    a nested search whose winner this is; its adapter says so.
    """
    config, classifier, scores, threshold = study.config, tested.classifier, tested.scores, tested.threshold
    figure = study.task.selects_by
    labels = [subject.label for subject in parts["test"]]
    summary = _summarise(study, parts["test"], tested, baselines)
    figures = summary["figures"]
    rows = [_row(trial, figure, study, validating) for trial in trials]
    inner = len(validating)
    averaged = f", mean of {inner} inner folds" if inner > 1 else ""
    if inner > 1:
        parts = {
            "train": parts["train"] + parts["validation"],
            "validation": [subject for part in validating for subject in part],
            "test": parts["test"],
        }
    shared = _shared(study, parts, inner, summary, threshold)
    chosen = next(row for row in rows if row["trial"] == best.trial.number)
    results = {
        **shared,
        **summary,
        "sentence": _sentence(rows, chosen, best.trial, figures, shared["intervals"], parts, study),
        "best": chosen,
        "trials": rows,
        "roc": roc_points(labels, scores) if study.task.kind == "binary" else None,
        "n_unlabelled": study.cohort.n_unlabelled,
        "n_too_short": study.cohort.n_too_short,
        "n_duplicates": study.cohort.n_duplicates,
        "n_repeated": study.cohort.n_repeated,
        "n_several_sites": study.cohort.n_several_sites,
        "selected_by": f"validation {figure}{averaged}, ties to the lower rank",
        "settings": settings,
    }
    folder = config.out / "best"
    # By the hash an attribution knows whom the adapter has seen.
    about = {"clips_per_subject": config.clips, "shards_hash": study.manifest.content_hash}
    about |= {"sentence": results["sentence"]} | ({} if outer_fold is None else {"outer_fold": outer_fold})
    save_adapter(classifier, folder / "adapter", {**shared, **about})
    line = threshold if study.task.kind == "binary" else None
    predictions = [Prediction(subject, score, line, 1) for subject, score in zip(parts["test"], scores, strict=True)]
    write_predictions(folder / "predictions.tsv", predictions, study.task.classes, study.called)
    own = {
        "roc": results["roc"],
        "adapter_rank": best.trial.values["rank"],
        "trainable_parameters": classifier.trainable,
    }
    write_json(folder / "metrics.json", {**shared, **summary, **own, "total_parameters": classifier.total})
    columns = [name for name in rows[0] if name != "name" and not name.endswith(("_by_epoch", "_interval", "_by_fold"))]
    write_table(config.out / "trials.tsv", columns, [[_cell(row[name]) for name in columns] for row in rows])
    write_json(scratch / "sweep.json", results)
    (scratch / "sweep.json").replace(config.out / "sweep.json")
    return results


def _shared(
    study: Study, parts: Mapping[str, Sequence[Subject]], inner: int, summary: Mapping[str, Any], threshold: float
) -> dict[str, Any]:
    """Return what all files of a sweep say."""
    return {
        "task": study.task.name,
        "column": study.task.column,
        "classes": named_classes(study.task),
        "compared_by": study.task.selects_by,
        "simulated": study.cohort.simulated,
        "pretrained_on_these_shards": study.pretrained_on_these_shards,
        "measured_by": (
            "test subjects held out of a sweep, scored once"
            if inner == 1
            else f"test subjects held out of a sweep that chose by the mean of {inner} inner folds, scored once"
        ),
        **({"inner_folds": inner} if inner > 1 else {}),
        **{name: summary[name] for name in ("figures", "intervals", "rows", "baselines", "verdict") if name in summary},
        "threshold": threshold,
        "subjects": {
            name: describe_labels(study.task, [subject.label for subject in subjects])
            for name, subjects in parts.items()
        },
    }


def _summarise(
    study: Study, test: Sequence[Subject], tested: Tested, baselines: Mapping[str, Scores] | None
) -> dict[str, Any]:
    """Return the figures of the chosen one with intervals and, where there are baselines, all that stands beside."""
    labels, seed = [subject.label for subject in test], study.config.seed
    model = Scores.empty(study.task, 1, len(test))
    model.put(0, range(len(test)), tested.scores, tested.threshold)
    if baselines is None:
        return {"figures": model.figures(labels), "intervals": model.intervals(labels, seed)}
    return summarise(model, baselines, labels, [subject.site for subject in test], seed, cross_validated=False)


def best_epoch(trial: TrialResult) -> dict[str, Any]:
    """Return what a trial recorded of its best epoch; nothing where it has none."""
    return next((epoch for epoch in reversed(trial.curve) if epoch.get("improved")), {})


def _row(result: TrialResult, figure: str, study: Study, validating: Sequence[Sequence[Subject]]) -> dict[str, Any]:
    adapter, training, values = study.config.adapter, study.config.training, result.trial.values
    best, curve = best_epoch(result), [epoch for epoch in result.curve if "diverged" not in epoch]
    return {
        "rank": values["rank"],
        "trainable_parameters": result.curve[-1]["trainable_parameters"],
        "total_parameters": result.curve[-1]["total_parameters"],
        "epochs": len(curve),
        "stopped_early": len(curve) < training.epochs,
        "best_epoch": best.get("epoch"),
        f"validation_{figure}": best.get(figure),
        "validation_loss": best.get("validation_loss"),
        "trial": result.trial.number,
        "name": result.trial.name,
        "alpha": values.get("alpha", adapter.alpha if adapter.alpha is not None else 2.0 * values["rank"]),
        "dropout": values.get("dropout", adapter.dropout),
        "targets": values.get("targets", list(adapter.targets)),
        "lr": values.get("lr", training.lr),
        "head_lr": values.get("head_lr", training.head_lr),
        "weight_decay": values.get("weight_decay", training.weight_decay),
        "diverged": has_diverged(result.curve),
        **_of_inner_folds(best, figure, validating),
        **_interval(best, figure, study, validating),
        f"validation_{figure}_by_epoch": [epoch[figure] for epoch in curve],
        "train_loss_by_epoch": [epoch["train_loss"] for epoch in curve],
    }


def _of_inner_folds(best: dict[str, Any], figure: str, validating: Sequence[Sequence[Subject]]) -> dict[str, Any]:
    """Say how many inner folds a trial's figures are the mean of, and how many subjects these count."""
    if len(validating) == 1:
        return {}
    return {
        "inner_folds": len(validating),
        "validation_subjects": sum(map(len, validating)),
        f"validation_{figure}_by_fold": best.get(f"{figure}_by_fold"),
    }


def _interval(
    best: dict[str, Any], figure: str, study: Study, validating: Sequence[Sequence[Subject]]
) -> dict[str, Any]:
    if study.task.kind != "binary":
        return {}
    positive = [sum(subject.label == 1 for subject in part) for part in validating]
    sizes = [(n, len(part) - n) for n, part in zip(positive, validating, strict=True)]
    return {f"validation_{figure}_interval": mean_auc_interval(best[figure], sizes) if best else None}


def _cell(value: object) -> object:
    return "+".join(value) if isinstance(value, list) else value


def _sentence(
    rows: list[dict[str, Any]],
    chosen: dict[str, Any],
    trial: Trial,
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
    ranks = sorted({row["rank"] for row in rows})
    if len(ranks) == len(rows):
        among = f"Of the LoRA ranks {', '.join(str(row['rank']) for row in rows)}, rank {chosen['rank']}"
    else:
        among = (
            f"Of {len(rows)} trials at LoRA ranks from {ranks[0]} to {ranks[-1]}, trial {trial.number} ({trial.name})"
        )
    n, folds = len(parts["validation"]), chosen.get("inner_folds", 1)
    counted, seen = f"{n} subjects", "these and the training subjects"
    if folds > 1:
        counted = f"the mean of {folds} inner folds, in which {n} subjects validated once each"
        seen = "these" if n == len(parts["train"]) else f"all {len(parts['train'])} who are not tested"
    key = f"validation_{figure}"
    tied = sum(row[key] == chosen[key] for row in rows) - 1
    shared = f", as had {count_of(tied, 'other')} (ties go to the lower rank)" if tied else ""
    sentence = (
        f"{among} had the highest validation {called}{shared} "
        f"({chosen[f'validation_{figure}']:.2f}, {counted}); "
        f"trained anew on {seen} for "
        f"{chosen['best_epoch']} epoch{'' if chosen['best_epoch'] == 1 else 's'} and tested once on "
        f"{len(parts['test'])} subjects that no trial has seen, "
        f"its {called} is {figures[figure]:.2f}{interval}{beside}."
    )
    if study.pretrained_on_these_shards:
        sentence += (
            " The encoder was pretrained on these same shards, so it has seen those subjects' scans, unlabelled."
        )
    return sentence + (" The subjects are simulated." if study.cohort.simulated else "")
