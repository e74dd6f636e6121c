"""What a user gets wrong in tables, folders and names: one sentence each, and nothing silently lost."""

import errno
import json
import sys
from pathlib import Path

import pytest

from boldforge.data_shards import (
    BuildError,
    DataRecipe,
    LayoutError,
    RemoteError,
    ShardError,
    build_shards,
    check_headers,
    find_runs,
    load_manifest,
    open_remote,
)
from boldforge.data_shards.layout_adhd200 import PHENOTYPE_COLUMNS
from boldforge.data_shards.phenotype import describe_columns, read_table

MNI = "space-MNI152NLin2009cAsym"
RECIPE = DataRecipe(grid="mni4mm", tr=2.0)


def reasons(found):
    return {path.name: reason for path, reason in found.skipped}


@pytest.mark.parametrize("cell", ["abc", "2,0", "2.0 s", "0", "-2", "inf", "2000", "1e999"])
def test_a_tr_that_is_none_names_its_line_and_column(place, cell):
    root = place("a.nii.gz", "b.nii.gz")
    (root / "runs.tsv").write_text(f'path\tsubject\tTR\n\na.nii.gz\tP1\t1.5\nb.nii.gz\tP2\t"{cell}"\n')
    found = find_runs(root)
    assert [run.subject for run in found.runs] == ["P1"]
    assert f"line 4 of runs.tsv has {cell!r} in the column tr, expected seconds from 0.02 to 100" in found.skipped[0][1]
    assert [run.tr for run in find_runs(root, tr=2.5).runs] == [2.5, 2.5], "given, it takes the place of all others"
    built = build_shards(found, root.parent / "out", RECIPE)
    assert built.manifest.n_runs == 1
    assert "in the column tr, expected seconds" in (root.parent / "out" / "rejected.tsv").read_text()


@pytest.mark.parametrize("cell", ["", "n/a", "-999", "nan"])
def test_a_tr_that_is_missing_is_the_headers(place, cell):
    root = place("a.nii.gz")
    (root / "runs.tsv").write_text(f"path\tsubject\ttr\na.nii.gz\tP1\t{cell}\n")
    assert [run.tr for run in check_headers(find_runs(root)).runs] == [2.0]


@pytest.mark.parametrize("stated", ["2.0", 2000, 0, True, None, float("inf"), [2]])
def test_a_sidecar_without_a_usable_tr_is_told_and_the_headers_is_taken(place, caplog, stated):
    name = f"sub-01_task-rest_{MNI}_bold"
    root = place(f"{name}.nii.gz")
    (root / f"{name}.json").write_text(json.dumps({"RepetitionTime": stated}))
    assert [run.tr for run in check_headers(find_runs(root)).runs] == [2.0]
    assert (f"has the RepetitionTime {stated!r}, expected seconds" in caplog.text) == (stated is not None)


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, "nonsense", "[1]"])
def test_a_sidecar_that_is_no_object_is_told(place, caplog, content):
    name = f"sub-01_task-rest_{MNI}_bold"
    root = place(f"{name}.nii.gz")
    (root / f"{name}.json").write_text(content)
    assert len(find_runs(root).runs) == 1
    assert "is not a readable JSON object" in caplog.text


