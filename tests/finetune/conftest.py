import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from boldforge.data_shards import DataRecipe, Run, brain_mask, build_shards, get_grid, mask_hash
from boldforge.finetune import SweepConfig, fit, summary, sweep
from boldforge.pretrain import ModelConfig, build_model, write_export

GRID = "mni4mm"
FRAMES = 4
# Patches of 48 mm leave a few dozen tokens: the real encoder, small enough for a test.
TINY = ModelConfig(
    patch_mm=48,
    frames=FRAMES,
    embed_dim=8,
    depths=(2, 2),
    decoder_depths=(1,),
    d_state=4,
    mlp_ratio=2.0,
    backend="torch",
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def few_draws():
    """For tests in which intervals and p only have to be the same again."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("bootstrap_intervals", "permutation_test", "compare"):
            patch.setattr(summary, name, partial(getattr(summary, name), draws=50))
        yield


@pytest.fixture(scope="session")
def write_encoder(tmp_path_factory):
    """Write an untrained encoder's export; another seed gives other weights."""

    def write(seed: int = 0, model: ModelConfig = TINY, **data) -> Path:
        grid = get_grid(GRID)
        mask = brain_mask(grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_model(model, mask, grid.voxel_size, grid.affine)
        recipe = {"grid": GRID, "tr": 2.0, "normalisation": "residual-z", "dtype": "int16", "clip_length": model.frames}
        recipe |= {"mask_sha256": mask_hash(mask), **data}
        content = {"model": model.model_dump(mode="json"), "data": recipe, "training": {}}
        return write_export(network.state_dict(), content, tmp_path_factory.mktemp("export"))

    return write


@pytest.fixture(scope="session")
def encoder(write_encoder) -> Path:
    return write_encoder()


@pytest.fixture(scope="session")
def values_BTV() -> torch.Tensor:
    n_voxels = int(brain_mask(get_grid(GRID)).sum())
    generator = np.random.default_rng(5)
    return torch.from_numpy(generator.standard_normal((3, FRAMES, n_voxels)).astype(np.float32))


@pytest.fixture(scope="session")
def build_cohort(tmp_path_factory):
    """Shard a small cohort whose class 1 fluctuates more in one block of the brain; effect 0 plants nothing."""

    def build(subjects: int, effect: float, seed: int = 0, frames: int = 12, unlabelled: int = 0, **recipe) -> Path:
        folder = tmp_path_factory.mktemp("cohort")
        grid = get_grid(GRID)
        mask = brain_mask(grid)
        place = np.argwhere(mask)
        planted = (place[:, 0] < 22) & (place[:, 1] > 26)
        generator = np.random.default_rng(seed)
        runs = []
        for number in range(subjects):
            label = number % 2 if number >= unlabelled else None
            values_TV = generator.standard_normal((frames, len(place)), dtype=np.float32)
            values_TV *= 1 + 0.1 * generator.standard_normal()
            # Coherent fluctuation, as a network gives: it survives averaging over a patch, white noise does not.
            strength = 0.6 + 0.05 * generator.standard_normal() + effect * (label or 0)
            values_TV[:, planted] += strength * generator.standard_normal((frames, 1), dtype=np.float32)
            volume = np.zeros((*grid.shape, frames), dtype=np.float32)
            volume[mask] = values_TV.T
            image = nib.Nifti1Image(volume, grid.affine)
            image.header.set_zooms((4, 4, 4, 2))
            image.header.set_xyzt_units("mm", "sec")
            path = folder / f"{number}.nii"
            nib.save(image, path)
            site = ("KKI", "NYU")[number // 2 % 2]
            phenotype = {
                "diagnosis": label,
                "age": 9.0 + 4 * strength,
                "group": f"g{number % 3}",
                "same": "one",
                "constant": 12.0,
            }
            runs.append(Run(f"person{number:02d}", "1", site, 2.0, path, phenotype=phenotype, simulated=True))
        stored = {"grid": GRID, "tr": 2.0, "normalisation": "residual-z", "dtype": "int16"} | recipe
        build_shards(runs, folder / "shards", DataRecipe(**stored))
        for run in runs:
            run.path.unlink()
        return folder / "shards"

    return build


@pytest.fixture(scope="session")
def cohort(build_cohort) -> Path:
    return build_cohort(subjects=24, effect=2.0, unlabelled=2)


@pytest.fixture(scope="session")
def sweep_and_die() -> Callable[..., bool]:
    """Sweep in a child that kills itself before its n-th durable step; say whether it came to its end.

    Every epoch begun leaves a line in the log, if there is one: the trial's rank (or ``chosen``) and its number.
    """

    def counting(work, step, done):
        def do(*arguments, **keywords):
            done[0] += 1
            if done[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return work(*arguments, **keywords)

        return do

    def logging(work, log):
        def do(fitting):
            with log.open("a") as stream:
                called = "chosen" if fitting.validation is None else fitting.classifier.adapter.rank
                stream.write(f"{called} {fitting._number + 1}\n")
            return work(fitting)

        return do

    def sweep_and_die(config: SweepConfig, step: int, log: Path | None = None) -> bool:
        child = os.fork()
        if child == 0:
            done = [0]
            for name in ("fsync", "replace", "unlink", "rename"):
                setattr(os, name, counting(getattr(os, name), step, done))
            if log is not None:
                fit.Fit.begin_epoch = logging(fit.Fit.begin_epoch, log)
            try:
                sweep(config)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status == 0

    return sweep_and_die
