"""Odd headers through the whole command: one recording, written in every lawful way, is stored as the same values."""

import itertools
import re

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import inv_ornt_aff
from scipy.ndimage import map_coordinates
from typer.testing import CliRunner

from boldforge.data_shards import ShardReader, brain_mask, get_grid, load_manifest
from boldforge.launch.cli import app

SHAPE, FRAMES, TR = (12, 14, 13), 6, 2.0
AFFINE = np.array([[14.0, 0, 0, -77], [0, 14, 0, -105], [0, 0, 14, -73], [0, 0, 0, 1]])
CODES = ["".join(code) for axes in itertools.permutations(("LR", "PA", "IS")) for code in itertools.product(*axes)]
DATA = (1000 + 50 * np.random.default_rng(5).standard_normal((*SHAPE, FRAMES))).astype(np.int16)


def image(data=DATA, affine=AFFINE, kind=nib.Nifti1Image, tr=TR, units="sec", order="<"):
    made = kind(data.astype(data.dtype.newbyteorder(order)), affine, kind.header_class(endianness=order))
    made.header.set_data_dtype(data.dtype.newbyteorder(order))
    made.header.set_xyzt_units("mm", units)
    made.header["pixdim"][4] = tr
    return made


def oriented(code):
    """The same places in space, stored along other axes."""
    ornt = nib.orientations.axcodes2ornt(code)
    change = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), ornt)
    return image(
        nib.orientations.apply_orientation(DATA, change).astype(np.int16), AFFINE @ inv_ornt_aff(change, SHAPE)
    )


def scaled():
    made = image(((DATA.astype(np.int32) - 700) * 4).astype(np.int16))
    made.header.set_slope_inter(0.25, 700)
    return made


def five_d(axis):
    made = image(np.expand_dims(DATA, axis))
    made.header["pixdim"][4:6] = (TR, 0) if axis == 4 else (0, TR)
    return made


def disagreeing():
    made = image()
    made.set_sform(AFFINE, 4)
    made.set_qform(np.diag([14.0, 14, 14, 1]), 1)
    return made


def qform_only():
    made = image()
    made.set_qform(AFFINE, 1)
    made.set_sform(None, 0)
    return made


SAME = {
    "plain.nii.gz": image,
    "big.nii": lambda: image(order=">"),
    "two.nii.gz": lambda: image(kind=nib.Nifti2Image),
    "bigtwo.nii": lambda: image(kind=nib.Nifti2Image, order=">"),
    "pair.img": lambda: image(kind=nib.Nifti1Pair),
    "bigpair.img": lambda: image(kind=nib.Nifti1Pair, order=">"),
    "scaled.nii": scaled,
    "time5.nii": lambda: five_d(3),
    "last5.nii": lambda: five_d(4),
    "forms.nii": disagreeing,
    "qform.nii": qform_only,
    "ms.nii": lambda: image(tr=1000 * TR, units="msec"),
    "us.nii": lambda: image(tr=1e6 * TR, units="usec"),
    "wrongly.nii": lambda: image(tr=1000 * TR, units="sec"),
    **{f"{code}.nii": lambda code=code: oriented(code) for code in CODES},
}
REJECTED = {
    "timeless.nii": (lambda: image(tr=0), "pass it with --source-tr"),
    "five.nii": (lambda: image(np.stack([DATA, DATA], axis=4)), "expected 4D"),
    "complex.nii": (lambda: image(DATA.astype(np.complex64)), "expected whole or real numbers"),
}
HALF = AFFINE.copy()
HALF[:3, 3] += 7


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Everything sharded once by the command; returns its output, the manifest and the values by subject."""
    folder = tmp_path_factory.mktemp("odd")
    makers = SAME | {name: maker for name, (maker, _) in REJECTED.items()} | {"half.nii": lambda: image(affine=HALF)}
    rows = []
    for name, maker in makers.items():
        nib.save(maker(), folder / name)
        rows.append(f"{name.replace('.img', '.hdr')}\t{name.split('.')[0]}")
    (folder / "runs.tsv").write_text("path\tsubject\n" + "\n".join(rows) + "\n")
    out = tmp_path_factory.mktemp("shards") / "out"
    options = ["--grid", "mni4mm", "--tr", str(TR), "--normalisation", "global-z"]
    result = CliRunner().invoke(app, ["shard", str(folder), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    manifest = load_manifest(out)
    reader = ShardReader(manifest)
    values = {}
    for number, run in enumerate(manifest.runs):
        clip = reader.read(number, 0, run.n_frames)
        values[run.subject] = np.where(clip.scale > 0, clip.mean + clip.q * clip.scale, np.nan)
    reader.close()
    return manifest, values, (out / "rejected.tsv").read_text()


def test_every_way_of_writing_a_recording_gives_the_same_values(stored):
    manifest, values, _ = stored
    assert len(CODES) == 48 and manifest.n_runs == len(SAME) + 1
    for name in SAME:
        found = values[name.split(".")[0]]
        np.testing.assert_allclose(found, values["plain"], atol=2e-4, err_msg=name)
    assert {run.source_tr for run in manifest.runs} == {TR}


@pytest.mark.parametrize(("subject", "affine"), [("plain", AFFINE), ("half", HALF)])
def test_values_lie_where_the_affine_says(stored, subject, affine):
    manifest, values, _ = stored
    grid = get_grid("mni4mm")
    ijk = np.argwhere(brain_mask(grid))
    world = ijk @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    voxel = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    inside = ((voxel >= 0) & (voxel <= np.array(SHAPE) - 1)).all(axis=1)
    wanted = np.stack([map_coordinates(DATA[..., t].astype(float), voxel[inside].T, order=1) for t in range(FRAMES)])
    run = next(run for run in manifest.runs if run.subject == subject)
    found = values[subject][:, inside] * run.normalisation.std + run.normalisation.mean
    assert inside.mean() > 0.9
    np.testing.assert_allclose(found, wanted, atol=0.02)


def test_what_cannot_be_used_is_listed_with_its_reason(stored):
    lines = dict(re.findall(r"^\S*/(\S+)\t(.*)$", stored[2], re.M))
    assert set(lines) == set(REJECTED)
    for name, (_, reason) in REJECTED.items():
        assert reason in lines[name]
