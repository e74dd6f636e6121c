"""BIDS derivatives as fMRIPrep writes them: one BOLD file per recording in MNI space, its mask and its sidecar."""

import json
import logging
import re
from pathlib import Path

from boldforge.data_shards.dataset_files import files_named, is_outside
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
        If ``participants.tsv`` has no ``participant_id`` column.
    """
    participants = _read_participants(folder / "participants.tsv", root)
    versions: dict[tuple[tuple[str, str], ...], list[Path]] = {}
    for path in files_named(folder, re.compile(r"sub-.*_bold\.nii(\.gz)?$")):
        recording = tuple(item for item in _entities(path).items() if item[0] not in _VERSION_ENTITIES)
        versions.setdefault(recording, []).append(path)
    runs, skipped = [], links_not_entered(folder)
    for recording, paths in versions.items():
        in_mni = sorted((path for path in paths if _is_mni(path)), key=_preference)
        for path in paths:
            if path not in in_mni:
                skipped.append(
                    Skipped(path, "is not in MNI space (no space-MNI… in its name); give fMRIPrep's MNI output.")
                )
            elif path != in_mni[0]:
                skipped.append(Skipped(path, f"is another version of {in_mni[0].name}, which was taken."))
        if in_mni:
            runs.append(_run(folder, root, in_mni[0], dict(recording), participants))
    return RunList(tuple(runs), tuple(skipped), "bids")


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
    candidates += [folder / f"task-{entities.get('task')}_bold.json"]
    for sidecar in candidates:
        if sidecar.is_file():
            if is_outside(sidecar, root):
                log.warning("%s: leads out of %s, so it is not read.", sidecar, root)
                continue
            try:
                seconds = json.loads(sidecar.read_text()).get("RepetitionTime")
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
                log.warning("%s: is not a JSON object; the repetition time is taken from elsewhere.", sidecar)
                continue
            if isinstance(seconds, int | float) and seconds > 0:
                return float(seconds)
    return None


def _read_participants(path: Path, root: Path) -> dict[str, Phenotype]:
    if not path.is_file():
        return {}
    rows = read_table(path, root)
    if rows and "participant_id" not in rows[0]:
        raise LayoutError(f"{path}: has no column participant_id; its columns are {', '.join(rows[0])}.")
    known = frozenset({"participant_id"})
    return {row["participant_id"].removeprefix("sub-"): canonical(row, known) for row in rows}
