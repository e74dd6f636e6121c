"""Labelled subjects of a shard folder, and their clips ready for training.

Shape suffixes: T frames · V brain voxels.
"""

import errno
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boldforge.configs import count_of, load_config
from boldforge.data_shards import DataRecipe, Manifest, ShardReader
from boldforge.finetune.backbone import Backbone, Partway
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.same_scans import same_scans_in
from boldforge.finetune.subjects import Cohort, Subject, known_sites
from boldforge.finetune.tasks import Task

logger = logging.getLogger(__name__)
OnProgress = Callable[[int, int], None]


def find_cohort(manifest: Manifest, task: Task, clip_length: int) -> Cohort:
    """List the subjects that have a label and a run long enough for one clip.

    Parameters
    ----------
    manifest
        Of the shards.
    task
        Reads the label from the phenotype.
    clip_length
        T, frames.

    Returns
    -------
    Cohort
        Subjects without a label, or with short runs only, are counted and left out; so are subjects who share a scan
        with another one: one person under two names would be trained on and tested.

    Raises
    ------
    FinetuneError
        If no subject has a label, or two runs of one subject disagree.
    """
    runs: dict[str, list[int]] = {}
    for position, run in enumerate(manifest.runs):
        runs.setdefault(run.subject, []).append(position)
    same = same_scans_in(manifest, [task.label(run.phenotype) is not None for run in manifest.runs])
    subjects, n_unlabelled, n_too_short = [], 0, 0
    for name in sorted(runs.keys() - same.people):
        entries = [manifest.runs[position] for position in runs[name]]
        labels = {label for entry in entries if (label := task.label(entry.phenotype)) is not None}
        usable = (position for position in runs[name] if position not in same.recordings)
        long_enough = tuple(p for p in usable if manifest.runs[p].n_frames >= clip_length)
        if len(labels) > 1:
            raise FinetuneError(
                f"subject {name} has different {task.name} labels in different runs; correct the phenotype table and "
                "shard again."
            )
        if not labels:
            n_unlabelled += 1
        elif not long_enough:
            n_too_short += 1
        else:
            sites = known_sites(manifest.runs[p].site for p in long_enough)
            subjects.append(Subject(name, labels.pop(), next(iter(sites), None), long_enough, sites=sites))
    if not subjects:
        remedy = "fill the column in, or name another one" if n_unlabelled else "use an encoder with shorter clips"
        raise FinetuneError(
            f"none of the {len(runs)} subjects in these shards can be used for task {task.name!r}: {n_unlabelled} have "
            f"no label in phenotype column {task.column!r} and {n_too_short} have no run of {clip_length} frames; "
            f"{remedy}."
        )
    n_several_sites = sum(len(subject.sites) > 1 for subject in subjects)
    if n_several_sites:
        logger.warning(
            "Scanned at several sites, so that the site of the first run counts: %s",
            count_of(n_several_sites, "subject"),
        )
    if n_unlabelled or n_too_short:
        logger.info(
            "left out: %s without a label, %d with short runs only", count_of(n_unlabelled, "subject"), n_too_short
        )
    simulated = any(manifest.runs[position].simulated for subject in subjects for position in subject.runs)
    counted = (n_unlabelled, n_too_short, len(same.people), simulated, len(same.recordings), n_several_sites)
    return Cohort(tuple(subjects), *counted)


