from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, SpatialCrop

from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.volumes import CubeRecipe, read_cube

LABELS = (("L", "R"), ("P", "A"), ("I", "S"))
ORIENTATIONS = [
    "".join(letters)
    for order in permutations([("R", "L"), ("A", "P"), ("S", "I")])
    for letters in product(*order)
]  # fmt: skip


def _write(path, values, affine):
    nib.Nifti1Image(np.asarray(values, dtype=np.float32), affine).to_filename(path)
    return path


def _head(rng, shape=(60, 55, 58)):
    return rng.uniform(-1000, 1000, shape).astype(np.float32), np.diag([1.0, 1, 1, 1])


def test_the_cube_is_what_the_published_transforms_give(tmp_path):
    values, affine = _head(np.random.default_rng(0), (61, 55, 57))
    path = _write(tmp_path / "ct.nii.gz", values, affine)
    # The published pipeline: to LPS, 50³ around the centre, (HU + 1024) / 3072, axes reversed.
    published = Compose(
        [Orientation("LPS", labels=LABELS), SpatialCrop(roi_center=(30, 27, 28), roi_size=(49, 49, 49))]
    )
    cube = published(MetaTensor(values[None], affine=affine)).numpy()[0]
    np.testing.assert_allclose(
        read_cube(path, CubeRecipe(kind="ct", size=49)), (cube.transpose(2, 1, 0) + 1024) / 3072, atol=1e-6
    )


@pytest.mark.parametrize("orientation", ORIENTATIONS[::5])
def test_orientation_and_storage_do_not_matter(tmp_path, orientation):
    values, affine = _head(np.random.default_rng(1))
    image = nib.Nifti1Image(values, affine)
    turned = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
    )
    turned.to_filename(tmp_path / "turned.nii")
    recipe = CubeRecipe(kind="ct", size=20, spacing=1.3)
    plain = read_cube(_write(tmp_path / "plain.nii", values, affine), recipe)
    np.testing.assert_allclose(read_cube(tmp_path / "turned.nii", recipe), plain, atol=1e-5)


def test_a_place_in_millimetres_lands_where_it_should(tmp_path):
    values = np.zeros((60, 60, 60))
    values[40, 20, 10] = 1  # at (40, 20, 10) mm
    path = _write(tmp_path / "fa.nii", values, np.eye(4))
    cube = read_cube(path, CubeRecipe(kind="fa", size=21, centre=(35, 25, 8)))
    # 5 mm to the right is 5 steps back along x, 5 mm behind is 5 steps on along y, 2 mm up is 2 steps on along z.
    assert np.argwhere(cube > 0.5).tolist() == [[12, 15, 5]]


def test_outside_the_field_of_view_is_air(tmp_path):
    path = _write(tmp_path / "ct.nii", np.full((8, 8, 8), -500.0), np.eye(4))
    cube = read_cube(path, CubeRecipe(kind="ct", size=20))
    assert cube[10, 10, 10] == pytest.approx((1024 - 500) / 3072) and cube[0, 0, 0] == 0


def test_mri_does_not_depend_on_the_scanner_s_units_and_a_coarse_cube_does_not_alias(tmp_path):
    rng = np.random.default_rng(2)
    values = rng.uniform(50, 900, (40, 40, 40))
    recipe = CubeRecipe(kind="mri", size=10)
    one = read_cube(_write(tmp_path / "a.nii", values, np.eye(4)), recipe)
    other = read_cube(_write(tmp_path / "b.nii", 7 * values + 300, np.eye(4)), recipe)
    np.testing.assert_allclose(one, other, atol=1e-5)
    checkers = np.indices((40, 40, 40)).sum(axis=0) % 2 + 1.0
    coarse = read_cube(_write(tmp_path / "c.nii", checkers, np.eye(4)), CubeRecipe(kind="mri", size=8, spacing=4))
    assert np.ptp(coarse) < 0.2, "a pattern finer than the cube's voxels must become its mean"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("ct", [0, 1000], "lowest value is 0.*set kind to mri"),
        ("fa", [0, 700], "from 0 to 700, expected FA between 0 and 1"),
        ("md", [0, 0.9], r"from 0 to 0.9, expected MD mm²/s"),
        ("mri", [3, 3], "all of its voxels hold one value"),
        ("fa", [0, 0.003], r"below 0\.003, expected FA between 0 and 1, that reaches 0\.05"),
        ("fa", [0, 0], r"below 0, expected FA"),
        ("md", [0, 3e-9], r"below 3e-09, expected MD mm²/s.* reaches 0\.0001; rescale it"),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path, kind, values, message):
    path = _write(tmp_path / "x.nii", np.resize(values, (4, 4, 4)), np.eye(4))
    with pytest.raises(FinetuneError, match=message):
        read_cube(path, CubeRecipe(kind=kind))


@pytest.mark.parametrize(
    ("kind", "scale", "shift"), [("ct", 2000, -1000), ("mri", 800, 50), ("fa", 0.9, 0), ("md", 3e-3, 0)]
)
def test_values_that_are_not_finite_leave_the_others_as_they_are(tmp_path, kind, scale, shift):
    values = scale * np.random.default_rng(3).uniform(0.01, 1, (20, 20, 20)) + shift
    values[7, 7, 7] = values.min() - 0.001 * scale
    recipe = CubeRecipe(kind=kind, size=20)
    whole = read_cube(_write(tmp_path / "whole.nii", values, np.eye(4)), recipe)
    holes = values.copy()
    holes[0, 0, 0], holes[1, 1, 1], holes[2, 2, 2] = -np.inf, np.nan, np.inf
    cube = read_cube(_write(tmp_path / "holes.nii", holes, np.eye(4)), recipe)
    assert np.isfinite(cube).all()
    differing = np.abs(cube - whole) > 5e-3
    assert {tuple(place) for place in np.argwhere(differing)} <= {(i, 19 - i, 19 - i) for i in range(3)}


def test_files_that_are_no_volume_are_named(tmp_path):
    (tmp_path / "text.nii").write_text("no image")
    flat = nib.Nifti1Image(np.zeros((3, 3, 3, 2), dtype=np.float32), np.eye(4))
    flat.to_filename(tmp_path / "run.nii")
    nowhere = nib.Nifti1Image(np.zeros((3, 3, 3), dtype=np.float32), None)
    nowhere.to_filename(tmp_path / "nowhere.nii")
    for name, message in [
        ("none.nii", "no such file"),
        ("text.nii", "is not a NIfTI file"),
        ("run.nii", r"shape \(3, 3, 3, 2\), expected three axes"),
        ("nowhere.nii", "no usable affine"),
    ]:
        with pytest.raises(FinetuneError, match=f"{name}.*{message}"):
            read_cube(tmp_path / name, CubeRecipe(kind="mri"))
