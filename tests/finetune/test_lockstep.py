"""Trials trained as one batched model are the trials trained alone: curves, weights, and the optimizer's moments."""

import math

import numpy as np
import pytest
import torch

from boldforge.finetune import (
    AdapterConfig,
    Classifier,
    FinetuneError,
    TrainingConfig,
    get_task,
    load_backbone,
    stacked_lora,
)
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.fit import DivergedError, Fit
from boldforge.finetune.lockstep import Lockstep, embed_untrained
from boldforge.finetune.stacked_lora import share_backbone

EPOCHS, STAGE = 2, 1
# Everything that may differ between trials, together.
TRIALS = (
    ({"rank": 1}, {"lr": 1e-3}, 0),
    ({"rank": 5, "alpha": 3.0, "dropout": 0.3}, {"lr": 4e-3, "weight_decay": 0.0}, 0),
    ({"rank": 3, "rank_stabilised": True, "dropout": 0.1}, {"head_lr": 2e-2}, 7),
    ({"rank": 2, "targets": ("x_proj", "out_proj"), "ranks": {"out_proj": 6}}, {"clip_norm": 0.05}, 1),
)
WITHOUT_DROPOUT = (({"rank": 1}, {"lr": 1e-2}, 0), ({"rank": 3, "alpha": 2.0}, {"lr": 1e-3}, 1))
SAME_CLIPS = tuple((adapter, training, 4) for adapter, training, _ in TRIALS)
# The state after two epochs: AdamW divides by gradients' size, so rounding of a small gradient shows in a weight.
NEAR = {torch.float64: {"rtol": 1e-7, "atol": 1e-9}, torch.float32: {"rtol": 2e-3, "atol": 2e-4}}


@pytest.fixture(scope="module")
def clips_at(encoder, values_BTV):
    """Clips of six people as they enter a stage."""
    return {stage: _clips(encoder, values_BTV.shape[1:], stage) for stage in (0, STAGE)}


@pytest.fixture(scope="module")
def clips(clips_at):
    return clips_at[STAGE]


def _clips(encoder, shape, stage):
    generator = np.random.default_rng(0)
    labels = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    subject = np.repeat(np.arange(6), 2)
    values = generator.standard_normal((12, *shape))
    values[labels[subject] == 1, :, ::3] *= 1.5
    backbone = load_backbone(encoder)
    backbone.network.double()
    with torch.no_grad():
        x, pooled = backbone.encode_until(torch.from_numpy(values), stage)
    return ClipSet(x.numpy(), pooled.numpy(), np.arange(12), subject, labels)


def _sets(clips, dtype):
    kind = np.float64 if dtype == torch.float64 else np.float32
    clips = ClipSet(clips.x.astype(kind), clips.pooled.astype(kind), clips.rows, clips.subject, clips.labels)
    return clips.select([0, 1, 2, 3]), clips.select([4, 5])


def _backbone(encoder, dtype):
    backbone = load_backbone(encoder)
    backbone.network.to(dtype)
    return backbone


def _fit(backbone, clips, trial, stage, dtype, embeddings=None):
    adapter, training, seed = trial
    train, validation = _sets(clips, dtype)
    settings = TrainingConfig(**{"epochs": EPOCHS, "batch_size": 4, **training})
    classifier = Classifier(backbone, get_task("adhd"), AdapterConfig(first_stage=stage, **adapter), seed).to(dtype)
    return Fit(classifier, train, validation, settings, seed, embeddings=embeddings)


def _together(encoder, clips, trials, stage, dtype):
    backbone = _backbone(encoder, dtype)
    untrained = embed_untrained(backbone, _sets(clips, dtype)[0], stage, 4)
    fits = [_fit(share_backbone(backbone), clips, trial, stage, dtype, untrained) for trial in trials]
    return fits, Lockstep(backbone, fits)


def _same(epoch, wanted, near):
    assert (epoch.number, epoch.improved) == (wanted.number, wanted.improved)
    assert epoch.figures == pytest.approx(wanted.figures, rel=near["rtol"])
    assert math.isclose(epoch.train_loss, wanted.train_loss, rel_tol=near["rtol"])
    assert math.isclose(epoch.validation_loss, wanted.validation_loss, rel_tol=near["rtol"])


@pytest.mark.parametrize(
    ("trials", "stage", "dtype"),
    [
        pytest.param(TRIALS, STAGE, torch.float64, id="own clips"),
        pytest.param(SAME_CLIPS, STAGE, torch.float64, id="same clips"),
        pytest.param(TRIALS, STAGE, torch.float32, id="float32"),
        pytest.param(WITHOUT_DROPOUT, STAGE, torch.float64, id="without dropout"),
        pytest.param(TRIALS[1:3], 0, torch.float64, id="all stages"),
    ],
)
def test_every_trial_is_what_it_is_alone(encoder, clips_at, trials, stage, dtype):
    clips = clips_at[stage]
    fits, lockstep = _together(encoder, clips, trials, stage, dtype)
    alone = [_fit(_backbone(encoder, dtype), clips, trial, stage, dtype) for trial in trials]
    for _ in range(EPOCHS):
        for epoch, fit in zip(lockstep.step(range(len(trials))), alone, strict=True):
            _same(epoch, fit.step(), NEAR[dtype])
    for fit, wanted in zip(fits, alone, strict=True):
        torch.testing.assert_close(fit.state(), wanted.state(), **NEAR[dtype])
        assert fit.classifier.trainable == wanted.classifier.trainable
        assert fit.classifier.total == wanted.classifier.total


