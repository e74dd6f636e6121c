"""Attribute a fine-tuning to brain regions, on subjects whom the models have not seen: ``boldforge attribute``.

Shape suffixes: N subjects · V brain voxels · R regions, then groups of them.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from boldforge.configs import StrictModel, folder_lock
from boldforge.data_shards import Manifest, ShardReader, ShardsPlace, load_atlas, load_groups, open_dataset
from boldforge.finetune.attribution import (
    Parts,
    Score,
    class_score,
    gradients_through,
    integrated_gradients,
    occlusion,
)
from boldforge.finetune.attribution_null import contrast
from boldforge.finetune.attribution_results import Attributed, Method, hash_model, write_attribution
from boldforge.finetune.backbone import NeuroStormBackbone
from boldforge.finetune.classifier import Classifier, load_classifier, read_task
from boldforge.finetune.cohort import Cohort, OnProgress, Subject, check_recipe, find_cohort, gather_clips
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.fold_models import FoldModel, read_folds, read_results
from boldforge.finetune.results import pseudonym_key, pseudonyms
from boldforge.finetune.tasks import Task
from boldforge.pretrain import region_voxels

_CLIPS = ".clips-"


class AttributionConfig(StrictModel):
    """What is attributed, and how."""

    model: Path = Field(
        description="Folder of a fine-tuning or of a nested sweep, whose fold models are each asked about their own "
        "test subjects; or an adapter folder, whose model is asked about all labelled subjects of other shards."
    )
    shards: ShardsPlace | None = Field(
        None,
        description="Shards; none takes the fine-tuning's own. An adapter needs those of new subjects.",
    )
    backbone: Path | None = Field(
        None, description="Folder of the encoder; none takes the fine-tuning's own. An adapter of an encoder needs it."
    )
    out: Path | None = Field(
        None, description="Folder for the results; none is attribution/ in a fine-tuning's folder."
    )
    methods: tuple[Method, ...] = Field(
        ("integrated-gradients", "occlusion"),
        min_length=1,
        description="integrated-gradients: the score's change from the baseline, shared out to voxels and summed over "
        "regions. occlusion: by how much the score falls when a region shows the baseline only.",
    )
    baseline: Literal["subject", "cohort"] = Field(
        "subject",
        description="The frame that stands for nothing: the subject's own mean frame, or the mean of those of the "
        "subjects outside the test fold.",
    )
    clips: int = Field(4, ge=1, description="Most clips per subject, evenly spaced over its runs.")
    steps: int = Field(64, ge=2, le=1000, description="Nodes of the integral; more close the gap that is reported.")
    batch_size: int = Field(8, ge=1, description="Copies of a clip that are run at a time.")
    target: str | None = Field(
        None, description="With more than two classes: the class whose score against the others is attributed."
    )
    atlas: str = Field("aal3", description="aal3, or a NIfTI label volume in MNI space.")
    labels: Path | None = Field(
        None, description="Names of the regions of an atlas of your own, a line `id name` each."
    )
    groups: Path | None = Field(
        None, description="Groups of regions, a line `region group` each; none takes those that come with the atlas."
    )
    permutations: int = Field(2000, ge=99, le=100_000, description="Permutations of the labels for p.")
    resamples: int = Field(2000, ge=100, le=100_000, description="Bootstrap resamples for the intervals.")
    seed: int = Field(0, ge=0, description="Decides permutations and resamples.")


@dataclass
class _Work:
    """What an attribution needs, and what it has gathered so far."""

    config: AttributionConfig
    out: Path
    manifest: Manifest
    task: Task
    cohort: Cohort
    folds: list[FoldModel]
    backbone: Path | None
    asked: str
    parts: Parts
    mask: npt.NDArray[np.bool_]
    target: int | None
    called_N: list[str]
    label_N: npt.NDArray[np.float64]
    fold_N: list[int]
    weight_N: npt.NDArray[np.float64]
    pool: str | None
    rows: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    score_N: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    change_N: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    gap_N: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    voxels_V: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def attribute_regions(config: AttributionConfig, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Say which regions carry what a classifier has learned.

    Every model is asked about subjects whom it has not seen: each fold's own test subjects. What is reported of a
    region is the difference of its attribution between the classes (of a number, its slope on the number) inside
    folds, with a 95 % bootstrap interval over subjects and a family-wise p from permuted labels, see
    `boldforge.finetune.attribution_null`. Folds share training subjects, so that p is good to the extent that
    cross-validation's always is.

    Parameters
    ----------
    config
        The recipe.
    on_progress
        Called with subjects done and all of them.

    Returns
    -------
    dict
        The content of ``attribution.json``. Tables, brain maps and the subjects' own attributions lie beside it.

    Raises
    ------
    BoldForgeError
        If model, shards and atlas do not fit together.
    """
    work = _open(config)
    n, n_parts = len(work.label_N), len(work.parts)
    work.rows = {method: np.zeros((n, n_parts)) for method in config.methods}
    work.score_N, work.change_N, work.gap_N = np.zeros(n), np.zeros(n), np.zeros(n)
    work.voxels_V = np.zeros(work.manifest.n_voxels)
    reader = ShardReader(work.manifest)
    done = 0
    with folder_lock(work.out, "attributing"), _scratch(work.out) as scratch:
        for fold in work.folds:
            classifier = _load(work, fold.folder)
            check_recipe(classifier.backbone, work.manifest)
            others = [s for i, s in enumerate(work.cohort.subjects) if i not in set(fold.test)] or work.cohort.subjects
            cohort_V = _mean_frame(reader, others) if config.baseline == "cohort" else None
            for position in fold.test:
                frame_V = _mean_frame(reader, [work.cohort.subjects[position]]) if cohort_V is None else cohort_V
                _attribute_subject(work, classifier, reader, position, frame_V, Path(scratch) / str(position))
                done += 1
                if on_progress:
                    on_progress(done, n)
        return write_attribution(_finished(work), work.out)


