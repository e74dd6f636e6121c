"""What a sweep's trials read: clips of training and validation subjects and, where no layer learns, embeddings."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boldforge.configs.durable import sync_folder
from boldforge.data_shards import ShardReader
from boldforge.finetune.backbone import Backbone
from boldforge.finetune.cohort import ClipSet, OnProgress, Subject, plan_clips
from boldforge.finetune.embedded import EmbeddedClips, embed_clips
from boldforge.finetune.embedding_cache import EmbeddingCache
from boldforge.finetune.study import Study

_EMBEDDINGS = "embeddings.npy"


@dataclass(frozen=True)
class SeenClips:
    """A folder that holds training and validation subjects, and no others.

    Attributes
    ----------
    folder
        Written by `gather_clips`; without ``x.npy`` where all trials train a head alone.
    embedded
        For those trials that do.
    """

    folder: Path
    embedded: EmbeddedClips | None


def gather_seen(
    study: Study,
    subjects: Sequence[Subject],
    kinds: tuple[bool, bool],
    folder: Path,
    cache: EmbeddingCache,
    scratch: Path,
    on_progress: OnProgress | None,
) -> SeenClips:
    """Read the clips that trials see, once; what is there already is kept.

    Parameters
    ----------
    study, subjects
        Whose clips to read.
    kinds
        Whether some trials train a head alone, and whether some adapt layers.
    folder
        Put in place whole.
    cache
        Where embeddings are looked for first.
    scratch
        On the same disk as `folder`.
    on_progress
        Called with clips done and clips in all.
    """
    heads, layers = kinds
    backbone = study.backbone()
    plan = _plan(study, subjects, backbone)
    if not folder.exists():
        made = scratch / "seen"
        if layers:
            study.gather(subjects, made, on_progress)
        else:
            _write_labels(plan, subjects, made)
        _put_in_place(made, folder)
    if not heads:
        return SeenClips(folder, None)
    before, both = (len(plan) if layers else 0), len(plan) * (1 + layers)

    def report(done: int, _: int) -> None:
        if on_progress:
            on_progress(before + done, both)

    reader = ShardReader(study.manifest)
    place = folder / _EMBEDDINGS
    return SeenClips(folder, embed_clips(backbone, reader, subjects, study.config.clips, cache, place, report))


def embed_unseen(study: Study, subjects: Sequence[Subject], cache: EmbeddingCache, scratch: Path) -> ClipSet:
    """Embed the test subjects' clips."""
    backbone, reader = study.backbone(), ShardReader(study.manifest)
    place = scratch / _EMBEDDINGS
    embedded = embed_clips(backbone, reader, subjects, study.config.clips, cache, place)
    numbers = np.array([number for number, _, _ in _plan(study, subjects, backbone)])
    return embedded.load(numbers, np.array([subject.label for subject in subjects]))


def _plan(study: Study, subjects: Sequence[Subject], backbone: Backbone) -> list[tuple[int, int, int]]:
    return plan_clips(study.manifest, subjects, study.config.clips, int(backbone.data["clip_length"]))


def _write_labels(plan: Sequence[tuple[int, int, int]], subjects: Sequence[Subject], folder: Path) -> None:
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.array([subject.label for subject in subjects], dtype=np.float64))
    np.save(folder / "subject.npy", np.array([number for number, _, _ in plan], dtype=np.int64))


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename a folder to where it is looked for, once everything in it is durable."""
    for path in made.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(made)
    made.rename(folder)
    sync_folder(folder.parent)
