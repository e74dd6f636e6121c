"""Search over LoRA ranks and what goes with them; the best by validation AUC is tested once: ``boldforge sweep``."""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.backbone import load_backbone
from boldforge.finetune.baselines import check_names
from boldforge.finetune.beside import beside_chosen
from boldforge.finetune.cohort import ClipSet, OnProgress, Subject
from boldforge.finetune.embedded import head_on_embeddings, read_labels
from boldforge.finetune.embedding_cache import EmbeddingCache
from boldforge.finetune.evaluation import best_threshold
from boldforge.finetune.fit import TrainingConfig, predict_subjects
from boldforge.finetune.folds import Fold, inner_folds
from boldforge.finetune.merged_curves import pooled_scores
from boldforge.finetune.networks import BackboneSpec, shard_data
from boldforge.finetune.ray_driver import RayConfig, run_on_ray
from boldforge.finetune.serial_driver import run_serially
from boldforge.finetune.study import Study, StudyConfig
from boldforge.finetune.sweep_clips import SeenClips, embed_unseen, gather_seen
from boldforge.finetune.sweep_journal import Journal, SweepError, write_whole
from boldforge.finetune.sweep_results import Tested, TrialResult, best_epoch, choose, write_results
from boldforge.finetune.sweep_rungs import Halving, Report, Rounds, Segment
from boldforge.finetune.sweep_space import OF_TRAINING, Sampler, SpaceConfig, Span, ask_tpe, draw, grid
from boldforge.finetune.tasks import OF_PARTS
from boldforge.finetune.trial import Split, TrialSpec, has_diverged, read_best

logger = logging.getLogger(__name__)
_JOURNAL, _TRIALS, _SEEN, _EMBEDDINGS = "journal.jsonl", "trials", "seen", "embeddings"
# A nested search keeps those of its folds here, and the scores of their test subjects until they are pooled.
OUTER, TESTED = "outer", "tested.json"
_ATTEMPTS = 20
# Who does the work and where the result lies changes nothing in it.
_IMMATERIAL = {
    "shards",
    "shard_cache",
    "backbone",
    "out",
    "driver",
    "concurrency",
    "gpus",
    "address",
    "cache",
    "cache_gb",
}