@pytest.mark.parametrize("tr", [0, 0.0, -1, float("nan"), float("inf"), 2000])
def test_an_impossible_source_tr_is_refused_before_anything_is_looked_at(tmp_path, tr):
    with pytest.raises(LayoutError, match=r"--source-tr is .*, expected seconds from 0.02 to 100"):
        find_runs(tmp_path / "nowhere", tr=tr)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("gone.nii.gz\tP1\t", "names a file that does not exist"),
        ("folder\tP1\t", "names a file that is no file"),
        ("a\0.nii.gz\tP1\t", "has a path that no file can have"),
        ("x" * 300 + "\tP1\t", "has a path that no file can have"),
        ("a.nii.gz\tn/a\t", "has no subject"),
        ("\tP1\t", "has no path"),
        ("a.nii.gz\tP1\tgone.nii.gz", "names the mask gone.nii.gz that does not exist"),
        ("a.nii.gz\tP1\t/etc/passwd", "names the mask /etc/passwd that leads out of"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_and_the_others_are(place, row, reason):
    root = place("a.nii.gz", "folder/b.nii.gz")
    (root / "runs.tsv").write_text(f"path\tsubject\tmask\n{row}\nfolder/b.nii.gz\tP2\tn/a\n")
    found = find_runs(root)
    assert [run.subject for run in found.runs] == ["P2"]
    assert f"line 2 of runs.tsv {reason}" in found.skipped[0][1]


def test_a_cell_keeps_a_newline_and_lines_are_counted_as_an_editor_does(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('\npath,note\r\n"a","two\nlines, one cell"\n\n,\nb,plain \u2028 text\n')
    assert read_table(table) == [
        {"path": "a", "note": "two\nlines, one cell"},
        {"path": "b", "note": "plain \u2028 text"},
    ]


@pytest.mark.parametrize("cell", ['"never closed', '"closed" and more', "x" * 200_000])
def test_a_cell_that_would_take_the_rows_after_it_is_named(tmp_path, cell):
    table = tmp_path / "t.tsv"
    table.write_text(f"participant_id\tnote\nsub-01\tfine\nsub-02\t{cell}\nsub-03\tfine\n")
    with pytest.raises(LayoutError, match=r"t.tsv: the row at line 3 cannot be told apart into cells"):
        read_table(table)


FMRIPREP = f"sub-01/func/sub-01_task-rest_{MNI}_desc-preproc_bold.nii.gz"


@pytest.mark.parametrize(
    "names",
    [
        (f"studyA/{FMRIPREP}", f"studyB/{FMRIPREP}"),
        (f"studyA/{FMRIPREP}", f"studyB/{FMRIPREP.replace('rest', 'nback')}"),
        (FMRIPREP, f"derivatives/xcpd/{FMRIPREP.replace('preproc', 'denoised')}"),
        (f"A/{Path(FMRIPREP).name}", f"B/{Path(FMRIPREP).name}"),
    ],
    ids=["same recording", "same subject", "a pipeline's output inside", "loose files"],
)
def test_two_datasets_in_one_folder_are_not_merged(place, names):
    root = place(*names)
    with pytest.raises(LayoutError, match=r"holds several datasets, and the (subject 01|file sub-01.*) is both in"):
        find_runs(root)
    assert len(find_runs((root / names[1]).parents[2 if "func" in names[1] else 0]).runs) == 1


def test_two_derivatives_with_descriptions_are_two_datasets(place):
    root = place(f"one/{Path(FMRIPREP).name}", f"two/{Path(FMRIPREP).name.replace('rest', 'nback')}")
    assert len(find_runs(root).runs) == 2, "loose files may be sorted by task"
    for name in ("one", "two"):
        (root / name / "dataset_description.json").write_text("{}")
    with pytest.raises(LayoutError, match=rf"the subject 01 is both in {root}/one and in {root}/two"):
        find_runs(root)


def test_sites_with_other_people_each_are_one_study_with_all_their_tables(place):
    root = place(f"KKI/{FMRIPREP}", f"NYU/{FMRIPREP.replace('sub-01', 'sub-02')}")
    for site, person in (("KKI", "01"), ("NYU", "02")):
        (root / site / "participants.tsv").write_text(f"participant_id\tsite\tage\nsub-{person}\t{site}\t9\n")
    found = find_runs(root)
    assert [(run.site, run.phenotype["age"]) for run in found.runs] == [("KKI", 9.0), ("NYU", 9.0)]
    assert found.notes == ("The runs come from 2 folders: KKI, NYU.",)


def test_two_layouts_in_one_folder_are_told(place):
    root = place(FMRIPREP, "NYU/sfnwmrda0010001_session_1_rest_1.nii.gz")
    (root / "phenotypes.csv").write_text("ScanDir ID,Site,DX\n10001,5,0\n")
    with pytest.raises(
        LayoutError, match=r"several layouts, adhd200 \(NYU/sfn.*\), bids \(sub-01/.*\); give the folder"
    ):
        find_runs(root)
    assert [len(find_runs(root, layout).runs) for layout in ("bids", "adhd200")] == [1, 1]


def test_repeated_names_say_which_file_was_taken(place):
    scan = "sfnwmrda0010001_session_1_rest_1.nii.gz"
    root = place(f"a/{scan}", f"b/{scan}")
    (root / "phenotypes.csv").write_text("ScanDir ID,Site,DX\n10001,5,0\n")
    ((path, reason),) = find_runs(root).skipped
    assert path == root / "b" / scan
    assert f"as a/{scan}, which was taken" in reason
    (root / "runs.tsv").write_text(f"path\tsubject\na/{scan}\tP.1\nb/{scan}\tP1\nb/{scan}\té\n")
    one, two = (reason for _, reason in find_runs(root).skipped)
    assert "'P1' would have the same name in the dataset (sub-P1) as 'P.1'" in two + one
    assert "'é' has no letter a-z or digit" in one + two


def test_two_phenotype_tables_that_disagree_on_a_person_are_told(place):
    root = place("a/sfnwmrda0010001_session_1_rest_1.nii.gz")
    for name, dx in (("a", "pending"), ("b", "1"), ("c", "3"), ("d", "N/A")):
        (root / name).mkdir(exist_ok=True)
        (root / name / "phenotypes.csv").write_text(f"ScanDir ID,Site,DX\n10001,5,{dx}\n")
    assert [run.phenotype["diagnosis"] for run in find_runs(root).runs] == [1.0]
    (root / "c" / "phenotypes.csv").write_text("ScanDir ID,Site,DX\n10001,5,0\n")
    with pytest.raises(LayoutError, match=r"c/phenotypes.csv: gives person 10001 another DX \(0\) than .*b/phenotypes"):
        find_runs(root)


@pytest.mark.parametrize("identifier", ["²", "٣", "1e4", "-1", "x", "9" * 5000])
def test_only_plain_digits_are_a_scans_number(place, identifier):
    root = place("sfnwmrda0010001_session_1_rest_1.nii.gz", "sfnwmrda٣_session_1_rest_1.nii.gz")
    row = dict.fromkeys(PHENOTYPE_COLUMNS, "-999")
    lines = [row | {"ScanDir ID": identifier}, row | {"ScanDir ID": "10001.0", "DX": "0"}]
    text = "\n".join("\t".join(line.values()) for line in lines)
    (root / "phenotypes.tsv").write_text("\t".join(PHENOTYPE_COLUMNS) + "\n" + text + "\n")
    found = find_runs(root)
    assert [run.subject for run in found.runs] == ["0010001"]
    assert "is not named as Athena's volumes are" in reasons(found)["sfnwmrda٣_session_1_rest_1.nii.gz"]


def test_a_manifest_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ShardError, match=r"manifest.json: the manifest cannot be read \(Is a directory\); check"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").rmdir()

    for content in ("[" * 100_000, "1" * 5000, '{"schema_version": 2}', "\udcff"):
        (tmp_path / "manifest.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ShardError, match=r"is not a valid manifest|was built by another release"):
            load_manifest(tmp_path)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ShardError, match=r"the manifest cannot be read \(Permission denied\); check .*permissions"):
        load_manifest(tmp_path)


def test_no_reason_repeats_the_file_it_stands_beside(place, tmp_path):
    root = place("sub-01_task-rest_space-MNI152_bold.nii.gz", "sub-02_task-rest_space-MNI152_bold.nii.gz")
    (root / "sub-01_task-rest_space-MNI152_bold.nii.gz").write_bytes(b"")
    whole = (root / "sub-02_task-rest_space-MNI152_bold.nii.gz").read_bytes()
    (root / "sub-03_task-rest_space-MNI152_bold.nii.gz").write_bytes(whole[: len(whole) // 2])
    build_shards(find_runs(root), tmp_path / "out", RECIPE)
    lines = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert [line.count(str(root)) for line in lines] == [0, 1, 1]
    assert lines[1].split("\t")[1].startswith("the file is empty")


def test_files_of_others_stay_where_they_are(place, tmp_path):
    found = find_runs(place("sub-01_task-rest_space-MNI152_bold.nii.gz"))
    out = tmp_path / "analysis"
    out.mkdir()
    for name, content in (
        ("mask.npy", "mine"),
        ("index-mine.npy", "mine"),
        ("manifest.json", '{"name": "a web page"}'),
    ):
        (out / name).write_text(content)
        for overwrite in (False, True):
            with pytest.raises(BuildError, match=rf"holds {name}, which is no part of a dataset"):
                build_shards(found, out, RECIPE, overwrite=overwrite)
        assert (out / name).read_text() == content
        (out / name).unlink()


@pytest.mark.parametrize(("url", "package"), [("s3://a/b", "'boldforge[remote]'"), ("az://a/b", "adlfs")])
def test_a_missing_backend_says_what_to_install(tmp_path, monkeypatch, url, package):
    for module in ("s3fs", "adlfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RemoteError) as caught:
        open_remote(url, tmp_path)
    assert str(caught.value).startswith(f"{url}/manifest.json: needs a package that is not installed")
    assert str(caught.value).endswith(f"pip install {package}")


def test_a_table_with_semicolons_says_so(tmp_path):
    table = tmp_path / "runs.csv"
    table.write_text("path;subject;site\na.nii;1;X\n")
    with pytest.raises(
        LayoutError, match=r"runs\.csv: its columns are separated by semicolons; save it with commas or"
    ):
        read_table(table)
    table.write_text("path;subject\tsite\na;1\tX\n")
    assert read_table(table) == [{"path;subject": "a;1", "site": "X"}], "a semicolon in a name is the table's own"


def test_what_columns_hold_is_told_in_few_words():
    rows = [
        {"age": float(n), "sex": "FM"[n % 2], "score": None, "id": f"x{n}", "mixed": n if n > 3 else "?"}
        for n in range(9)
    ]
    assert describe_columns(rows) == {
        "age": "0 to 8",
        "id": "9 different texts",
        "mixed": "4, 5, 6, 7, 8, ?",
        "score": "empty",
        "sex": "F, M",
    }
