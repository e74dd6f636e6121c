import os
import shutil

import numpy as np
import pytest
import webdataset as wds
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.data_shards import (
    DataRecipe,
    ShardError,
    ShardReader,
    build_shards,
    export_zarr,
    load_manifest,
    open_zarr,
)
from boldforge.data_shards.zarr_view import ShardStore


@pytest.fixture(scope="module", params=["int16", "int8"])
def dataset(request, tmp_path_factory, real_runs):
    out = tmp_path_factory.mktemp(request.param)
    return build_shards(real_runs, out, DataRecipe(grid="mni4mm", tr=2.0, dtype=request.param)).manifest


# WebDataset leaves the closing of its shards to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
def test_one_tar_three_readers_bit_equal(dataset):
    reader, view = ShardReader(dataset), open_zarr(dataset)
    tars = [str(dataset.folder / shard.file) for shard in dataset.shards]
    samples = {s["__key__"]: s for s in wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode()}
    assert set(samples) == {run.key for run in dataset.runs} == set(view.group_keys())
    for number, run in enumerate(dataset.runs):
        q = reader.read(number, 0, run.n_frames).q
        assert q.dtype == dataset.recipe.dtype
        assert q.any()
        np.testing.assert_array_equal(samples[run.key]["bold.npy"], q, strict=True)
        np.testing.assert_array_equal(view[f"{run.key}/bold"][:], q, strict=True)
        np.testing.assert_array_equal(samples[run.key]["scale.npy"], reader.scales(number), strict=True)
        np.testing.assert_array_equal(view[run.key]["scale"][:], reader.scales(number), strict=True)
        assert view[run.key].attrs["subject"] == run.subject


def test_zarr_chunks_are_byte_ranges_of_the_tar(dataset):
    run = dataset.runs[1]
    array = zarr.open(ShardStore(dataset), path=f"{run.key}/bold", mode="r")
    assert array.chunks == (1, dataset.n_voxels)
    with (dataset.folder / dataset.shards[run.shard].file).open("rb") as tar:
        raw = os.pread(tar.fileno(), dataset.frame_bytes, run.offset + 17 * dataset.frame_bytes)
    assert array[17].tobytes() == raw


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_window_of_the_view_is_what_the_reader_gives(real_shards, data):
    run = data.draw(st.integers(0, real_shards.n_runs - 1))
    n_frames = real_shards.runs[run].n_frames
    start = data.draw(st.integers(0, n_frames - 1))
    length = data.draw(st.integers(1, min(9, n_frames - start)))
    first = data.draw(st.integers(0, real_shards.n_voxels - 1))
    array = open_zarr(real_shards)[f"{real_shards.runs[run].key}/bold"]
    wanted = ShardReader(real_shards).read(run, start, length).q
    np.testing.assert_array_equal(array[start : start + length, first:], wanted[:, first:])


def test_the_view_cannot_be_written_and_tells_the_grid(dataset):
    view = open_zarr(dataset)
    with pytest.raises((ValueError, PermissionError), match="read-only"):
        view[f"{dataset.runs[0].key}/bold"][0] = 0
    assert view.attrs["recipe"] == dataset.recipe.model_dump(mode="json")
    np.testing.assert_array_equal(view["mask"][:], dataset.brain_mask())
    np.testing.assert_array_equal(view.attrs["grid"]["affine"], dataset.grid.affine)


def test_damage_is_raised_by_the_view_and_never_a_fill_value(real_shards, tmp_path):
    folder = shutil.copytree(real_shards.folder, tmp_path / "copy")
    run = real_shards.runs[0]
    with (folder / real_shards.shards[run.shard].file).open("r+b") as file:
        file.seek(run.offset + 5 * real_shards.frame_bytes + 99)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    array = open_zarr(load_manifest(folder))[f"{run.key}/bold"]
    np.testing.assert_array_equal(array[:5], ShardReader(real_shards).read(0, 0, 5).q)
    with pytest.raises(ShardError, match="frame 5"):
        array[3:7]


def test_the_export_is_read_by_zarr_alone_and_gives_the_values(dataset, tmp_path):
    seen = []
    export_zarr(dataset, tmp_path / "store.zarr", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)
    root = zarr.open_group(str(tmp_path / "store.zarr"), mode="r")
    reader = ShardReader(dataset)
    for number, run in enumerate(dataset.runs):
        clip = reader.read(number, 0, run.n_frames)
        bold, scale = root[run.key]["bold"], root[run.key]["scale"][:]
        assert bold.metadata.codecs[0].to_dict()["name"] == "sharding_indexed"
        assert bold.shards[0] >= run.n_frames
        np.testing.assert_array_equal(scale[0] + bold[:] * scale[1], clip.mean + clip.q * clip.scale, strict=True)
        assert root[run.key].attrs.asdict() == open_zarr(dataset)[run.key].attrs.asdict()
    np.testing.assert_array_equal(root["mask"][:], dataset.brain_mask())
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_a_flipped_bit_of_an_export_is_found_by_zarr(real_shards, tmp_path):
    out = export_zarr(real_shards, tmp_path / "store.zarr")
    key = real_shards.runs[0].key
    path = out / key / "bold/c/0/0"
    data = bytearray(path.read_bytes())
    data[12_345] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(str(out), mode="r")[f"{key}/bold"][:]


def test_an_export_that_fails_leaves_nothing(real_shards, tmp_path):
    folder = shutil.copytree(real_shards.folder, tmp_path / "copy")
    with (folder / real_shards.shards[0].file).open("r+b") as file:
        file.seek(real_shards.runs[1].offset)
        file.write(b"\xff" * 64)
    with pytest.raises(ShardError, match="does not match its checksum"):
        export_zarr(load_manifest(folder), tmp_path / "store.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    with pytest.raises(ShardError, match="exists already"):
        export_zarr(real_shards, tmp_path / "copy")
