from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from nilearn.image import resample_img
from scipy import ndimage, signal

from boldforge.data_shards import brain_mask, get_grid, mask_centres, open_bold
from boldforge.data_shards import resample as resample_module
from boldforge.data_shards import spool as spool_module
from boldforge.data_shards.resample import ResampleError, sampling_matrix, to_tr

REAL_RUNS = sorted((Path(__file__).parents[1] / "data").glob("*.nii.gz"))
GRID = get_grid("mni4mm")


@dataclass(frozen=True, eq=False)
class ArrayFrames:
    """An array that hands out its frames a few at a time, as a file does."""

    data: np.ndarray
    affine: np.ndarray
    step: int = 5

    @property
    def shape(self):
        return self.data.shape[:3]

    @property
    def n_frames(self):
        return self.data.shape[3]

    def blocks(self):
        frames = self.data.reshape(-1, self.n_frames, order="F")
        for start in range(0, self.n_frames, self.step):
            yield frames[:, start : start + self.step]


def to_grid(data, affine, points, antialias_mm=None, step=5):
    """The function under test on an array, its result as an array."""
    values, covered = resample_module.to_grid(ArrayFrames(data, affine, step), points, antialias_mm)
    return values.read_rows(0, values.shape[0]), covered


def whole_to_grid(data, affine, points):
    """The same in one piece: every voxel and frame in memory."""
    frames = data.reshape(-1, data.shape[3], order="F")
    low, high = frames.min(axis=1), frames.max(axis=1)
    signal = np.isfinite(low) & np.isfinite(high) & (high > low)
    matrix = sampling_matrix(data.shape[:3], affine, points)
    matrix.data = matrix.data * signal[matrix.indices]
    matrix.eliminate_zeros()
    weight = np.asarray(matrix.sum(axis=1), dtype=np.float32)
    covered = weight >= 0.5
    factor = np.where(covered, 1 / np.where(covered, weight, 1), 0).astype(np.float32)
    return (matrix @ np.where(signal[:, None], frames, 0)).T * factor, covered


@pytest.fixture(scope="module")
def points():
    return mask_centres(GRID, brain_mask(GRID))


@pytest.mark.parametrize("path", REAL_RUNS, ids=lambda path: path.name[:12])
def test_agrees_with_nilearn_on_real_runs(path, points):
    bold = open_bold(path)
    data = bold.read()[..., :6]
    values, covered = to_grid(data, bold.affine, points)
    signal = (data.std(axis=3) > 0).astype(np.float32)
    signal[0, 0, 0] = 0.5  # far from the brain; nilearn warns about volumes of two values
    theirs, share = resampled_by_nilearn(data, bold.affine), resampled_by_nilearn(signal[..., None], bold.affine)[0]
    whole = covered & (share > 0.9999)
    assert whole.mean() > 0.6
    assert np.corrcoef(values[:, whole].ravel(), theirs[:, whole].ravel())[0, 1] > 0.99999
    # Where the file's own mask cuts a cell nilearn mixes its zeros in; divided out, the two agree again.
    np.testing.assert_array_equal(covered, share >= 0.5)
    mended = theirs[:, covered] / share[covered]
    assert np.corrcoef(values[:, covered].ravel(), mended.ravel())[0, 1] > 0.9999


@pytest.mark.parametrize("path", REAL_RUNS, ids=lambda path: path.name[:12])
def test_reading_in_pieces_gives_the_bits_of_reading_whole(path, points, monkeypatch):
    bold = open_bold(path)
    whole, covered = whole_to_grid(bold.read(), bold.affine, points)
    for in_memory, frames in ((2**40, 32), (0, 7)):  # all in memory; everything through the disk
        monkeypatch.setattr(spool_module, "IN_MEMORY_BYTES", in_memory)
        monkeypatch.setattr(resample_module, "_FRAMES_AT_ONCE", frames)
        values, covered_too = resample_module.to_grid(bold, points)
        with values:
            np.testing.assert_array_equal(values.read_rows(0, bold.n_frames), whole)
        np.testing.assert_array_equal(covered_too, covered)


