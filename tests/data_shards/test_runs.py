import json

import pytest

from boldforge.data_shards import DataRecipe, LayoutError, build_shards, check_headers, find_runs, load_manifest
from boldforge.data_shards.layout_adhd200 import PHENOTYPE_COLUMNS

MNI = "space-MNI152NLin2009cAsym"


def phenotypes(root, *rows, name="ADHD200_preprocessed_phenotypics.tsv"):
    lines = ["\t".join(PHENOTYPE_COLUMNS)]
    lines += ["\t".join(str(row.get(column, "-999")) for column in PHENOTYPE_COLUMNS) for row in rows]
    (root / name).write_text("\n".join(lines) + "\n")


def reasons(found):
    return {path.name: reason for path, reason in found.skipped}


def test_the_real_runs_are_found_as_bids(real_runs):
    assert real_runs.layout == "bids"
    assert [run.key for run in real_runs.runs] == ["sub-ds205s03_task-localizer", "sub-happy_task-rest"]
    assert [run.tr for run in check_headers(real_runs).runs] == [2.2, 1.16]
    assert not real_runs.skipped


def test_bids_takes_one_version_of_a_recording_and_says_so(place):
    stem = "sub-01/ses-a/func/sub-01_ses-a_task-rest_run-1"
    root = place(
        f"{stem}_{MNI}_res-2_desc-preproc_bold.nii.gz",
        f"{stem}_{MNI}_res-2_desc-smoothed_bold.nii.gz",
        f"{stem}_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz",
        f"{stem}_space-T1w_desc-preproc_bold.nii.gz",
        f"{stem}_{MNI}_res-2_desc-brain_mask.nii.gz",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
    )
    found = find_runs(root)
    (run,) = found.runs
    assert run.path.name.endswith(f"{MNI}_res-2_desc-preproc_bold.nii.gz")
    assert (run.subject, run.session, run.task, run.key) == ("01", "a", "rest", "sub-01_ses-a_task-rest_run-1")
    assert run.mask_path is not None
    assert len(found.skipped) == 4
    assert "not in MNI space" in reasons(found)["sub-02_task-rest_bold.nii.gz"]
    assert "another version" in reasons(found)[f"sub-01_ses-a_task-rest_run-1_{MNI}_res-2_desc-smoothed_bold.nii.gz"]


def test_an_age_that_is_no_number_is_not_taken_for_missing(place):
    root = place(f"sub-01/func/sub-01_task-rest_{MNI}_bold.nii.gz", f"sub-02/func/sub-02_task-rest_{MNI}_bold.nii.gz")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\tabc\nsub-02\tNaN\n")
    assert [run.phenotype["age"] for run in find_runs(root).runs] == ["abc", None]


def test_bids_reads_tr_from_sidecars_and_people_from_participants(place):
    root = place(f"sub-01/func/sub-01_task-rest_{MNI}_bold.nii.gz", f"sub-02/func/sub-02_task-rest_{MNI}_bold.nii.gz")
    (root / f"sub-01/func/sub-01_task-rest_{MNI}_bold.json").write_text(json.dumps({"RepetitionTime": 0.8}))
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tdx\tsite\tscore\nsub-01\t9.5\tFemale\tADHD-Combined\tA\tn/a\nsub-02\tn/a\tM\tcontrol\tB\t3\n"
    )
    one, two = find_runs(root).runs
    assert (one.tr, two.tr) == (0.8, None)
    assert (one.site, two.site) == ("A", "B")
    assert one.phenotype == {"age": 9.5, "sex": "F", "diagnosis": 1.0, "dx": "ADHD-Combined", "score": None}
    assert two.phenotype == {"age": None, "sex": "M", "diagnosis": 0.0, "dx": "control", "score": 3.0}
    assert [run.tr for run in find_runs(root, tr=1.5).runs] == [1.5, 1.5]


def test_bids_recordings_that_differ_only_in_direction_are_both_kept(place):
    root = place(f"sub-01_task-rest_dir-AP_{MNI}_bold.nii.gz", f"sub-01_task-rest_dir-PA_{MNI}_bold.nii.gz")
    assert len({run.key for run in find_runs(root).runs}) == 2


