"""Every way to adapt an encoder, by config: what it trains, that all of it learns, and which base it belongs to."""

import json
import os
import subprocess
import sys

import pytest
import torch

from boldforge.configs import BoldForgeError, load_config
from boldforge.finetune import (
    ADAPTER_FILES,
    AdapterConfig,
    AdapterError,
    AdhdDiagnosis,
    Classifier,
    FinetuneConfig,
    finetune,
    load_adapter,
    load_backbone,
    load_classifier,
    merge_adapter,
    save_adapter,
)
from boldforge.kernels import available_backends
from boldforge.pretrain import ModelConfig

# The Triton kernels run here only where Triton was told, before it was imported, to interpret them.
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch", "cpu", "merged"]
TINY = ModelConfig(
    patch_mm=48, frames=4, embed_dim=8, depths=(2, 2), decoder_depths=(1,), d_state=4, mlp_ratio=2.0, backend="torch"
)
LABELS = torch.tensor([0, 1, 1])
# The interpreter takes seconds for what a compiled kernel does at once.
SHORT = {"depths": (1, 1), "frames": 2} if BACKENDS == ["triton"] else {}
# Stage 0 has 2 blocks of 8 channels, stage 1 two of 16; the whole encoder's counts are taken from the network itself.
KINDS = {
    "probe": {"kind": "probe"},
    "prompts": {"kind": "prompts", "prompts": 3},
    "lora": {"kind": "lora", "rank": 2},
    "last stage": {"kind": "partial", "last_stages": 1},
    "norms": {"kind": "partial", "unfreeze": ["*norm*"]},
    "full": {"kind": "full"},
}


def _steps(classifier, values_BTV, steps):
    """Train, and name the tensors that had a gradient other than zero on the way."""
    parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    labels_B = LABELS[: len(values_BTV)]
    criterion = classifier.task.criterion(labels_B.tolist())
    alive = set()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        criterion(classifier(values_BTV), labels_B).backward()
        alive |= {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    return alive, set(parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_what_it_says_and_comes_back_the_same(encoder, values_BTV, tmp_path, kind):
    config = AdapterConfig.model_validate(KINDS[kind])
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), config)
    before = {name: p.clone() for name, p in classifier.network.named_parameters()}
    expected = {
        "probe": 0,
        "prompts": 3 * (2 * 8 + 2 * 16),
        "last stage": sum(p.numel() for name, p in before.items() if name.startswith(("stages.1.", "merging.1."))),
        "norms": sum(
            p.numel() for n, p in before.items() if "norm" in n and n.startswith(("stages", "merging", "patch_embed"))
        ),
        "full": sum(p.numel() for n, p in before.items() if n.startswith(("stages", "merging", "patch_embed"))),
        "lora": sum(p.numel() for n, p in before.items() if "lora" in n),
    }[kind]
    trained = sum(p.numel() for p in classifier.network.parameters() if p.requires_grad)
    parts = classifier.trainable_by_part
    assert trained == expected == parts.get(config.kind, 0)
    assert parts["head"] == 57 and classifier.trainable == expected + 57
    _steps(classifier, values_BTV, 3)
    for name, parameter in classifier.network.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), f"{name} is frozen and moved"
    save_adapter(classifier, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= set(ADAPTER_FILES)
    assert torch.equal(load_classifier(encoder, tmp_path).predict(values_BTV), classifier.predict(values_BTV))


@pytest.mark.parametrize("kind", ["prompts", "last stage", "norms", "probe"])
def test_each_kind_goes_through_a_whole_study(cohort, encoder, tmp_path, kind):
    settings = {"clips": 2, "folds": 2, "training": {"epochs": 2}, "baselines": [], "adapter": KINDS[kind]}
    if kind == "prompts":
        settings["adapter"] = settings["adapter"] | {"first_stage": 1}
    results = finetune(
        load_config(FinetuneConfig, {"shards": cohort, "backbone": encoder, "out": tmp_path, **settings})
    )
    task = json.loads((tmp_path / "adapter" / "task.json").read_text())
    assert task["trainable_parameters"] == results["trainable_parameters"] == sum(results["trainable_by_part"].values())
    # One epoch more or less of the same frozen part: below the first adapted stage nothing may have changed.
    loaded, fresh = load_classifier(encoder, tmp_path / "adapter").backbone, load_backbone(encoder)
    stage = task["adapter"]["first_stage"]
    assert stage == {"prompts": 1, "last stage": 1, "norms": 0, "probe": 2}[kind]
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(1, 4, loaded.network.token_grid.n_voxels, generator=generator)
    torch.testing.assert_close(loaded.encode_until(clip, stage).x, fresh.encode_until(clip, stage).x, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lora", "dora", "prompts", "norms"])
def test_every_adapter_tensor_learns_within_two_steps(write_encoder, values_BTV, backend, kind):
    """A projection whose weight goes straight into a fused operator would leave its LoRA without a gradient."""
    scan = "torch" if backend == "merged" else backend
    if reason := available_backends()[scan]:
        pytest.skip(f"{scan}: {reason}")
    encoder = write_encoder(0, TINY.model_copy(update={"backend": scan, **SHORT}))
    values_BTV = values_BTV[:2, : SHORT["frames"]] if SHORT else values_BTV
    config = {"kind": "lora", "rank": 2, "dora": True} if kind == "dora" else KINDS[kind]
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig.model_validate(config))
    alive, trainable = set(), set()
    for _ in range(2):
        if backend == "merged":
            # Training takes a merged adapter off the weights, or it would be dead and nothing would say so.
            merge_adapter(classifier.backbone)
        classifier.train()
        learned, trainable = _steps(classifier, values_BTV, 1)
        classifier.train(False)
        alive |= learned
    assert alive == trainable and len(trainable) > 2


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_adapter_tensor_learns_under_the_triton_kernels():
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "within_two_steps",
    ]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "partial"}, "kind partial trains what you name; add adapter.last_stages=1"),
        ({"last_stages": 1}, "read by kind partial alone, not by lora; set adapter.kind=partial"),
        ({"kind": "partial", "last_stages": 1, "unfreeze": ["*"]}, "set one of them"),
        ({"kind": "partial", "last_stages": 3}, "last_stages is 3, but this encoder has 2 stages"),
        ({"kind": "partial", "unfreeze": ["attention*"]}, r"'attention\*' fits no parameter"),
        ({"kind": "prompt"}, "'adapter.kind' is 'prompt', but: .*; did you mean 'prompts'"),
    ],
)
def test_what_cannot_be_trained_is_a_sentence(cohort, encoder, tmp_path, settings, sentence):
    with pytest.raises(BoldForgeError, match=sentence):
        finetune(
            load_config(FinetuneConfig, {"shards": cohort, "backbone": encoder, "out": tmp_path, "adapter": settings})
        )


