import gzip
import logging
import struct

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import HeaderError, ReadError, open_bold
from boldforge.data_shards import nifti as nifti_module

# Byte offsets in a NIfTI-1 header.
DIM, PIXDIM, QFORM_CODE, SROW = 40, 76, 252, 280


def patch_header(path, offset, data):
    """Overwrite header bytes of a .nii.gz as a broken converter would."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(content), 1))
    return path


def zero_bytes(path):
    path.write_bytes(b"")


def not_nifti(path):
    path.write_bytes(b"this is a letter, not a brain\n" * 40)


def three_d(path):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), dtype=np.int16), np.eye(4)), path)


def one_frame(path):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 1), dtype=np.int16), np.eye(4)), path)


def five_d(path):
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6, 2, 3), dtype=np.int16), np.eye(4)), path)


def zero_affine(path):
    patch_header(path, SROW, bytes(48))


def nan_affine(path):
    patch_header(path, SROW, struct.pack("<f", float("nan")))


def no_orientation(path):
    patch_header(path, QFORM_CODE, bytes(4))


def tr_missing(path):
    patch_header(path, PIXDIM + 16, struct.pack("<f", 0.0))


def tr_negative(path):
    patch_header(path, PIXDIM + 16, struct.pack("<f", -2.0))


def absurd_size(path):
    patch_header(path, DIM, struct.pack("<8h", 4, 32767, 32767, 32767, 32767, 1, 1, 1))


def negative_size(path):
    patch_header(path, DIM, struct.pack("<8h", 4, 12, -14, 12, 12, 1, 1, 1))


def absurd_length(path):
    patch_header(path, DIM, struct.pack("<8h", 4, 256, 256, 256, 32767, 1, 1, 1))


def more_than_the_file_can_hold(path):
    patch_header(path, DIM, struct.pack("<8h", 4, 400, 400, 400, 2, 1, 1, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (zero_bytes, r"is empty \(0 bytes\)"),
        (not_nifti, "cannot be read as NIfTI"),
        (three_d, "has shape 4×5×6, expected 4D"),
        (one_frame, "at least two frames"),
        (five_d, "has shape 4×5×6×2×3, expected 4D"),
        (zero_affine, "affine is zero or singular"),
        (nan_affine, "affine is zero or singular"),
        (no_orientation, "neither an sform nor a qform"),
        (tr_missing, r"no repetition time \(found 0\); pass it with --source-tr"),
        (tr_negative, "no repetition time"),
        (absurd_size, "has shape 32767×32767×32767×32767, more than 67108864 voxels in a frame"),
        (absurd_length, "promises 2048 GiB"),
        (negative_size, "cannot be read as NIfTI|every axis must be at least 1"),
        (more_than_the_file_can_hold, "its header promises 256000352 bytes but the file has only"),
    ],
)
def test_bad_headers_get_one_sentence_that_names_the_file(write_bold, damage, message):
    path = write_bold()
    damage(path)
    with pytest.raises(HeaderError, match=message) as caught:
        open_bold(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_broken_qform_beside_a_good_sform_is_told_and_not_used(write_bold, caplog):
    path = write_bold()
    wanted = nib.load(path).affine
    # Quaternion parts may not exceed 1; the sform stays valid.
    patch_header(path, QFORM_CODE, struct.pack("<2h3f", 1, 2, 0.9, 0.9, 0.9))
    with caplog.at_level(logging.WARNING, logger="boldforge"):
        np.testing.assert_array_equal(open_bold(path).affine, wanted)
    assert "its qform is broken" in caplog.text


def test_a_header_without_its_voxels_names_the_file_that_is_missing(tmp_path):
    nib.save(nib.Nifti1Pair(np.ones((3, 4, 5, 6), dtype=np.int16), np.eye(4)), tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    with pytest.raises(HeaderError, match=r"a\.hdr: its voxels should be in a\.img"):
        open_bold(tmp_path / "a.hdr")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HeaderError, match=r"gone\.nii: no such file"):
        open_bold(tmp_path / "gone.nii")


@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_a_truncated_gzip_is_told_when_decoded(write_bold, keep):
    path = write_bold()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ReadError, match="cut short or corrupt"):
        open_bold(path).read()


def test_a_truncated_plain_file_is_told_before_decoding(write_bold):
    path = write_bold("a.nii")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HeaderError, match="cut short"):
        open_bold(path)


@pytest.mark.parametrize(
    ("value", "units", "seconds", "warns"),
    [
        (2.0, "sec", 2.0, False),
        (1.16, "sec", 1.16, False),
        (2000.0, "msec", 2.0, False),
        (720_000.0, "usec", 0.72, False),
        (2000.0, "sec", 2.0, True),
        (1500.0, "unknown", 1.5, True),
        (2.5, "unknown", 2.5, False),
    ],
)
def test_repetition_time_in_any_unit(write_bold, caplog, value, units, seconds, warns):
    with caplog.at_level(logging.WARNING, logger="boldforge"):
        assert open_bold(write_bold(tr=value, units=units)).tr == seconds
    assert ("read as milliseconds" in caplog.text) == warns


def test_an_impossible_repetition_time_is_refused_unless_given(write_bold):
    path = write_bold(tr=2.0, units="msec")
    with pytest.raises(HeaderError, match="impossible repetition time"):
        open_bold(path)
    assert open_bold(path, tr=2.0).tr == 2.0
    with pytest.raises(HeaderError, match="0 s was given"):
        open_bold(path, tr=0)


def test_a_singleton_fourth_axis_is_squeezed(tmp_path):
    data = np.random.default_rng(0).integers(0, 99, (3, 4, 5, 1, 7)).astype(np.int16)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header["pixdim"][5] = 1.5
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "five.nii.gz")
    bold = open_bold(tmp_path / "five.nii.gz")
    assert (bold.n_frames, bold.tr) == (7, 1.5)
    np.testing.assert_array_equal(bold.read(), data[:, :, :, 0])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("order", ["<", ">"])
def test_slope_byte_order_and_container_do_not_change_values(tmp_path, kind, order):
    values = np.random.default_rng(1).integers(-300, 300, (3, 4, 5, 6)).astype(np.int16)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
    image = kind(values, np.eye(4), header)
    image.header.set_zooms((1, 1, 1, 2))
    image.header.set_slope_inter(0.5, 10)
    path = tmp_path / ("a.img" if kind is nib.Nifti1Pair else "a.nii")
    nib.save(image, path)
    raw = nib.load(path)
    np.testing.assert_array_equal(open_bold(path).read(), np.asarray(raw.dataobj, dtype=np.float32))


def test_sform_wins_over_a_different_qform(write_bold, caplog):
    path = write_bold()
    image = nib.load(path)
    moved = image.affine.copy()
    moved[:3, 3] += 30
    image.set_qform(moved, code=1)
    nib.save(image, path.with_name("moved.nii.gz"))
    with caplog.at_level(logging.WARNING, logger="boldforge"):
        np.testing.assert_array_equal(open_bold(path.with_name("moved.nii.gz")).affine, image.get_sform())
    assert "sform and qform disagree" in caplog.text


def test_the_fast_gzip_decoder_gives_the_bytes_of_the_plain_one(real_runs, monkeypatch):
    igzip = pytest.importorskip("isal.igzip", reason="isal is an optional package")
    path = real_runs.runs[0].path
    monkeypatch.setattr(nifti_module, "igzip", igzip)
    fast = open_bold(path).read()
    monkeypatch.setattr(nifti_module, "igzip", None)
    np.testing.assert_array_equal(fast, open_bold(path).read())