def _attribute_subject(
    work: _Work, classifier: Classifier, reader: ShardReader, position: int, frame_V: torch.Tensor, folder: Path
) -> None:
    """Attribute the mean score over a subject's clips, as the prediction is."""
    config, subject = work.config, work.cohort.subjects[position]
    device = next(classifier.parameters()).device
    clips = gather_clips(classifier.backbone, 0, reader, [subject], config.clips, folder)
    values_BTV, frame_V = torch.from_numpy(np.array(clips.x)).to(device), frame_V.to(device)
    (folder / "x.npy").unlink()
    score = class_score(classifier, work.target)
    score_B, base = _scores(score, values_BTV), _scores(score, frame_V.expand(1, *values_BTV.shape[1:]))[0]
    work.score_N[position], work.change_N[position] = score_B.mean(), (score_B - base).mean()
    if "integrated-gradients" in config.methods:
        with gradients_through(classifier):
            found_BV = integrated_gradients(score, values_BTV, frame_V, config.steps, config.batch_size)
        voxels_V = found_BV.mean(axis=0)
        work.rows["integrated-gradients"][position] = work.parts.sums(voxels_V)
        work.gap_N[position] = voxels_V.sum() - work.change_N[position]
        work.voxels_V += work.weight_N[position] * voxels_V
    if "occlusion" in config.methods:
        fall_BR = occlusion(score, values_BTV, frame_V, work.parts, config.batch_size, score_B)
        work.rows["occlusion"][position] = fall_BR.mean(axis=0)


@torch.no_grad()
def _scores(score: Score, values_BTV: torch.Tensor) -> npt.NDArray[np.float64]:
    # One at a time: every copy of a clip is then computed as in an occlusion, and memory stays what one clip takes.
    return np.array([float(score(values_TV[None])[0]) for values_TV in values_BTV])


def _mean_frame(reader: ShardReader, subjects: Sequence[Subject]) -> torch.Tensor:
    """Return the mean over subjects of the mean over all frames of their runs, [V]."""
    total_V = np.zeros(reader.manifest.n_voxels)
    for subject in subjects:
        own_V, frames = np.zeros_like(total_V), 0
        for run in subject.runs:
            length = reader.manifest.runs[run].n_frames
            clip = reader.read(run, 0, length)
            own_V += length * clip.mean.astype(np.float64) + clip.q.sum(axis=0, dtype=np.int64) * clip.scale
            frames += length
        total_V += own_V / frames
    return torch.from_numpy((total_V / len(subjects)).astype(np.float32))


