"""OpenfMRI, the layout before BIDS: ``sub001/BOLD/task001_run001/bold.nii.gz`` and ``scan_key.txt``."""

import re
from pathlib import Path

import numpy as np

from boldforge.data_shards.dataset_files import files_named, why_refused
from boldforge.data_shards.nifti import LONGEST_TR, SHORTEST_TR, HeaderError, open_bold
from boldforge.data_shards.phenotype import LayoutError, parse_number
from boldforge.data_shards.runs import Run, RunList, Skipped, links_not_entered

_FILE = re.compile(r"bold.*\.nii(\.gz)?$")
_RUN = re.compile(r"task(?P<task>\d+)_run(?P<run>\d+)$")
_SUBJECT = re.compile(r"sub(?P<subject>\d+)$")
_NOTE = (
    "OpenfMRI's files lie in the scanner's own space and are placed by their affines alone, so regions of an atlas are "
    "only roughly where they say."
)


def find_openfmri(folder: Path, root: Path) -> RunList:
    """Find ``sub<n>/BOLD/task<n>_run<n>/bold*.nii[.gz]`` below a folder.

    Of several versions of a run the one with the smallest voxels is taken, and by name where they are alike. The
    repetition time is that of ``scan_key.txt`` in the study's folder, else the header's.

    Raises
    ------
    LayoutError
        If the folder holds several studies: their sub001 is another person in each.
    """
    versions: dict[Path, list[Path]] = {}
    for path in files_named(folder, _FILE):
        if is_openfmri(path):
            versions.setdefault(path.parent, []).append(path)
    studies = sorted({place.parents[2] for place in versions})
    if len(studies) > 1:
        raise LayoutError(
            f"{folder}: holds several studies, {studies[0]} and {studies[1]} among them, and sub001 is another person "
            "in each; give the folder of one, or a table of the runs (runs.tsv) in which every person has another name."
        )
    tr, note = _scan_key_tr(studies[0] / "scan_key.txt", root) if studies else (None, None)
    runs, skipped = [], links_not_entered(folder)
    for place, paths in versions.items():
        inside = [path for path in paths if why_refused(path, root) is None] or paths
        taken = min(inside, key=lambda path: (_voxel_volume(path), path.name))
        skipped += [
            Skipped(path, f"is another version of {taken.name}, which was taken.") for path in paths if path != taken
        ]
        name, owner = _RUN.match(place.name), _SUBJECT.match(place.parents[1].name)
        assert name is not None and owner is not None, "is_openfmri has matched both"
        runs.append(Run(owner["subject"], None, None, tr, taken, task=name["task"], number=name["run"]))
    notes = (_NOTE,) if note is None else (_NOTE, note)
    return RunList(tuple(runs), tuple(skipped), "openfmri", notes if runs else ())


def is_openfmri(path: Path) -> bool:
    """Say whether a file lies where OpenfMRI keeps its runs."""
    return (
        _FILE.match(path.name) is not None
        and _RUN.match(path.parent.name) is not None
        and path.parents[1].name == "BOLD"
        and _SUBJECT.match(path.parents[2].name) is not None
    )


def _voxel_volume(path: Path) -> float:
    try:
        return round(abs(float(np.linalg.det(open_bold(path, tr=1.0).affine[:3, :3]))), 3)
    except HeaderError:
        return float("inf")


def _scan_key_tr(path: Path, root: Path) -> tuple[float | None, str | None]:
    """Return the repetition time that the file states, or None and, where what it states is of no use, a note."""
    if not path.is_file() or why_refused(path, root) is not None:
        return None, None
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    stated = [words[1] for words in lines if len(words) >= 2 and words[0] == "TR"]
    if not stated:
        return None, None
    tr = parse_number(stated[-1])
    if tr is not None and SHORTEST_TR <= tr <= LONGEST_TR:
        return tr, None
    return None, (
        f"{path}: has the TR {stated[-1][:60]!r}, expected seconds from {SHORTEST_TR:g} to {LONGEST_TR:g}; the "
        "header's is taken. Mend the file or give --source-tr."
    )