class SweepConfig(StudyConfig):
    """A sweep: one split of the subjects, one trial per point, the ones that fall behind at a rung are stopped."""

    product: ClassVar[str] = "a sweep"

    ranks: tuple[int, ...] = Field((2, 4, 8), min_length=1, description="LoRA ranks to try; 0 is the head alone.")
    space: SpaceConfig = Field(default_factory=SpaceConfig, description="What else is searched: alpha, dropout, …")
    sampler: Sampler = Field(
        "grid",
        description="grid: every combination. random: points drawn by seed. tpe: Optuna's TPE, batch after batch.",
    )
    trials: int = Field(16, ge=1, le=9999, description="Points to try where the sampler is random or tpe.")
    batch: int = Field(8, ge=1, description="Points that TPE proposes at once; it learns when all of them are done.")
    grace: int = Field(3, ge=1, description="Epochs that every trial may train before it is compared.")
    reduction: int = Field(2, ge=2, description="At every rung the best 1/reduction of the trials, rounded up, go on.")
    driver: Literal["ray", "serial"] = Field(
        "ray", description="ray: trials side by side under Ray Tune. serial: one after the other in this process."
    )
    concurrency: int = Field(2, ge=1, description="Trials at a time on Ray.")
    cpus: int = Field(1, ge=1, description="CPU threads per trial.")
    gpus: float = Field(
        0.0, ge=0, description="GPUs per trial; a fraction lets trials share one, 0 trains them on CPU threads."
    )
    address: str | None = Field(
        None, description="Ray cluster to work on, e.g. auto or 10.0.0.1:6379; its nodes must see out. None: here."
    )

    outer_folds: int = Field(
        1,
        ge=1,
        description="Folds whose test subjects are scored, each by the winner of a search of its own (nested "
        "cross-validation); at most folds. 1: a single search and test.",
    )
    inner_folds: int = Field(
        1,
        ge=1,
        description="Parts of the subjects who are not tested that validate in turn, while the others train; at most "
        "folds - 1, where all of them validate, once each. Every trial trains so many times and is judged by the mean. "
        "1: one part validates.",
    )
    baselines: tuple[str, ...] | None = Field(
        None,
        description="Plain models fitted and tested on the winners' own subjects; None takes the task's own.",
    )
    batch_trials: int = Field(
        1,
        ge=1,
        le=64,
        description="Trials that a process trains as one batched model on one copy of the frozen encoder; activations "
        "grow with it. 1 trains each by itself, with figures that differ in their last digits.",
    )
    cache: Path | None = Field(
        None,
        description="Folder that keeps embeddings for other sweeps over heads alone (rank 0). None: gone with them.",
    )
    cache_gb: float = Field(10.0, ge=0, description="GB that the cache may hold; what was not used for longest goes.")

    @field_validator("backbone")
    @classmethod
    def _pretrained(cls, backbone: BackboneSpec) -> BackboneSpec:
        if not isinstance(backbone, Path):
            raise ValueError("a sweep over LoRA ranks adapts pretrained weights; give their folder")
        return backbone

    @field_validator("task")
    @classmethod
    def _of_subjects(cls, task: str) -> str:
        if task in OF_PARTS:
            raise ValueError(
                f"a sweep tests whole subjects, but the rows of task {task!r} are parts of them; use boldforge "
                f"finetune --task {task}, once for each adapter.rank"
            )
        return task

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
                "a sweep stops trials at rungs, so training.patience has no meaning; remove it and set grace instead"
            )
        return training

    @field_validator("baselines")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return check_names(names)

    @field_validator("ranks")
    @classmethod
    def _each_once(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ranks)) != len(ranks) or min(ranks) < 0 or max(ranks) > 256:
            raise ValueError("ranks must differ and lie between 0 and 256")
        return ranks

    @model_validator(mode="after")
    def _one_meaning(self) -> "SweepConfig":
        for name in self.space.searched():
            called = "training" if name in OF_TRAINING else "adapter"
            if name in getattr(self, called).model_fields_set:
                place = f"{called}.{name}"
                raise ValueError(f"space.{name} is searched, so {place} has no meaning; remove one of the two")
        spans = [name for name in ("rank", *self.space.searched()) if isinstance(getattr(self.space, name), Span)]
        if self.sampler == "grid" and spans:
            raise ValueError(f"a grid needs lists, but space.{spans[0]} has bounds; list values, or set sampler=tpe")
        if self.space.rank is not None and "ranks" in self.model_fields_set:
            raise ValueError("space.rank is searched, so ranks has no meaning; remove one of the two")
        if self.inner_folds > self.folds - 1:
            raise ValueError(
                f"inner_folds is {self.inner_folds}, but beside the part that tests folds deals {self.folds - 1}; set "
                "inner_folds lower or folds higher"
            )
        if self.outer_folds > self.folds:
            raise ValueError(f"outer_folds is {self.outer_folds}, but folds deals {self.folds}; set folds higher")
        if self.adapter.kind != "lora":
            raise ValueError("a sweep over LoRA ranks needs adapter.kind lora")
        if self.batch_trials > 1 and self.adapter.dora:
            raise ValueError("batch_trials batches plain LoRA, but adapter.dora is set; set one of the two back")
        return self

    def settings(self) -> dict[str, Any]:
        """Return what a user may set and this sweep reads, as JSON."""
        searched = set(self.space.searched())
        unread: dict[str, Any] = {
            "adapter": {"rank"} | searched - OF_TRAINING,
            "training": {"patience"} | searched & OF_TRAINING,
        }
        unread |= {"ranks": True} if self.space.rank is not None else {}
        # A sweep begun before these keys goes on.
        unread |= {"frames": True} if self.frames is None else {}
        unread |= {"batch_trials": True} if self.batch_trials == 1 else {}
        unread |= {"inner_folds": True} if self.inner_folds == 1 else {}
        unread |= {"outer_folds": True} if self.outer_folds == 1 else {}
        unread |= {"baselines": True} if self.outer_folds == 1 and self.baselines is None else {}
        return self.model_dump(mode="json", exclude=unread)

    def propose(self, batch: int, seen: list[tuple[dict[str, Any], float | None]]) -> list[dict[str, Any]]:
        """Return the points of a batch; a pure function of the recipe and of what was seen."""
        if self.sampler == "tpe":
            left = min(self.batch, self.trials - len(seen))
            return ask_tpe(self.space, self.ranks, self.seed, seen, left) if left > 0 else []
        if batch > 0:
            return []
        if self.sampler == "grid":
            return grid(self.space, self.ranks)
        return [draw(self.space, self.ranks, self.seed, trial) for trial in range(self.trials)]

    @property
    def trains(self) -> tuple[bool, bool]:
        """Whether some trials train a head alone, and whether some adapt layers."""
        ranks = (self.space.rank.low,) if self.space.rank is not None else self.ranks
        return 0 in ranks, any(rank > 0 for rank in ranks)

    @property
    def n_trials(self) -> int:
        """Number of points that will be tried."""
        return len(grid(self.space, self.ranks)) if self.sampler == "grid" else self.trials


