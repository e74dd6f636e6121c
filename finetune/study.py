"""What a fine-tuning and a sweep have in common: shards, encoder, task, subjects and folds that fit together."""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from boldforge.configs import StrictModel, check_out, folder_lock
from boldforge.data_shards import CacheConfig, Manifest, ShardReader, ShardsPlace, open_dataset
from boldforge.finetune.adapters import AdapterConfig, resolve_adapter
from boldforge.finetune.backbone import POOL_CHOICES, Backbone, Pool
from boldforge.finetune.baselines import subject_features
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet, OnProgress, check_recipe, find_cohort, gather_clips, write_clips
from boldforge.finetune.embedded import mean_embeddings
from boldforge.finetune.errors import FinetuneError, FoldError
from boldforge.finetune.events import EventsConfig
from boldforge.finetune.fit import TrainingConfig
from boldforge.finetune.fmcib_config import FmcibConfig
from boldforge.finetune.folds import Fold, group_folds, site_folds, subject_folds
from boldforge.finetune.images import ImagesConfig, ImageTable
from boldforge.finetune.networks import BackboneSpec, make_backbone, shard_data
from boldforge.finetune.resnet_rnn import ResnetRnnConfig
from boldforge.finetune.results import pseudonym_key, pseudonyms
from boldforge.finetune.subjects import Cohort, Subject, rows_hash
from boldforge.finetune.tasks import TASK_CHOICES, Task, get_task, named_classes, open_rows
from boldforge.finetune.tasks.base import Matching

logger = logging.getLogger(__name__)
_SCRATCH = ".boldforge-scratch-"

Protocol = Literal["folds", "leave-one-site-out", "leave-one-run-out"]


class StudyConfig(StrictModel):
    """Data, encoder and protocol."""

    product: ClassVar[str] = "a fine-tuning"

    shards: ShardsPlace | None = Field(
        None,
        description="Shard folder with phenotypes, or its address (s3://, gs://, hf://, http://, …), made with the "
        "encoder's grid, TR and normalisation.",
    )
    images: ImagesConfig | None = Field(
        None, description="In place of shards, for backbones that read cubes: a table of 3D images."
    )
    shard_cache: CacheConfig = Field(default_factory=CacheConfig, description="Where what an address gives is kept.")
    backbone: BackboneSpec = Field(
        description="Pretraining run folder, its export/, or a release; or the kind of a network to train from nothing."
    )
    out: Path = Field(description="Folder for the results; made if missing.")
    task: str = Field("adhd", description=f"What to predict: {TASK_CHOICES}.")
    pool: Pool = Field("multiscale", description=POOL_CHOICES)
    frames: int | None = Field(
        None,
        ge=1,
        description="Frames per clip, for an encoder pretrained with model.time=seconds; none: as in pretraining.",
    )
    clips: int = Field(
        4, ge=1, description="Most clips per subject, evenly spaced over its runs; a subject's score is their mean."
    )
    events: EventsConfig = Field(
        default_factory=EventsConfig, description="Where the conditions of task states are, and the delay of BOLD."
    )
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="Rank, layers and scale of the adapter.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Epochs, rates and batch size.")
    folds: int = Field(
        5, ge=2, description="Parts the subjects are dealt into; of 5, one tests, one validates and three train."
    )
    seed: int = Field(0, ge=0, description="Decides folds, first values, order of clips and dropout.")

    @model_validator(mode="after")
    def _one_source(self) -> "StudyConfig":
        if (self.shards is None) == (self.images is None):
            raise ValueError("a study reads shards or images; set exactly one of the two keys")
        if isinstance(self.backbone, FmcibConfig) == (self.images is None):
            raise ValueError("images are read by backbone {kind: fmcib} and by no other; give shards to the others")
        return self