def test_adhd200_joins_the_phenotype_table(place):
    root = place(
        "NYU/sfnwmrda0010001_session_1_rest_1.nii.gz",
        "NYU/sfnwmrda0010002_session_1_rest_2.nii.gz",
        "Peking_1/sfnwmrda1018959_session_1_rest_1.nii.gz",
        "Brown/sfnwmrda0026001_session_1_rest_1.nii.gz",
        "KKI/sfnwmrda2000000_session_1_rest_1.nii.gz",
        "KKI/sfnwmrda3000000_session_1_rest_1.nii.gz",
    )
    phenotypes(
        root,
        {"ScanDir ID": 10001, "Site": 5, "Gender": 1, "Age": 8.5, "DX": 3, "Full4 IQ": 100, "Handedness": "N/A"},
        {"ScanDir ID": 10002, "Site": 5, "Gender": "N/A", "Age": "", "DX": 0, "Verbal IQ": "-999"},
        {"ScanDir ID": 1018959, "Site": 1, "Gender": 0, "Age": 12, "DX": 1},
        {"ScanDir ID": 26001, "Site": 2, "DX": "pending"},
        {"ScanDir ID": 3000000, "Site": 3, "Gender": 0, "DX": "N/A"},
    )
    found = find_runs(root)
    assert found.layout == "adhd200"
    one, two, three, four = found.runs
    assert [run.subject for run in found.runs] == ["0010001", "0010002", "1018959", "3000000"]
    assert [run.site for run in found.runs] == ["NYU", "NYU", "Peking", "KKI"]
    assert [run.phenotype["diagnosis"] for run in found.runs] == [1.0, 0.0, 1.0, None]
    assert [run.phenotype["dx"] for run in found.runs] == [3.0, 0.0, 1.0, None], "subtypes stay apart"
    assert (one.phenotype["age"], one.phenotype["sex"], one.phenotype["full4_iq"]) == (8.5, "M", 100.0)
    assert one.phenotype["handedness"] is None
    assert (two.phenotype["age"], two.phenotype["sex"], two.phenotype["verbal_iq"]) == (None, None, None)
    assert (three.phenotype["sex"], two.number, one.simulated) == ("F", "2", False)
    assert four.tr == 2.0
    assert len(found.skipped) == 2
    assert "pending" in reasons(found)["sfnwmrda0026001_session_1_rest_1.nii.gz"]
    assert "has no row in ADHD200" in reasons(found)["sfnwmrda2000000_session_1_rest_1.nii.gz"]


def test_adhd200_takes_the_sites_tr_where_the_header_has_none(tmp_path, write_bold):
    path = write_bold("data/KKI/sfnwmrda2000000_session_1_rest_1.nii.gz", tr=0.0)
    root = path.parents[1]
    phenotypes(root, {"ScanDir ID": 2000000, "Site": 3, "DX": 0})
    assert find_runs(root).runs[0].tr == 2.5


def test_adhd200_never_mixes_filtered_and_unfiltered(place):
    root = place(
        "NYU/sfnwmrda0010001_session_1_rest_1.nii.gz",
        "NYU/snwmrda0010001_session_1_rest_1.nii.gz",
        "NYU/snwmrda0010002_session_1_rest_1.nii.gz",
    )
    phenotypes(root, {"ScanDir ID": 10001, "Site": 5, "DX": 1}, {"ScanDir ID": 10002, "Site": 5, "DX": 0})
    found = find_runs(root)
    assert [run.path.name for run in found.runs] == ["sfnwmrda0010001_session_1_rest_1.nii.gz"]
    assert "exists only as snwmrda" in reasons(found)["snwmrda0010002_session_1_rest_1.nii.gz"]
    plain = find_runs(root, band_passed=False)
    assert [run.path.name[:7] for run in plain.runs] == ["snwmrda", "snwmrda"]
    assert not plain.skipped
    (root / "NYU/sfnwmrda0010001_session_1_rest_1.nii.gz").unlink()
    assert len(find_runs(root).runs) == 2


def test_adhd200_without_a_table_says_what_to_put_where(place):
    root = place("NYU/sfnwmrda0010001_session_1_rest_1.nii.gz")
    with pytest.raises(LayoutError, match="no phenotype table; put ADHD200_preprocessed"):
        find_runs(root)
    (root / "phenotypes.csv").write_text("ID,DX\n10001,1\n")
    with pytest.raises(LayoutError, match="no column 'ScanDir ID'"):
        find_runs(root)


