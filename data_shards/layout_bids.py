"""BIDS derivatives as fMRIPrep writes them: one BOLD file per recording in MNI space, its mask and its sidecar."""

import json
import logging
import re
from pathlib import Path

from boldforge.data_shards.dataset_files import files_named, is_outside
from boldforge.data_shards.nifti import LONGEST_TR, SHORTEST_TR
from boldforge.data_shards.phenotype import LayoutError, Phenotype, canonical, read_table
from boldforge.data_shards.runs import Run, RunList, Skipped, links_not_entered

log = logging.getLogger(__name__)

# These tell versions of one recording apart; every other entity tells recordings apart.
_VERSION_ENTITIES = ("space", "res", "desc", "cohort")


def find_bids(folder: Path, root: Path) -> RunList:
    """Find ``sub-*_bold.nii[.gz]`` below a folder; of several versions of a recording, the best MNI one is taken.

    Raises
    ------
    LayoutError
        If ``participants.tsv`` has no ``participant_id`` column, or the folder holds several datasets with the same
        subjects.
    """
    versions: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for path in files_named(folder, re.compile(r"sub-.*_bold\.nii(\.gz)?$")):
        recording = tuple(item for item in _entities(path).items() if item[0] not in _VERSION_ENTITIES)
        versions.setdefault(recording, []).append(path)
    runs, skipped = [], links_not_entered(folder)
    mni = {recording: [path for path in paths if _is_mni(path)] for recording, paths in versions.items()}
    datasets = _datasets(folder, mni)
    # Each dataset has its own people, the label sub-01 another one in each; the folder's own table has the last word.
    shared = _read_participants(folder / "participants.tsv", root)
    participants = {dataset: _read_participants(dataset / "participants.tsv", root) | shared for dataset in datasets}
    for recording, paths in versions.items():
        in_mni = sorted(mni[recording], key=_preference)
        for path in paths:
            if path not in in_mni:
                skipped.append(
                    Skipped(path, "is not in MNI space (no space-MNI… in its name); give fMRIPrep's MNI output.")
                )
            elif path != in_mni[0]:
                skipped.append(Skipped(path, f"is another version of {in_mni[0].name}, which was taken."))
        if in_mni:
            dataset, _ = _dataset_of(folder, in_mni[0].parent)
            runs.append(_run(folder, root, in_mni[0], dict(recording), participants[dataset]))
    notes: tuple[str, ...] = ()
    if len(datasets) > 1:
        named = [str(dataset.relative_to(folder)) for dataset in datasets[:4]]
        notes = (f"The runs come from {len(datasets)} folders: {', '.join(named)}{', …' * (len(datasets) > 4)}.",)
    return RunList(tuple(runs), tuple(skipped), "bids", notes)


def _datasets(folder: Path, versions: dict[tuple[tuple[str, str], ...], list[Path]]) -> list[Path]:
    """Return the folders of the datasets that recordings belong to.

    Two with the same subject are refused: in two studies that is two people, in the output of two pipelines one.
    """
    known: dict[Path, tuple[Path, bool]] = {}
    owner: dict[str, Path] = {}
    for recording, paths in versions.items():
        for path in paths:
            if path.parent not in known:
                known[path.parent] = _dataset_of(folder, path.parent)
            dataset, declared = known[path.parent]
            # Folders of loose files may share a subject's recordings out among them, but no recording is in two.
            names = [f"the subject {dict(recording)['sub']}"] if declared else []
            for name in [*names, f"the file {path.name}"]:
                if owner.setdefault(name, dataset) != dataset:
                    raise LayoutError(
                        f"{folder}: holds several datasets, and {name} is both in {owner[name]} and in {dataset}; give "
                        "the folder of one, or a table of the runs (runs.tsv) in which every person has another name."
                    )
    return sorted(set(owner.values()))


def _dataset_of(folder: Path, place: Path) -> tuple[Path, bool]:
    """Return a file's dataset from its folder, and whether a description or the folders of subjects say it is one."""
    within = [parent for parent in (place, *place.parents) if parent.is_relative_to(folder)]
    for parent in within:
        if (parent / "dataset_description.json").is_file():
            return parent, True
    above = [parent for parent in within if parent != folder and parent.name.startswith("sub-")]
    return (above[-1].parent, True) if above else (place, False)


