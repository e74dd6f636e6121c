import errno
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from boldforge.configs import BoldForgeError, folder_lock
from boldforge.data_shards import (
    BuildError,
    DataRecipe,
    ShardError,
    ShardReader,
    build_shards,
    find_runs,
    load_manifest,
    plan,
    prepare_run,
    tasks,
)

RECIPE = DataRecipe(grid="mni4mm", tr=2.0)


def name(subject):
    return f"data/sub-{subject}_task-rest_space-MNI152_bold.nii.gz"


@pytest.fixture
def folder(write_bold):
    """Ten runs, three of them bad in different ways."""
    paths = [write_bold(name(f"{i:02d}"), seed=i, tr=2.0 if i != 4 else 0.0) for i in range(10)]
    paths[2].write_bytes(paths[2].read_bytes()[:-2000])
    paths[7].write_bytes(b"")
    return paths[0].parent


def files(out):
    found = (path for path in out.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_bad_runs_are_listed_and_the_rest_is_stored(folder, tmp_path):
    progress = []
    report = build_shards(find_runs(folder), tmp_path / "out", RECIPE, on_progress=lambda *seen: progress.append(seen))
    assert [run.subject for run in report.manifest.runs] == ["00", "01", "03", "05", "06", "08", "09"]
    assert progress[-1] == (10, 10)
    assert sorted(progress) == progress
    rows = (tmp_path / "out/rejected.tsv").read_text().splitlines()
    assert rows[0] == "path\treason"
    assert [row.split("\t")[0].split("sub-")[1][:2] for row in rows[1:]] == ["02", "04", "07"]
    assert "cut short" in rows[1]
    assert "--source-tr" in rows[2]
    assert "0 bytes" in rows[3]
    assert len(report.rejected) == 3
    assert not list((tmp_path / "out").glob(".*"))


def test_stored_values_are_the_prepared_ones(real_shards, real_runs):
    reader = ShardReader(real_shards)
    for index, (run, entry) in enumerate(zip(real_runs.runs, real_shards.runs, strict=True)):
        prepared = prepare_run(run, real_shards.recipe)
        clip = reader.read(index, 0, entry.n_frames)
        np.testing.assert_array_equal(clip.scale > 0, prepared.covered)
        error = np.abs(clip.mean + clip.q * clip.scale - prepared.values_TV)
        assert (error <= 0.51 * clip.scale + 1e-6).all()
        assert entry.tsnr_db > 90
        assert entry.key == run.key
        assert not entry.simulated


def test_int8_keeps_over_45_db_on_real_runs(real_runs, tmp_path):
    manifest = build_shards(real_runs, tmp_path, DataRecipe(grid="mni4mm", tr=2.0, dtype="int8")).manifest
    assert all(run.tsnr_db > 45 for run in manifest.runs)
    assert ShardReader(manifest).read(0, 0, 3).q.dtype == np.int8


# WebDataset leaves the closing of its shards to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_what_pread_reads(real_shards):
    reader = ShardReader(real_shards)
    pattern = str(real_shards.folder / real_shards.shards[0].file)
    samples = {s["__key__"]: s for s in wds.WebDataset(pattern, shardshuffle=False, empty_check=False).decode()}
    assert set(samples) == {run.key for run in real_shards.runs}
    for index, run in enumerate(real_shards.runs):
        clip = reader.read(index, 0, run.n_frames)
        np.testing.assert_array_equal(samples[run.key]["bold.npy"], clip.q)
        np.testing.assert_array_equal(samples[run.key]["scale.npy"], [clip.mean, clip.scale])
        assert samples[run.key]["json"]["subject"] == run.subject


def test_payloads_start_on_a_page_and_nothing_pickled_is_inside(real_shards):
    assert all(run.offset % 4096 == 0 for run in real_shards.runs)
    with tarfile.open(real_shards.folder / real_shards.shards[0].file) as tar:
        endings = {member.name.split(".", 1)[1] for member in tar.getmembers()}
    assert endings == {"bold.npy", "json", "scale.npy", "xxh3.npy"}


def test_manifest_says_what_was_stored(real_shards):
    loaded = load_manifest(real_shards.folder / "manifest.json")
    assert loaded == real_shards
    assert loaded.grid.name == "mni4mm"
    assert loaded.brain_mask().sum() == loaded.n_voxels
    run = loaded.runs[0]
    assert (run.source_tr, run.source_frames, run.n_frames) == (2.2, 82, 90)
    assert run.normalisation.method == "residual-z"
    assert run.normalisation.std > 0
    shard = loaded.folder / loaded.shards[0].file
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == loaded.shards[0].sha256
    assert "nilearn" in loaded.software


@pytest.fixture
def small(write_bold, tmp_path):
    build_shards(find_runs(write_bold(name("01")).parent), tmp_path / "out", RECIPE)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tr": 2.0', '"tr": 2.5', "content hash"),
        ('"schema_version": 2', '"schema_version": 1', "older release .schema version 1.*--overwrite"),
        ('"schema_version": 2', '"schema_version": 9', "schema version 9"),
        ('"file": "index-', '"file": "../index-', "not a valid manifest"),
        ("{", "[", "not a valid manifest"),
    ],
)
def test_an_edited_manifest_is_refused(small, old, new, message):
    path = small / "manifest.json"
    text = json.dumps(json.loads(path.read_text()))
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ShardError, match=message):
        load_manifest(small)