@dataclass(frozen=True)
class Study:
    """An opened study; see `open_study`.

    ``pretrained_on_these_shards``: the encoder has seen the scans of every subject, test subjects included, though no
    label; the figures then do not say how it does on people whom it has never seen.
    """

    config: StudyConfig
    task: Task
    source: Manifest | ImageTable
    cohort: Cohort
    clip_length: int
    pretrained_on_these_shards: bool

    @property
    def manifest(self) -> Manifest:
        """The shards.

        Raises
        ------
        FinetuneError
            If the study is of images.
        """
        if isinstance(self.source, ImageTable):
            raise FinetuneError("a study of images has no shards; a sweep needs shards.")
        return self.source

    @cached_property
    def called(self) -> dict[str, str]:
        """Everybody's pseudonym, the same in all files of the study, in their order."""
        return pseudonyms([row.person for row in self.cohort.subjects], pseudonym_key(self.source))

    @property
    def folds(self) -> list[Fold]:
        """The folds of the study's own seed."""
        return self.deal(self.config.seed)

    def made_from(self) -> dict[str, str]:
        """Return content hashes: of the data, the rows and labels made of it, the labels' meaning, and the weights.

        What was read of events is in the rows and classes; of a table of embeddings there is a hash of its own.
        """
        found = {
            "data": self.source.content_hash,
            "rows": rows_hash(self.cohort.subjects),
            "classes": hashlib.sha256(repr(self.task.classes).encode()).hexdigest(),
            "backbone": self._backbone(self.config.seed).weights_hash,
        }
        if isinstance(self.task, Matching):
            digest = hashlib.sha256()
            for name, tensor in sorted(self.task.tensors.items()):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
            found["embeddings"] = digest.hexdigest()
        return found

    @contextmanager
    def claim_out(self, doing: str) -> Iterator[Path]:
        """Keep ``out`` to this run and lend a scratch folder in it; what a killed run left there is removed.

        Raises
        ------
        FolderInUseError
            If another run writes to the same folder.
        """
        out = self.config.out
        with folder_lock(out, doing):
            # Nobody else holds the folder, so no scratch folder in it is in use.
            for left in out.glob(f"{_SCRATCH}*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=out, prefix=_SCRATCH) as scratch:
                yield Path(scratch)

    def positions(self, names: Sequence[str]) -> list[int]:
        """Return the subjects' positions in the cohort."""
        position = {subject.name: i for i, subject in enumerate(self.cohort.subjects)}
        return [position[name] for name in names]

    def deal(self, seed: int, protocol: Protocol = "folds") -> list[Fold]:
        """Deal the rows into folds: subjects by diagnosis × site; parts of subjects by person, or by run of one."""
        return _deal(self, seed, protocol)

    @property
    def held_apart(self) -> str:
        """Whom or what the folds hold apart, in the plural."""
        several = len({row.person for row in self.cohort.subjects}) > 1
        return "subjects" if several else "runs of one subject"

    def clusters(self) -> list[str]:
        """Name what a row's chance hangs together with: its person or, where there is one person only, its run."""
        rows = self.cohort.subjects
        several = len({row.person for row in rows}) > 1
        return [row.person if several else str(row.runs) for row in rows]

    @property
    def device(self) -> torch.device:
        """Where clips are read and tested: the GPU that is there, unless a sweep's ``gpus`` is 0."""
        wanted = getattr(self.config, "gpus", None) != 0
        return torch.device("cuda" if wanted and torch.cuda.is_available() else "cpu")

    def lifted(self, adapter: AdapterConfig) -> AdapterConfig:
        """Return the same adapter; a head alone with all of the encoder below it, which is then run once per clip."""
        if not adapter.frozen:
            return adapter
        return adapter.model_copy(update={"first_stage": self._backbone(self.config.seed).n_stages})

    def classifier(self, adapter: AdapterConfig, seed: int | None = None) -> Classifier:
        """Load the encoder afresh, with a new adapter and head (of the study's seed), on the study's device."""
        seed = self.config.seed if seed is None else seed
        hidden = getattr(self.config, "head_hidden", 0)
        return Classifier(self._backbone(seed), self.task, adapter, seed, hidden).to(self.device)

    def backbone(self) -> Backbone:
        """Load the encoder afresh, frozen, on the study's device."""
        backbone = self._backbone(self.config.seed)
        backbone.network.to(self.device)
        return backbone

    def gather(
        self,
        subjects: Sequence[Subject],
        folder: Path,
        on_progress: OnProgress | None = None,
        adapter: AdapterConfig | None = None,
    ) -> ClipSet:
        """Read these subjects' clips, up to the first stage of the adapter (the study's own), into a new folder."""
        config, source, backbone = self.config, self.source, self.backbone()
        stage = resolve_adapter(backbone, adapter or config.adapter).first_stage
        if isinstance(source, ImageTable):
            count = sum(len(subject.runs[: config.clips]) for subject in subjects)
            cubes = source.cubes(subjects, config.clips)
            return write_clips(backbone, stage, cubes, count, subjects, folder, on_progress)
        return gather_clips(backbone, stage, ShardReader(source), subjects, config.clips, folder, on_progress)

    def embeddings(self, clips: ClipSet, adapter: AdapterConfig) -> npt.NDArray[Any]:
        """Embed every subject of clips gathered for an adapter, [N, C], by the encoder before any is attached."""
        backbone = self.backbone()
        return mean_embeddings(backbone, resolve_adapter(backbone, adapter).first_stage, clips)

    def features(self, kinds: Sequence[str], advance: Callable[[], None]) -> dict[str, npt.NDArray[Any]]:
        """Compute the baselines' features of every row, those that are not embeddings."""
        rows = self.cohort.subjects
        if isinstance(self.source, ImageTable):
            return self.source.features(rows, kinds, advance)
        return subject_features(ShardReader(self.source), rows, kinds, lambda done, total: advance(), self.clip_length)

    def _backbone(self, seed: int) -> Backbone:
        return make_backbone(self.config.backbone, self.config.pool, _recorded(self.source, self.config.frames), seed)


def open_study(config: StudyConfig) -> Study:
    """Check that shards, encoder and task fit together and deal the subjects into folds; makes the ``out`` folder.

    Raises
    ------
    BoldForgeError
        If they do not fit, or there are too few subjects.
    """
    check_out(config.out, config.product)
    source = (
        ImageTable(config.images)
        if config.images is not None
        else open_dataset(cast(str, config.shards), config.shard_cache)
    )
    backbone = make_backbone(config.backbone, config.pool, _recorded(source, config.frames), config.seed)
    if isinstance(config.backbone, ResnetRnnConfig) and (config.adapter.kind, config.adapter.first_stage) != (
        "full",
        0,
    ):
        raise FinetuneError(
            f"backbone {config.backbone.kind} has no pretrained weights to adapt; set adapter.kind to full and "
            "adapter.first_stage to 0."
        )
    task, cohort, length = _open_rows(config, source, backbone)
    # An adapter that does not fit should be known before the clips are read, which may take hours.
    Classifier(backbone, task, config.adapter)
    if task.kind != "regression" and len({subject.label for subject in cohort.subjects}) < 2:
        raise FinetuneError(
            f"all {len(cohort.subjects)} usable subjects have the same label for task {task.name!r} (column "
            f"{task.column}); give shards with subjects of two classes."
        )
    seen = backbone.data.get("manifest_hash")  # of an encoder that was pretrained on a mixture, a list
    pretrained_on_these_shards = source.content_hash in (seen if isinstance(seen, list) else [seen])
    if pretrained_on_these_shards:
        logger.warning(
            "The encoder was pretrained on these same shards, so it has seen the test subjects' scans, though no "
            "label; for figures on people new to it, give shards of other subjects."
        )
    if task.kind == "regression" and len({subject.label for subject in cohort.subjects}) < 2:
        raise FinetuneError(
            f"all {len(cohort.subjects)} usable subjects have the same value {cohort.subjects[0].label:g} in column "
            f"{task.column} ({cohort.n_unlabelled} have none); there is nothing to foretell, name another column."
        )
    study = Study(config, task, source, cohort, length, pretrained_on_these_shards)
    study.deal(
        config.seed, getattr(config, "protocol", "folds")
    )  # too few subjects should be known before anything is written
    config.out.mkdir(parents=True, exist_ok=True)
    return study


def _open_rows(config: StudyConfig, source: Manifest | ImageTable, backbone: Backbone) -> tuple[Task, Cohort, int]:
    """Return the task, its rows, and the frames of a clip (0 for images)."""
    if isinstance(source, ImageTable):
        task = get_task(config.task, source.phenotypes, people=(image.subject for image in source.images))
        return task, source.find_cohort(task), 0
    check_recipe(backbone, source)
    length = int(backbone.data["clip_length"])
    opened = open_rows(config.task, source, config.events, length)
    if opened is not None:
        return *opened, length
    task = get_task(config.task, (run.phenotype for run in source.runs), people=(run.subject for run in source.runs))
    return task, find_cohort(source, task, length), length


def _recorded(source: Manifest | ImageTable, frames: int | None) -> dict[str, Any]:
    """Return what a backbone records of its input beside what it knows itself."""
    if isinstance(source, ImageTable):
        return {"cube": source.config.cube.model_dump(mode="json")}
    return shard_data(source, frames)


def _deal(study: Study, seed: int, protocol: Protocol) -> list[Fold]:
    rows, folds = study.cohort.subjects, study.config.folds
    names, strata = [row.name for row in rows], study.task.strata([row.label for row in rows])
    sites = [row.site for row in rows]
    whole, classes = study.task.rows == "subjects", named_classes(study.task)
    if protocol == ("leave-one-run-out" if whole else "leave-one-site-out") or (
        study.task.kind == "match" and protocol != "folds"
    ):
        raise FoldError(
            f"protocol {protocol} does not fit task {study.task.name!r}, whose rows are {study.task.rows}; set "
            "protocol to folds."
        )
    if protocol == "leave-one-site-out":
        # A row for every site of a subject, so that one with several is refused.
        placed = [(i, site) for i, row in enumerate(rows) for site in row.sites or (row.site,)]
        at = [i for i, _ in placed]
        placed_sites = [site for _, site in placed]
        return site_folds([names[i] for i in at], [strata[i] for i in at], placed_sites, folds, seed, classes)
    if whole:
        return subject_folds(names, strata, sites, folds, seed, classes)
    runs, every = [str(row.runs) for row in rows], getattr(study.task, "every_class_trains", True)
    if protocol == "folds":
        return group_folds(names, strata, study.clusters(), runs, folds, seed, every, classes)
    return group_folds(names, strata, _run_numbers(rows), runs, None, seed, every, classes)


def _run_numbers(rows: Sequence[Subject]) -> list[str]:
    """Say of every row the how-manieth run of its person it lies in."""
    of_person: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row.runs):
        runs = of_person.setdefault(row.person, [])
        runs += [row.runs[0]] if row.runs[0] not in runs else []
    return [f"{of_person[row.person].index(row.runs[0]):04d}" for row in rows]
