"""The HCP layout, what a dataset's links and tables may lead to, and every missing code of ADHD-200."""

import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import (
    DataRecipe,
    LayoutError,
    Run,
    build_shards,
    check_headers,
    find_runs,
    load_manifest,
    prepare_run,
)
from boldforge.data_shards.layout_adhd200 import PHENOTYPE_COLUMNS

MNI = "space-MNI152NLin2009cAsym"
PLACE_TR = 0.72
RESULTS = "MNINonLinear/Results"


def reasons(found):
    return {path.name: reason for path, reason in found.skipped}


def test_hcp_runs_are_found_with_their_masks_and_header_tr(place):
    place(
        f"100307/{RESULTS}/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz",
        f"100307/{RESULTS}/rfMRI_REST1_LR/rfMRI_REST1_LR_hp2000_clean.nii.gz",
        f"100307/{RESULTS}/rfMRI_REST1_LR/rfMRI_REST1_LR_SBRef.nii.gz",
        f"100307/{RESULTS}/rfMRI_REST1_LR/brainmask_fs.2.nii.gz",
        f"100307/{RESULTS}/rfMRI_REST2_RL/rfMRI_REST2_RL_hp2000_clean.nii.gz",
        f"100307/{RESULTS}/tfMRI_MOTOR_LR/tfMRI_MOTOR_LR.nii.gz",
        f"100307/{RESULTS}/rfMRI_REST/rfMRI_REST_hp0_clean.nii.gz",
        f"102311/{RESULTS}/tfMRI_MOVIE1_7T_AP/tfMRI_MOVIE1_7T_AP.nii.gz",
        "100307/T1w/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz",
    )
    root = place(f"HCA6002236_V1_MR/{RESULTS}/rfMRI_REST1_AP/rfMRI_REST1_AP.nii.gz")
    (root / "unrestricted_someone_1_2.csv").write_text(
        "Subject,Release,Gender,Age,PMAT24_A_CR\n100307,Q1,F,26-30,17\n102311,Q1,M,31-35,\n"
    )
    (root / "RESTRICTED_someone_1_2.csv").write_text("Subject,Age_in_Yrs,ZygosityGT\n100307,27,MZ\n")
    found = check_headers(find_runs(root))
    assert found.layout == "hcp"
    assert [run.key for run in found.runs] == [
        "sub-100307_task-motor_run-LR",
        "sub-100307_task-rest_run-REST1LR",
        "sub-100307_task-rest_run-REST2RL",
        "sub-102311_task-movie_run-17TAP",
        "sub-HCA6002236_ses-V1_task-rest_run-REST1AP",
    ]
    assert {run.tr for run in found.runs} == {0.72}
    rest = found.runs[1]
    assert rest.path.name == "rfMRI_REST1_LR.nii.gz"
    assert rest.mask_path.name == "brainmask_fs.2.nii.gz"
    assert rest.phenotype == {"sex": "F", "age": 27.0, "age_range": "26-30"}
    assert found.runs[2].path.name == "rfMRI_REST2_RL_hp2000_clean.nii.gz"
    assert (found.runs[3].phenotype["sex"], found.runs[4].phenotype) == ("M", {})
    assert "another version of rfMRI_REST1_LR.nii.gz" in reasons(found)["rfMRI_REST1_LR_hp2000_clean.nii.gz"]
    assert "no single run" in reasons(found)["rfMRI_REST_hp0_clean.nii.gz"]
    assert len(found.skipped) == 2
    image = nib.load(rest.path)
    front = np.zeros(image.shape[:3], dtype=np.uint8)
    front[:, 7:] = 1
    nib.save(nib.Nifti1Image(front, image.affine), rest.mask_path)
    prepared = prepare_run(rest, DataRecipe(grid="mni4mm", tr=0.72))
    assert prepared.source_tr == 0.72
    assert 0.2 < prepared.covered.mean() < 0.8


def test_a_hidden_folder_is_not_searched(place):
    root = place(f"sub-01_task-rest_{MNI}_bold.nii.gz", f".git/sub-02_task-rest_{MNI}_bold.nii.gz")
    assert [run.subject for run in find_runs(root).runs] == ["01"]


def test_annexed_content_inside_the_dataset_is_read_and_missing_content_is_told(place):
    name, gone = (f"sub-0{i}_task-rest_{MNI}_bold.nii.gz" for i in (1, 2))
    root = place(f".git/annex/objects/x1/MD5E-s1--aa.nii.gz/{name}", name)
    for link, target in ((name, f".git/annex/objects/x1/MD5E-s1--aa.nii.gz/{name}"), (gone, ".git/annex/objects/x2/b")):
        (root / link).unlink(missing_ok=True)
        (root / link).symlink_to(target)
    found = check_headers(find_runs(root))
    assert [run.subject for run in found.runs] == ["01"]
    assert "datalad get" in reasons(found)[gone]