@pytest.mark.parametrize("step", [1, 2, 9])
def test_the_size_of_a_piece_changes_nothing(step):
    rng = np.random.default_rng(3)
    data = rng.normal(size=(6, 5, 4, 9)).astype(np.float32)
    data[rng.random((6, 5, 4)) < 0.2] = 0  # no signal
    data[2, 2, 2, 8] = np.nan  # known only with the last frame
    points = rng.uniform(-1, 6, (80, 3))
    values, covered = to_grid(data, np.eye(4), points, step=step)
    whole, covered_too = whole_to_grid(data, np.eye(4), points)
    np.testing.assert_array_equal(covered, covered_too)
    np.testing.assert_array_equal(values, whole)


def resampled_by_nilearn(data, affine):
    image = resample_img(
        nib.Nifti1Image(data, affine), GRID.affine, GRID.shape, "linear", copy_header=True, force_resample=True
    )
    return image.get_fdata()[brain_mask(GRID)].T


def test_points_on_the_lattice_copy_values_exactly():
    shape, affine = (7, 6, 5), np.array([[-2.0, 0, 0, 12], [0, 2, 0, -4], [0, 0, 2, 6], [0, 0, 0, 1]])
    # What a header in float32 does to an affine.
    affine = affine + np.float32(1e-6)
    data = np.random.default_rng(0).normal(100, 5, (*shape, 4)).astype(np.float32)
    index = np.argwhere(np.ones(shape, dtype=bool))
    values, covered = to_grid(data, affine, index @ np.diag([-2.0, 2, 2]) + [12, -4, 6])
    assert covered.all()
    np.testing.assert_array_equal(values.T.reshape(*shape, 4), data)


ORIENTATIONS = ["".join(code) for axes in permutations(("LR", "PA", "IS")) for code in product(*axes)]


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_any_of_the_48_orientations_gives_the_same_values(code):
    rng = np.random.default_rng(5)
    data = rng.normal(size=(5, 6, 7, 3)).astype(np.float32)
    affine = np.diag([3.0, 3.5, 4.0, 1.0])
    affine[:3, 3] = (-7, -9, -12)
    turned = nib.Nifti1Image(data, affine).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
    )
    assert "".join(nib.aff2axcodes(turned.affine)) == code
    points = rng.uniform(-12, 12, (50, 3))
    values, covered = to_grid(data, affine, points)
    again, covered_again = to_grid(np.asarray(turned.dataobj), turned.affine, points)
    np.testing.assert_array_equal(covered, covered_again)
    np.testing.assert_allclose(values, again, atol=1e-5)


def test_left_stays_left(points):
    # Signal only at negative x of a file that is stored right to left.
    affine = np.array([[-4.0, 0, 0, 96], [0, 4, 0, -132], [0, 0, 4, -70], [0, 0, 0, 1]])
    data = np.zeros((49, 58, 47, 3), dtype=np.float32)
    data[28:] = np.random.default_rng(0).normal(size=(21, 58, 47, 3))
    _, covered = to_grid(data, affine, points)
    assert covered[points[:, 0] < -16].mean() > 0.99
    assert not covered[points[:, 0] > -12].any()


def test_a_linear_ramp_is_reproduced_between_voxels():
    index = np.indices((6, 7, 8)).astype(np.float32)
    ramp = index[0] + 10 * index[1] - 3 * index[2]
    data = np.stack([ramp + 1, 2 * ramp, 5 - ramp], axis=3)
    points = np.random.default_rng(2).uniform(0, [5, 6, 7], (100, 3))
    values, _ = to_grid(data, np.eye(4), points)
    wanted = points @ [1, 10, -3]
    np.testing.assert_allclose(values, [wanted + 1, 2 * wanted, 5 - wanted], rtol=1e-4, atol=1e-3)