def search_once(study: Study, number: int | None = None, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Train one adapter per point, choose by validation AUC (ties: the lower rank), and test the chosen one once.

    Before its test the chosen one is trained anew on training and validation subjects, for as many epochs as were best
    for it. With ``inner_folds`` above 1 every trial trains once in each of them, and all that is said of it here and in
    the table is the mean. Trials get a folder that holds training and validation subjects only; the test subjects'
    clips and labels are read after the choice is made. Curves, decisions and results are pure functions of the recipe:
    how many trials run at a time, on what, and how often the sweep was killed and continued by the same command,
    changes nothing.

    Parameters
    ----------
    study
        Opened, with a `SweepConfig`.
    number
        Of the outer fold, from 0, where the search is part of a nested one; None searches in the first fold alone.
    on_progress
        Called with clips read and epochs done (each counted in clips), and the most there can be.

    Returns
    -------
    dict
        The content of ``sweep.json``. The test subjects' scores lie beside it in ``tested.json`` where the search is
        part of a nested one.

    Raises
    ------
    BoldForgeError
        If shards, backbone and task do not fit together, there are too few subjects, a trial fails, or the folder
        holds an unfinished sweep of another recipe.
    """
    config = study.config
    assert isinstance(config, SweepConfig)
    with study.claim_out("running a sweep") as scratch, closing(open_journal(study, config, number)) as journal:
        if any("finished" in record for record in journal.records):
            logger.info("%s: this sweep is finished; its results are those in the folder.", config.out)
            results: dict[str, Any] = json.loads((config.out / "sweep.json").read_text())
        else:
            results = _search_and_test(study, config, number, journal, scratch, on_progress)
            journal.append({"finished": True})
        _clear_work(config.out)
        return results


def _search_and_test(
    study: Study,
    config: SweepConfig,
    number: int | None,
    journal: Journal,
    scratch: Path,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    fold = study.folds[number or 0]
    parts = {
        name: [study.cohort.subjects[i] for i in study.positions(subjects)]
        for name, subjects in (("train", fold.train), ("validation", fold.validation), ("test", fold.test))
    }
    seen = parts["train"] + parts["validation"]
    inner = _splits(fold, seen, config.inner_folds)
    reading = len(seen) * config.clips * sum(config.trains)
    # What is trained anew, numbered 0, is not among several inner folds and not in the total.
    first = 1 if len(inner) > 1 else 0
    sizes = {part: len(split.train) * config.clips for part, split in enumerate(inner, start=first)}
    # A search inside a nested one is tested without baselines; they are measured in all of its folds together.
    beside = len(study.cohort.subjects) if number is None else 0
    total = reading + sum(sizes.values()) * config.training.epochs * config.n_trials + beside
    done: dict[tuple[int, int], int] = {}

    def on_epoch(trial: int, part: int, epoch: int) -> None:
        done[trial, part] = max(epoch, done.get((trial, part), 0))
        if on_progress:
            on_progress(reading + sum(sizes.get(each, 0) * there for (_, each), there in done.items()), total)

    cache = EmbeddingCache(config.cache or config.out / _EMBEDDINGS, int(config.cache_gb * 1e9))
    place = (config.out / _SEEN).resolve()
    clips = gather_seen(
        study, seen, config.trains, place, cache, scratch, on_progress and (lambda n, _: on_progress(n, total))
    )
    spec = _trial_spec(config, study, clips, inner)
    folder = (config.out / _TRIALS).resolve()
    folder.mkdir(exist_ok=True)
    halving = Halving(study.task.selects_by, config.training.epochs, config.grace, config.reduction)
    rounds = Rounds(halving, config.propose, journal, folder, config.batch_trials, spec.inner_numbers)
    drive(config, spec, _course(rounds, study.task.selects_by, folder), folder, on_epoch, scratch)
    trials, best = _standing(rounds, study.task.selects_by)
    tested = _test(study, spec, best, folder, parts["test"], cache, scratch)
    others = None
    if number is None:
        read = count(total - beside + 1)
        advance = (lambda: on_progress(next(read), total)) if on_progress else (lambda: None)
        test = study.positions(fold.test)
        found = beside_chosen(study, [fold], config.baselines, scratch, advance)
        others = {name: scores.select(test) for name, scores in found.items()}
    if on_progress:
        on_progress(total, total)
    if number is not None:
        kept = {"scores": tested.scores.tolist(), "threshold": tested.threshold}
        write_whole(config.out / TESTED, json.dumps(kept).encode())
    validating = [[seen[place] for place in split.validation] for split in inner]
    outer = None if number is None else number + 1
    return write_results(study, config.settings(), parts, validating, trials, best, tested, scratch, others, outer)


def _splits(fold: Fold, seen: Sequence[Subject], count: int) -> list[Split]:
    """Return the inner folds as positions among the subjects seen."""
    place_of = {subject.name: place for place, subject in enumerate(seen)}
    return [
        Split(tuple(place_of[name] for name in part.train), tuple(place_of[name] for name in part.validation))
        for part in inner_folds(fold, count)
    ]


def _course(rounds: Rounds, figure: str, folder: Path) -> Iterator[list[Segment]]:
    """Yield all rounds of work, and last the chosen trial's, which is trained anew on all subjects seen so far."""
    yield from rounds
    _, best = _standing(rounds, figure)
    last = Segment(best.trial, best_epoch(best)["epoch"], anew=True)
    (curve,) = last.curves(folder)
    if len(curve) < last.until and not has_diverged(curve):
        yield [last]


def _standing(rounds: Rounds, figure: str) -> tuple[list[TrialResult], TrialResult]:
    """Return all trials, and the chosen one."""
    trials = [TrialResult(trial, rounds.curve(trial)) for trial in rounds.trials]
    return trials, choose(trials, figure)


def _test(
    study: Study,
    spec: TrialSpec,
    best: TrialResult,
    folder: Path,
    unseen: list[Subject],
    cache: EmbeddingCache,
    scratch: Path,
) -> Tested:
    """Set the threshold where the chosen trial separates all who validated; score the test subjects once.

    They are scored, and read, after that, by the trial trained anew on training and validation subjects.
    """
    adapter, size = best.trial.spec(spec).adapter, spec.training.batch_size
    last = Segment(best.trial, best_epoch(best)["epoch"], anew=True)
    (place,), (curve,) = last.folders(folder), last.curves(folder)
    if has_diverged(curve):
        raise SweepError(
            f"The chosen trial, at {best.trial.name}, diverged when it was trained anew on more subjects; "
            f"remove {folder.parent} or choose another out, and set training.lr or space.lr lower."
        )
    state = read_best(place, curve)
    classifier = study.classifier(adapter)
    scorer = classifier
    kept = spec.embedded if adapter.frozen else None
    if kept is not None:
        seen = kept.load(*read_labels(spec.clips))
        scorer = head_on_embeddings(study.task, seen.x.shape[1], spec.seed)
    else:
        seen = ClipSet.load(spec.clips)
    threshold = 0.5
    if study.task.kind == "binary" and spec.inner:
        threshold = best_threshold(*pooled_scores(spec, seen.labels, best_epoch(best)))
    elif study.task.kind == "binary":
        validation = seen.select(spec.validation)
        scorer.load_state(read_best(best.trial.folder(folder), best.curve))
        threshold = best_threshold(validation.labels, predict_subjects(scorer, validation, size))
    classifier.load_state(state)
    scorer.load_state(state)
    read = kept is None
    test = study.gather(unseen, scratch / "unseen") if read else embed_unseen(study, unseen, cache, scratch)
    return Tested(classifier, predict_subjects(scorer, test, size), threshold)


def drive(
    config: SweepConfig,
    spec: TrialSpec,
    rounds: Iterator[list[Segment]],
    folder: Path,
    on_epoch: Report,
    scratch: Path,
) -> None:
    """Do all rounds of work with the recipe's driver."""
    if config.driver == "serial":
        run_serially(spec, rounds, folder, on_epoch)
        return
    ray_config = RayConfig(config.concurrency, config.cpus, config.gpus, config.address)
    run_on_ray(spec, rounds, folder, on_epoch, ray_config, scratch / "ray")


def open_journal(study: Study, config: SweepConfig, number: int | None = None, results: str = "sweep.json") -> Journal:
    """Open the folder's journal for this sweep.

    Raises
    ------
    SweepError
        If it is that of another sweep, or of a finished one that is no longer whole.
    """
    assert isinstance(config.backbone, Path)
    identity = {
        **{name: value for name, value in config.settings().items() if name not in _IMMATERIAL},
        "shards": study.manifest.content_hash,
        "backbone": load_backbone(config.backbone, config.pool).weights_hash,
        "device": "cuda" if config.gpus else "cpu",
        "torch": torch.__version__,
    }
    identity |= {} if number is None else {"fold": number}
    identity = json.loads(json.dumps(identity))
    journal = Journal(config.out / _JOURNAL)
    found = journal.records[0]["sweep"] if journal.records else None
    finished = any("finished" in record for record in journal.records)
    # What is finished stays what it is under another torch or on another device.
    names = ((found or {}).keys() | identity.keys()) - ({"device", "torch"} if finished else set())
    differing = sorted(name for name in names if identity.get(name) != (found or {}).get(name))
    if found is not None and differing:
        journal.close()
        held, mend = ("a", "") if finished else ("an unfinished", "run the command that started it to go on, ")
        raise SweepError(
            f"{config.out}: holds {held} sweep with other settings ({', '.join(differing)}); {mend}remove the folder, "
            "or choose another out."
        )
    if finished and not (config.out / results).is_file():
        journal.clear()
    elif finished and (missing := [name for name in _results_of(config) if not (config.out / name).is_file()]):
        journal.close()
        raise SweepError(
            f"{config.out}: holds a finished sweep, but {missing[0]} is missing; put it back, or remove {results} to "
            "sweep anew."
        )
    if not journal.records:
        _clear_work(config.out)
        journal.append({"sweep": identity})
    return journal


def _results_of(config: SweepConfig) -> list[str]:
    if config.outer_folds > 1:
        return ["predictions.tsv", *(f"{OUTER}/{number + 1}/sweep.json" for number in range(config.outer_folds))]
    return ["trials.tsv", "best/metrics.json", "best/predictions.tsv", "best/adapter/task.json"]


def _clear_work(out: Path) -> None:
    for folder in (out / _TRIALS, out / _SEEN, out / _EMBEDDINGS):
        # The worker of a driver that was killed may still be tidying up its trial.
        for _ in range(_ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)
        else:
            shutil.rmtree(folder)


def _trial_spec(config: SweepConfig, study: Study, clips: SeenClips, inner: Sequence[Split]) -> TrialSpec:
    assert isinstance(config.backbone, Path)
    return TrialSpec(
        backbone=config.backbone.resolve(),
        pool=config.pool,
        task=config.task,
        data=shard_data(study.manifest, config.frames),
        classes=study.task.classes,
        clips=clips.folder,
        train=inner[0].train,
        validation=inner[0].validation,
        adapter=config.adapter,
        training=config.training,
        seed=config.seed,
        threads=config.cpus,
        device="cuda" if config.gpus else "cpu",
        embedded=clips.embedded,
        inner=tuple(inner) if len(inner) > 1 else (),
    )