@pytest.mark.parametrize("what", ["bold", "mask", "confounds"])
def test_a_link_out_of_the_dataset_is_refused(place, tmp_path, what):
    stem = f"sub-01_task-rest_{MNI}"
    names = {
        "bold": f"{stem}_desc-preproc_bold.nii.gz",
        "mask": f"{stem}_desc-brain_mask.nii.gz",
        "confounds": "sub-01_task-rest_desc-confounds_timeseries.tsv",
    }
    root = place(*names.values())
    secret = tmp_path / "elsewhere.nii.gz"
    shutil.copy(root / names["bold"], secret)
    (root / names[what]).unlink()
    (root / names[what]).symlink_to(secret)
    found = find_runs(root)
    assert not found.runs
    assert f"leads out of {root} to {secret}, so it is not read" in reasons(found)[names["bold"]]
    assert [run.subject for run in find_runs(root, root=tmp_path).runs] == ["01"]
    with pytest.raises(LayoutError, match="does not lie in"):
        find_runs(root, root=root / "sub")


def test_a_linked_folder_outside_is_told_and_one_inside_is_found_where_it_is(place, tmp_path):
    name = f"sub-01_task-rest_{MNI}_bold.nii.gz"
    root = place(f"real/{name}")
    (tmp_path / "other").mkdir()
    (root / "outside").symlink_to(tmp_path / "other")
    (root / "inside").symlink_to(root / "real")
    (root / "real/loop").symlink_to(root)
    found = find_runs(root)
    assert [run.path for run in found.runs] == [root / "real" / name]
    assert [path.name for path, _ in found.skipped] == ["outside"]


@pytest.mark.parametrize("layout", ["bids", "adhd200", "hcp"])
def test_a_phenotype_table_that_leads_out_is_refused(place, tmp_path, layout):
    files = {
        "bids": (f"sub-01_task-rest_{MNI}_bold.nii.gz", "participants.tsv"),
        "adhd200": ("NYU/sfnwmrda0010001_session_1_rest_1.nii.gz", "phenotypes.tsv"),
        "hcp": (f"1/{RESULTS}/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz", "participants.tsv"),
    }
    name, table = files[layout]
    root = place(name)
    (tmp_path / "private.tsv").write_text("participant_id\tScanDir ID\nroot\t1\n")
    (root / table).symlink_to(tmp_path / "private.tsv")
    with pytest.raises(LayoutError, match="leads out of"):
        find_runs(root)


def test_a_table_cannot_name_files_outside_its_folder(place, tmp_path):
    root = place("a.nii.gz", "deeper/b.nii.gz")
    outside = tmp_path / "c.nii.gz"
    shutil.copy(root / "a.nii.gz", outside)
    rows = ["a.nii.gz\tP1", f"{root}/deeper/b.nii.gz\tP2", "../c.nii.gz\tP3", f"{outside}\tP4", "/etc/passwd\tP5"]
    (root / "runs.tsv").write_text("path\tsubject\n" + "\n".join(rows) + "\n")
    found = find_runs(root)
    assert [run.subject for run in found.runs] == ["P1", "P2"]
    assert [reason.split(" names a file that ")[0] for _, reason in found.skipped] == [
        f"line {line} of runs.tsv" for line in (4, 5, 6)
    ]
    assert all("leads out of" in reason for _, reason in found.skipped)
    assert len(find_runs(root, root=tmp_path).runs) == 4


def test_voxels_beside_a_header_may_not_lie_elsewhere_either(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    nib.save(nib.Nifti1Pair(np.ones((3, 4, 5, 6), dtype=np.int16), np.eye(4)), root / "a.img")
    (root / "a.img").replace(tmp_path / "b.img")
    (root / "a.img").symlink_to(tmp_path / "b.img")
    (root / "runs.tsv").write_text("path\tsubject\na.hdr\tP1\n")
    found = find_runs(root)
    assert not found.runs
    assert "its a.img leads out of" in reasons(found)["a.hdr"]
    assert find_runs(root, root=tmp_path).runs


def test_a_folder_that_cannot_be_listed_is_told(place, monkeypatch, caplog):
    root = place(f"sub-01_task-rest_{MNI}_bold.nii.gz", f"closed/sub-02_task-rest_{MNI}_bold.nii.gz")
    scandir = os.scandir

    def scan(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert [run.subject for run in find_runs(root).runs] == ["01"]
    assert "closed: cannot be listed" in caplog.text


@pytest.mark.parametrize("subject", ["../../etc/passwd", "a/b", "x\0y", "..", "sub.01"])
def test_no_name_of_a_run_can_be_a_path(subject):
    key = Run(subject, None, None, None, "x").key
    assert not set(key) & set("/\\.\0")


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), np.float32("inf")])
def test_a_run_made_by_hand_has_no_infinite_phenotype(place, tmp_path, number):
    path = place("a.nii.gz") / "a.nii.gz"
    run = Run("P1", None, None, None, path, phenotype={"x": number, "age": np.int64(7), "sex": "F"})
    assert run.phenotype == {"x": None, "age": 7.0, "sex": "F"}
    build_shards([run], tmp_path / "out", DataRecipe(grid="mni4mm", tr=0.72))
    assert load_manifest(tmp_path / "out").runs[0].phenotype == run.phenotype
    with pytest.raises(LayoutError, match="expected a number, a text or None"):
        Run("P1", None, None, None, path, phenotype={"x": [1]})


