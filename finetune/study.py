"""What a fine-tuning and a sweep have in common: shards, encoder, task, subjects and folds that fit together."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from boldforge.configs import StrictModel, folder_lock
from boldforge.data_shards import CacheConfig, Manifest, ShardReader, ShardsPlace, open_dataset
from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.backbone import POOL_CHOICES, Backbone, Pool
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet, Cohort, OnProgress, Subject, check_recipe, find_cohort, gather_clips
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.fit import TrainingConfig
from boldforge.finetune.folds import Fold, subject_folds
from boldforge.finetune.networks import BackboneSpec, make_backbone, shard_data
from boldforge.finetune.tasks import TASK_CHOICES, Task, get_task

logger = logging.getLogger(__name__)
_SCRATCH = ".boldforge-scratch-"


class StudyConfig(StrictModel):
    """Data, encoder and protocol."""

    shards: ShardsPlace = Field(
        description="Shard folder with phenotypes, or its address (s3://, gs://, hf://, http://, …), made with the "
        "encoder's grid, TR and normalisation."
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
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="Rank, layers and scale of the adapter.")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="Epochs, rates and batch size.")
    folds: int = Field(
        5, ge=2, description="Parts the subjects are dealt into; of 5, one tests, one validates and three train."
    )
    seed: int = Field(0, ge=0, description="Decides folds, first values, order of clips and dropout.")


@dataclass(frozen=True)
class Study:
    """An opened study; see `open_study`.

    ``pretrained_on_these_shards``: the encoder has seen the scans of every subject, test subjects included, though no
    label; the figures then do not say how it does on people whom it has never seen.
    """

    config: StudyConfig
    task: Task
    manifest: Manifest
    cohort: Cohort
    folds: list[Fold]
    pretrained_on_these_shards: bool

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

    def deal(self, seed: int) -> list[Fold]:
        """Deal the subjects into folds, by diagnosis × site."""
        return _deal(self.task, self.cohort, self.config.folds, seed)

    def classifier(self, adapter: AdapterConfig, seed: int | None = None) -> Classifier:
        """Load the encoder afresh, with a new adapter and head (of the study's seed), on the device that is there."""
        seed = self.config.seed if seed is None else seed
        return Classifier(self._backbone(seed), self.task, adapter, seed).to(_device())

    def backbone(self) -> Backbone:
        """Load the encoder afresh, frozen, on the device that is there."""
        backbone = self._backbone(self.config.seed)
        backbone.network.to(_device())
        return backbone

    def gather(self, subjects: Sequence[Subject], folder: Path, on_progress: OnProgress | None = None) -> ClipSet:
        """Read these subjects' clips, up to the first adapted stage, into a new folder."""
        config, backbone = self.config, self.backbone()
        stage = config.adapter.first_stage
        return gather_clips(backbone, stage, ShardReader(self.manifest), subjects, config.clips, folder, on_progress)

    def _backbone(self, seed: int) -> Backbone:
        return make_backbone(
            self.config.backbone, self.config.pool, shard_data(self.manifest, self.config.frames), seed
        )


def open_study(config: StudyConfig) -> Study:
    """Check that shards, encoder and task fit together and deal the subjects into folds; makes the ``out`` folder.

    Raises
    ------
    BoldForgeError
        If they do not fit, or there are too few subjects.
    """
    manifest = open_dataset(config.shards, config.shard_cache)
    task = get_task(config.task, (run.phenotype for run in manifest.runs))
    backbone = make_backbone(config.backbone, config.pool, shard_data(manifest, config.frames), config.seed)
    if not isinstance(config.backbone, Path) and (config.adapter.kind, config.adapter.first_stage) != ("full", 0):
        raise FinetuneError(
            f"backbone {config.backbone.kind} has no pretrained weights to adapt; set adapter.kind to full and "
            "adapter.first_stage to 0."
        )
    check_recipe(backbone, manifest)
    # An adapter that does not fit should be known before the clips are read, which may take hours.
    Classifier(backbone, task, config.adapter)
    cohort = find_cohort(manifest, task, int(backbone.data["clip_length"]))
    if task.kind != "regression" and len({subject.label for subject in cohort.subjects}) < 2:
        raise FinetuneError(
            f"all {len(cohort.subjects)} usable subjects have the same label for task {task.name!r} (column "
            f"{task.column}); give shards with subjects of two classes."
        )
    folds = _deal(task, cohort, config.folds, config.seed)
    seen = backbone.data.get("manifest_hash")  # of an encoder that was pretrained on a mixture, a list
    pretrained_on_these_shards = manifest.content_hash in (seen if isinstance(seen, list) else [seen])
    if pretrained_on_these_shards:
        logger.warning(
            "The encoder was pretrained on these same shards, so it has seen the test subjects' scans, though no "
            "label; for figures on people new to it, give shards of other subjects."
        )
    config.out.mkdir(parents=True, exist_ok=True)
    return Study(config, task, manifest, cohort, folds, pretrained_on_these_shards)


def _deal(task: Task, cohort: Cohort, folds: int, seed: int) -> list[Fold]:
    subjects = cohort.subjects
    names, strata = [subject.name for subject in subjects], task.strata([subject.label for subject in subjects])
    return subject_folds(names, strata, [subject.site for subject in subjects], folds, seed)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
