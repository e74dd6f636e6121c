"""Odd but lawful NIfTI files, written by nibabel, and some real ones; and what must never be decoded."""

import ast
import gzip
import pickle
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import boldforge.data_shards
from boldforge.data_shards import HeaderError, ReadError, open_bold
from boldforge.data_shards.nifti import read_volume

LOCAL = Path(__file__).parents[2] / "../shared/data/local/headers"


def whole(bold):
    """The recording from its blocks."""
    parts = [np.array(block, dtype=np.float32) for block in bold.blocks(n_bytes=1)]
    assert all(part.shape[1] == 1 for part in parts)
    return np.concatenate(parts, axis=1).reshape(*bold.shape, bold.n_frames, order="F")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".img", ".img.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
def test_blocks_are_what_nibabel_reads(tmp_path, ending, version, order, dtype):
    kind = getattr(nib, f"Nifti{version}{'Image' if ending.startswith('.nii') else 'Pair'}")
    values = np.random.default_rng(1).integers(0, 200, (5, 4, 3, 7)).astype(order + dtype)
    for slope in ((None, None), (0.37, -11)) if dtype == "i2" else ((None, None),):
        image = kind(values, np.diag([2.0, 2, 2, 1]), kind.header_class(endianness=order))
        image.header.set_data_dtype(order + dtype)
        image.header.set_zooms((2, 2, 2, 1.5))
        image.header.set_slope_inter(*slope)
        path = tmp_path / f"run{ending}"
        nib.save(image, path)
        bold = open_bold(path)
        assert (bold.tr, bold.n_frames) == (1.5, 7)
        wanted = nib.load(path).get_fdata(dtype=np.float32)
        np.testing.assert_array_equal(whole(bold), wanted)
        np.testing.assert_array_equal(bold.read(), wanted)


@pytest.mark.parametrize(
    ("shape", "step"), [((3, 4, 5, 7, 1), 4), ((3, 4, 5, 1, 7), 5), ((3, 4, 5, 7, 1, 1), 4), ((1, 4, 5, 7), 4)]
)
def test_singleton_axes_do_not_matter(tmp_path, shape, step):
    data = np.arange(np.prod(shape)).reshape(shape).astype(np.int16)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header["pixdim"][step] = 1.25
    nib.save(image, tmp_path / "five.nii.gz")
    bold = open_bold(tmp_path / "five.nii.gz")
    assert (bold.shape, bold.n_frames, bold.tr) == (shape[:3], 7, 1.25)
    np.testing.assert_array_equal(whole(bold), data.reshape(*shape[:3], 7))


def test_a_qform_alone_is_used(tmp_path):
    image = nib.Nifti1Image(np.ones((3, 4, 5, 6), dtype=np.int16), None)
    affine = np.array([[0, -2.0, 0, 7], [2, 0, 0, -8], [0, 0, 2, 9.5], [0, 0, 0, 1]])
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    image.header["pixdim"][4] = 2
    nib.save(image, tmp_path / "q.nii")
    np.testing.assert_allclose(open_bold(tmp_path / "q.nii").affine, affine, atol=1e-5)


def test_one_flipped_bit_in_a_gzip_is_found(write_bold):
    path = write_bold()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match="cut short or corrupt"):
        open_bold(path).read()


def test_a_wrong_checksum_at_the_end_of_a_gzip_is_found(write_bold):
    path = write_bold()
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # every voxel decodes; only the checksum knows
    path.write_bytes(content)
    with pytest.raises(ReadError, match="CRC"):
        open_bold(path).read()


def test_a_gzip_that_goes_on_for_ever_is_read_as_far_as_its_header_says(write_bold, caplog):
    path = write_bold()
    content = gzip.decompress(path.read_bytes())
    with gzip.open(path, "wb") as file:
        file.write(content)
        for _ in range(64):
            file.write(bytes(2**20))
    assert open_bold(path).read().shape == (12, 14, 12, 12)
    assert "more than its header says" in caplog.text


@pytest.mark.parametrize("dims", [(3, 32767, 32767, 32767, 1), (3, 900, 900, 900, 1), (3, 500, 500, 500, 1)])
def test_a_mask_cannot_ask_for_absurd_memory_either(tmp_path, dims):
    path = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), dtype=np.uint8), np.eye(4)), path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[40:50] = struct.pack("<5h", *dims)
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(HeaderError, match=r"voxels that are read|has only"):
        read_volume(path)


def test_a_pickle_is_no_recording_and_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    for name, data in (("a.nii", pickle.dumps(Bomb())), ("b.nii.gz", gzip.compress(pickle.dumps(Bomb())))):
        (tmp_path / name).write_bytes(data * 50)
        with pytest.raises(HeaderError, match="cannot be read as NIfTI"):
            open_bold(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_the_data_layer_unpickles_nothing():
    for path in Path(boldforge.data_shards.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in {"eval", "exec", "torch.load", "yaml.load"}, path
                if called in {"np.load", "np.lib.format.read_array", "np.lib.format.open_memmap"}:
                    assert keywords.get("allow_pickle", "False") == "False", path


@pytest.mark.skipif(not LOCAL.is_dir(), reason="optional: the public test images are not beside this repository")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("nib_functional.nii", ((17, 21, 3), 20)),
        ("nib_example4d.nii.gz", ((128, 96, 24), 2)),
        ("njs_5D_small.nii", ((1, 2, 3), 3)),
        ("nm_3vols.nii.gz", ((64, 64, 34), 3)),
        ("bv_sub-01_task-rhymejudgment_bold.nii.gz", "neither an sform nor a qform"),
        ("bis_avg152T1_LR_PSR.nii.gz", "expected 4D"),
        ("njs_not-nifti.nii", "cannot be read as NIfTI"),
        ("zero_bytes_bold.nii.gz", "is empty"),
        ("made_truncated_gzip_example4d.nii.gz", "cut short"),
    ],
)
def test_public_test_images(name, found):
    if isinstance(found, str):
        with pytest.raises((HeaderError, ReadError), match=found):
            open_bold(LOCAL / name, tr=2.0).read()
    else:
        bold = open_bold(LOCAL / name, tr=2.0)
        assert (bold.shape, bold.n_frames) == found
        wanted = nib.load(LOCAL / name).get_fdata(dtype=np.float32)
        np.testing.assert_array_equal(whole(bold), wanted.reshape(*bold.shape, bold.n_frames))