def test_an_adapter_is_refused_by_another_base_unless_forced(encoder, write_encoder, values_BTV, tmp_path, caplog):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=1))
    save_adapter(classifier, tmp_path)
    other = write_encoder(seed=9)
    with pytest.raises(AdapterError, match=r"weights hash .* instead of .*--force-base"):
        load_classifier(other, tmp_path)
    forced = load_classifier(other, tmp_path, force=True)
    assert "taken all the same" in caplog.text
    assert not torch.equal(forced.predict(values_BTV), classifier.predict(values_BTV))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"atlas_sha256": "ab" * 32}, f"atlas_sha256 {'ab' * 32} instead of {'cd' * 32}"),
        ({"normalisation": "global-z"}, "normalisation global-z instead of residual-z"),
        ({"tr": 0.8}, "tr 0.8 instead of 2.0"),
    ],
)
def test_the_same_weights_with_another_atlas_or_input_are_refused(write_encoder, tmp_path, data, sentence):
    known = {"atlas": "aal3", "atlas_sha256": "cd" * 32}
    save_adapter(Classifier(load_backbone(write_encoder(**known)), AdhdDiagnosis(), AdapterConfig(rank=1)), tmp_path)
    recorded = json.loads((tmp_path / "task.json").read_text())["data"]
    assert recorded["atlas_sha256"] == "cd" * 32 and recorded["normalisation"] == "residual-z"
    backbone = load_backbone(write_encoder(**known | data))
    with pytest.raises(AdapterError, match=sentence):
        load_adapter(tmp_path, backbone)
    load_adapter(tmp_path, load_backbone(write_encoder(**known | data)), force=True)
