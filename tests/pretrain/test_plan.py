"""What `boldforge pretrain --dry-run` says, beside what a model holds when it trains."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from boldforge.configs import BoldForgeError, load_config, recipe_names
from boldforge.data_shards import brain_mask, get_grid, load_atlas
from boldforge.pretrain import NeuroStorm, Objective, PretrainConfig, make_targets, speed_estimate
from boldforge.pretrain.activations import block_bytes
from boldforge.pretrain.checks import Prepared, check_run, prepare_masks
from boldforge.pretrain.config import BUCKET_ELEMENTS
from boldforge.pretrain.evaluate import counted_voxels
from boldforge.pretrain.flops import block_flops
from boldforge.pretrain.mamba import Block
from boldforge.pretrain.plan import TrainingPlan, clip_bytes, estimate_speed, plan_training, rank_memory
from boldforge.pretrain.regions import RegionVoxels, region_voxels

OWN = ("tiny", "base", "large")
SMALL = [
    *("model.frames=4", "model.embed_dim=16", "model.depths=[1,2,1]", "model.decoder_depths=[1,1]", "model.d_state=4"),
    *("shards=none", "out=none", "batch_size=4", "micro_batch_size=2"),
]


def recipe(name: str = "tiny", *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, f"configs/pretrain/{name}.yaml", list(overrides))


def planned(config: PretrainConfig, grid: str = "mni4mm", ranks: int = 1) -> tuple[TrainingPlan, Prepared]:
    prepared = prepare_masks(config, get_grid(grid))
    return plan_training(config, prepared, ranks), prepared


@pytest.fixture(scope="module")
def plans() -> dict[str, TrainingPlan]:
    return {name: planned(recipe(f"boldforge-{name}"), "mni2mm")[0] for name in OWN}


def test_our_recipes_have_the_sizes_that_they_say(plans: dict[str, TrainingPlan]) -> None:
    wanted = {"tiny": 5e6, "base": 90e6, "large": 1e9}
    for name, size in wanted.items():
        assert plans[name].parameters == pytest.approx(size, rel=0.05)
        config = recipe(f"boldforge-{name}").model
        assert config.embed_dim % 32 == 0 and config.scan_mode == "region" and config.encoder_sees == "visible"


@pytest.mark.parametrize("name", OWN)
def test_a_clip_goes_through_our_networks_as_shapes_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # tensors without content have none
    config = recipe(f"boldforge-{name}").model
    prepared = prepare_masks(recipe(f"boldforge-{name}"), get_grid("mni2mm"))
    with torch.device("meta"):
        model = NeuroStorm(config, prepared.token_grid).to("meta")
    clips = torch.empty(1, config.frames, prepared.token_grid.n_voxels, device="meta")
    patches_BLP = model(clips, prepared.sampler.sample([(0,)]), 2.0)
    assert patches_BLP.shape == (1, 29_620, 216) and model.dim == 8 * config.embed_dim


WAYS = {
    "float32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "all of it": ["precision=bf16", "checkpoint_activations=true", "model.encoder_sees=visible", "loss.gradient=0.5"],
    "losses": ["precision=fp32", "loss.region=1", "loss.parcel=1", "loss.gradient=1", "loss.targets=clip"],
}


@pytest.fixture(scope="module")
def brain_regions() -> RegionVoxels:
    grid = get_grid("mni4mm")
    return region_voxels(load_atlas("aal3"), grid, brain_mask(grid))


@pytest.mark.parametrize("way", WAYS)
def test_weights_gradients_and_moments_are_exact_and_activations_nearly(way: str, brain_regions: RegionVoxels) -> None:
    config = recipe("tiny", *SMALL, *WAYS[way])
    plan, prepared = planned(config)
    token_grid, bf16 = prepared.token_grid, config.precision == "bf16"
    model = NeuroStorm(config.model, token_grid)
    model.checkpoint_activations = config.checkpoint_activations
    objective = Objective(config.loss, 4, brain_regions, model.patch_voxels)
    optimizer = torch.optim.AdamW(model.parameters())

    def kept(clips: int) -> int:
        """Do a step, and return the bytes that it holds between forward and backward pass, weights and all."""
        values_BTV = torch.randn(clips, 4, token_grid.n_voxels)
        signal_BV = torch.ones(clips, token_grid.n_voxels, dtype=torch.bool)
        hidden_BL = prepared.sampler.sample([(9, config.seed, number) for number in range(clips)])
        counted_BLP = counted_voxels(hidden_BL, signal_BV, model.patch_voxels)
        target_BLP = make_targets(values_BTV, signal_BV, model.patch_voxels, config.loss.targets)
        # The loss holds the target, and the clip is there, whether autograd keeps them or not.
        held = {t.data_ptr(): t.nbytes for t in (values_BTV, signal_BV, target_BLP, counted_BLP)}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted_BLP = model(values_BTV, hidden_BL)
            terms = objective(predicted_BLP, target_BLP, counted_BLP, objective.counts(counted_BLP))
        terms["loss"].backward()
        return sum(held.values())

    found = kept(3) - kept(1)  # without weights and tables, which are there once
    optimizer.step()
    memory = plan.memory[0]
    assert memory.parameters == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [state[kind].nbytes for state in optimizer.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    assert memory.optimizer == sum(moments)
    predicted = plan.micro_batch * clip_bytes(config, 27, plan.tokens, plan.seen, token_grid.n_voxels)
    if config.checkpoint_activations:
        # One block at a time is computed again after this; see test_memory.py for what one keeps.
        dims = [16, 32, 64]
        predicted -= plan.micro_batch * max(
            block_bytes(config.model, dim, bf16) * count for dim, count in zip(dims, plan.tokens, strict=True)
        )
    assert predicted == pytest.approx(found, rel=0.05)


def test_smaller_micro_batches_leave_the_clips_and_little_else() -> None:
    found = {size: planned(recipe("tiny", *SMALL, f"micro_batch_size={size}"))[0] for size in (4, 2, 1)}
    kept = {size: plan.memory[2].activations for size, plan in found.items()}
    assert kept[4] - kept[2] == 2 * (kept[2] - kept[1]), "every clip of a micro-batch counts the same"
    waiting = (4 * 4 + 1) * brain_mask(get_grid("mni4mm")).sum() + found[1].tokens[0] * 27
    assert kept[1] == kept[4] / 4 + 3 * waiting
    assert 3 * waiting < 0.2 * kept[1]


def test_zero_shards_more_from_stage_to_stage() -> None:
    stages = [rank_memory(10**9, stage, 64, 7) for stage in range(4)]
    assert [memory.parameters for memory in stages][:3] == [4 * 10**9] * 3
    totals = [memory.total for memory in stages]
    assert totals == sorted(totals, reverse=True) and totals[0] == 16 * 10**9 + 7 and totals[3] < 0.1 * totals[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_of_zero_hold_what_the_plan_says(stage: int, tmp_path: Path) -> None:
    """Every float32 tensor of the model, its gradients and the optimiser in the middle of the second step."""
    out = tmp_path / "found.json"
    program = str(Path(__file__).parent / "zero_memory_program.py")
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29500 + os.getpid() % 500)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *ranks, program, str(stage), str(out)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    memory = rank_memory(found["parameters"], stage, 2, 0)
    # Below stage 3 what was on its way has arrived by then. The bucket of stage 3 would hide everything else.
    expected = memory.total - (4 * BUCKET_ELEMENTS if stage == 3 else memory.passing)
    assert found["bytes"] - (4 * BUCKET_ELEMENTS if stage == 3 else 0) == pytest.approx(expected, rel=0.05)


def test_checkpointing_and_bf16_show_in_the_plan() -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        for checkpointed in ("false", "true"):
            ways = [f"precision={precision}", f"checkpoint_activations={checkpointed}"]
            config = recipe("boldforge-base", *ways, "batch_size=1", "micro_batch_size=1")
            found[precision, checkpointed] = planned(config, "mni2mm")[0].memory[0].activations
    assert found["bf16", "false"] < 0.7 * found["fp32", "false"]
    assert found["bf16", "true"] < 0.5 * found["bf16", "false"]


def test_the_speed_is_estimated_from_what_was_measured() -> None:
    config = recipe("tiny", *SMALL, "precision=fp32")
    plan, prepared = planned(config)
    patch = prepared.token_grid.patch_voxels.shape[1]
    narrow = estimate_speed(config, plan, patch, 1, "cpu")
    wide = recipe("tiny", *SMALL, "precision=fp32", "model.embed_dim=128")
    more = estimate_speed(wide, planned(wide)[0], patch, 1, "cpu")
    assert 0 < narrow.shortest <= narrow.median <= narrow.longest
    assert narrow.median < more.median


@pytest.mark.parametrize("seen", ["all", "visible"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_estimate_is_the_sum_over_the_blocks_that_a_forward_pass_visits(
    seen: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [f"model.encoder_sees={seen}", f"checkpoint_activations={str(checkpointed).lower()}", "model.patch_mm=24"]
    config = recipe("tiny", *SMALL, *ways, "model.depths=[1,3,2]", "model.decoder_depths=[2,1]")
    plan, prepared = planned(config)
    model, patch = NeuroStorm(config.model, prepared.token_grid), prepared.token_grid.patch_voxels.shape[1]
    visited: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda _, given, __: visited.append((given[0].shape[2], given[0][..., 0].numel()))
            )
    masks_BL = prepared.sampler.sample([(9, config.seed, number) for number in range(8)])
    with torch.no_grad():
        model(torch.zeros(8, 4, prepared.token_grid.n_voxels), masks_BL)
    assert len(visited) == 6 + 3
    # As if a block of every width took this long, forward and backward, and the optimiser 10 s.
    seconds = {16: 1.0, 32: 3.0, 64: 7.0}
    monkeypatch.setattr(speed_estimate, "_timed", lambda *_: [[*seconds.values(), 10.0]] * 7)
    found = estimate_speed(config, plan, patch, 1, "cpu")
    blocks = sum(seconds[dim] * rows / speed_estimate._block_tokens(dim, "cpu") for dim, rows in visited) / 8
    passes = 4 if checkpointed else 3
    counted = passes * sum(rows * sum(block_flops(config.model, dim)) for dim, rows in visited) / 8
    step = 10.0 * plan.parameters / (1 << 20)
    wanted = (blocks * plan.flops.step / counted + step / config.batch_size) / 4
    assert found.median == found.shortest == found.longest == pytest.approx(wanted)
    assert 1 < plan.flops.step / counted < 2


def test_what_is_computed_again_counts() -> None:
    once, again = (planned(recipe("tiny", *SMALL, f"checkpoint_activations={way}"))[0] for way in ("false", "true"))
    assert again.flops.step_scan == once.flops.step_scan * 4 / 3 and again.flops.matmul == once.flops.matmul
    assert 1.2 < again.flops.step / once.flops.step < 4 / 3


def test_every_piece_of_work_runs_in_every_round_after_warming_up() -> None:
    ran: list[str] = []
    rounds = speed_estimate._timed([lambda: ran.append("a"), lambda: time.sleep(0.06) or ran.append("b")], "cpu")
    assert len(rounds) == speed_estimate.ROUNDS and all(len(each) == 2 for each in rounds)
    assert ran.count("b") == speed_estimate.ROUNDS + speed_estimate._WARM_UPS
    assert ran.count("a") > 100 * speed_estimate.ROUNDS, "what is short runs often, or the clock is what is timed"
    assert all(a < 1e-3 < 0.06 <= b for a, b in rounds)


REFUSED = {
    "batch_size=3": "batch_size is 3, which 2 ranks cannot share",
    "model.frames=500": "the longest run has .* a clip needs model.frames = 500",
    "holdout.fraction=0.01": "the longest held-out stretch has 1 frames",
    "mask.ratio=0.9999": "mask.ratio is 0.9999, which hides all",
    "mask.atlas=elsewhere.nii.gz": "none of its 1 regions meets the brain of grid mni4mm",
    "model.patch_mm=7": "model.patch_mm is 7, no multiple of the grid's voxels",
    "model.backend=cuda": "model.backend is cuda, which cannot be used here",
    "holdout.fraction=0.95": "the longest stretch to train on has .* frames, a clip needs model.frames = 8; lower",
    "loss.background=true": "loss.background is true, but these shards store brain voxels only",
    "out=elsewhere.nii.gz/run": "out is elsewhere.nii.gz/run, but .*elsewhere.nii.gz is a file",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_can_be_known_before_the_first_step_is_refused(
    change: str, real_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nibabel as nib

    monkeypatch.chdir(tmp_path)
    far = np.diag([2.0, 2.0, 2.0, 1.0])
    far[:3, 3] = 1000
    nib.Nifti1Image(np.ones((4, 4, 4), dtype=np.int16), far).to_filename("elsewhere.nii.gz")
    with pytest.raises(BoldForgeError, match=REFUSED[change]):
        check_run(recipe("tiny", f"shards={real_shards}", "batch_size=4", change), 2)


def test_every_recipe_can_be_planned() -> None:
    for name in recipe_names():
        if name.startswith("pretrain/"):
            config = load_config(PretrainConfig, f"configs/{name}")
            plan, _ = planned(config, "neurostorm" if "neurostorm" in name else "mni4mm", 2)
            assert plan.flops.step > 0 and plan.memory[2].parameters == 4 * plan.parameters
            if name == "pretrain/neurostorm.yaml":
                assert (plan.parameters, plan.encoder_parameters) == (7_712_964, 5_173_020), "as published"
