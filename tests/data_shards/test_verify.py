import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.data_shards import DataRecipe, ShardError, ShardReader, build_shards, find_runs, load_manifest, plan
from boldforge.data_shards.verify import verify_shards


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Six small runs in three shards of the same size."""
    import nibabel as nib

    root = tmp_path_factory.mktemp("sound")
    (root / "data").mkdir()
    affine = np.diag([14.0, 14.0, 14.0, 1.0])
    affine[:3, 3] = (-77, -105, -70)
    for i in range(6):
        values = 1000 + 20 * np.random.default_rng(i).standard_normal((12, 14, 12, 7))
        image = nib.Nifti1Image(values.astype(np.int16), affine)
        image.header["pixdim"][4] = 2.0
        nib.save(image, root / f"data/sub-{i:02d}_task-rest_space-MNI152_bold.nii.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_RUNS", 2)
        return build_shards(find_runs(root / "data"), root / "shards", DataRecipe(grid="mni4mm", tr=2.0)).manifest


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound.folder, tmp_path / "copy")


def flip(path, position, bit=0):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def reasons(folder):
    return [damage.reason for damage in verify_shards(folder)]


def test_a_sound_dataset_is_read_to_its_end(sound):
    seen = []
    assert verify_shards(sound.folder, lambda done, total: seen.append((done, total))) == ()
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_each_part_of_a_run_is_named(sound, copy):
    shard = sound.shards[1].file
    runs = [run for run in sound.runs if run.shard == 1]
    flip(copy / shard, runs[0].offset + 2 * sound.frame_bytes + 7)
    flip(copy / shard, runs[0].offset + 5 * sound.frame_bytes)
    flip(copy / shard, runs[1].scale_offset + 11)
    found = reasons(copy)
    assert len(found) == 2
    assert f"{shard}: run {runs[0].key}: frames 2, 5 damaged" in found[0]
    assert f"run {runs[1].key}: scales damaged" in found[1]
    flip(copy / shard, runs[1].hashes_offset + 3)
    assert f"run {runs[1].key}: scales, list of frame hashes damaged" in reasons(copy)[1]


def test_a_flipped_tar_header_is_named_though_values_by_position_are_right(sound, copy):
    run = sound.runs[3]
    flip(copy / sound.shards[1].file, run.offset - 4096 + 3)  # in the member's name, the first field of its header
    reader = ShardReader(load_manifest(copy))
    np.testing.assert_array_equal(reader.read(3, 0, 7).q, ShardReader(sound).read(3, 0, 7).q)
    (reason,) = reasons(copy)
    assert "tar's own headers are damaged" in reason
    assert f"{run.key}.bold.npy" in reason


def test_a_changed_text_member_is_found(sound, copy):
    path = copy / sound.shards[0].file
    data = path.read_bytes()
    assert data.count(b'"subject": "00"') == 1
    path.write_bytes(data.replace(b'"subject": "00"', b'"subject": "99"'))
    (reason,) = reasons(copy)
    assert "all values are sound: a text member" in reason


def test_cut_missing_swapped_and_stray_shards_are_named(sound, copy):
    one, two, three = (copy / shard.file for shard in sound.shards)
    assert one.stat().st_size == two.stat().st_size
    one.rename(copy / "aside")
    two.rename(one)
    (copy / "aside").rename(two)
    with three.open("r+b") as file:
        file.truncate(three.stat().st_size // 2)
    (copy / "shard-000009.tar").write_bytes(b"left over")
    found = "\n".join(reasons(copy))
    for run in (*sound.runs[:4], sound.runs[5]):
        assert f"run {run.key}: " in found
    assert f"{three.name}: has {sound.shards[2].n_bytes // 2} bytes, expected {sound.shards[2].n_bytes}" in found
    assert "shard-000009.tar: is no part of the dataset" in found
    three.unlink()
    assert any(f"{three.name}: is missing" in reason for reason in reasons(copy))


def test_swapped_shards_are_never_read(sound, copy):
    one, two = (copy / shard.file for shard in sound.shards[:2])
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    reader = ShardReader(load_manifest(copy))
    for run in range(4):
        with pytest.raises(ShardError, match="does not match its checksum"):
            reader.read(run, 0, 1)


@pytest.mark.parametrize("name", ["shards", "index", "runs", "mask", "manifest"])
def test_damage_beside_the_shards_is_named(sound, copy, name):
    files = {**{table: entry.file for table, entry in sound.tables.items()}, "mask": "mask.npy"}
    path = copy / files.get(name, "manifest.json")
    flip(path, path.stat().st_size // 2)
    (damage,) = verify_shards(copy)
    assert path.name in damage.reason
    path.unlink()
    (damage,) = verify_shards(copy)
    assert path.name in damage.reason


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_of_any_file_is_missed(sound, tmp_path_factory, data):
    """What a reader hands out is right or an error, and verify names every damage."""
    copy = shutil.copytree(sound.folder, tmp_path_factory.mktemp("flip") / "copy")
    path = data.draw(st.sampled_from(sorted(p for p in copy.iterdir() if p.name != "rejected.tsv")))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    flip(path, position, data.draw(st.integers(0, 7)))
    assert any(damage.path == path or path.name in damage.reason for damage in verify_shards(copy))
    right = ShardReader(sound)
    try:
        reader = ShardReader(load_manifest(copy))
    except ShardError:
        return
    for run in range(sound.n_runs):
        try:
            clip = reader.read(run, 0, 7)
        except ShardError:
            continue
        for got, wanted in zip(clip, right.read(run, 0, 7), strict=True):
            np.testing.assert_array_equal(got, wanted)
    shutil.rmtree(copy)