def _run(folder: Path, root: Path, path: Path, entities: dict[str, str], participants: dict[str, Phenotype]) -> Run:
    phenotype = dict(participants.get(entities["sub"], {}))
    site = phenotype.pop("site", None)
    # Entities such as acq, dir and echo also tell recordings apart, so they must reach the run's key.
    others = [name + value for name, value in entities.items() if name not in {"sub", "ses", "task", "run"}]
    return Run(
        subject=entities["sub"],
        session=entities.get("ses"),
        site=None if site is None else str(site),
        tr=_sidecar_tr(folder, root, path, entities),
        path=path,
        mask_path=_mask_beside(path),
        phenotype=phenotype,
        task=entities.get("task"),
        number="".join([entities.get("run", ""), *others]) or None,
        confounds_path=_confounds_beside(path),
    )


def _entities(path: Path) -> dict[str, str]:
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return dict(part.split("-", 1) for part in stem.split("_")[:-1] if "-" in part)


def _is_mni(path: Path) -> bool:
    return _entities(path).get("space", "").startswith("MNI")


def _preference(path: Path) -> tuple[bool, bool, float, str]:
    entities = _entities(path)
    resolution = entities.get("res", "")
    return (
        entities.get("space") != "MNI152NLin2009cAsym",
        entities.get("desc", "preproc") != "preproc",
        # The finest stated resolution but not finer than 2 mm, which only costs reading time.
        abs(float(resolution) - 2) if resolution.isdigit() else 0.5,
        path.name,
    )


def _mask_beside(path: Path) -> Path | None:
    prefix = re.sub(r"(_desc-[^_]+)?_bold\.nii(\.gz)?$", "", path.name)
    for ending in ("_desc-brain_mask.nii.gz", "_desc-brain_mask.nii", "_brainmask.nii.gz"):
        if (path.parent / (prefix + ending)).is_file() or (path.parent / (prefix + ending)).is_symlink():
            return path.parent / (prefix + ending)
    return None


def _confounds_beside(path: Path) -> Path | None:
    """Find the table of confounds, which is the same for every space and resolution of a recording."""
    kept = [part for part in path.name.split("_")[:-1] if part.split("-")[0] not in _VERSION_ENTITIES]
    for ending in ("desc-confounds_timeseries.tsv", "desc-confounds_regressors.tsv"):  # the second until fMRIPrep 1.5
        found = path.parent / "_".join([*kept, ending])
        if found.is_file() or found.is_symlink():
            return found
    return None


def _sidecar_tr(folder: Path, root: Path, path: Path, entities: dict[str, str]) -> float | None:
    """Look for RepetitionTime beside the file, then in the dataset's shared sidecars (BIDS inheritance)."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    candidates = [path.parent / f"{stem}.json", path.parent / (stem.split("_space-")[0] + "_bold.json")]
    shared = f"task-{entities.get('task')}_bold.json"
    candidates += [parent / shared for parent in path.parents if parent.is_relative_to(folder)]
    for sidecar in candidates:
        if sidecar.is_file():
            if is_outside(sidecar, root):
                log.warning("%s: leads out of %s, so it is not read.", sidecar, root)
                continue
            try:
                stated = json.loads(sidecar.read_text()).get("RepetitionTime")
            except (ValueError, RecursionError, AttributeError, OSError):
                log.warning("%s: is not a readable JSON object; the repetition time is taken from elsewhere.", sidecar)
                continue
            if stated is None:
                continue
            number = isinstance(stated, int | float) and not isinstance(stated, bool)
            if number and SHORTEST_TR <= stated <= LONGEST_TR:
                return float(stated)
            log.warning(
                "%s: has the RepetitionTime %.60r, expected seconds; the repetition time is taken from elsewhere.",
                sidecar,
                stated,
            )
    return None


def _read_participants(path: Path, root: Path) -> dict[str, Phenotype]:
    if not path.is_file():
        return {}
    rows = read_table(path, root)
    if rows and "participant_id" not in rows[0]:
        raise LayoutError(f"{path}: has no column participant_id; its columns are {', '.join(rows[0])}.")
    known = frozenset({"participant_id"})
    return {row["participant_id"].removeprefix("sub-"): canonical(row, known) for row in rows}
