"""OpenfMRI, the layout before BIDS: ``sub001/BOLD/task001_run001/bold.nii.gz`` and ``scan_key.txt``."""

import re
from pathlib import Path

import numpy as np

from boldforge.data_shards.dataset_files import files_named, why_refused
from boldforge.data_shards.nifti import HeaderError, open_bold
from boldforge.data_shards.phenotype import parse_number
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
    repetition time is that of ``scan_key.txt``, else the header's.
    """
    versions: dict[Path, list[Path]] = {}
    for path in files_named(folder, _FILE):
        if is_openfmri(path):
            versions.setdefault(path.parent, []).append(path)
    tr = _scan_key_tr(folder / "scan_key.txt", root)
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
    return RunList(tuple(runs), tuple(skipped), "openfmri", (_NOTE,) if runs else ())


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


def _scan_key_tr(path: Path, root: Path) -> float | None:
    if not path.is_file() or why_refused(path, root) is not None:
        return None
    words = dict(line.split(maxsplit=1) for line in path.read_text(errors="replace").splitlines() if " " in line)
    return parse_number(words.get("TR"))