def test_table_gives_everything_by_column(place):
    root = place("a/first.nii.gz", "b/second.nii.gz")
    (root / "runs.tsv").write_text(
        "path\tsubject\tsession\tSite\tTR\tdiagnosis\tage\n"
        "a/first.nii.gz\tsub-P.1\t2\tX\t1.5\tcontrol\t30\n"
        "b/second.nii.gz\tP2\tn/a\t\t\tADHD\tn/a\n"
        "c/gone.nii.gz\tP3\t1\tX\t1\t\t\n"
        "b/second.nii.gz\tP2\t\t\t\tADHD\t\n"
    )
    found = find_runs(root)
    one, two = found.runs
    assert found.layout == "table"
    assert (one.key, one.site, one.tr) == ("sub-P1_ses-2", "X", 1.5)
    assert one.phenotype == {"diagnosis": 0.0, "dx": "control", "age": 30.0}
    assert (two.key, two.session, two.tr, two.phenotype["diagnosis"]) == ("sub-P2", None, None, 1.0)
    assert "does not exist" in reasons(found)["gone.nii.gz"]
    assert "is named twice as the run sub-P2, and taken once" in reasons(found)["second.nii.gz"]
    assert find_runs(root / "runs.tsv").runs == found.runs


def test_an_unknown_diagnosis_is_kept_so_that_a_task_can_refuse_it(place):
    root = place(*(f"{name}.nii.gz" for name in "abcdef"))
    codes = dict(zip("abcdef", ("Autism", "4", "n/a", "withheld", "none", "2.0"), strict=True))
    rows = [f"{name}.nii.gz\t{name}\t{code}\n" for name, code in codes.items()]
    (root / "runs.tsv").write_text("path\tsubject\tdiagnosis\n" + "".join(rows))
    assert [run.phenotype["diagnosis"] for run in find_runs(root).runs] == ["Autism", 4.0, None, None, None, 1.0]


def test_of_diagnosis_and_dx_each_gives_its_own(place):
    root = place("a.nii.gz", "b.nii.gz")
    (root / "runs.tsv").write_text(
        "path\tsubject\tdiagnosis\tDX\na.nii.gz\tA\tpatient\tF90.0\nb.nii.gz\tB\tNone\tnone\n"
    )
    found = [run.phenotype for run in find_runs(root).runs]
    assert found == [{"diagnosis": 1.0, "dx": "F90.0"}, {"diagnosis": None, "dx": None}]


def test_a_short_line_of_a_table_has_empty_cells_at_its_end(place):
    root = place("a.nii.gz", "b.nii.gz")
    (root / "runs.tsv").write_text("path\tsubject\tsite\tage\na.nii.gz\tP1\nb.nii.gz\n")
    found = find_runs(root)
    assert [(run.subject, run.site, run.phenotype) for run in found.runs] == [("P1", None, {"age": None})]
    assert "line 3 of runs.tsv has no subject" in reasons(found)["b.nii.gz"]


def test_a_number_that_is_not_finite_is_a_missing_one(place):
    root = place("a.nii.gz")
    (root / "runs.tsv").write_text("path\tsubject\tiq\tscore\tage\na.nii.gz\tP1\tInf\t1e999\t-infinity\n")
    assert find_runs(root).runs[0].phenotype == {"iq": None, "score": None, "age": None}
    manifest = build_shards(find_runs(root), root / "out", DataRecipe(grid="mni4mm", tr=2.0)).manifest
    assert load_manifest(root / "out") == manifest


def test_headers_are_checked_before_any_work(place, write_bold):
    root = place("sub-01_task-rest_space-MNI152_bold.nii.gz", "sub-02_task-rest_space-MNI152_bold.nii.gz")
    (root / "sub-02_task-rest_space-MNI152_bold.nii.gz").write_bytes(b"")
    checked = check_headers(find_runs(root))
    assert [run.tr for run in checked.runs] == [2.0]
    assert "is empty" in reasons(checked)["sub-02_task-rest_space-MNI152_bold.nii.gz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "table is empty"),
        ("path\tsubject\n", "a header and no rows"),
        ("path\tid\na\tb\n", "no column 'subject'"),
        ("path\tpath\na\tb\n", "occurs twice"),
    ],
)
def test_malformed_tables_are_explained(tmp_path, content, message):
    (tmp_path / "runs.tsv").write_text(content)
    with pytest.raises(LayoutError, match=message):
        find_runs(tmp_path)


def test_unknown_folders_say_what_was_expected(tmp_path):
    with pytest.raises(LayoutError, match="no runs found; expected fMRIPrep names"):
        find_runs(tmp_path)
    with pytest.raises(LayoutError, match="no such folder"):
        find_runs(tmp_path / "gone")
    with pytest.raises(LayoutError, match="valid layouts are auto, bids, adhd200, hcp, openfmri, table"):
        find_runs(tmp_path, "freesurfer")
