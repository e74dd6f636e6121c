"""The same scan twice: one person under two names, or one recording listed as two."""

import logging
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from boldforge.configs import count_of
from boldforge.data_shards import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SameScans:
    """What must be left out, so that no scan is both trained on and tested.

    Attributes
    ----------
    people
        Of the names that share a scan all but the first by name of those with a label, or of all where none has one;
        whose it is nobody here can tell.
    recordings
        Positions of recordings whose scan another recording of the same name has, too, which is kept: one with a label
        before one without, then the earlier.
    """

    people: frozenset[str]
    recordings: frozenset[int]


def find_same_scans(
    owners: Sequence[str],
    recordings: Sequence[Hashable],
    marks: Sequence[Collection[Hashable]],
    labelled: Sequence[bool] | None = None,
) -> SameScans:
    """Find scans that occur twice, and say so in the log.

    Parameters
    ----------
    owners
        The name of each scan's person.
    recordings
        What each scan is a part of; parts of one recording are no copies of each other.
    marks
        Hashes of each scan; two scans with one in common are the same.
    labelled
        Whether each scan has a label; None where that is no difference.
    """
    labelled = [True] * len(owners) if labelled is None else labelled
    named = {owner for owner, known in zip(owners, labelled, strict=True) if known}
    sharing: dict[Hashable, set[str]] = {}
    for owner, own in zip(owners, marks, strict=True):
        for mark in own:
            sharing.setdefault(mark, set()).add(owner)
    joined: dict[str, str] = {}

    def first(name: str) -> str:
        while name in joined:
            name = joined[name]
        return name

    for names in sharing.values():
        kept, *others = sorted({first(name) for name in names})
        joined |= dict.fromkeys(others, kept)
    groups: dict[str, set[str]] = {}
    for name in joined:
        groups.setdefault(first(name), {first(name)}).add(name)
    people = {name for group in groups.values() for name in group - {min(group & named or group)}}
    repeated = _repeated(owners, recordings, marks, labelled)
    if people:
        logger.warning(
            "left out: %s whose scan is also another subject's; check the dataset for people listed twice.",
            count_of(len(people), "subject"),
        )
    if repeated:
        logger.warning(
            "left out: %s whose scan the same subject has under another name, too; check the dataset for "
            "files listed twice.",
            count_of(len(repeated), "recording"),
        )
    return SameScans(frozenset(people), frozenset(repeated))


def _repeated(
    owners: Sequence[str],
    recordings: Sequence[Hashable],
    marks: Sequence[Collection[Hashable]],
    labelled: Sequence[bool],
) -> set[int]:
    """Return the positions of recordings whose scan one that is kept has, too."""
    whole = list(zip(owners, recordings, strict=True))
    named = {recording for recording, known in zip(whole, labelled, strict=True) if known}
    repeated: set[int] = set()
    known: dict[tuple[str, Hashable], Hashable] = {}
    for position in sorted(range(len(whole)), key=lambda position: whole[position] not in named):
        owner, recording = whole[position]
        found = [known.setdefault((owner, mark), recording) for mark in marks[position]]
        if any(other != recording for other in found):
            repeated.add(position)
    return repeated


def same_scans_in(manifest: Manifest, labelled: Sequence[bool] | None = None) -> SameScans:
    """Find runs of the same file, byte for byte, and runs of the same stored voxels, however their files were written.

    Nothing is read but the manifest, which has both hashes. Voxels are compared as the integers that are stored, each
    voxel's own range wide, so that another scale of the whole run does not hide it. `labelled` says of each run whether
    it has a label.
    """
    owners, recordings, marks = [], [], []
    for run in manifest.runs:
        owners.append(run.subject)
        recordings.append(run.key.split("_part-")[0])
        marks.append((run.source_sha256, (run.n_frames, run.hashes_xxh3)))
    return find_same_scans(owners, recordings, marks, labelled)