@pytest.mark.parametrize("code", ["", "N/A", "n/a", "pending", "-999", "-999.0", "-999.00", " N/A "])
@pytest.mark.parametrize("column", [name for name in PHENOTYPE_COLUMNS if name not in ("ScanDir ID", "DX")])
def test_every_missing_code_of_adhd200_is_read_as_unknown(tmp_path, column, code):
    (tmp_path / "NYU").mkdir()
    (tmp_path / "NYU/sfnwmrda0010001_session_1_rest_1.nii.gz").write_bytes(b"")
    row = {"ScanDir ID": "10001", "Site": "5", "Gender": "1", "Age": "9", "DX": "2", "Handedness": "1"} | {column: code}
    table = "\t".join(PHENOTYPE_COLUMNS) + "\n" + "\t".join(row.get(name, "-999") for name in PHENOTYPE_COLUMNS) + "\n"
    (tmp_path / "ADHD200_preprocessed_phenotypics.tsv").write_text(table)
    (run,) = find_runs(tmp_path).runs
    assert run.site == "NYU"  # by its number or by its folder
    wanted = {"diagnosis": 1.0, "dx": 2.0, "age": 9.0, "sex": "M", "handedness": 1.0}
    wanted |= {"Age": {"age": None}, "Gender": {"sex": None}, "Handedness": {"handedness": None}}.get(column, {})
    known = {name: value for name, value in run.phenotype.items() if value is not None or name in wanted}
    assert known == wanted


DIAGNOSES = {"0": 0.0, "1": 1.0, "2": 1.0, "3": 1.0, "-999": None, "": None, "N/A": None}


@pytest.mark.parametrize(("dx", "diagnosis"), list(DIAGNOSES.items()))
def test_adhd200_diagnoses(tmp_path, dx, diagnosis):
    (tmp_path / "sfnwmrda0010001_session_1_rest_1.nii.gz").write_bytes(b"")
    (tmp_path / "phenotypes.csv").write_text(f"ScanDir ID,Site,DX\n10001,5,{dx}\n")
    assert find_runs(tmp_path).runs[0].phenotype["diagnosis"] == diagnosis


def test_pending_rows_are_left_out_and_counted(tmp_path):
    for number in (26001, 26002):
        (tmp_path / f"sfnwmrda00{number}_session_1_rest_1.nii.gz").write_bytes(b"")
    rows = "".join(f"{26001 + i},2,{'pending' if i else 0}\n" for i in range(27))
    (tmp_path / "phenotypes.csv").write_text("ScanDir ID,Site,DX\n" + rows)
    found = find_runs(tmp_path)
    assert [run.subject for run in found.runs] == ["0026001"]
    assert len(found.skipped) == 1
    assert found.notes == ("26 of 27 people in phenotypes.csv have a pending DX and are left out.",)


def test_a_sidecar_that_leads_out_is_not_read(place, tmp_path, caplog):
    name = f"sub-01_task-rest_{MNI}_bold"
    root = place(f"{name}.nii.gz")
    (tmp_path / "elsewhere.json").write_text(json.dumps({"RepetitionTime": 9.0}))
    (root / f"{name}.json").symlink_to(tmp_path / "elsewhere.json")
    assert [run.tr for run in check_headers(find_runs(root)).runs] == [0.72]
    assert "so it is not read" in caplog.text


def test_a_single_scan_is_not_taken_for_a_table(tmp_path):
    scan = tmp_path / "sub-01_bold.nii.gz"
    scan.write_bytes(b"\x1f\x8b")
    with pytest.raises(LayoutError, match="is one scan, expected a folder of scans"):
        find_runs(scan)


@pytest.mark.parametrize("described", [True, False])
def test_a_sites_table_says_nothing_of_the_people_of_another(place, described):
    place(f"siteA/sub-01/func/sub-01_task-rest_{MNI}_bold.nii.gz")
    root = place(f"siteB/sub-02/func/sub-02_task-rest_{MNI}_bold.nii.gz")
    for site, first_age in (("siteA", 9), ("siteB", 60)):
        (root / site / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{first_age}\nsub-02\t33\n")
        if described:
            (root / site / "dataset_description.json").write_text("{}")
    assert {run.subject: run.phenotype["age"] for run in find_runs(root).runs} == {"01": 9.0, "02": 33.0}
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t10\n")
    assert {run.subject: run.phenotype["age"] for run in find_runs(root).runs} == {"01": 10.0, "02": 33.0}
