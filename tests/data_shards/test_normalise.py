import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.data_shards.normalise import (
    Fidelity,
    NormaliseError,
    decibels,
    dequantise,
    normalise,
    quantise,
    temporal_snr,
)


def made(n_frames=30, n_voxels=41, seed=0):
    rng = np.random.default_rng(seed)
    amplitude = rng.uniform(1, 20, n_voxels)
    values = (rng.uniform(500, 1500, n_voxels) + amplitude * rng.standard_normal((n_frames, n_voxels))).astype(
        np.float32
    )
    covered = np.arange(n_voxels) % 7 != 0
    values[:, ~covered] = 0
    return values, covered


def test_residual_z_keeps_relative_amplitudes():
    values, covered = made()
    result, how = normalise(values, covered, "residual-z")
    inside = result[:, covered]
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.square(inside).mean()), 1, rtol=1e-5)
    before = values[:, covered].std(axis=0)
    np.testing.assert_allclose(inside.std(axis=0) * how.std, before, rtol=1e-4)
    assert how.mean is None


def test_voxel_z_makes_every_voxel_alike():
    values, covered = made()
    result, how = normalise(values, covered, "voxel-z")
    np.testing.assert_allclose(result[:, covered].std(axis=0), 1, rtol=1e-4)
    assert (how.mean, how.std) == (None, None)


def test_global_z_keeps_anatomy():
    values, covered = made()
    result, how = normalise(values, covered, "global-z")
    np.testing.assert_allclose(result[:, covered] * how.std + how.mean, values[:, covered], rtol=1e-5)


@pytest.mark.parametrize("method", ["residual-z", "voxel-z", "global-z"])
def test_uncovered_voxels_become_zero_and_do_not_count(method):
    values, covered = made()
    other = values.copy()
    other[:, ~covered] = 1e6
    one, how = normalise(values, covered, method)
    two, how_too = normalise(other, covered, method)
    np.testing.assert_array_equal(one, two)
    assert how == how_too
    assert (one[:, ~covered] == 0).all()


def test_a_run_without_variation_is_refused():
    with pytest.raises(NormaliseError, match="do not vary"):
        normalise(np.ones((5, 4), dtype=np.float32), np.ones(4, dtype=bool), "residual-z")


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["int16", "int8"]))
def test_quantisation_error_is_at_most_half_a_step(seed, dtype):
    values, covered = made(n_frames=11, n_voxels=13, seed=seed)
    stored = quantise(values, covered, dtype)
    assert stored.q.dtype == np.dtype(dtype)
    # Half a step, and the rounding of float32 around values of a thousand.
    assert (np.abs(dequantise(stored) - values) <= 0.5 * stored.scale + 2e-4)[:, covered].all()
    assert ((stored.scale > 0) == covered).all()
    assert (dequantise(stored)[:, ~covered] == 0).all()


def test_a_scale_per_voxel_beats_one_scale_for_all():
    values, covered = normalise(*made(200, 60), "residual-z")[0], made(200, 60)[1]
    snr = temporal_snr(values, quantise(values, covered, "int8"))
    together = np.abs(values).max() / 127
    error = np.rint(values / together) * together - values
    one_scale = 10 * np.log10(np.square(values).sum() / np.square(error).sum())
    assert snr > 40
    assert snr > one_scale + 3
    assert temporal_snr(values, quantise(values, covered, "int16")) > 85


def test_min_max_spans_zero_to_one_and_loses_nothing():
    values, covered = made()
    result, how = normalise(values, covered, "min-max")
    inside = result[:, covered]
    assert (inside.min(), inside.max()) == (0, 1)
    assert (how.mean, how.std) == (values[:, covered].min(), np.ptp(values[:, covered].astype(np.float64)))
    np.testing.assert_allclose(inside * how.std + how.mean, values[:, covered], rtol=1e-6)


def test_percent_signal_change_is_nilearns():
    from nilearn.signal import standardize_signal

    values, covered = made()
    result, how = normalise(values, covered, "percent-signal-change")
    theirs = standardize_signal(values[:, covered].astype(np.float64), standardize="psc", detrend=False)
    np.testing.assert_allclose(result[:, covered], theirs, atol=1e-3)
    assert (how.mean, how.std) == (None, None)


def test_percent_signal_change_needs_a_mean():
    values, covered = made()
    with pytest.raises(NormaliseError, match=r"about zero, as in residual data.*choose residual-z"):
        normalise(values - values.mean(axis=0), covered, "percent-signal-change")
    values[:, 1] = 1e-3 * np.arange(len(values))  # one voxel without a mean carries no percentage
    result, _ = normalise(values, covered, "percent-signal-change")
    assert (result[:, 1] == 0).all()
    assert np.abs(result[:, 2]).max() > 0


@pytest.mark.parametrize("method", ["residual-z", "voxel-z", "global-z", "min-max"])
def test_negative_values_keep_their_sign(method):
    rng = np.random.default_rng(4)
    values = rng.normal(size=(40, 23)).astype(np.float32)
    values -= values.mean(axis=0)  # residuals, as Athena distributes them
    covered = np.ones(23, dtype=bool)
    result, how = normalise(values, covered, method)
    zero = 0.0 if how.mean is None else -how.mean / how.std
    clear = np.abs(values) > 0.01
    np.testing.assert_array_equal(np.sign(result - zero)[clear], np.sign(values)[clear])
    assert (values < 0).mean() > 0.4
    stored = quantise(result, covered, "int8")
    clear = np.abs(values) > 0.1
    np.testing.assert_array_equal(np.sign(dequantise(stored) - zero)[clear], np.sign(values)[clear])


@pytest.mark.parametrize("method", ["residual-z", "voxel-z", "global-z", "min-max", "percent-signal-change"])
def test_statistics_are_those_of_float64_arithmetic(method):
    values, covered = made(50, 37, seed=9)
    inside = values[:, covered].astype(np.float64)
    own = inside.mean(axis=0)
    wanted = {
        "residual-z": (inside - own) / (inside - own).std(),
        "voxel-z": (inside - own) / inside.std(axis=0),
        "global-z": (inside - inside.mean()) / inside.std(),
        "min-max": (inside - inside.min()) / (inside.max() - inside.min()),
        "percent-signal-change": 100 * (inside - own) / own,
    }[method]
    result, _ = normalise(values, covered, method)
    np.testing.assert_allclose(result[:, covered], wanted, rtol=1e-4, atol=1e-4)


def test_a_run_stored_without_any_error_has_a_finite_temporal_snr():
    # JSON has no infinity: the run's line in the manifest could not be read again.
    assert np.isfinite(decibels([Fidelity(n_voxels=9, variance=1e6, error=0.0)]))
