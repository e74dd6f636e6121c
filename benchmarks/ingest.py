"""Peak memory and speed of reading one long run: a simulated 91×109×91 NIfTI, gzipped or not, to stored integers.

    python benchmarks/ingest.py [--quick] [--json FILE]

`write_long_run` makes the file, `measure` stores it in a process of its own and returns that process's figures.
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

MNI_SHAPE = (91, 109, 91)
MNI_AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
_PATTERNS = 7  # noise frames that the made run repeats in turn; drawing each frame anew would take minutes

# Runs alone in its process, so that its peak is that of one run and of what it imports.
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from boldforge.data_shards import DataRecipe, Run
from boldforge.data_shards.grid import brain_mask, get_grid
from boldforge.data_shards.prepare import store_run
path, recipe, scratch = Path(sys.argv[1]), DataRecipe.model_validate_json(sys.argv[2]), Path(sys.argv[3])
brain_mask(get_grid(recipe.grid))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
stored = store_run(Run("01", None, None, None, path), recipe, scratch)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_mb": peak / 1024, "imports_mb": before / 1024, "seconds": seconds,
                  "frames_in": stored.prepared.source_frames, "frames_out": len(stored.stored.q),
                  "tsnr_db": stored.tsnr_db}))
"""


def write_long_run(path: Path, n_frames: int = 1200, tr: float = 0.72, seed: int = 0, shift: float = 0.0) -> Path:
    """Write a simulated run on the MNI 2 mm grid, int16, zero outside the brain, a few frames at a time.

    Parameters
    ----------
    path
        Ends in ``.nii`` or ``.nii.gz``.
    n_frames, tr, seed
        Frames, seconds between them, and what the noise is drawn from.
    shift
        How many mm along each axis the file's lattice lies off FSL's.
    """
    from boldforge.data_shards.grid import Grid, brain_mask

    rng = np.random.default_rng(seed)
    brain = brain_mask(Grid("mni", MNI_SHAPE, MNI_AFFINE))
    mean = rng.uniform(8000, 12000, MNI_SHAPE)
    noise = [100 * rng.standard_normal(MNI_SHAPE) for _ in range(_PATTERNS)]
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((*MNI_SHAPE, n_frames))
    header.set_xyzt_units("mm", "sec")
    affine = MNI_AFFINE.copy()
    affine[:3, 3] += shift
    header.set_sform(affine, code=4)
    header["pixdim"][1:5] = (2, 2, 2, tr)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    header["descrip"] = b"simulated by BoldForge, for a benchmark"
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(header.binaryblock + bytes(4))
        for frame in range(n_frames):
            values = np.where(brain, mean + noise[frame % _PATTERNS] + 50 * np.sin(frame / 20), 0)
            file.write(values.astype("<i2").tobytes(order="F"))
    return path


def measure(path: Path, grid: str = "mni2mm", tr: float = 0.72, dtype: str = "int16", **options: object) -> dict:
    """Store one run in a process of its own.

    Returns
    -------
    ``peak_mb`` (the process's largest resident set, MiB), ``imports_mb`` (the same before the run was touched),
    ``seconds``, ``frames_in``, ``frames_out``, ``tsnr_db``.
    """
    from boldforge.data_shards import DataRecipe

    recipe = DataRecipe(grid=grid, tr=tr, dtype=dtype, **options).model_dump_json()
    command = [sys.executable, "-c", _CHILD, str(path), recipe, str(path.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 frames instead of 1200")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    arguments = parser.parse_args()
    n_frames = 200 if arguments.quick else 1200
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_long_run(Path(folder) / "long_bold.nii.gz", n_frames)
        for grid in ("mni2mm", "mni4mm"):
            found = measure(path, grid)
            peak = {"value": round(found["peak_mb"], 1), "unit": "MiB", "goal": 2000, "better": "lower"}
            rows.append({"figure": f"ingest_peak_memory_mb_{grid}", **peak})
            speed = {"value": round(n_frames / found["seconds"], 1), "unit": "frames/s", "goal": None}
            rows.append({"figure": f"ingest_frames_per_second_{grid}", **speed, "better": "higher"})
    size = "×".join(map(str, (*MNI_SHAPE, n_frames)))
    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}"
    print(f"{size}, int16, gzipped; {machine}")
    for row in rows:
        print(f"{row['figure']:40} {row['value']:>10} {row['unit']:10} goal {row['goal']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
