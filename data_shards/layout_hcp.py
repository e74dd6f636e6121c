"""The Human Connectome Project's minimally preprocessed volumes: one folder per run below MNINonLinear/Results."""

import re
from pathlib import Path

from boldforge.data_shards.dataset_files import files_named
from boldforge.data_shards.phenotype import LayoutError, Phenotype, canonical, parse_number, parse_sex, read_table
from boldforge.data_shards.runs import Run, RunList, Skipped, links_not_entered

# rfMRI_REST1_LR, tfMRI_MOTOR_RL; 7 T: rfMRI_REST1_7T_PA; Lifespan: rfMRI_REST1_AP. What follows is a cleaned version.
_RUN = re.compile(
    r"(?P<run>(?P<kind>[rt])fMRI_(?P<task>[A-Za-z]+)(?P<number>[0-9]*)(?P<field>_7T)?_(?P<way>LR|RL|AP|PA))$"
)
_FILE = re.compile(r"[rt]fMRI_.*\.nii(\.gz)?$")
_LIFESPAN = re.compile(r"(?P<subject>HC[AD][0-9]+)_(?P<visit>V[0-9]+)_MR$")
_TABLE = re.compile(r"(participants\.tsv|(un)?restricted.*\.csv)$", re.IGNORECASE)
# Of several versions of a run the first of these is taken: as minimally preprocessed, so that all runs are alike.
_VERSIONS = ("", "_hp2000_clean", "_hp0_clean", "_hp2000_clean_rclean_tclean", "_hp0_clean_rclean_tclean")
_NOT_BOLD = ("_SBRef", "_PhaseOne", "_PhaseTwo", "_mean", "_Jacobian", "_bias", "_vn")


def find_hcp(folder: Path, root: Path) -> RunList:
    """Find ``<subject>/MNINonLinear/Results/<run>/<run>.nii.gz`` below a folder.

    ICA-cleaned files are taken where there are no others.

    Sex, age and the like come from ``participants.tsv`` or from the project's own ``unrestricted*.csv`` and
    ``restricted*.csv`` in the folder; a table's age range stays a text, ``age_range``.

    Raises
    ------
    LayoutError
        If a table has no column of subjects.
    """
    people = _read_people(folder, root)
    versions: dict[Path, dict[str, Path]] = {}
    skipped = []
    for path in files_named(folder, _FILE):
        if path.parent.parent.name != "Results" or path.parents[2].name != "MNINonLinear":
            continue
        name = path.parent.name
        version = _version(path)
        if not path.name.startswith(name) or any(mark in version for mark in _NOT_BOLD):
            continue  # single-band references, masks, bias fields
        if _RUN.match(name) is None:
            skipped.append(
                Skipped(path, f"{name} is no single run of HCP (expected for example rfMRI_REST1_LR); its runs are.")
            )
        else:
            versions.setdefault(path.parent, {})[version] = path
    runs = []
    for place, files in versions.items():
        version = min(files, key=lambda name: (_VERSIONS.index(name) if name in _VERSIONS else len(_VERSIONS), name))
        others = [path for name, path in files.items() if name != version]
        skipped += [Skipped(path, f"is another version of {files[version].name}, which was taken.") for path in others]
        runs.append(_run(place, files[version], people))
    skipped += links_not_entered(folder)
    return RunList(tuple(runs), tuple(skipped), "hcp")


def is_hcp(path: Path) -> bool:
    """Say whether a file lies where HCP keeps its runs."""
    return _FILE.match(path.name) is not None and path.parent.parent.name == "Results"


def _version(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii").removeprefix(path.parent.name)


def _run(place: Path, path: Path, people: dict[str, Phenotype]) -> Run:
    folder = place.parents[2].name
    lifespan = _LIFESPAN.match(folder)
    subject = lifespan["subject"] if lifespan else folder
    name = _RUN.match(place.name)
    assert name is not None
    phenotype = dict(people.get(folder) or people.get(subject, {}))
    site = phenotype.pop("site", None)
    masks = sorted(place.glob("brainmask_fs*.nii*"))
    return Run(
        subject=subject,
        session=lifespan["visit"] if lifespan else None,
        site=None if site is None else str(site),
        tr=None,
        path=path,
        mask_path=masks[0] if masks else None,
        phenotype=phenotype,
        task=name["task"].lower() if name["kind"] == "t" else "rest",
        number=f"{name['task'] if name['kind'] == 'r' else ''}{name['number']}{name['field'] or ''}{name['way']}",
    )


def _read_people(folder: Path, root: Path) -> dict[str, Phenotype]:
    people: dict[str, Phenotype] = {}
    for path in sorted(folder.iterdir()):
        if not _TABLE.match(path.name):
            continue
        for row in read_table(path, root):
            column = next((name for name in ("participant_id", "Subject", "src_subject_id") if name in row), None)
            if column is None:
                raise LayoutError(f"{path}: has no column participant_id or Subject; its columns are {', '.join(row)}.")
            person = people.setdefault(row[column].removeprefix("sub-"), {})
            person.update(canonical(row, frozenset({column.lower()})) if path.suffix == ".tsv" else _hcp_person(row))
    return people


def _hcp_person(row: dict[str, str]) -> Phenotype:
    """Take sex and age from the project's own table; its hundreds of other columns would go into every run's entry."""
    person: Phenotype = {}
    if "Gender" in row:
        person["sex"] = parse_sex(row["Gender"])
    if "Age_in_Yrs" in row:
        person["age"] = parse_number(row["Age_in_Yrs"])
    if "Age" in row:
        person["age_range"] = row["Age"] or None
    return person