def test_outside_and_empty_and_broken_voxels_are_not_covered():
    data = np.random.default_rng(0).normal(size=(4, 4, 4, 5)).astype(np.float32)
    data[0] = 7.0  # constant: no signal
    data[3, 3, 3, 2] = np.nan
    points = np.array(
        [[0, 1, 1], [1, 1, 1], [3, 3, 3], [-2, 0, 0], [3.4, 0, 0], [3.6, 0, 0], [0.4, 1, 1], [0.6, 1, 1.0]]
    )
    values, covered = to_grid(data, np.eye(4), points)
    assert covered.tolist() == [False, True, False, False, True, False, False, True]
    assert (values[:, ~covered] == 0).all()
    # The empty neighbour does not dim the value.
    np.testing.assert_allclose(values[:, 7], data[1, 1, 1], rtol=1e-6)


def test_a_run_elsewhere_is_refused(points):
    far = np.diag([4.0, 4, 4, 1])
    far[:3, 3] = 500
    with pytest.raises(ResampleError, match="MNI space"):
        to_grid(np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32), far, points)


def test_equal_repetition_times_change_nothing():
    values = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    assert to_tr(values, 2.0, 2.0) is values
    assert to_tr(values, 1.99, 2.0) is values


@pytest.mark.parametrize(("tr", "target"), [(2.2, 2.0), (2.5, 0.8), (1.16, 2.0), (0.72, 2.0), (2.0, 1.96)])
def test_slow_signals_pass_and_keep_their_time(tr, target):
    time = np.arange(150) * tr
    wave = np.sin(2 * np.pi * 0.02 * time)[:, None].astype(np.float32)
    found = to_tr(wave, tr, target)
    expected = np.sin(2 * np.pi * 0.02 * np.arange(len(found)) * target)
    assert (len(found) - 1) * target <= time[-1] + 1e-6 < len(found) * target + 1e-6
    assert np.abs(found[5:-5, 0] - expected[5:-5]).max() < 0.04


def test_fast_signals_do_not_fold_when_slowing_down():
    time = np.arange(400) * 0.72
    fast = np.sin(2 * np.pi * 0.47 * time)[:, None].astype(np.float32)  # would appear at 0.03 Hz
    assert to_tr(fast, 0.72, 2.0)[5:-5].std() < 0.15 * fast.std()


def test_too_short_a_run_is_refused():
    with pytest.raises(ResampleError, match="too short"):
        to_tr(np.zeros((2, 3), dtype=np.float32), 0.5, 2.0)


@pytest.mark.parametrize(
    ("tr", "target", "up", "down", "frequency"),
    [(0.72, 2.0, 9, 25, frequency) for frequency in (0.02, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6)]
    + [(2.0, 0.8, 5, 2, frequency) for frequency in (0.02, 0.1, 0.2)],
)
def test_the_sinc_keeps_the_band_as_scipy_does(tr, target, up, down, frequency):
    time = np.arange(800) * tr
    wave = np.sin(2 * np.pi * frequency * time + 0.3)[:, None].astype(np.float32)
    ours = to_tr(wave, tr, target, "sinc")[:, 0]
    theirs = signal.resample_poly(wave[:, 0], up, down)[: len(ours)]
    inner = slice(40, -40)
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=0.02)
    nyquist = 0.5 / target
    if frequency > 1.15 * nyquist:
        assert np.abs(ours[inner]).max() < 0.01  # nothing folds
    elif frequency < 0.85 * nyquist:
        truth = np.sin(2 * np.pi * frequency * np.arange(len(ours)) * target + 0.3)
        assert np.abs(ours - truth)[inner].max() < 0.02


