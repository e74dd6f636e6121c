"""Find the runs in a folder, whichever way it is laid out."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from boldforge.data_shards.dataset_files import files_named, is_outside, why_refused
from boldforge.data_shards.layout_adhd200 import find_adhd200
from boldforge.data_shards.layout_bids import find_bids
from boldforge.data_shards.layout_hcp import find_hcp, is_hcp
from boldforge.data_shards.layout_openfmri import find_openfmri, is_openfmri
from boldforge.data_shards.layout_table import find_table
from boldforge.data_shards.nifti import LONGEST_TR, SHORTEST_TR, HeaderError, open_bold
from boldforge.data_shards.phenotype import LayoutError
from boldforge.data_shards.runs import Run, RunList, Skipped

Layout = Literal["auto", "bids", "adhd200", "hcp", "openfmri", "table"]
EXPECTED = {
    "bids": "fMRIPrep names (sub-*_bold.nii.gz)",
    "adhd200": "ADHD-200 Athena names (sfnwmrda<ID>_session_<n>_rest_<m>.nii.gz)",
    "hcp": "HCP folders (<subject>/MNINonLinear/Results/rfMRI_*)",
    "openfmri": "OpenfMRI folders (sub001/BOLD/task001_run001/bold.nii.gz)",
    "table": "a table runs.tsv with the columns path and subject",
}
"""What a folder of each layout holds, as messages say it."""


def find_runs(
    folder: str | Path,
    layout: Layout = "auto",
    tr: float | None = None,
    band_passed: bool = True,
    root: str | Path | None = None,
) -> RunList:
    """Find runs without decoding any of them.

    Parameters
    ----------
    folder
        A BIDS derivatives folder as fMRIPrep writes it (``bids``), an ADHD-200 Athena folder (``adhd200``), subject
        folders of the Human Connectome Project (``hcp``), OpenfMRI's folders from before BIDS (``openfmri``), or a
        table (``table``: a TSV or CSV file, or a folder with ``runs.tsv``).
    layout
        One of the five, or ``auto`` to look at the names.
    tr
        Seconds between frames for every run, in place of what sidecars and headers say.
    band_passed
        For ``adhd200``: take ``sfnwmrda`` files (band-passed) or ``snwmrda`` files (not); never both.
    root
        Nothing outside this folder is read, however links and tables name it; by default `folder`, or the table's own.

    Raises
    ------
    LayoutError
        If the folder does not exist, its layout cannot be told or nothing in it fits the one asked for, it holds
        several datasets or layouts, its table is malformed or lies outside `root`, or `tr` is no repetition time.
    """
    if tr is not None and not SHORTEST_TR <= tr <= LONGEST_TR:
        raise LayoutError(
            f"--source-tr is {tr:g}, expected seconds from {SHORTEST_TR:g} to {LONGEST_TR:g}, for example 2.0."
        )
    folder = Path(folder)
    if not folder.exists():
        raise LayoutError(f"{folder}: no such folder or table of runs.")
    top = folder if folder.is_dir() else folder.parent
    root = top if root is None else Path(root)
    if is_outside(top, root):
        raise LayoutError(f"{folder}: does not lie in {root}, outside of which nothing is read; give another --root.")
    chosen = detect_layout(folder) if layout == "auto" else layout
    finders: dict[str, Callable[[], RunList]] = {
        "bids": lambda: find_bids(folder, root),
        "adhd200": lambda: find_adhd200(folder, root, band_passed),
        "hcp": lambda: find_hcp(folder, root),
        "openfmri": lambda: find_openfmri(folder, root),
        "table": lambda: find_table(folder, root, tr),
    }
    if chosen not in finders:
        raise LayoutError(f"Unknown layout {layout!r}; valid layouts are auto, {', '.join(finders)}.")
    found = finders[chosen]()
    if not found.runs and not found.skipped and not found.notes:
        raise LayoutError(f"{folder}: holds no runs in the layout {chosen}; expected {EXPECTED[chosen]}.")
    found = _without_repeats(_inside(found, root), folder)
    if tr is not None:
        found = replace(found, runs=tuple(replace(run, tr=tr) for run in found.runs))
    return found


def detect_layout(folder: Path) -> str:
    """Tell the layout from the names in a folder.

    Raises
    ------
    LayoutError
        If nothing in it looks like a known layout, or files look like two.
    """
    if folder.is_file() or (folder / "runs.tsv").is_file():
        return "table"
    first: dict[str, Path] = {}
    for path in files_named(folder, re.compile(r".*\.nii(\.gz)?$")):
        if re.match(r"s?f?nwmrda[0-9]", path.name):
            first.setdefault("adhd200", path)
        elif is_hcp(path):
            first.setdefault("hcp", path)
        elif is_openfmri(path):
            first.setdefault("openfmri", path)
        elif re.match(r"sub-[^_]+_.*bold\.nii(\.gz)?$", path.name):
            first.setdefault("bids", path)
    if len(first) > 1:
        seen = ", ".join(f"{layout} ({path.relative_to(folder)})" for layout, path in first.items())
        raise LayoutError(
            f"{folder}: holds files of several layouts, {seen}; give the folder of one study, or choose with --layout."
        )
    if first:
        return next(iter(first))
    *others, last = EXPECTED.values()
    raise LayoutError(f"{folder}: no runs found; expected {', '.join(others)}, or {last}.")


def check_headers(found: RunList) -> RunList:
    """Open every run's header: fill in what it tells, and move runs that cannot be used to the skipped ones."""
    runs, skipped = [], list(found.skipped)
    for run in found.runs:
        try:
            bold = open_bold(run.path, run.tr)
            runs.append(replace(run, tr=bold.tr, simulated=run.simulated or bold.simulated))
        except HeaderError as error:
            skipped.append(Skipped(run.path, str(error)))
    return replace(found, runs=tuple(runs), skipped=tuple(skipped))


