"""Which frames of a dataset are for training and which are held out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
from pydantic import Field

from boldforge.configs import StrictModel, folder_lock
from boldforge.configs.durable import write_atomic
from boldforge.data_shards.manifest import MANIFEST_FILE, Manifest, load_manifest
from boldforge.data_shards.split_plan import TRAIN, SplitPlan, drawn_numbers
from boldforge.data_shards.tables import ShardError


class Segment(NamedTuple):
    """Frames [start, stop) of one run, by its index in the manifest."""

    run: int
    start: int
    stop: int


class Segments(Sequence[Segment]):
    """A sequence of segments, kept as a table, int64 [S, 3]: a hundred thousand runs cost no time."""

    def __init__(self, segments: npt.NDArray[np.int64] | Sequence[Segment]) -> None:
        rows = segments.table if isinstance(segments, Segments) else segments
        self.table: npt.NDArray[np.int64] = np.asarray(rows, dtype=np.int64).reshape(-1, 3)

    @overload
    def __getitem__(self, place: int) -> Segment: ...
    @overload
    def __getitem__(self, place: slice) -> "Segments": ...
    def __getitem__(self, place: int | slice) -> "Segment | Segments":
        if isinstance(place, slice):
            return Segments(self.table[place])
        return Segment(*self.table[place].tolist())

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Segment]:
        return map(Segment._make, self.table.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self.table.tobytes())

    def __repr__(self) -> str:
        return f"Segments({len(self)}, {int((self.table[:, 2] - self.table[:, 1]).sum())} frames)"


class Holdout(StrictModel):
    """What is kept away from training."""

    by: Literal["frames", "subject", "split"] = "frames"
    """frames: the end of every run (the only choice with one or two subjects); subject: whole subjects; split: a split
    that the manifest names (see `SplitPlan`)."""
    fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of each run's frames, or expected share of the subjects; 0 holds nothing out. Not used with by=split."""
    seed: int = 0
    """Chooses the subjects: a subject's side follows from its label and this alone, so it stays when others join."""
    split: str = "validation"
    """Which split is held out with by=split."""


def whole_runs(manifest: Manifest) -> Segments:
    """Return one segment per run, with all its frames."""
    frames = manifest.index["n_frames"].astype(np.int64)
    return Segments(np.column_stack([np.arange(len(frames)), np.zeros_like(frames), frames]))


def store_splits(folder: str | Path, plan: SplitPlan) -> Manifest:
    """Write a plan into a dataset's manifest, before anything is trained on it, and return the manifest.

    The manifest's content hash changes with it, and so does the order of a stream.

    Raises
    ------
    ShardError
        If the dataset has another plan already, or one of the plan's splits would hold nobody.
    FolderInUseError
        If another process writes into the folder.
    """
    with folder_lock(folder, "storing its splits"):
        manifest = load_manifest(folder)
        if manifest.splits not in (None, plan):
            raise ShardError(
                f"{manifest.folder}: has a plan of splits already; another one could evaluate on people who were "
                "trained on. Build the shards again to plan anew."
            )
        planned = manifest.placed_in(manifest.folder).model_copy(update={"splits": plan})
        planned = planned.model_copy(update={"content_hash": planned.computed_hash()}).placed_in(manifest.folder)
        for name in plan.names:
            split_runs(planned, name)
        write_atomic(manifest.folder / MANIFEST_FILE, planned.model_dump_json(indent=1).encode())
    return load_manifest(folder)


def split_runs(manifest: Manifest, split: str) -> Segments:
    """Return the whole runs of one split of the manifest's plan.

    Raises
    ------
    ShardError
        If the manifest has no plan, or none of its splits has the name, or no subject is in it.
    """
    plan = manifest.splits
    if plan is None or split not in plan.names:
        found = "no splits" if plan is None else f"the splits {', '.join(plan.names)}"
        raise ShardError(f"{manifest.place}: the manifest has {found}, expected one named {split}; see store_splits.")
    chosen = plan.assign(manifest.index["subject"]) == plan.names.index(split)
    if not chosen.any():
        raise ShardError(
            f"{manifest.place}: no subject is in the split {split}; plan a larger fraction of it, or another seed."
        )
    return Segments(whole_runs(manifest).table[chosen])


def split_segments(manifest: Manifest, holdout: Holdout) -> tuple[Segments, Segments]:
    """Split a dataset into (train, held out).

    ``frames`` holds out the last part of every run, in time, so that no held-out frame lies between two training
    frames. ``subject`` holds out all runs of some subjects. Each is drawn by its label and the seed alone, as in a
    `SplitPlan`: nobody changes sides when subjects are added, so of a few subjects the share is met only roughly.
    ``split`` holds out one split of the manifest's plan. Where the manifest has a plan, training never sees a subject
    who is not in its ``train`` split.

    Raises
    ------
    ShardError
        If subjects are to be held out and there is only one, or all are drawn to one side, or a split is asked for that
        the manifest does not have.
    """
    if holdout.by == "split":
        held = split_runs(manifest, holdout.split)
        return split_runs(manifest, TRAIN), held
    everything = whole_runs(manifest) if manifest.splits is None else split_runs(manifest, TRAIN)
    if holdout.fraction == 0:
        return everything, Segments(())
    if holdout.by == "frames":
        run, start, stop = everything.table.T
        cut = stop - np.ceil(stop * holdout.fraction).astype(np.int64)
        return Segments(np.stack([run, start, cut], axis=1)[cut > 0]), Segments(np.stack([run, cut, stop], axis=1))
    of_run = manifest.index["subject"][everything.table[:, 0]]
    drawn = drawn_numbers(of_run, holdout.seed)
    is_held = drawn < holdout.fraction
    if is_held.all() or not is_held.any():
        raise _one_sided(manifest, holdout, np.unique(drawn))
    return Segments(everything.table[~is_held]), Segments(everything.table[is_held])


def _one_sided(manifest: Manifest, holdout: Holdout, drawn: npt.NDArray[np.float64]) -> ShardError:
    """Say what to do where the seed draws nobody, or everybody; `drawn` holds each subject's number once, ascending."""
    if len(drawn) < 2:
        return ShardError(
            f"{manifest.place}: holds one subject only, so none can be held out; hold out frames "
            "instead (holdout.by=frames)."
        )
    # A fraction between two subjects' numbers parts them; of the nearest pair to what was asked for, the middle.
    pair = slice(0, 2) if holdout.fraction < drawn[1] else slice(-2, None)
    low, high = drawn[pair].tolist()
    fraction = next(
        rounded for places in range(1, 17) if low < (rounded := round((low + high) / 2, places)) < high or places == 16
    )
    n_held = int((drawn < fraction).sum())
    return ShardError(
        f"{manifest.place}: holdout.by=subject with holdout.fraction={holdout.fraction:g} and "
        f"holdout.seed={holdout.seed} draws {'none' if holdout.fraction < fraction else 'all'} of its {len(drawn)} "
        f"subjects; set holdout.fraction={fraction:g}, which holds out {n_held} of them, or hold out frames instead "
        "(holdout.by=frames)."
    )