def test_another_mask_is_refused(small):
    mask = np.load(small / "mask.npy")
    np.save(small / "mask.npy", ~mask)
    with pytest.raises(ShardError, match=r"mask\.npy: is not the brain mask"):
        load_manifest(small).brain_mask()


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(ShardError, match="boldforge shard"):
        load_manifest(tmp_path)


def test_an_existing_dataset_is_replaced_only_on_request(small, write_bold):
    found = find_runs(write_bold(name("02"), seed=2).parent)
    before = files(small)
    with pytest.raises(BuildError, match="already holds a dataset; pass --overwrite"):
        build_shards(found, small, RECIPE)
    assert files(small) == before
    assert len(build_shards(found, small, RECIPE, overwrite=True).manifest.runs) == 2


def test_a_dataset_stays_until_the_new_one_is_whole(small, write_bold, monkeypatch):
    before = files(small)
    bad = write_bold("bad/sub-09_task-rest_space-MNI152_bold.nii.gz")
    good = find_runs(bad.parent)
    bad.write_bytes(b"")
    with pytest.raises(BuildError, match="none of the 1 files could be used"):
        build_shards(find_runs(bad.parent), small, RECIPE, overwrite=True)
    assert files(small) == before

    write_bold("bad/sub-09_task-rest_space-MNI152_bold.nii.gz")

    def interrupted(run, recipe, scratch):
        assert load_manifest(small).runs[0].subject == "01"
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "store_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_shards(good, small, RECIPE, overwrite=True)
    assert files(small) == before


def test_a_swap_that_was_cut_short_leaves_no_manifest_and_can_be_done_again(small, write_bold, monkeypatch):
    found = find_runs(write_bold(name("02"), seed=2).parent)
    replace_file = Path.replace

    def replace_until_cut(path, target):
        if Path(target) == small / "mask.npy":
            raise KeyboardInterrupt
        return replace_file(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_until_cut)
        build_shards(found, small, RECIPE, overwrite=True)
    with pytest.raises(ShardError, match="no manifest"):
        load_manifest(small)
    assert build_shards(found, small, RECIPE).manifest == load_manifest(small)
    assert not list(small.glob(".*"))


def test_two_builds_do_not_share_a_folder(small, write_bold):
    found = find_runs(write_bold(name("02"), seed=2).parent)
    before = files(small)
    with folder_lock(small, "writing shards"):
        with pytest.raises(BoldForgeError, match="another process is writing shards in it"):
            build_shards(found, small, RECIPE, overwrite=True)
        assert {path.name for path in small.glob(".*")} == {".boldforge.lock"}
    assert files(small) == before


def test_tar_files_of_others_are_not_overwritten(write_bold, tmp_path):
    found = find_runs(write_bold(name("01")).parent)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shard-000000.tar").write_bytes(b"somebody's work")
    with pytest.raises(BuildError, match="no part of a dataset of ours"):
        build_shards(found, tmp_path / "out", RECIPE)
    assert (tmp_path / "out/shard-000000.tar").read_bytes() == b"somebody's work"


