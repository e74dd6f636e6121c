"""ADHD-200 as the Athena pipeline distributes it: residuals at 4 mm in site folders, and a phenotype table."""

import re
from pathlib import Path

from boldforge.data_shards.dataset_files import files_named, why_refused
from boldforge.data_shards.nifti import HeaderError, open_bold
from boldforge.data_shards.phenotype import (
    LayoutError,
    Phenotype,
    parse_diagnosis,
    parse_number,
    parse_value,
    read_table,
)
from boldforge.data_shards.runs import Run, RunList, Skipped, links_not_entered

# fmt: off
PHENOTYPE_COLUMNS = (
    "ScanDir ID", "Site", "Gender", "Age", "Handedness", "DX", "Secondary Dx", "ADHD Measure", "ADHD Index",
    "Inattentive", "Hyper/Impulsive", "IQ Measure", "Verbal IQ", "Performance IQ", "Full2 IQ", "Full4 IQ", "Med Status",
    "QC_Athena", "QC_NIAK",
)
# fmt: on
SITE_NAMES = {1: "Peking", 2: "Brown", 3: "KKI", 4: "NeuroIMAGE", 5: "NYU", 6: "OHSU", 7: "Pittsburgh", 8: "WashU"}
# As the consortium publishes them; used only where a file's header has no repetition time.
SITE_TRS = {"Peking": 2.0, "KKI": 2.5, "NeuroIMAGE": 1.96, "NYU": 2.0, "OHSU": 2.5, "Pittsburgh": 1.5, "WashU": 2.5}
SIMULATION_FILE = "simulation.json"

_EXPECTED = "sfnwmrda<ID>_session_<n>_rest_<m>.nii.gz"
# [0-9]: \d would take the digits of every script.
_NAME = re.compile(r"(?P<kind>sf?nwmrda)(?P<id>[0-9]+)_session_(?P<session>[0-9]+)_rest_(?P<rest>[0-9]+)\.nii(\.gz)?$")
_NEARLY = re.compile(r"s?f?nwmrda.*\.nii(\.gz)?$")
_LONGEST_ID = 12
_SCORES = {
    "ADHD Index": "adhd_index",
    "Inattentive": "inattentive",
    "Hyper/Impulsive": "hyper_impulsive",
    "Handedness": "handedness",
    "Verbal IQ": "verbal_iq",
    "Performance IQ": "performance_iq",
    "Full4 IQ": "full4_iq",
    "Full2 IQ": "full2_iq",
    "QC_Athena": "qc_athena",
}


def find_adhd200(folder: Path, root: Path, band_passed: bool = True) -> RunList:
    """Find Athena volumes below a folder and join them with the phenotype table.

    DX 1, 2 and 3 are all ADHD (``diagnosis``); the code itself is kept as ``dx``. Rows whose DX is ``pending`` are left
    out; a run without a row is skipped with the mend.

    Raises
    ------
    LayoutError
        If there is no phenotype table, it has no ``ScanDir ID`` column, or two tables disagree on a person.
    """
    wanted, skipped = _one_kind(folder, "sfnwmrda" if band_passed else "snwmrda")
    if not wanted and not skipped:
        return RunList((), (), "adhd200")
    table, rows = _read_phenotypes(folder, root)
    simulated = (folder / SIMULATION_FILE).is_file()
    skipped += links_not_entered(folder)
    runs = []
    for path, name in wanted:
        if (reason := why_refused(path, root)) is not None:  # before its header is read
            skipped.append(Skipped(path, reason))
            continue
        row = rows.get(int(name["id"]))
        if row is None:
            reason = (
                f"subject {name['id']} has no row in {table.name}; add one (ScanDir ID, Site, DX) or remove the file."
            )
            skipped.append(Skipped(path, reason))
        elif row.get("DX", "").lower() == "pending":
            skipped.append(
                Skipped(path, f"its DX in {table.name} is pending, so its group is not known; set DX to use it.")
            )
        else:
            runs.append(_run(path, name, row, simulated))
    pending = sum(row.get("DX", "").lower() == "pending" for row in rows.values())
    notes = [f"{pending} of {len(rows)} people in {table.name} have a pending DX and are left out."] if pending else []
    return RunList(tuple(runs), tuple(skipped), "adhd200", tuple(notes))