def check_recipe(backbone: Backbone, manifest: Manifest) -> None:
    """Make sure that the shards are what the encoder reads: same recipe but for the precision, and same brain mask.

    Raises
    ------
    FinetuneError
        Naming what differs and how to shard again.
    """
    wanted = backbone.data
    same = [name for name in DataRecipe.model_fields if name != "dtype"]
    # Not validated: an encoder from elsewhere may name a grid or a TR that no recipe of ours can have.
    pretrained = DataRecipe.model_construct(**_recipe_keys(wanted))
    found, expected = ({name: getattr(recipe, name) for name in same} for recipe in (manifest.recipe, pretrained))
    differing = [f"{key} {found[key]} instead of {expected[key]}" for key in same if found[key] != expected[key]]
    if differing:
        raise FinetuneError(
            f"the shards have {', '.join(differing)}, which the encoder was pretrained on; make shards that fit it: "
            f"boldforge shard FOLDER --out OTHER {pretrained.as_options()}."
        )
    if manifest.mask_sha256 != wanted.get("mask_sha256", manifest.mask_sha256):
        # Voxels go in by their position in the mask: another mask puts them elsewhere in the brain, often unnoticed.
        raise FinetuneError(
            f"{manifest.folder}: the brain mask (sha256 {manifest.mask_sha256[:12]}…) is not the one that the encoder "
            f"was pretrained on ({wanted['mask_sha256'][:12]}…), so its voxels would be taken for others; make the "
            "shards again with the nilearn that made the pretraining's shards (see software in their manifest.json)."
        )


def recipe_of(data: Mapping[str, Any]) -> DataRecipe:
    """Return the recipe by which shards for an encoder are made, from its ``data``.

    Raises
    ------
    ConfigError
        If its input is none that `boldforge shard` can make.
    """
    return load_config(DataRecipe, _recipe_keys(data) | ({"dtype": data["dtype"]} if "dtype" in data else {}))


def _recipe_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    asked = {name: data[name] for name in DataRecipe.model_fields if name in data and name != "dtype"}
    return asked | {"confounds": tuple(data.get("confounds", ()))}


@dataclass(frozen=True)
class ClipSet:
    """Clips of some subjects, as they enter the first adapted stage.

    Attributes
    ----------
    x, pooled
        float32 [n, …] and [n, P], see `Partway`; usually read-only memory maps that many sets and processes share.
    rows
        int64 [clips], which of the n belong to this set.
    subject
        int64 [clips], position in ``labels`` of each clip's subject.
    labels
        float64 [subjects]; whole numbers for classes.
    """

    x: np.ndarray
    pooled: np.ndarray
    rows: np.ndarray
    subject: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def subject_labels(self) -> np.ndarray:
        """float64 [clips], the label of each clip's subject."""
        return self.labels[self.subject]

    def select(self, subjects: Sequence[int]) -> "ClipSet":
        """Keep the clips of these subjects (positions in ``labels``), which are numbered anew in the order given."""
        number = np.full(len(self.labels), -1)
        number[list(subjects)] = np.arange(len(subjects))
        kept = number[self.subject] >= 0
        return replace(
            self, rows=self.rows[kept], subject=number[self.subject[kept]], labels=self.labels[list(subjects)]
        )

    def batch(self, clips: np.ndarray, device: torch.device) -> Partway:
        """Return the clips at these positions."""
        rows = self.rows[clips]
        return Partway(torch.from_numpy(self.x[rows]).to(device), torch.from_numpy(self.pooled[rows]).to(device))

    @classmethod
    def load(cls, folder: Path) -> "ClipSet":
        """Read what `gather_clips` wrote; the clips are mapped, not copied."""
        x, pooled = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "pooled.npy")
        subject, labels = np.load(folder / "subject.npy"), np.load(folder / "labels.npy")
        return cls(x, pooled, np.arange(len(x)), subject, labels)