@contextmanager
def _scratch(out: Path) -> Iterator[str]:
    """Lend a folder for clips; what a killed run left is removed. The caller holds the lock of `out`."""
    for left in out.glob(f"{_CLIPS}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=out, prefix=_CLIPS) as scratch:
        yield scratch


def _open(config: AttributionConfig) -> _Work:
    """Find the models, their subjects, the encoder and the atlas's regions, and check that they fit together."""
    single = (config.model / "task.json").is_file()
    results = {} if single else read_results(config.model)
    settings = results.get("settings", {})
    if settings.get("images") is not None:
        raise FinetuneError(f"{config.model}: is a study of images; regions are attributed to studies of shards only.")
    if single and (config.shards is None or config.out is None):
        raise FinetuneError(f"{config.model}: is one adapter; give shards= of subjects new to it, and out=.")
    spec = settings.get("backbone")
    backbone = config.backbone or (Path(spec) if isinstance(spec, str) else None)
    manifest = open_dataset(config.shards or settings["shards"])
    folder = config.model if single else config.model / "folds" / "1"
    folds = [] if single else read_folds(config.model, manifest.content_hash)
    if single:
        _check_unseen(folder, manifest)
    classifier = load_classifier(backbone, folder)
    task = classifier.task
    if task.kind not in ("binary", "multiclass", "regression") or task.rows != "subjects":
        raise FinetuneError(f"task {task.name!r} cannot be attributed; give one with a label per subject.")
    cohort = find_cohort(manifest, task, int(classifier.backbone.data["clip_length"]))
    named = pseudonyms([subject.name for subject in cohort.subjects], pseudonym_key(manifest))
    if "outer_folds" in settings and settings["outer_folds"] < settings["folds"]:
        tested = {name for fold in folds for name in fold.people}
        cohort = replace(cohort, subjects=tuple(s for s in cohort.subjects if named[s.name] in tested))
    n = len(cohort.subjects)
    called_N = [named[subject.name] for subject in cohort.subjects]
    folds = [fold.placed(called_N) for fold in folds] or [FoldModel(1, config.model, test=tuple(range(n)))]
    if sorted(position for fold in folds for position in fold.test) != list(range(n)):
        raise FinetuneError(
            f"{config.model}: its folds do not test every one of the {n} subjects once; only tasks with one label per "
            "subject can be attributed."
        )
    target, label_N = _targeted(task, config.target, [subject.label for subject in cohort.subjects])
    number = {position: fold.number for fold in folds for position in fold.test}
    fold_N = [number[position] for position in range(n)]
    weight_N = contrast(label_N, fold_N)
    if not weight_N.any():
        raise FinetuneError(
            f"in none of the {len(folds)} folds do the {n} test subjects differ in their label, so no region can be "
            "compared; use fewer folds or more subjects."
        )
    atlas = load_atlas(config.atlas, config.labels)
    with_groups = config.groups is not None or atlas.groups is not None
    mask = manifest.brain_mask()
    parts = Parts(
        region_voxels(atlas, manifest.grid, mask),
        load_groups(atlas, config.groups) if with_groups else {},
        manifest.n_voxels,
    )
    asked = "each fold's model about its own test subjects" if not single else "one adapter about subjects new to it"
    out = config.out or config.model / "attribution"
    return _Work(
        config,
        out,
        manifest,
        task,
        cohort,
        folds,
        backbone,
        asked,
        parts,
        mask,
        target,
        called_N,
        label_N,
        fold_N,
        weight_N,
        classifier.backbone.pool if isinstance(classifier.backbone, NeuroStormBackbone) else None,
    )


def _check_unseen(adapter: Path, manifest: Manifest) -> None:
    """Make sure that an adapter was not trained on these shards."""
    trained_on = read_task(adapter)["figures"].get("shards_hash")
    if trained_on is None:
        raise FinetuneError(
            f"{adapter / 'task.json'}: does not say which shards it was trained on, so whether it has seen these "
            "subjects cannot be told; finetune or sweep again with this boldforge."
        )
    if trained_on == manifest.content_hash:
        raise FinetuneError(
            f"{adapter}: was trained on these very subjects; give shards of others, or the "
            "fine-tuning's folder, whose fold models have subjects they did not see."
        )


def _load(work: _Work, folder: Path) -> Classifier:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_classifier(work.backbone, folder).to(device).train(False)


def _targeted(task: Task, target: str | None, labels: Sequence[float]) -> tuple[int | None, npt.NDArray[np.float64]]:
    """Return the output that is attributed where there are several, and the label that goes with it."""
    label_N = np.array(labels, dtype=np.float64)
    if task.kind != "multiclass":
        if target is not None:
            raise FinetuneError(
                f"target is for tasks of more than two classes, task {task.name!r} has none; leave it out."
            )
        return None, label_N
    if target not in task.classes:
        said = "is missing" if target is None else f"is {target!r}"
        raise FinetuneError(f"target {said}, expected one of the classes: {', '.join(task.classes)}.")
    number = task.classes.index(target)
    return number, (label_N == number).astype(np.float64)


def _finished(work: _Work) -> Attributed:
    return Attributed(
        config=work.config,
        manifest=work.manifest,
        task=work.task,
        asked=work.asked,
        model_hash=hash_model(work.config.model),
        simulated=work.cohort.simulated,
        parts=work.parts,
        mask=work.mask,
        called_N=work.called_N,
        label_N=work.label_N,
        fold_N=work.fold_N,
        site_N=[subject.site for subject in work.cohort.subjects],
        rows=work.rows,
        score_N=work.score_N,
        change_N=work.change_N,
        gap_N=work.gap_N,
        voxels_V=work.voxels_V,
        pool=work.pool,
    )