def _one_kind(folder: Path, kind: str) -> tuple[list[tuple[Path, re.Match[str]]], list[Skipped]]:
    """Choose between band-passed and plain files: one kind for the whole dataset."""
    named, skipped = [], []
    for path in sorted(files_named(folder, _NEARLY)):
        match = _NAME.match(path.name)
        if match is None:
            skipped.append(Skipped(path, f"is not named as Athena's volumes are ({_EXPECTED}); rename it to use it."))
        else:
            named.append((path, match))
    if named and not any(match["kind"] == kind for _, match in named):
        kind = named[0][1]["kind"]
    taken = {(match["id"], match["session"], match["rest"]) for _, match in named if match["kind"] == kind}
    for path, match in named:
        if match["kind"] != kind and (match["id"], match["session"], match["rest"]) not in taken:
            reason = (
                f"exists only as {match['kind']} while {kind} files are used; mixing the two would bias the groups."
            )
            skipped.append(Skipped(path, reason))
    return [(path, match) for path, match in named if match["kind"] == kind], skipped


def _run(path: Path, name: re.Match[str], row: dict[str, str], simulated: bool) -> Run:
    number = parse_number(row.get("Site"))
    site = SITE_NAMES.get(int(number), path.parent.name) if number is not None else path.parent.name
    return Run(
        subject=name["id"],
        session=name["session"],
        site=site,
        tr=_header_or_site_tr(path, site),
        path=path,
        phenotype=_phenotype(row),
        task="rest",
        number=name["rest"],
        simulated=simulated,
    )


def _phenotype(row: dict[str, str]) -> Phenotype:
    phenotype: Phenotype = {
        "diagnosis": parse_diagnosis(row.get("DX")),
        "dx": parse_value(row.get("DX")),
        "age": parse_value(row.get("Age")),
        # The table's key: 0 female, 1 male.
        "sex": {0.0: "F", 1.0: "M"}.get(parse_number(row.get("Gender"))),  # type: ignore[arg-type]
    }
    for column, name in _SCORES.items():
        if column in row:
            phenotype[name] = parse_number(row[column])
    return phenotype


def _header_or_site_tr(path: Path, site: str) -> float | None:
    try:
        return open_bold(path).tr
    except HeaderError:
        # Either the header lacks only the TR, which the site tells, or the build will reject the file with the reason.
        return SITE_TRS.get(site)


def _read_phenotypes(folder: Path, root: Path) -> tuple[Path, dict[int, dict[str, str]]]:
    tables = sorted(files_named(folder, re.compile(r".*henotyp.*\.(tsv|csv|txt)$")))
    if not tables:
        raise LayoutError(
            f"{folder}: has ADHD-200 volumes but no phenotype table; put ADHD200_preprocessed_phenotypics.tsv into it."
        )
    rows: dict[int, dict[str, str]] = {}
    origin: dict[int, Path] = {}
    for table in tables:
        for row in read_table(table, root):
            if "ScanDir ID" not in row:
                raise LayoutError(f"{table}: has no column 'ScanDir ID'; its columns are {', '.join(row)}.")
            person = _scan_id(row["ScanDir ID"])
            if person is None:
                continue
            before, now = (parse_diagnosis(each.get("DX")) for each in (rows.get(person, {}), row))
            if person not in rows or (before is None and now is not None):
                rows[person], origin[person] = row, table
            elif now not in (before, None):
                raise LayoutError(
                    f"{table}: gives person {person} another DX ({row['DX']}) than {origin[person]} does "
                    f"({rows[person]['DX']}); give the folder of one study, or correct one of them."
                )
    return tables[0], rows


def _scan_id(text: str) -> int | None:
    """Return a number such as 10001, 0010001 or (as spreadsheets write it) 10001.0; None for anything else."""
    whole = text.removesuffix(".0")
    return int(whole) if whole.isascii() and whole.isdigit() and len(whole) <= _LONGEST_ID else None