def test_a_killed_build_is_cleaned_up_by_the_next(write_bold, tmp_path):
    found = find_runs(write_bold(name("01")).parent)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.building").mkdir()
    for leftover in (".building/shard-000004.tar", ".building/.shard-000005.tar.partial", "shard-000006.tar"):
        (tmp_path / "out" / leftover).write_bytes(b"half")
    build_shards(found, tmp_path / "out", RECIPE)
    tables = {entry.file for entry in load_manifest(tmp_path / "out").tables.values()}
    whole = {"manifest.json", "mask.npy", "rejected.tsv", "shard-000000.tar"} | tables
    assert {path.name for path in (tmp_path / "out").iterdir()} == whole


def test_no_usable_run_is_an_error_that_names_a_reason(write_bold, tmp_path):
    path = write_bold(name("01"))
    path.write_bytes(b"")
    with pytest.raises(BuildError, match=r"none of the 1 files could be used, the first of them .*: the file is empty"):
        build_shards(find_runs(path.parent), tmp_path / "out", RECIPE)
    assert not (tmp_path / "out/manifest.json").exists()
    assert "is empty" in (tmp_path / "out/rejected.tsv").read_text()
    with pytest.raises(BuildError, match="no runs were given"):
        build_shards([], tmp_path / "out", RECIPE)


@pytest.mark.parametrize("full", ["run", "shard-000000.tar", "shard-000002.tar", "manifest.json"])
def test_no_space_left_keeps_nothing_half_written_and_the_same_command_goes_on(folder, tmp_path, monkeypatch, full):
    monkeypatch.setattr(plan, "SHARD_RUNS", 2)
    found = find_runs(folder)
    build_shards(found, tmp_path / "whole", RECIPE)
    open_file = Path.open

    def open_on_a_full_disk(path, mode="r", *args, **kwargs):
        # /dev/full answers every write as a full disk does.
        this = path.parent.name == "runs" if full == "run" else path.name == f".{full}.partial"
        return open_file(Path("/dev/full") if this and "w" in mode else path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_a_full_disk)
        with pytest.raises(BuildError, match="no space left"):
            build_shards(found, tmp_path / "out", RECIPE)
    assert files(tmp_path / "out") == {}
    assert not list((tmp_path / "out").rglob("*.partial"))
    build_shards(found, tmp_path / "out", RECIPE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*"))


def test_a_source_that_vanishes_while_it_is_read_is_that_runs_fault(folder, tmp_path, monkeypatch):
    found = find_runs(folder)
    open_file = Path.open

    def open_unless_gone(path, *args, **kwargs):
        if path == found.runs[3].path:
            raise OSError(errno.EIO, "Input/output error")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_unless_gone)
    report = build_shards(found, tmp_path / "out", RECIPE)
    assert len(report.manifest.runs) == 6
    assert any("cannot be read any more (Input/output error)" in reason for _, reason in report.rejected)


def test_a_run_mask_limits_what_is_stored(write_bold, tmp_path):
    import nibabel as nib

    path = write_bold(name("01"))
    image = nib.load(path)
    left = np.zeros(image.shape[:3], dtype=np.uint8)
    left[: 77 // 14] = 1
    nib.save(
        nib.Nifti1Image(left, image.affine), path.with_name("sub-01_task-rest_space-MNI152_desc-brain_mask.nii.gz")
    )
    manifest = build_shards(find_runs(path.parent), tmp_path / "out", RECIPE).manifest
    assert 0.3 < manifest.runs[0].coverage < 0.6


@pytest.mark.parametrize("method", ["residual-z", "voxel-z", "global-z"])
def test_voxels_that_resampling_flattens_are_left_out_and_the_run_is_stored(write_bold, tmp_path, method):
    import nibabel as nib

    # At 2.16 s no frame lies near the last of fifteen at 2 s, and these voxels are 0 in all others.
    path = write_bold(name("01"), frames=15)
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[:6, ..., :14] = 0
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    recipe = DataRecipe(grid="mni4mm", tr=2.16, normalisation=method)
    (entry,) = build_shards(find_runs(path.parent), tmp_path / "out", recipe).manifest.runs
    assert 0.3 < entry.coverage < 0.7

    values[..., :14] = 0
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    with pytest.raises(BuildError, match="do not vary over time"):
        build_shards(find_runs(path.parent), tmp_path / "flat", recipe)


def test_importing_the_package_does_not_import_what_takes_long():
    import subprocess
    import sys

    code = "import sys, boldforge.data_shards; print([p for p in ('nilearn', 'zarr', 'ray') if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", "they take long to import"