@pytest.mark.parametrize("frequency", [0.25, 0.3, 0.4, 0.5, 0.6])
def test_the_gaussian_has_the_gain_of_its_formula_at_and_above_the_new_nyquist(frequency):
    # Phases drawn at random: at exactly the Nyquist frequency a sine can be sampled at its zeros.
    phase = np.random.default_rng(0).uniform(0, 2 * np.pi, 200)
    wave = np.sin(2 * np.pi * frequency * 0.72 * np.arange(400)[:, None] + phase).astype(np.float32)
    gain = to_tr(wave, 0.72, 2.0)[10:-10].std() / wave.std()
    formula = 0.5 ** ((frequency / 0.25) ** 2)
    assert formula - 0.12 < gain < formula + 0.01  # linear interpolation takes the rest
    plain = signal.resample_poly(wave, 9, 25, axis=0)[20:-20].std() / wave.std()
    assert gain > plain or frequency == 0.25  # it cuts softly; who minds takes the sinc


@pytest.mark.parametrize(("tr", "target"), [(0.72, 2.0), (2.5, 0.8), (1.16, 2.0)])
@pytest.mark.parametrize("time_filter", ["gaussian", "sinc"])
def test_constants_and_lines_pass_in_time(tr, target, time_filter):
    for n_frames in (5, 12, 90):
        time = np.arange(n_frames) * tr
        values = np.stack([np.full(n_frames, 7.0), 3 - 0.5 * time], axis=1).astype(np.float32)
        found = to_tr(values, tr, target, time_filter)
        at = np.arange(len(found)) * target
        np.testing.assert_allclose(found[:, 0], 7, atol=1e-4)
        if time_filter == "sinc" and n_frames == 90:
            np.testing.assert_allclose(found[:, 1], 3 - 0.5 * at, atol=0.03)


@pytest.mark.parametrize("path", REAL_RUNS, ids=lambda path: path.name[:12])
def test_agrees_with_nibabel_on_real_runs(path, points):
    bold = open_bold(path)
    data = bold.read()[..., :3]
    values, _ = to_grid(data, bold.affine, points)
    brain = brain_mask(GRID)
    theirs = []
    for frame in range(3):
        image = resample_from_to(nib.Nifti1Image(data[..., frame], bold.affine), (GRID.shape, GRID.affine), order=1)
        theirs.append(image.get_fdata()[brain])
    share = nib.Nifti1Image((data.std(axis=3) > 0).astype(np.float32), bold.affine)
    whole = resample_from_to(share, (GRID.shape, GRID.affine), order=1).get_fdata()[brain] > 0.9999
    assert whole.mean() > 0.5
    assert np.corrcoef(values[:, whole].ravel(), np.array(theirs)[:, whole].ravel())[0, 1] > 0.9999


def test_half_voxel_origins_are_kept():
    # The same field sampled on two lattices half a voxel apart: what is where in mm must not change.
    index = np.indices((9, 10, 11)).astype(np.float64)
    points = np.random.default_rng(1).uniform(2, 12, (200, 3))
    for origin in ([0, 0, 0], [-1, -1, -1], [0.5, -0.25, 1.5]):
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        affine[:3, 3] = origin
        place = np.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3][:, None, None, None]
        field = place[0] + 3 * place[1] - 2 * place[2]
        data = np.stack([field, 2 * field + 1], axis=3).astype(np.float32)
        values, _ = to_grid(data, affine, points)
        wanted = points @ [1, 3, -2]
        np.testing.assert_allclose(values, [wanted, 2 * wanted + 1], atol=1e-3)


