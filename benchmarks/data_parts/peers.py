"""Peers, written in the plain way that people write them, and the files that each of them reads.

All hold the same runs on the same 96³ grid. The clips are asked for at the same places.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import webdataset as wds

from boldforge.data_shards import ClipStream, DataRecipe, Manifest, Run, ShardReader, build_shards

REAL = Path(__file__).parents[2] / "tests/data"
CLIP = 20


def write_long_runs(folder: Path, n_frames: int) -> list[Run]:
    """Write the two real runs, played forwards and backwards until they have `n_frames`, as if their TR were 2 s."""
    runs = []
    for number, path in enumerate(sorted(REAL.glob("*_bold.nii.gz"))):
        image = nib.load(path)
        values = np.asarray(image.dataobj)
        there_and_back = np.concatenate([values, values[..., -2:0:-1]], axis=3)
        frames = np.take(there_and_back, range(n_frames), axis=3, mode="wrap")
        longer = nib.Nifti1Image(frames, image.affine)
        longer.header.set_xyzt_units("mm", "sec")
        longer.header["pixdim"][4] = 2.0
        target = folder / f"sub-{number}_bold.nii"
        nib.save(longer, target)
        runs.append(Run(f"{number}", None, None, 2.0, target))
    return runs


def build(runs: list[Run], out: Path, dtype: str, normalisation: str = "residual-z") -> Manifest:
    """Build 96³ shards of the runs."""
    return build_shards(runs, out, DataRecipe(grid="mni2mm", tr=2.0, dtype=dtype, normalisation=normalisation)).manifest


def clip_places(manifest: Manifest, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the (run, first frame) of clips in the stream's own order, for ever."""
    stream = ClipStream(manifest, CLIP, 1, seed)
    sample = 0
    while True:
        clip = stream.clip(sample)
        yield clip.run, clip.start
        sample += 1


def read_ours(manifest: Manifest, seed: int = 0, copy_scales: bool = False) -> Iterator[int]:
    """Read clips through `ClipStream`, checksums on; yield the bytes of each that were copied."""
    for batch in ClipStream(manifest, CLIP, 1, seed):
        yield batch.q.nbytes + (batch.scales.both().nbytes if copy_scales else 0)


class DensePt:
    """One ``.pt`` per subject: int8 cubes [T, 96, 96, 96] with one scale, memory-mapped and sliced."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, manifest: Manifest) -> None:
        """Write every run, from what is stored in the shards."""
        mask = manifest.brain_mask()
        reader = ShardReader(manifest)
        for number, run in enumerate(manifest.runs):
            clip = reader.read(number, 0, run.n_frames)
            values = clip.q * clip.scale + clip.mean
            scale = float(np.abs(values).max()) / 127
            cubes = np.zeros((run.n_frames, *mask.shape), dtype=np.int8)
            cubes[:, mask] = np.rint(values / scale).astype(np.int8)
            torch.save({"q": torch.from_numpy(cubes), "scale": scale}, self.folder / f"{number}.pt")

    def read(self, manifest: Manifest, seed: int = 0) -> Iterator[int]:
        """Read clips, each file mapped once."""
        files = [torch.load(path, mmap=True)["q"] for path in sorted(self.folder.glob("*.pt"))]
        for run, start in clip_places(manifest, seed):
            yield files[run][start : start + CLIP].clone().nbytes


class WebDatasetNpy:
    """A stock WebDataset of dense fp16 clips as ``.npy``, read one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, manifest: Manifest) -> None:
        """Write the clips of the first epoch without overlap."""
        mask = manifest.brain_mask()
        reader = ShardReader(manifest)
        with wds.TarWriter(str(self.folder / "clips.tar")) as tar:
            for start in range(0, manifest.runs[0].n_frames - CLIP + 1, CLIP):
                clip = reader.read(0, start, CLIP)
                cubes = np.zeros((CLIP, *mask.shape), dtype=np.float16)
                cubes[:, mask] = clip.q * clip.scale + clip.mean
                tar.write({"__key__": f"clip{start:06d}", "npy": cubes})

    def read(self, manifest: Manifest, seed: int = 0) -> Iterator[int]:
        """Read clips, decoded to arrays."""
        while True:
            for sample in wds.WebDataset(
                str(self.folder / "clips.tar"), shardshuffle=False, empty_check=False
            ).decode():
                yield sample["npy"].nbytes


class NiftiSlices:
    """The ``.nii.gz`` files themselves, sliced through nibabel's array proxy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, manifest: Manifest) -> None:
        """Write every run as int16 on the same grid."""
        mask = manifest.brain_mask()
        reader = ShardReader(manifest)
        for number, run in enumerate(manifest.runs):
            clip = reader.read(number, 0, run.n_frames)
            cubes = np.zeros((*mask.shape, run.n_frames), dtype=np.int16)
            cubes[mask] = np.rint((clip.q * clip.scale + clip.mean) * 1000).T
            nib.save(nib.Nifti1Image(cubes, manifest.grid.affine), self.folder / f"{number}.nii.gz")

    def read(self, manifest: Manifest, seed: int = 0) -> Iterator[int]:
        """Read clips."""
        images = [nib.load(path) for path in sorted(self.folder.glob("*.nii.gz"))]
        for run, start in clip_places(manifest, seed):
            yield np.asarray(images[run].dataobj[..., start : start + CLIP]).nbytes


def ingest_plainly(path: Path, out: Path) -> int:
    """Turn a NIfTI into a file of cubes as people do: load it whole, interpolate, z-score, save; return the frames."""
    values = nib.load(path).get_fdata()
    frames = torch.from_numpy(values).permute(3, 0, 1, 2).float()[:, None]
    cubes = torch.nn.functional.interpolate(frames, size=(96, 96, 96), mode="trilinear")[:, 0]
    cubes = (cubes - cubes.mean()) / cubes.std()
    torch.save(cubes.half(), out)
    return len(cubes)


def one_scale_per_subject(manifest: Manifest) -> list[float]:
    """Return the temporal SNR, in dB, that int8 with one scale per subject leaves of each stored run.

    The values are what peers quantise: anatomy and signal together, z-scored as one.
    """
    reader, found = ShardReader(manifest), []
    for number, run in enumerate(manifest.runs):
        clip = reader.read(number, 0, run.n_frames)
        values = (clip.q * clip.scale + clip.mean)[:, clip.scale > 0].astype(np.float64)
        scale = np.abs(values).max() / 127
        error = np.square(np.rint(values / scale) * scale - values).mean()
        found.append(float(10 * np.log10(values.var(axis=0).mean() / error)))
    return found


def empty(folder: Path) -> Path:
    """Make a folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