def gather_clips(
    backbone: Backbone,
    stage: int,
    reader: ShardReader,
    subjects: Sequence[Subject],
    clips: int,
    folder: Path,
    on_progress: OnProgress | None = None,
) -> ClipSet:
    """Read evenly spaced clips of every subject and run what lies below the first adapted stage, once.

    Parameters
    ----------
    backbone
        On the device that is to do the work.
    stage
        First stage that will be adapted.
    reader
        Of the shards.
    subjects
        Whose clips to read.
    clips
        Most clips per subject, spread over its runs.
    folder
        Made for the result; holds these subjects' clips and labels, and no others. Any process maps it into memory
        with `ClipSet.load`.
    on_progress
        Called with clips done and clips in all.

    Returns
    -------
    ClipSet
        Clips in the order of `subjects`.
    """
    length = int(backbone.data["clip_length"])
    plan = plan_clips(reader.manifest, subjects, clips, length)

    def inputs() -> Iterator[tuple[int, torch.Tensor]]:
        for number, run, start in plan:
            clip = reader.read(run, start, length)
            yield number, torch.from_numpy(clip.mean + clip.q * clip.scale).unsqueeze(0)

    return write_clips(backbone, stage, inputs(), len(plan), subjects, folder, on_progress)


def write_clips(
    backbone: Backbone,
    stage: int,
    inputs: Iterable[tuple[int, torch.Tensor]],
    count: int,
    subjects: Sequence[Subject],
    folder: Path,
    on_progress: OnProgress | None = None,
) -> ClipSet:
    """Run inputs through what lies below the first adapted stage and keep what comes out.

    Parameters
    ----------
    backbone, stage, folder, on_progress
        As for `gather_clips`.
    inputs
        Each with its subject's position in `subjects`, as a batch of one.
    count
        How many there are.
    subjects
        Whose they are.

    Returns
    -------
    ClipSet
        In the order of the inputs.
    """
    device = next(backbone.network.parameters()).device
    pooled, owners = [], []
    # Plain writes: through a memory map of a file without blocks, a full disk is a SIGBUS that no program survives.
    with _name_full_disk(folder), (folder / "x.npy").open("wb") as stream:
        for row, (number, values) in enumerate(inputs):
            with torch.no_grad():
                partway = backbone.encode_until(values.to(device), stage)
            entering = partway.x[0].float().cpu().numpy().astype("<f4", copy=False)
            pooled.append(partway.pooled[0].float().cpu().numpy())
            owners.append(number)
            if row == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, *entering.shape)}
                np.lib.format.write_array_header_1_0(stream, header)
            stream.write(entering.tobytes())
            if on_progress:
                on_progress(row + 1, count)
        stream.flush()
        np.save(folder / "pooled.npy", np.stack(pooled))
        np.save(folder / "labels.npy", np.array([subject.label for subject in subjects], dtype=np.float64))
        np.save(folder / "subject.npy", np.array(owners, dtype=np.int64))
    return ClipSet.load(folder)


@contextmanager
def _name_full_disk(folder: Path) -> Iterator[None]:
    """Make the folder; an error of a disk that fills up while something is written into it becomes a sentence."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError as error:
        # numpy's own writes raise an OSError without a number when they come out short.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, None):
            raise
        raise FinetuneError(
            f"{folder}: the disk is full; make room for the clips, choose an out on another disk, or set clips lower."
        ) from error


def plan_clips(manifest: Manifest, subjects: Sequence[Subject], clips: int, length: int) -> list[tuple[int, int, int]]:
    """Say which clips are read: position in `subjects`, run, first frame; in the order of `subjects`."""
    return [
        (number, run, start)
        for number, subject in enumerate(subjects)
        for run, start in _clip_starts(manifest, subject, clips, length)
    ]


def _clip_starts(manifest: Manifest, subject: Subject, clips: int, length: int) -> list[tuple[int, int]]:
    if subject.starts:
        kept = np.linspace(0, len(subject.starts) - 1, min(clips, len(subject.starts))).round().astype(int)
        return [(subject.runs[0], subject.starts[i]) for i in kept]
    starts = []
    for number, run in enumerate(subject.runs):
        share = clips // len(subject.runs) + (number < clips % len(subject.runs))
        last = manifest.runs[run].n_frames - length
        # Centres of equal stretches, so that one clip is the middle of the run and no end is preferred.
        places = {round(last * (2 * i + 1) / (2 * share)) for i in range(share)}
        starts += [(run, start) for start in sorted(places)]
    return starts