def _inside(found: RunList, root: Path) -> RunList:
    """Skip every run of which a file leads out of the root or to nothing, and say which folders were not entered."""
    runs, skipped = [], list(found.skipped)
    for run in found.runs:
        voxels = [run.path.with_suffix(ending) for ending in (".img", ".img.gz")] if run.path.suffix == ".hdr" else []
        beside = [path for path in voxels if path.is_symlink()]
        for path in (run.path, run.mask_path, run.confounds_path, *beside):
            if path is not None and (reason := why_refused(path, root)) is not None:
                skipped.append(Skipped(run.path, reason if path == run.path else f"its {path.name} {reason}"))
                break
        else:
            runs.append(run)
    return replace(found, runs=tuple(runs), skipped=tuple(skipped))


def _without_repeats(found: RunList, folder: Path) -> RunList:
    """Skip runs whose names in the dataset say too little to tell them apart: repeated ones, and empty ones."""
    kept: dict[str, Run] = {}
    skipped = list(found.skipped)
    for run in sorted(found.runs, key=lambda run: (run.key, str(run.path))):
        if re.search("[A-Za-z0-9]", run.subject) is None:
            reason = f"its subject {run.subject!r} has no letter a-z or digit, of which names are made; rename it."
            skipped.append(Skipped(run.path, reason))
        elif run.key in kept:
            skipped.append(Skipped(run.path, _repeated(run, kept[run.key], folder)))
        else:
            kept[run.key] = run
    return replace(found, runs=tuple(kept.values()), skipped=tuple(skipped))


def _repeated(run: Run, first: Run, folder: Path) -> str:
    if run.path == first.path:
        return f"is named twice as the run {run.key}, and taken once; remove one of the rows."
    other = first.path.relative_to(folder) if first.path.is_relative_to(folder) else first.path
    if run.subject != first.subject:
        return (
            f"its subject {run.subject!r} would have the same name in the dataset ({run.key}) as {first.subject!r} of "
            f"{other}, since only letters a-z and digits count; rename one."
        )
    return (
        f"has the same name in the dataset ({run.key}) as {other}, which was taken; if both are to be used, give them "
        "different subjects, sessions or runs."
    )
