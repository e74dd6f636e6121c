"""The NeuroSTORM recipe through the real command, on shards of its own grid; and what stops a run with a sentence."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from boldforge.configs import ConfigError, load_config
from boldforge.data_shards import ClipStream, DataRecipe, build_shards, find_runs, load_manifest, split_segments
from boldforge.pretrain import PretrainConfig, load_pretrained, read_metrics
from boldforge.pretrain.run_folder import check_same_run

DATA = Path(__file__).parents[1] / "data"
# Patches of 24 mm and 4 channels: every part of the recipe is there, in two steps of a few seconds.
TINY = [
    *("model.patch_mm=24", "model.frames=4", "model.embed_dim=4", "model.depths=[1,2]", "model.decoder_depths=[1]"),
    *("model.last_window=[4,4,4,4]", "model.d_state=2", "steps=3", "batch_size=1", "checkpoint_every=3"),
    *("evaluate_every=3", "evaluation_clips=1", "num_workers=0", "holdout.by=frames", "holdout.fraction=0.2"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real run on the cube of 96³ voxels, background included, at the paper's normalisation."""
    out = tmp_path_factory.mktemp("neurostorm-shards")
    runs = [run for run in find_runs(DATA).runs if "happy" in str(run.path)]
    build_shards(runs, out, DataRecipe(grid="neurostorm", tr=8.0, normalisation="neurostorm", dtype="int8"))
    return out


def pretrain(shards: Path, out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    recipe = ["--config", "configs/pretrain/neurostorm.yaml", f"shards={shards}", f"out={out}", *TINY, *overrides]
    command = [sys.executable, "-m", "boldforge.launch.cli", "pretrain", *recipe]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.distributed
def test_the_recipe_pretrains_and_exports_what_it_describes(shards: Path, tmp_path: Path) -> None:
    done = pretrain(shards, tmp_path / "run", "model.redundancy_dropout=true", "model.prompts=2")
    assert done.returncode == 0, done.stderr[-3000:] + (tmp_path / "run" / "ranks.log").read_text()[-3000:]
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)
    assert {row["lr"] for row in rows} == {5e-5}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["tokens_per_clip"], summary["hidden_tokens_per_clip"]) == (512 * 4, 256 * 4)
    pretrained = load_pretrained(tmp_path / "run" / "export")
    assert (
        pretrained.config["data"]["grid"] == "neurostorm" and pretrained.config["data"]["normalisation"] == "neurostorm"
    )
    names = set(dict(pretrained.model.named_parameters()))
    assert {"mask_token", "window_mask_token", "atlas_mask_token", "stages.0.blocks.0.prompt"} <= names
    with torch.no_grad():
        assert pretrained.model.encode(torch.zeros(1, 4, 96**3)).isfinite().all()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.frames=64"], "the longest run has"),
        (["mask.ratio=0.9999"], "hides all 512 patches of this grid, so that nothing is left to see"),
        (["optimizer.lr=1e30", "steps=6"], "the loss is not a finite number, though the data are; lower optimizer.lr"),
    ],
    ids=["clips longer than the run", "nothing visible", "diverged"],
)
def test_what_cannot_be_trained_ends_with_one_sentence(shards, tmp_path: Path, overrides: list, sentence: str) -> None:
    done = pretrain(shards, tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr


def config(shards: Path, *overrides: str) -> PretrainConfig:
    paths = [f"shards={shards}", "out=out"]
    return load_config(PretrainConfig, "configs/pretrain/neurostorm.yaml", [*paths, *TINY, *overrides])


def test_a_clip_longer_than_what_is_held_out_is_refused_before_the_first_step(shards: Path) -> None:
    from boldforge.pretrain.datasets import check_lengths

    manifest = load_manifest(shards)
    train, held = split_segments(manifest, config(shards).holdout)
    check_lengths(4, [manifest], [train], [held])
    with pytest.raises(
        ConfigError, match=r"the longest held-out stretch has .* a clip needs model\.frames = 12; raise"
    ):
        check_lengths(12, [manifest], [train], [held])
    with pytest.raises(ConfigError, match=r"the longest run has .* a clip needs model\.frames = 64; lower"):
        check_lengths(64, [manifest], [train], [held])


def test_a_loss_that_is_no_number_names_the_run_that_holds_nan_or_the_learning_rate(
    shards: Path, one_rank: None
) -> None:
    from boldforge.pretrain.train import lost

    manifest = load_manifest(shards)
    batch = ClipStream(manifest, clip_length=4, batch_size=1, seed=0).batch(0)
    run = SimpleNamespace(manifests=[manifest], config=config(shards), world_size=1)
    assert "though the data are; lower optimizer.lr (now 5e-05)" in str(lost(run, batch, 6))
    batch.scale[0, 5] = float("nan")
    sentence = str(lost(run, batch, 6))
    assert sentence.startswith("step 7: the loss is not a finite number, because run sub-happy_task-rest of ")
    assert f"{shards} holds NaN or infinity; mend the file" in sentence


def test_a_run_folder_from_before_these_options_is_still_the_same_run(shards: Path, tmp_path: Path) -> None:
    mine = load_config(PretrainConfig, "configs/pretrain/tiny.yaml", [f"shards={shards}", f"out={tmp_path}"])
    before = mine.model_dump(mode="json") | {"manifest_hash": "abc"}
    for section, keys in {"model": ("prompts", "mask_tokens", "decoder", "last_shifted"), "mask": ("time",)}.items():
        for key in keys:
            del before[section][key]
    del before["loss"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    check_same_run(mine, {"manifest_hash": "abc"})
    with pytest.raises(ConfigError, match="this run was started with manifest_hash = abc, now it is xyz"):
        check_same_run(mine, {"manifest_hash": "xyz"})