def fine_run(shape=(40, 44, 38), n_frames=4):
    """A random run at 2 mm over part of the brain, zero outside an ellipsoid."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-40, -60, -30)
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    inside = x[:, None, None] ** 2 + y[:, None] ** 2 + z**2 < 0.9
    data = np.random.default_rng(0).normal(100, 10, (*shape, n_frames)) * inside[..., None]
    return data.astype(np.float32), affine, inside


def test_antialiasing_is_a_gaussian_over_what_carries_signal(points):
    data, affine, inside = fine_run()
    values, covered = to_grid(data, affine, points, antialias_mm=4.0)
    plain, covered_too = to_grid(data, affine, points)
    np.testing.assert_array_equal(covered, covered_too)
    # By hand: variance = difference of the two Gaussians with gain 1/2 at 4 mm's and at 2 mm's Nyquist frequency.
    sigma = np.sqrt(2 * np.log(2)) / np.pi * np.sqrt(4**2 - 2**2) / 2
    share = ndimage.gaussian_filter(inside.astype(np.float64), sigma, mode="constant")
    voxel = ((points - affine[:3, 3]) / 2).T
    over = ndimage.map_coordinates(share, voxel, order=1, mode="constant")
    for frame in range(data.shape[3]):
        smooth = ndimage.gaussian_filter(data[..., frame].astype(np.float64), sigma, mode="constant")
        wanted = ndimage.map_coordinates(smooth, voxel, order=1, mode="constant")[covered] / over[covered]
        np.testing.assert_allclose(values[frame, covered], wanted, rtol=1e-4)
    assert values[:, covered].std() < 0.7 * plain[:, covered].std()  # noise finer than the grid is gone
    assert abs(values[:, covered].mean() - 100) < 0.5  # and the border is not dimmed


def test_antialiasing_leaves_runs_alone_that_are_not_finer(points):
    data, affine, _ = fine_run()
    affine = affine.copy()
    affine[:3, :3] *= 2
    np.testing.assert_array_equal(to_grid(data, affine, points, 4.0)[0], to_grid(data, affine, points)[0])


@pytest.mark.parametrize("in_memory", [2**40, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("dtype", ["int16", ">i2", "float32", "uint8"])
def test_points_on_voxel_centres_are_copied_to_the_bits_of_interpolating(dtype, in_memory, monkeypatch):
    monkeypatch.setattr(spool_module, "IN_MEMORY_BYTES", in_memory)
    rng = np.random.default_rng(4)
    data = rng.integers(0, 200, (6, 5, 4, 11)).astype(dtype)
    data[rng.random((6, 5, 4)) < 0.3] = 7  # no signal
    points = np.argwhere(np.ones((8, 6, 5))) @ np.diag([-1.0, 1, 1]) + [6, -1, 0]  # some lie beyond the image
    whole, covered = whole_to_grid(data.astype(np.float32), np.eye(4), points)
    values, covered_too = resample_module.to_grid(ArrayFrames(data, np.eye(4), 4), points)
    assert isinstance(values, resample_module.Copied)
    assert 0 < covered.sum() < len(points)
    with values:
        np.testing.assert_array_equal(covered_too, covered)
        np.testing.assert_array_equal(values.read_rows(2, 9), whole[2:9])
        for start, stop in ((0, len(points)), (3, 4), (17, 101), (0, 2)):
            columns = values.read_columns(start, stop)
            np.testing.assert_array_equal(columns, whole[:, start:stop])
            assert columns.dtype == np.float32
            assert columns.flags.c_contiguous


@pytest.mark.parametrize("shift", [0.0, 0.3], ids=["copied", "interpolated"])
def test_nan_is_named_and_not_taken_for_a_file_that_lies_elsewhere(shift: float) -> None:
    data = np.random.default_rng(0).normal(size=(5, 6, 7, 9)).astype(np.float32)
    points = np.argwhere(np.ones(data.shape[:3]))[60:90] + shift
    empty_frame, scattered = data.copy(), data.copy()
    empty_frame[..., 3] = np.nan
    scattered[..., 2:4] = np.where(np.arange(7)[:, None] % 2 == [0, 1], np.nan, scattered[..., 2:4])
    for broken, said in (
        (empty_frame, r"frame 3 \(the first is 0\) holds NaN or infinity in every voxel of the brain"),
        (scattered, "some are NaN or infinity; mend the file"),
        (np.ones_like(data), "no voxel with signal lies inside the MNI brain"),
    ):
        with pytest.raises(ResampleError, match=said):
            to_grid(broken, np.eye(4), points)
