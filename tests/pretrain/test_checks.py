"""What a run would refuse is refused before a rank is started: a mixture, a run folder, damaged checkpoints, NaN."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from boldforge.configs import BoldForgeError, folder_lock, load_config
from boldforge.data_shards import DataRecipe, Segments, ShardReader, build_shards, find_runs, split_segments
from boldforge.pretrain import PretrainConfig, checks, gather_patches, train
from boldforge.pretrain.checks import Standing, check_recipe, check_run, parameter_shapes
from boldforge.pretrain.run import Run
from boldforge.pretrain.run_folder import file_hash, read_finished

DATA = Path(__file__).parents[1] / "data"
SMALL = [
    *("model.frames=4", "model.embed_dim=8", "model.depths=[1,2]", "model.decoder_depths=[1]", "model.d_state=4"),
    *("batch_size=4", "holdout.fraction=0.2", "model.patch_mm=24"),
]


@pytest.fixture
def recipe(real_shards: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    # A few small regions, because the packaged atlas takes a second a time.
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -20, -60, 0
    labels = np.arange(1, 9, dtype=np.int16).reshape(2, 2, 2).repeat(5, 0).repeat(5, 1).repeat(5, 2)
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "small.nii.gz")

    def recipe(*overrides: str) -> PretrainConfig:
        paths = [f"shards={real_shards}", f"out={tmp_path / 'run'}"]
        atlas = f"mask.atlas={tmp_path / 'small.nii.gz'}"
        return load_config(PretrainConfig, "pretrain/tiny.yaml", [*paths, *SMALL, atlas, *overrides])

    return recipe


@pytest.fixture
def train_until(recipe: Callable[..., PretrainConfig]) -> Callable[..., Path]:
    """Leave a run folder as a run stopped at these steps leaves it, with untrained weights."""

    def train_until(*steps: int, overrides: Sequence[str] = ()) -> Path:
        config = recipe(*overrides)
        checked = check_recipe(config, 1)
        folder = config.out / "checkpoints"
        shapes = parameter_shapes(config, checked.prepared.token_grid)
        weights = {f"weight:{name}": torch.zeros(shape) for name, shape in shapes.items()}
        for step in steps:
            checkpoint = folder / f"step-{step:08d}"
            checkpoint.mkdir(parents=True)
            state = checkpoint / "state-00000-of-00001.safetensors"
            save_file(weights, state)
            listing = {"step": step, "world_size": 1, "state": {"stream": checked.stream.state_dict()}}
            listing["files"] = {state.name: [state.stat().st_size, file_hash(state)]}
            (checkpoint / "checkpoint.json").write_text(json.dumps(listing))
        content = checked.record(config)
        (config.out / "config.yaml").write_text(yaml.safe_dump(content))
        return folder

    return train_until


def finish(out: Path) -> None:
    (out / "export").mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / "export" / name).write_text("{}")
    summary = {"steps": 200, "heldout_error": 0.9, "heldout_baseline": 1.0}
    (out / "summary.json").write_text(json.dumps(summary))


def damage(checkpoint: Path) -> None:
    (path,) = checkpoint.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("tr", "frames", "said"),
    [
        (4.0, 4, r"cannot be mixed: their tr is 2\.0 and 4\.0; build both with one recipe"),
        (16.0, 8, r"sixteen: the longest stretch to train on has \d frames, a clip needs model\.frames = 8; lower"),
    ],
)
def test_datasets_that_do_not_go_together_are_refused(
    real_shards: Path, recipe: Callable[..., PretrainConfig], tmp_path: Path, tr: float, frames: int, said: str
) -> None:
    other = tmp_path / "sixteen"
    build_shards(find_runs(DATA).runs[:1], other, DataRecipe(grid="mni4mm", tr=tr))
    config = recipe(f"shards=[{real_shards}, {other}]", f"model.frames={frames}", "holdout.fraction=0.5")
    with pytest.raises(BoldForgeError, match=said):
        check_run(config, 1)


def test_a_missing_shard_is_refused(recipe: Callable[..., PretrainConfig], real_shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(real_shards, copy)
    next(copy.glob("*.tar")).unlink()
    with pytest.raises(BoldForgeError, match="the shard is missing; copy it again"):
        check_run(recipe(f"shards={copy}"), 1)


def test_a_run_goes_on_from_its_newest_whole_checkpoint(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path]
) -> None:
    assert check_run(recipe(), 1)[1] == Standing(None, None)
    checkpoints = train_until(50, 100)

    def stands_at() -> int | None:
        checkpoint = check_run(recipe(), 1)[1].checkpoint
        return checkpoint and checkpoint.step

    assert stands_at() == 100
    damage(checkpoints / "step-00000100")
    assert stands_at() == 50
    damage(checkpoints / "step-00000050")
    with pytest.raises(BoldForgeError, match="every checkpoint is damaged, so the run cannot go on; move the folder"):
        stands_at()


def test_another_recipe_in_a_run_folder_is_refused(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path]
) -> None:
    def recorded(change: str) -> PretrainConfig:
        config = recipe(change)
        path = config.out / "config.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | config.model_dump(mode="json")))
        return config

    train_until(50)
    check_run(recipe("zero_stage=1", "checkpoint_every=7"), 1)
    with pytest.raises(BoldForgeError, match="this run was started with seed = 0, now it is 5; use another out folder"):
        check_run(recipe("seed=5"), 1)
    with pytest.raises(BoldForgeError, match=r"step-00000050: .* is \[.*\] there and \[.*\] in this recipe's model"):
        check_run(recorded("model.embed_dim=16"), 1)
    with pytest.raises(BoldForgeError, match="The saved stream differs in the seed"):
        check_run(recorded("seed=5"), 1)


def test_a_run_whose_record_is_lost_is_refused(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path]
) -> None:
    checkpoints = train_until(200)
    (recipe().out / "config.yaml").unlink()
    for _ in range(2):
        with pytest.raises(BoldForgeError, match=r"config\.yaml: is missing, so it cannot be told whether this is the"):
            check_run(recipe("optimizer.lr=1e-5"), 1)
        if checkpoints.exists():
            finish(recipe().out)
            shutil.rmtree(checkpoints)


@pytest.mark.parametrize("content", ["[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": ["x", "y"]}}', "3"])
def test_a_listing_of_another_form_is_a_damaged_one(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path], content: str
) -> None:
    checkpoints = train_until(50, 100)
    (checkpoints / "step-00000100" / "checkpoint.json").write_text(content)
    checkpoint = check_run(recipe(), 1)[1].checkpoint
    assert checkpoint and checkpoint.step == 50


@pytest.mark.parametrize("steps", ["200", 200.5, None])
def test_a_summary_of_another_form_is_none(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path], steps: object
) -> None:
    train_until(200)
    finish(recipe().out)
    path = recipe().out / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": steps}))
    assert read_finished(recipe().out) is None


def test_an_atlas_is_known_by_what_it_holds_not_by_its_path(
    recipe: Callable[..., PretrainConfig],
    train_until: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, names, groups = (tmp_path / name for name in ("small.nii.gz", "names.txt", "groups.txt"))
    names.write_text("".join(f"{n} r{n}\n" for n in range(1, 9)))
    groups.write_text("".join(f"r{n} {'odd' if n % 2 else 'even'}\n" for n in range(1, 9)))
    group = ["mask.strategy=group", "mask.labels=names.txt", "mask.groups=groups.txt"]
    monkeypatch.chdir(tmp_path)
    train_until(50, overrides=group)
    image = nib.load(own)
    nib.save(image, "moved.nii")
    names.rename("other.txt")
    check_run(recipe(*group, "mask.atlas=moved.nii", "mask.labels=other.txt", "model.backend=torch"), 1)

    def refused(what: str) -> None:
        with pytest.raises(BoldForgeError, match=f"was started with atlas_hash.{what} = .*; use another out folder"):
            check_run(recipe(*group), 1)

    shutil.copy("other.txt", names)
    names.write_text(names.read_text().replace("8 r8", "8 r7").replace("7 r7", "7 r8", 1))
    refused("labels")
    shutil.copy("other.txt", names)
    groups.write_text(groups.read_text().replace("r8 even", "r8 odd"))
    refused("groups")
    groups.write_text(groups.read_text().replace("r8 odd", "r8 even"))
    check_run(recipe(*group), 1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), own)
    refused("volume")


def test_a_record_without_the_atlas_content_goes_by_its_path(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path], tmp_path: Path
) -> None:
    train_until(50)
    path = recipe().out / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["atlas_hash"]
    path.write_text(yaml.safe_dump(content))
    check_run(recipe(), 1)
    shutil.copy(tmp_path / "small.nii.gz", tmp_path / "moved.nii.gz")
    with pytest.raises(
        BoldForgeError, match=r"started with mask\.atlas = .*small\.nii\.gz, now it is .*moved\.nii\.gz"
    ):
        check_run(recipe(f"mask.atlas={tmp_path / 'moved.nii.gz'}"), 1)


def test_a_folder_of_something_else_is_refused(recipe: Callable[..., PretrainConfig], real_shards: Path) -> None:
    with pytest.raises(BoldForgeError, match=r"holds shards .*, so a pretraining run is not written there; choose"):
        check_run(recipe(f"out={real_shards}"), 1)


def test_somebody_else_s_config_is_not_replaced(recipe: Callable[..., PretrainConfig]) -> None:
    config = recipe()
    config.out.mkdir()
    (config.out / "config.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(BoldForgeError, match=r"config.yaml: is no recipe of a pretraining run, which would replace it"):
        check_run(config, 1)


def test_a_finished_run_is_known_though_its_checkpoints_are_gone(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path]
) -> None:
    checkpoints = train_until(150, 200)
    finish(recipe().out)
    for _ in range(2):
        finished = check_run(recipe(), 1)[1].finished
        assert finished and finished["heldout_error"] == 0.9
        with pytest.raises(BoldForgeError, match="started with steps = 200, now it is 300"):
            check_run(recipe("steps=300"), 1)
        shutil.rmtree(checkpoints, ignore_errors=True)
    train_until(150)
    standing = check_run(recipe(), 1)[1]
    assert standing.finished is None and standing.checkpoint and standing.checkpoint.step == 150, "wound back by hand"
    shutil.rmtree(checkpoints)
    (recipe().out / "export" / "model.safetensors").unlink()
    assert check_run(recipe(), 1)[1].finished is None


def test_a_folder_that_another_run_writes_to_is_refused(recipe: Callable[..., PretrainConfig]) -> None:
    with (
        folder_lock(recipe().out, "pretraining"),
        pytest.raises(BoldForgeError, match="another process is pretraining"),
    ):
        check_run(recipe(), 1)
    check_run(recipe(), 1)
    assert list(recipe().out.iterdir()) == []


@pytest.fixture
def nan_in_a_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def put() -> None:
        read = ShardReader._tail

        def with_nan(reader: ShardReader, run: int):
            tail = read(reader, run)
            scale = tail.scale.copy()
            scale[0, 7] = float("nan") if run == 1 else scale[0, 7]
            return tail._replace(scale=scale)

        monkeypatch.setattr(ShardReader, "_tail", with_nan)

    return put


def test_nan_in_shards_is_named_before_the_first_step(
    recipe: Callable[..., PretrainConfig], nan_in_a_run: Callable[[], None], real_shards: Path
) -> None:
    nan_in_a_run()
    said = f"{real_shards}: run sub-happy_task-rest holds NaN or infinity; mend the file that it was made from and"
    with pytest.raises(BoldForgeError, match=said):
        check_run(recipe(), 1)


@pytest.mark.parametrize("kept", [{"train": [0]}, {"held": [0]}, {"train": [0], "held": [0]}])
def test_nan_in_a_run_that_is_not_used_is_no_matter(
    recipe: Callable[..., PretrainConfig],
    nan_in_a_run: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    kept: dict[str, list[int]],
) -> None:
    """A plan may leave a run out of both sides: for a test of its own."""

    def parted(*asked: object) -> tuple[Segments, ...]:
        sides = zip(("train", "held"), split_segments(*asked), strict=True)
        return tuple(
            Segments(side.table[np.isin(side.table[:, 0], kept[name])] if name in kept else side.table)
            for name, side in sides
        )

    nan_in_a_run()
    monkeypatch.setattr(checks, "split_segments", parted)
    if len(kept) == 2:
        check_run(recipe(), 1)
    else:
        with pytest.raises(BoldForgeError, match="sub-happy_task-rest holds NaN"):
            check_run(recipe(), 1)


def test_frames_to_train_on_are_those_of_runs_that_hold_a_clip(recipe: Callable[..., PretrainConfig]) -> None:
    for frames, longer in ((4, 2), (40, 1)):
        data = checks.open_data(recipe(f"model.frames={frames}", "holdout.fraction=0.45"))
        lengths = [stop - start for segments in data.train for _, start, stop in segments]
        hold_a_clip = [length for length in lengths if length >= frames]
        assert (len(lengths), len(hold_a_clip)) == (2, longer)
        assert data.frames == sum(hold_a_clip)


def test_a_finished_run_needs_no_folder_that_can_be_written(
    recipe: Callable[..., PretrainConfig], train_until: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(200)
    # Root may write anywhere.
    monkeypatch.setattr("boldforge.pretrain.checks.os.access", lambda *asked: False)
    with pytest.raises(BoldForgeError, match="cannot be written to; choose another folder"):
        check_run(recipe(), 1)
    finish(recipe().out)
    assert check_run(recipe(), 1)[1].finished


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_the_first_rank_refuses_all_ranks_say(
    recipe: Callable[..., PretrainConfig],
    train_until: Callable[..., Path],
    two_ranks: Callable[[Callable[[int], object]], list[str]],
    nan_in_a_run: Callable[[], None],
    tmp_path: Path,
) -> None:
    def refused(*changes: str) -> str:
        def start(rank: int) -> Path:
            train.join_ranks = lambda: (rank, 2)  # of this process
            return train.train(recipe(*changes))

        first, second = two_ranks(start)
        assert first == second
        return first

    train_until(50)
    (tmp_path / "file").touch()
    assert refused("seed=5").endswith("seed = 0, now it is 5; use another out folder, or the old value.")
    assert refused(f"out={tmp_path}/file").endswith("file is a file; choose another folder.")
    with folder_lock(tmp_path / "used", "pretraining"):
        assert "another process is pretraining in it" in refused(f"out={tmp_path}/used")
    nan_in_a_run()
    assert "run sub-happy_task-rest holds NaN" in refused(f"out={tmp_path}/new")
    assert not (tmp_path / "new").exists(), "a refused recipe leaves nothing behind"


@pytest.mark.parametrize("in_data", [True, False])
def test_a_held_out_error_that_is_no_number_names_the_run_or_the_learning_rate(
    recipe: Callable[..., PretrainConfig], nan_in_a_run: Callable[[], None], real_shards: Path, one_rank, in_data: bool
) -> None:
    config = recipe()
    checked = check_recipe(config, 1)
    table = torch.from_numpy(checked.prepared.token_grid.patch_voxels)

    def predict(values_BTV: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        return gather_patches(values_BTV, table) * (1.0 if in_data else float("nan"))

    run = SimpleNamespace(
        config=config,
        engine=torch.nn.Module(),
        heldout=checked.heldout,
        manifests=checked.data.manifests,
        patch_voxels=table,
        predict=predict,
        token_grid=checked.prepared.token_grid,
    )
    run._heldout_lost = lambda: Run._heldout_lost(run)
    if in_data:
        nan_in_a_run()
    said = (
        f"the held-out error is not a finite number, because run sub-happy_task-rest of {real_shards} holds NaN"
        if in_data
        else "the held-out error is not a finite number, though the data are; lower optimizer.lr"
    )
    with pytest.raises(BoldForgeError, match=said):
        Run.measure(run)