def test_trials_without_dropout_train_by_the_one_product(encoder, clips, monkeypatch):
    with_gradients = []
    apply = stacked_lora._StackedLowRank.apply
    monkeypatch.setattr(
        stacked_lora._StackedLowRank,
        "apply",
        lambda *given: with_gradients.append(torch.is_grad_enabled()) or apply(*given),
    )
    _, lockstep = _together(encoder, clips, WITHOUT_DROPOUT, STAGE, torch.float32)
    lockstep.step(range(len(WITHOUT_DROPOUT)))
    assert any(with_gradients)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_s_last_step_that_breaks_the_weights_is_a_divergence(encoder, clips, grouped):
    """With one step in an epoch no training loss has seen what it did."""
    wild = ({"rank": 2, "alpha": 1024.0}, {"lr": 1.0, "head_lr": 1.0, "batch_size": 64, "clip_norm": 1e30}, 0)
    if grouped:
        fits, lockstep = _together(encoder, clips, (wild, wild), STAGE, torch.float32)
        ended = [epoch for _ in range(8) for epoch in lockstep.step(range(len(fits)))]
        assert any(isinstance(epoch, DivergedError) for epoch in ended)
        return
    fit = _fit(_backbone(encoder, torch.float32), clips, wild, STAGE, torch.float32)
    with pytest.raises(DivergedError, match="in epoch"):
        for _ in range(8):
            fit.step()


def test_who_has_left_rests_and_the_others_go_on_as_alone(encoder, clips):
    fits, lockstep = _together(encoder, clips, TRIALS, STAGE, torch.float64)
    alone = [_fit(_backbone(encoder, torch.float64), clips, trial, STAGE, torch.float64) for trial in TRIALS]
    for trials in ([0, 1, 2, 3], [1, 3], [3]):
        for trial, epoch in zip(trials, lockstep.step(trials), strict=True):
            _same(epoch, alone[trial].step(), NEAR[torch.float64])
    for fit, wanted in zip(fits, alone, strict=True):
        torch.testing.assert_close(fit.state(), wanted.state(), **NEAR[torch.float64])


def test_a_trial_that_diverges_leaves_the_others_as_they_were(encoder, clips):
    wild = ({"rank": 2}, {"lr": 1.0, "head_lr": 1.0, "clip_norm": 1e30}, 0)
    fits, lockstep = _together(encoder, clips, (TRIALS[0], wild, TRIALS[1]), STAGE, torch.float32)
    with torch.no_grad():
        fits[1].classifier.head.linear.weight.fill_(math.inf)
    _, calm = _together(encoder, clips, (TRIALS[0], TRIALS[2], TRIALS[1]), STAGE, torch.float32)
    found, wanted = lockstep.step([0, 1, 2]), calm.step([0, 1, 2])
    assert isinstance(found[1], DivergedError) and "training.lr below 1" in str(found[1])
    assert (found[0], found[2]) == (wanted[0], wanted[2])


def test_the_frozen_weights_are_there_once_and_stay_as_they_are(encoder, clips):
    fits, lockstep = _together(encoder, clips, TRIALS, STAGE, torch.float32)
    frozen = [
        {name.replace(".base_layer", ""): tensor for name, tensor in fit.classifier.network.state_dict().items()}
        for fit in fits
    ]
    lockstep.step([0, 1, 2, 3])
    for name, tensor in load_backbone(encoder).network.state_dict().items():
        assert {found[name].data_ptr() for found in frozen} == {frozen[0][name].data_ptr()}, name
        torch.testing.assert_close(frozen[0][name], tensor, rtol=0, atol=0)
    for fit in fits:
        assert all(p.grad is None for p in fit.classifier.parameters())


@pytest.mark.parametrize(
    ("adapter", "found"), [({"rank": 0}, "rank 0"), ({"dora": True}, "dora"), ({"kind": "full"}, "kind full")]
)
def test_what_is_not_plain_lora_is_refused(encoder, clips, adapter, found):
    with pytest.raises(FinetuneError, match=f"a batch of trials trains plain LoRA, found {found}; train it alone"):
        _together(encoder, clips, (TRIALS[0], (adapter, {}, 0)), STAGE, torch.float32)


def test_trials_must_have_steps_of_one_size(encoder, clips):
    with pytest.raises(FinetuneError, match=r"clips per step; found \(8, 4, 2\) and \(8, 4, 4\)"):
        _together(encoder, clips, (TRIALS[0], ({}, {"batch_size": 2}, 0)), STAGE, torch.float32)
