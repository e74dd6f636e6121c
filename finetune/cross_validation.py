"""Adapt an encoder to a task and measure it on subjects it has not seen: ``boldforge finetune``."""

import logging
import statistics
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from boldforge.data_shards import Manifest
from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.baselines import BASELINES, check_names
from boldforge.finetune.beside import Beside, plain_models, threshold_of
from boldforge.finetune.classifier import Classifier, save_adapter
from boldforge.finetune.cohort import ClipSet, OnProgress
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.fit import fit, predict_subjects
from boldforge.finetune.fold_models import FOLDER, clear_folds, keep_fold, read_results
from boldforge.finetune.folds import Fold
from boldforge.finetune.harmonise import check_installed
from boldforge.finetune.metrics import roc_points
from boldforge.finetune.resnet_rnn import ResnetRnnConfig
from boldforge.finetune.results import Prediction, write_json, write_predictions
from boldforge.finetune.study import Protocol, Study, StudyConfig, open_study
from boldforge.finetune.summary import Blocks, Scores, summarise
from boldforge.finetune.tasks import describe_labels
from boldforge.finetune.tasks.columns import SUBJECT_BASELINES

logger = logging.getLogger(__name__)
# Where things lie changes nothing; what lies there is told by its hash.
_NOT_COMPARED = {"shards", "shard_cache", "backbone", "out"}
_OF_SWEEPS = ("ranks", "space", "sampler", "grace")
_PLACES_OF_EVENTS = {"folder", "embeddings"}
_PLAIN = {name: baseline for name, baseline in BASELINES.items() if not baseline.harmonised}
_BASELINES_SAY = "; ".join(f"{name}: {baseline.says('binary')}" for name, baseline in _PLAIN.items())


class FinetuneConfig(StudyConfig):
    """A cross-validated fine-tuning: ``folds`` outer folds, every subject tested once per repetition."""

    protocol: Protocol = Field(
        "folds",
        description="How test subjects are chosen: dealt over the folds by diagnosis × site, or a site at a time; for "
        "tasks of blocks, people (of one person: runs) dealt over the folds, or everybody's runs one after the other.",
    )
    repeats: int = Field(
        1, ge=1, le=100, description="Repetitions with other folds, first values and orders; figures are their mean."
    )
    baselines: tuple[str, ...] | None = Field(
        None,
        description=f"Plain models measured in the same folds ({_BASELINES_SAY}); +combat after "
        "a name harmonises sites first. None takes the task's own: for "
        f"subjects {', '.join(SUBJECT_BASELINES)}; for blocks regions and image.",
    )
    keep_folds: bool = Field(
        True, description="Keep each fold's model (of the first repetition), for boldforge attribute; each as adapter/."
    )
    head_hidden: int = Field(0, ge=0, description="Width of a layer between embedding and head; 0 for none.")

    @model_validator(mode="before")
    @classmethod
    def _not_a_sweep(cls, content: Any) -> Any:
        found = [name for name in _OF_SWEEPS if isinstance(content, dict) and name in content]
        if found:
            raise ValueError(
                f"sets {', '.join(found)}, as a sweep's recipe does, but finetune trains one adapter; run a sweep with "
                "boldforge sweep --config"
            )
        return content

    @field_validator("baselines")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return check_names(names)

    @model_validator(mode="after")
    def _something_to_embed_with(self) -> "FinetuneConfig":
        embedding = [name for name in self.baselines or () if BASELINES[name].features == "embedding"]
        if embedding and isinstance(self.backbone, ResnetRnnConfig):
            raise ValueError(
                f"baseline {embedding[0]!r} reads the embeddings of a pretrained encoder, but backbone "
                f"{self.backbone.kind} is trained from nothing; take it out of baselines, or give a pretrained encoder"
            )
        return self


