from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from boldforge.data_shards import Atlas, AtlasError, Grid, atlas_on_grid, brain_mask, get_grid, load_atlas

LOCAL = Path(__file__).parents[2] / "../shared/data/local/grids/AAL3v1_2mm_LAS.nii.gz"


def label_at(volume, affine, point):
    voxel = np.rint(np.linalg.inv(affine) @ [*point, 1])[:3].astype(int)
    return int(volume[tuple(voxel)])


def test_aal3_lists_only_the_labels_that_occur():
    atlas = load_atlas("aal3")
    assert len(atlas.labels) == 166
    assert max(atlas.labels) == 170
    assert not {35, 36, 81, 82} & set(atlas.labels)
    assert atlas.labels[1] == "Precentral_L"


@pytest.mark.parametrize("grid_name", ["mni2mm", "mni4mm"])
def test_left_stays_left_and_high_ids_survive(grid_name):
    atlas, grid = load_atlas(), get_grid(grid_name)
    labels = atlas_on_grid(atlas, grid)
    assert labels.dtype == np.int16
    assert labels.max() > 127
    # The left hippocampus lies at negative x.
    assert atlas.labels[label_at(labels, grid.affine, (-27, -19, -15))] == "Hippocampus_L"
    assert atlas.labels[label_at(labels, grid.affine, (29, -19, -15))] == "Hippocampus_R"


def test_labelled_voxels_are_brain():
    grid = get_grid("mni4mm")
    labels = atlas_on_grid(load_atlas(), grid)
    assert brain_mask(grid)[labels > 0].mean() > 0.95


def test_storage_orientation_does_not_matter():
    atlas = load_atlas()
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = atlas.volume.shape[0] - 1
    flipped = Atlas("flipped", atlas.volume[::-1], atlas.affine @ flip, atlas.labels, atlas.sha256)
    grid = get_grid("mni2mm")
    np.testing.assert_array_equal(atlas_on_grid(flipped, grid), atlas_on_grid(atlas, grid))


def test_agrees_with_nibabels_resampling_to_2mm_las():
    atlas = load_atlas()
    # What the distributed 2 mm file is: stored right to left, at 2 mm.
    las = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    ours = atlas_on_grid(atlas, Grid("las", (91, 109, 91), las))
    image = nib.Nifti1Image(atlas.volume.astype(np.int16), atlas.affine)
    theirs = np.asarray(resample_from_to(image, ((91, 109, 91), las), order=0).dataobj)
    assert (ours == theirs).mean() > 0.999
    assert (ours == theirs)[ours > 0].mean() > 0.999
    left = [number for number, name in atlas.labels.items() if name.endswith("_L")]
    x = las[0, 0] * np.nonzero(np.isin(ours, left))[0] + las[0, 3]
    assert (x < 2).mean() > 0.98  # some regions reach a little over the midline


@pytest.mark.skipif(
    not LOCAL.is_file(), reason="optional: the distributed 2 mm LAS atlas is not beside this repository"
)
def test_agrees_with_the_distributed_2mm_file():
    grid = get_grid("mni2mm")
    ours, theirs = atlas_on_grid(load_atlas(), grid), atlas_on_grid(load_atlas(LOCAL), grid)
    assert (ours == theirs).mean() > 0.999
    both = (ours > 0) | (theirs > 0)
    assert (ours == theirs)[both].mean() > 0.997  # what differs is a voxel's width of the smallest nuclei


def test_own_volume_and_table(tmp_path):
    data = np.zeros((5, 4, 3), dtype=np.int16)
    data[1, 1, 1], data[2, 2, 2] = 7, 300
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "mine.nii")
    (tmp_path / "mine.txt").write_text("# my regions\n7,seven\n300\tthree_hundred\n9 absent\n")
    atlas = load_atlas(tmp_path / "mine.nii", tmp_path / "mine.txt")
    assert atlas.name == "mine"
    assert atlas.labels == {7: "seven", 300: "three_hundred"}
    assert atlas.ids(["three_hundred"]) == [300]
    with pytest.raises(AtlasError, match="no region named nine"):
        atlas.ids(["nine"])


def test_bad_atlases_are_explained(tmp_path):
    with pytest.raises(AtlasError, match=r"no such atlas.*aal3"):
        load_atlas("aal4")
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), 0.5, dtype=np.float32), np.eye(4)), tmp_path / "probability.nii")
    with pytest.raises(AtlasError, match="whole numbers"):
        load_atlas(tmp_path / "probability.nii")
    (tmp_path / "table.txt").write_text("one Precentral_L\n")
    with pytest.raises(AtlasError, match="line 1"):
        load_atlas("aal3", tmp_path / "table.txt")


@pytest.mark.parametrize("name", ["labels.txt", "atlas.nii", "atlas.nii.gz"])
def test_a_text_file_in_place_of_an_atlas_is_called_what_it_is(tmp_path, name):
    path = tmp_path / name
    path.write_text("1 Precentral_L\n2 Precentral_R\n")
    with pytest.raises(AtlasError, match=f"{name}: is not a NIfTI file; expected a 3D volume in a .nii or .nii.gz"):
        load_atlas(path)


def test_a_damaged_atlas_is_to_be_copied_again(tmp_path):
    whole = np.random.default_rng(0).integers(0, 9, (12, 12, 12)).astype(np.int16)
    path = tmp_path / "atlas.nii.gz"
    nib.save(nib.Nifti1Image(whole, np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(AtlasError, match=r"cannot be read as a NIfTI volume .*; copy it again"):
        load_atlas(path)


def test_an_atlas_without_regions_and_a_table_of_another_are_told(tmp_path):
    empty = tmp_path / "empty.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), empty)
    with pytest.raises(AtlasError, match=r"empty.nii.gz: every voxel is 0, so there is no region"):
        load_atlas(empty)
    table = tmp_path / "labels.txt"
    table.write_text("1 Precentral_L\n")
    with pytest.raises(AtlasError, match=r"names none of the regions 2, 3, 4, … of atlas aal3 \(165 of 166"):
        load_atlas("aal3", table)
