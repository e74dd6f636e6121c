import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import LayoutError, find_runs


def _write(path, voxel, frames=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.ones((4, 4, 4, frames), dtype=np.int16), np.diag([voxel, voxel, voxel, 1.0]))
    image.header.set_zooms((voxel, voxel, voxel, 1.0))
    nib.save(image, path)
    return path


@pytest.fixture
def study(tmp_path):
    for subject in ("sub001", "sub002"):
        for run in (1, 2):
            place = tmp_path / subject / "BOLD" / f"task001_run{run:03d}"
            _write(place / "bold_coarse.nii.gz", 20.0)
            _write(place / "bold.nii.gz", 3.0)
    _write(tmp_path / "sub001" / "anatomy" / "bold_like.nii.gz", 1.0)
    (tmp_path / "scan_key.txt").write_text("TR 2.5\n")
    return tmp_path


def test_runs_are_found_and_the_finer_version_is_taken(study):
    found = find_runs(study)
    assert found.layout == "openfmri" and "placed by their affines alone" in found.notes[0]
    assert [run.key for run in found.runs] == [
        f"sub-{subject}_task-001_run-{run}" for subject in ("001", "002") for run in ("001", "002")
    ]
    assert {run.path.name for run in found.runs} == {"bold.nii.gz"} and {run.tr for run in found.runs} == {2.5}
    assert [skipped.reason for skipped in found.skipped] == ["is another version of bold.nii.gz, which was taken."] * 4


def test_without_a_scan_key_the_header_is_asked(study):
    (study / "scan_key.txt").write_text("slices 36\nTR\n")
    assert {run.tr for run in find_runs(study).runs} == {None}


def test_a_version_that_cannot_be_read_is_not_preferred(study):
    broken = study / "sub001" / "BOLD" / "task001_run001" / "bold.nii.gz"
    broken.write_bytes(b"")
    first = find_runs(study).runs[0]
    assert first.path.name == "bold_coarse.nii.gz"


@pytest.mark.parametrize(
    ("text", "tr"),
    [("TR 2.5\nnotes \n", 2.5), ("TR \n", None), (" \nTR 2.5\n", 2.5), ("TR\t2.5", 2.5), ("", None), ("TRs 3\n", None)],
)
def test_any_scan_key_is_read(study, text, tr):
    (study / "scan_key.txt").write_text(text)
    found = find_runs(study)
    assert {run.tr for run in found.runs} == {tr} and len(found.notes) == 1


@pytest.mark.parametrize("stated", ["2500", "0", "two", "inf"])
def test_a_scan_key_without_seconds_is_told_and_the_header_is_asked(study, stated):
    (study / "scan_key.txt").write_text(f"TR {stated}\n")
    found = find_runs(study)
    assert {run.tr for run in found.runs} == {None}
    assert f"scan_key.txt: has the TR '{stated}', expected seconds" in found.notes[1]


def test_several_studies_are_not_taken_for_one(tmp_path):
    _write(tmp_path / "ds1" / "sub001" / "BOLD" / "task001_run001" / "bold.nii.gz", 3.0)
    (tmp_path / "ds1" / "scan_key.txt").write_text("TR 2.5\n")
    assert [run.tr for run in find_runs(tmp_path).runs] == [2.5]
    _write(tmp_path / "ds2" / "sub001" / "BOLD" / "task001_run002" / "bold.nii.gz", 3.0)
    with pytest.raises(LayoutError, match=r"holds several studies, .*ds1 and .*ds2 among them.*give the folder of one"):
        find_runs(tmp_path)