def finetune(config: FinetuneConfig, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Cross-validate an adapter beside plain baselines, then train it on all subjects.

    In every outer fold the validation subjects choose the epoch and the threshold, and the test subjects are scored
    once, by the mean over their clips. The adapter that is written is trained on all labelled subjects for the median
    of the epochs that the folds chose; the figures are those of the folds, which estimate how the same procedure does
    on new subjects.

    Parameters
    ----------
    config
        The recipe.
    on_progress
        Called with clip passes done and the most there can be.

    Returns
    -------
    dict
        The content of ``metrics.json``. ``figures`` pools all test subjects (mean over repetitions), with
        ``intervals``, ``baselines`` and a ``verdict`` beside them; ``folds`` has each fold's own.

    Raises
    ------
    BoldForgeError
        If shards, backbone and task do not fit together, there are too few subjects, or the folder holds something
        else or results of another recipe.
    """
    study = open_study(config)
    if (results := _finished(study)) is not None:
        return results
    subjects = study.cohort.subjects
    check_harmonised(config.baselines, config.protocol)
    dealt = [study.deal(config.seed + repeat, config.protocol) for repeat in range(config.repeats)]
    names = plain_models(study, config.baselines, [fold for folds in dealt for fold in folds])
    passes = sum(len(fold.train) for folds in dealt for fold in folds) + len(subjects)
    reading = config.clips * len(subjects) + len(subjects)
    model = Scores.empty(study.task, config.repeats, len(subjects))
    others = Beside(study, names, config.repeats)
    per_fold: list[dict[str, Any]] = []
    adapter = study.lifted(config.adapter)
    bar = _Progress(on_progress, reading, config.clips * config.training.epochs * passes, adapter)
    with study.claim_out("fine-tuning") as scratch:
        # Another process may have finished it meanwhile.
        if (results := _finished(study)) is not None:
            return results
        clear_folds(config.out)
        clips = study.gather(subjects, scratch, lambda done, total: bar.read(), adapter)
        others.read(bar.read, lambda: (clips, adapter))
        for repeat, folds in enumerate(dealt):
            for number, fold in enumerate(folds, start=1):
                classifier = study.classifier(adapter, config.seed + repeat)
                scores, described = _run_fold(study, classifier, clips, fold, config.seed + repeat, bar)
                test = study.positions(fold.test)
                model.put(repeat, test, scores, described["threshold"])
                others.run(fold, repeat)
                per_fold.append({"repeat": repeat + 1, "fold": number, **described})
                if config.keep_folds and repeat == 0 and (shards_hash := _shards_hash(study)) is not None:
                    about = {"simulated": study.cohort.simulated, **described}
                    unseen = {study.called[subjects[position].person] for position in test}
                    keep_fold(classifier, config.out, number, unseen, shards_hash, about)
                logger.info("fold %d of %d: %s", number, len(folds), described["figures"])
        epochs = round(statistics.median(fold["best_epoch"] for fold in per_fold))
        bar.skip((config.training.epochs - epochs) * len(clips))
        final = study.classifier(adapter, config.seed)
        for _ in fit(final, clips, None, config.training, epochs, config.seed):
            bar.train(len(clips))
        bar.finish()
        return _write(study, dealt[0], model, others.scores, per_fold, final, epochs)


def _finished(study: Study) -> dict[str, Any] | None:
    """Return the results that the folder holds, if they are this study's; None if it holds none.

    Raises
    ------
    FinetuneError
        If they are those of another one, or no longer whole.
    """
    out = study.config.out
    if not (out / "metrics.json").is_file():
        return None
    results = read_results(out)
    now = _compared(study.config.model_dump(mode="json")) | study.made_from()
    before = _compared(results["settings"]) | results.get("made_from", {})
    before.setdefault("classes", now["classes"])  # not recorded before
    differing = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if differing:
        raise FinetuneError(
            f"{out}: holds a fine-tuning with other settings ({', '.join(differing)}); remove the folder to fine-tune "
            "anew, or choose another out."
        )
    wanted = ["predictions.tsv", "adapter/task.json"]
    if getattr(study.config, "keep_folds", False) and _shards_hash(study) is not None:
        wanted += [f"{FOLDER}/{number}/task.json" for number in sorted({fold["fold"] for fold in results["folds"]})]
    missing = [name for name in wanted if not (out / name).is_file()]
    if missing:
        raise FinetuneError(
            f"{out}: holds a finished fine-tuning, but {missing[0]} is missing; put it back, or remove metrics.json "
            "to fine-tune anew."
        )
    logger.info("%s: this fine-tuning is finished; its results are those in the folder.", out)
    return results


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in _NOT_COMPARED}
    events = {name: value for name, value in kept.get("events", {}).items() if name not in _PLACES_OF_EVENTS}
    return kept | {"events": events}


def check_harmonised(names: tuple[str, ...] | None, protocol: Protocol = "folds") -> None:
    """Make sure that the baselines that harmonise sites can.

    Raises
    ------
    FinetuneError
        If the packages are missing, or nothing is known of the sites that are tested.
    """
    harmonised = [name for name in names or () if BASELINES[name].harmonised]
    if harmonised and protocol == "leave-one-site-out":
        raise FinetuneError(
            f"baseline {harmonised[0]!r} harmonises sites, but protocol leave-one-site-out tests a site of which "
            "nothing is known; take one of the two out."
        )
    if harmonised:
        check_installed()


class _Progress:
    """Moves one bar at one pace, in the cost of the clips that take longest.

    Those are trained clips and, of a head alone, clips that are read and embedded. Measured on two small encoders, a
    clip was read some fifty times as fast as it was trained through all stages.
    """

    def __init__(self, on_progress: OnProgress | None, reading: int, training: int, adapter: AdapterConfig) -> None:
        self._on_progress = on_progress
        self._read = 1.0 if adapter.frozen else 0.02 if adapter.first_stage == 0 else 0.5
        self._trained = 0.02 if adapter.frozen else 1.0
        self._total = reading * self._read + training * self._trained
        self._done = 0.0

    def read(self) -> None:
        """Count one clip, or one subject's features."""
        self._add(self._read)

    def train(self, clips: int) -> None:
        """Count an epoch's clips."""
        self._add(clips * self._trained)

    def skip(self, clips: int) -> None:
        """Take off clips that will not be trained; as done they would look like a sudden speed."""
        self._total -= clips * self._trained

    def finish(self) -> None:
        """Call all done: of short runs there are fewer clips than were expected."""
        self._total = self._done
        self._add(0.0)

    def _add(self, cost: float) -> None:
        self._done += cost
        if self._on_progress:
            # Sums of hundredths do not meet the total to the last bit.
            total = max(1, round(self._total))
            self._on_progress(min(round(self._done), total), total)


def _run_fold(
    study: Study, classifier: Classifier, clips: ClipSet, fold: Fold, seed: int, bar: _Progress
) -> tuple[np.ndarray, dict[str, Any]]:
    """Train on the fold's training subjects, keep the validation's best epoch, score the test subjects once."""
    train, validation, test = (study.positions(part) for part in (fold.train, fold.validation, fold.test))
    train_clips, validation_clips, training = clips.select(train), clips.select(validation), study.config.training
    best, best_state = None, classifier.state()
    last = 0
    for epoch in fit(classifier, train_clips, validation_clips, training, training.epochs, seed):
        bar.train(len(train_clips))
        last = epoch.number
        if epoch.improved:
            best, best_state = epoch, classifier.state()
        elif best is not None and epoch.number - best.number >= training.patience:
            break
    bar.skip((training.epochs - last) * len(train_clips))
    assert best is not None, "the first epoch always improves"
    classifier.load_state(best_state)
    checked = predict_subjects(classifier, validation_clips, training.batch_size)
    threshold = threshold_of(study.task, validation_clips.labels, checked)
    test_clips = clips.select(test)
    scores = predict_subjects(classifier, test_clips, training.batch_size)
    described = {
        "figures": classifier.task.metrics(test_clips.labels, scores, threshold),
        "validation": best.figures,
        "threshold": threshold,
        "best_epoch": best.number,
        "epochs": last,
        "n_train": len(train),
        "n_validation": len(validation),
        "n_test": len(test),
    }
    return scores, described


def _write(
    study: Study,
    folds: list[Fold],
    model: Scores,
    baselines: dict[str, Scores],
    per_fold: list[dict[str, Any]],
    final: Classifier,
    epochs: int,
) -> dict[str, Any]:
    config, cohort = study.config, study.cohort
    assert isinstance(config, FinetuneConfig)
    labels = [subject.label for subject in cohort.subjects]
    scores, binary = model.mean(), study.task.kind == "binary"
    number = {name: fold for fold, dealt in enumerate(folds, start=1) for name in dealt.test}
    predictions = [
        Prediction(subject, score, line if binary else None, number[subject.name])
        for subject, score, line in zip(cohort.subjects, scores, model.threshold_RN.mean(axis=0), strict=True)
    ]
    of = study.held_apart
    deal = config.protocol if config.protocol != "folds" else f"{config.folds}-fold cross-validation over {of}"
    times = f", {config.repeats} repetitions" if config.repeats > 1 else ""
    threshold = float(np.median([fold["threshold"] for fold in per_fold]))
    results = {
        "task": study.task.name,
        "simulated": cohort.simulated,
        "pretrained_on_these_shards": study.pretrained_on_these_shards,
        "measured_by": deal + times,
        **summarise(
            model, baselines, labels, [subject.site for subject in cohort.subjects], config.seed, _blocks(study)
        ),
        "people": _per_person(study, model),
        "roc": roc_points(labels, model.by_row()) if binary else None,
        "folds": per_fold,
        "subjects": describe_labels(study.task, labels),
        "n_unlabelled": cohort.n_unlabelled,
        "n_too_short": cohort.n_too_short,
        "n_duplicates": cohort.n_duplicates,
        "n_repeated": cohort.n_repeated,
        "n_several_sites": cohort.n_several_sites,
        "trainable_by_part": final.trainable_by_part,
        "trainable_parameters": final.trainable,
        "total_parameters": final.total,
        "epochs_of_adapter": epochs,
        "threshold_of_adapter": threshold,
        "settings": config.model_dump(mode="json"),
        "made_from": study.made_from(),
        # Not compared: they change the last digits, not what was done.
        "computed_with": {
            "torch": torch.__version__,
            "device": next(final.parameters()).device.type,
            "cpu_threads": torch.get_num_threads(),
        },
    }
    kept = (
        "rows",
        "column",
        "compared_by",
        "figures",
        "intervals",
        "baselines",
        "verdict",
        "measured_by",
        "simulated",
        "pretrained_on_these_shards",
        "subjects",
    )
    shared = {key: results[key] for key in kept}
    about = {"clips_per_subject": config.clips, "threshold": threshold, "shards_hash": _shards_hash(study)}
    save_adapter(final, config.out / "adapter", {**shared, **about})
    parts = study.task.rows != "subjects"
    write_predictions(config.out / "predictions.tsv", predictions, study.task.classes, study.called, parts)
    write_json(config.out / "metrics.json", results)
    return results


def _shards_hash(study: Study) -> str | None:
    """Return the hash of the shards, by which an attribution knows whom a model has seen; None for images."""
    return study.source.content_hash if isinstance(study.source, Manifest) else None


def _blocks(study: Study) -> Blocks | None:
    if study.task.rows == "subjects":
        return None
    return Blocks(study.clusters(), [str(row.runs) for row in study.cohort.subjects], study.held_apart)


def _per_person(study: Study, model: Scores) -> list[dict[str, Any]] | None:
    """Return the figures of every person's rows, under the predictions' pseudonyms; None where rows are people."""
    if study.task.rows == "subjects":
        return None
    rows = study.cohort.subjects
    labels = np.array([row.label for row in rows])
    found = []
    for person, name in study.called.items():
        mine = np.flatnonzero([row.person == person for row in rows])
        found.append({"subject": name, **model.figures_of(labels[mine], mine)})
    return found
