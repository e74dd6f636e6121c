"""What a recipe may say of its shards: a folder, an address, a mixture; read by the real command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from boldforge.configs import ConfigError, load_config
from boldforge.data_shards import (
    CacheConfig,
    DataRecipe,
    SplitPlan,
    build_shards,
    find_runs,
    load_manifest,
    store_splits,
)
from boldforge.finetune import FinetuneConfig
from boldforge.pretrain import PretrainConfig, load_pretrained, read_metrics
from boldforge.pretrain.datasets import open_datasets

DATA = Path(__file__).parents[1] / "data"
TINY = [
    *("model.frames=4", "model.embed_dim=8", "model.depths=[1,2]", "model.decoder_depths=[1]", "model.d_state=4"),
    *("batch_size=2", "checkpoint_every=2", "evaluation_clips=3", "optimizer.warmup_steps=2", "holdout.fraction=0.2"),
]


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the two real runs, as a dataset of its own."""
    out = tmp_path_factory.mktemp("one-run")
    build_shards(find_runs(DATA).runs[:1], out, DataRecipe(grid="mni4mm", tr=2.0))
    return out


def pretrain(shards: object, out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command that a user runs, on one rank."""
    recipe = ["--config", "configs/pretrain/tiny.yaml", f"shards={shards}", f"out={out}", *TINY, *overrides]
    command = [sys.executable, "-m", "boldforge.launch.cli", "pretrain", *recipe]
    return subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)


def figures(out: Path) -> list[dict[str, float]]:
    """What a run logged, but its speed."""
    return [{name: value for name, value in row.items() if name != "frames_per_second"} for row in read_metrics(out)]


def config(shards: object, **changes: object) -> PretrainConfig:
    return load_config(PretrainConfig, {"shards": shards, "out": "out", **changes})


@pytest.mark.parametrize(
    ("shards", "paths", "weights"),
    [
        ("s3://bucket/shards", ["s3://bucket/shards"], [None]),
        (Path("runs/shards"), ["runs/shards"], [None]),
        (["a", "gs://b/c"], ["a", "gs://b/c"], [None, None]),
        ([{"path": "a", "weight": 3}, {"path": "b", "weight": 1}], ["a", "b"], [3, 1]),
    ],
)
def test_a_recipe_names_one_dataset_or_several(shards: object, paths: list[str], weights: list[float | None]) -> None:
    found = config(shards)
    assert [dataset.path for dataset in found.shards] == paths and found.weights == weights
    written = yaml.safe_load(yaml.safe_dump(found.model_dump(mode="json")))
    assert load_config(PretrainConfig, written) == found
    if len(paths) == 1:
        assert written["shards"] == paths[0]


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ([], "shards"),
        ([{"path": "a", "weight": 0}], "weight"),
        ([{"path": "a", "wieght": 1}], r"unknown key 'shards\.0\.wieght'; did you mean 'shards\.0\.weight'\?"),
        (["b", {"path": "a", "zzz": 1}], r"unknown key 'shards\.1\.zzz'; valid keys are path, weight\."),
        ([{"path": "a", "weight": float("nan")}], "weight"),
        (7, "shards"),
        ("", "shards"),
    ],
)
def test_shards_that_cannot_be_are_refused_by_key(shards: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(shards)


@pytest.mark.parametrize("url", ["http://alice:S3'CRET@host/x", "ftp://u:S3'CRET@h/x", "https://h/x?Signature=S3'CRET"])
def test_a_recipe_with_a_password_is_refused_without_repeating_it(url: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"shards": ["a", {"path": url}], "out": "o"}))
    finetuning = {"backbone": "b", "out": "o"}
    for recipe in (
        lambda: load_config(PretrainConfig, tmp_path / "recipe.yaml"),
        lambda: load_config(PretrainConfig, {"out": "o"}, [f'shards="{url}"']),
        lambda: load_config(FinetuneConfig, {**finetuning, "shards": url}),
        lambda: load_config(FinetuneConfig, {**finetuning, "shards": {"path": url}}),
        lambda: load_config(FinetuneConfig, finetuning, [f'shards="{url}']),
    ):
        with pytest.raises(ConfigError, match="shards") as caught:
            recipe()
        assert "CRET" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"key 'shards.*is '[a-z]+://…', but: [a-z]+://h(ost)?: expected an address"):
        config(url)


@pytest.mark.parametrize("recipe", [PretrainConfig, FinetuneConfig])
def test_a_config_made_in_python_does_not_repeat_a_password_either(recipe: type) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(shards="https://alice:S3'CRET@host/x", backbone="b", out="o")
    assert "expected an address without a user, a password" in str(caught.value)
    assert "CRET" not in str(caught.value) + repr(caught.value)


def test_a_folder_may_have_any_name() -> None:
    assert config(["a?b", "c#d@e"]).shards[1].path == "c#d@e"


def test_a_mixture_with_a_twin_or_a_missing_weight_is_refused(real_shards: Path, one_run: Path) -> None:
    def opened(*shards: object) -> list[str]:
        found = config(list(shards))
        return [manifest.content_hash for manifest in open_datasets(found.shards, found.shard_cache)]

    assert opened(str(real_shards), str(one_run)) == [
        load_manifest(real_shards).content_hash,
        load_manifest(one_run).content_hash,
    ]
    with pytest.raises(ConfigError, match="are the same dataset; name it once, with a larger weight"):
        opened(str(real_shards), str(real_shards))
    with pytest.raises(ConfigError, match="has no weight and others have one"):
        opened({"path": str(real_shards), "weight": 2}, str(one_run))


def test_copies_with_other_splits_are_refused(real_shards: Path, tmp_path: Path) -> None:
    """One could train on a subject that the other holds out."""
    for number, run in enumerate(load_manifest(real_shards).runs):
        shutil.copytree(real_shards, tmp_path / str(number))
        store_splits(tmp_path / str(number), SplitPlan(fractions={"test": 1e-6}, fixed={"test": (run.subject,)}))
    config = load_config(PretrainConfig, "pretrain/tiny.yaml", [f"shards=[{tmp_path}/0, {tmp_path}/1]"])
    with pytest.raises(ConfigError, match=r"/0 and .*/1 store different splits, .* store the same plan in both"):
        open_datasets(config.shards, CacheConfig())


def test_finetuning_reads_from_addresses_too(real_shards: Path, tmp_path: Path, serve) -> None:
    from boldforge.data_shards import open_dataset

    with serve(real_shards) as server:
        settings = {
            "shards": server.url,
            "backbone": "b",
            "out": "o",
            "shard_cache": {"folder": tmp_path / "c", "gib": 0.1},
        }
        recipe = load_config(FinetuneConfig, settings)
        manifest = open_dataset(recipe.shards, recipe.shard_cache)
    assert manifest.content_hash == load_manifest(real_shards).content_hash and manifest.place == server.url
    assert (tmp_path / "c").is_dir() and recipe.shard_cache == CacheConfig(folder=tmp_path / "c", gib=0.1)


@pytest.mark.slow
@pytest.mark.distributed
def test_pretraining_over_http_is_pretraining_from_the_folder(real_shards: Path, tmp_path: Path, serve) -> None:
    settings = ("steps=3", "checkpoint_every=3", "evaluate_every=3", "num_workers=1")
    with serve(real_shards) as server:
        server.failures += [1]  # the connection may fail now and then
        far = pretrain(server.url, tmp_path / "far", *settings, f"shard_cache.folder={tmp_path / 'cache'}")
        assert far.returncode == 0, far.stderr[-3000:]
        assert any(path.endswith(".tar") and wanted for path, wanted in server.asked)
    assert (tmp_path / "cache" / "blocks").is_dir()
    near = pretrain(real_shards, tmp_path / "near", *settings)
    assert near.returncode == 0, near.stderr[-3000:]
    assert figures(tmp_path / "far") == figures(tmp_path / "near")
    exports = [load_pretrained(tmp_path / name / "export") for name in ("far", "near")]
    assert exports[0].weights_hash == exports[1].weights_hash
    assert exports[0].config["data"] == exports[1].config["data"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mixture_pretrains_records_its_datasets_and_goes_on(
    real_shards: Path, one_run: Path, tmp_path: Path, serve
) -> None:
    out, settings = tmp_path / "run", ("steps=4", "evaluate_every=2", f"shard_cache.folder={tmp_path / 'cache'}")
    with serve(one_run) as server:

        def mixed(weights: tuple[int, int]) -> str:
            paths = (str(real_shards), server.url)
            return json.dumps([{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)])

        done = pretrain(mixed((3, 1)), out, *settings)
        assert done.returncode == 0, done.stderr[-3000:]
        hashes = [load_manifest(folder).content_hash for folder in (real_shards, one_run)]
        recorded = yaml.safe_load((out / "config.yaml").read_text())
        assert recorded["manifest_hash"] == hashes and recorded["weights"] == [3, 1]
        about = load_pretrained(out / "export").config["data"]
        assert about["manifest_hash"] == hashes and about["weights"] == [3, 1]
        assert (about["n_runs"], about["n_subjects"]) == (3, 3)
        wanted = figures(out), load_pretrained(out / "export").weights_hash
        shutil.rmtree(out / "checkpoints" / "step-00000004")
        other = pretrain(mixed((1, 1)), out, *settings)
        assert other.returncode == 2
        assert "started with weights = [3.0, 1.0], now it is [1.0, 1.0]" in other.stderr
        again = pretrain(mixed((3, 1)), out, *settings)
        assert again.returncode == 0, again.stderr[-3000:]
        assert "going on from the checkpoint of step 2" in (out / "ranks.log").read_text()
    assert (figures(out), load_pretrained(out / "export").weights_hash) == wanted
