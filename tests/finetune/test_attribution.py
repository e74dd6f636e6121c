import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from boldforge.configs import BoldForgeError, load_config
from boldforge.data_shards import load_atlas, load_groups, load_manifest
from boldforge.finetune import (
    AdapterConfig,
    AdhdDiagnosis,
    AttributionConfig,
    Classifier,
    FinetuneConfig,
    attribute_regions,
    finetune,
    load_backbone,
)
from boldforge.finetune.attribution import Parts, class_score, gradients_through, integrated_gradients, occlusion
from boldforge.finetune.attribution_results import _verdict
from boldforge.finetune.networks import make_backbone, shard_data
from boldforge.finetune.resnet_rnn import ResnetRnnConfig
from boldforge.pretrain import ModelConfig, region_voxels

SMALL = {"clips": 2, "folds": 3, "training": {"epochs": 4}, "adapter": {"rank": 2, "first_stage": 1}, "baselines": []}
QUICK = {"clips": 1, "steps": 20, "permutations": 199, "resamples": 100}


@pytest.fixture(scope="module")
def finetuned(cohort, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetune")
    finetune(load_config(FinetuneConfig, {"shards": cohort, "backbone": encoder, "out": out, **SMALL}))
    return out


@pytest.fixture(scope="module")
def lobes(tmp_path_factory) -> dict:
    """A coarse atlas, for few regions are hidden faster than many: AAL3's regions, joined by group."""
    folder, atlas = tmp_path_factory.mktemp("lobes"), load_atlas("aal3")
    volume, names = np.zeros(atlas.volume.shape, dtype=np.int16), []
    for name, ids in load_groups(atlas).items():
        names.append(name)
        volume[np.isin(atlas.volume, ids)] = len(names)
    nib.save(nib.Nifti1Image(volume, atlas.affine), folder / "lobes.nii.gz")
    (folder / "lobes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, start=1)))
    (folder / "groups.txt").write_text("cerebellum back\noccipital back\n")
    return {
        "atlas": str(folder / "lobes.nii.gz"),
        "labels": str(folder / "lobes.txt"),
        "groups": str(folder / "groups.txt"),
    }


@pytest.fixture(scope="module")
def attributed(finetuned, lobes):
    seen = []
    config = load_config(AttributionConfig, {"model": finetuned, **QUICK, **lobes})
    results = attribute_regions(config, lambda done, total: seen.append((done, total)))
    return finetuned / "attribution", results, seen


@pytest.fixture(scope="module")
def parts(cohort) -> Parts:
    manifest, atlas = load_manifest(cohort), load_atlas("aal3")
    regions = region_voxels(atlas, manifest.grid, manifest.brain_mask())
    return Parts(regions, load_groups(atlas), manifest.n_voxels)


def _table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def _linear(weights_V):
    return lambda values_BTV: (values_BTV * weights_V).sum(dim=(1, 2))


def test_of_a_linear_score_both_methods_are_exact(parts, values_BTV):
    generator = torch.Generator().manual_seed(0)
    n_voxels = values_BTV.shape[-1]
    weights_V, baseline_V = torch.randn(n_voxels, generator=generator), torch.randn(n_voxels, generator=generator)
    score = _linear(weights_V.double())
    values = values_BTV.double()
    exact_BV = (weights_V * (values - baseline_V)).sum(dim=1).numpy()
    found_BV = integrated_gradients(score, values, baseline_V.double(), steps=3, batch_size=2)
    np.testing.assert_allclose(found_BV, exact_BV, atol=1e-9)
    fall_BR = occlusion(score, values, baseline_V.double(), parts, 50, score(values).numpy())
    summed_BR = np.stack([parts.sums(row) for row in exact_BV])
    assert fall_BR.shape == (3, len(parts)) and len(parts) > 170
    np.testing.assert_allclose(fall_BR, summed_BR, atol=1e-3)


def test_integrated_gradients_follow_the_path_they_name():
    def score(values_BTV):  # not convex, and not smooth at the baseline
        return values_BTV[:, 0, 0] ** 3 * values_BTV[:, 0, 1] + values_BTV.square().sum(dim=(1, 2)).sqrt()

    values = torch.tensor([[[2.0, 3.0]]], dtype=torch.float64)
    found = integrated_gradients(score, values, torch.zeros(2, dtype=torch.float64), steps=8, batch_size=3)
    root = 13**0.5  # x³y: ∫ 3α³x³y dα = 3/4 x³y for x, 1/4 x³y for y; |v|: v²/|v| each
    np.testing.assert_allclose(found, [[0.75 * 24 + 4 / root, 0.25 * 24 + 9 / root]], rtol=1e-12)


@pytest.mark.parametrize(("pool", "kind"), [("mean", "full"), ("multiscale", "lora")])
def test_attributions_of_the_encoder_add_up_to_the_change_of_the_score(encoder, values_BTV, pool, kind):
    classifier = Classifier(load_backbone(encoder, pool), AdhdDiagnosis(), AdapterConfig(rank=2, kind=kind))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    score, trainable, values = class_score(classifier), classifier.trainable, values_BTV[:1]
    with gradients_through(classifier):
        found_BV = integrated_gradients(score, values, torch.zeros(values.shape[-1]), steps=96, batch_size=25)
    with torch.no_grad():
        change = float(score(values) - score(torch.zeros_like(values)))
    assert abs(change) > 0.01 and found_BV.sum() == pytest.approx(change, rel=0.01)
    assert classifier.trainable == trainable and classifier.head.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_attributions_of_a_3d_resnet_with_a_recurrent_layer_add_up_too(cohort, values_BTV):
    config = ResnetRnnConfig(kind="resnet-rnn", depth="A", rnn="gru", clip_length=2)
    backbone = make_backbone(config, "mean", shard_data(load_manifest(cohort)), 0)
    classifier = Classifier(backbone, AdhdDiagnosis(), AdapterConfig(kind="full"))
    # From a frame that is flat in space too, its normalisation makes one jump; from an anatomy it does not.
    score, values, frame_V = class_score(classifier), values_BTV[:1, :2], values_BTV[1, 0]
    with gradients_through(classifier):
        found_BV = integrated_gradients(score, values, frame_V, steps=64, batch_size=8)
    with torch.no_grad():
        change = float(score(values) - score(frame_V.expand(1, 2, -1)))
    assert abs(change) > 1e-5 and found_BV.sum() == pytest.approx(change, rel=0.1)


def test_of_a_model_that_is_known_to_read_some_patches_these_and_no_others_are_named(write_encoder, parts, values_BTV):
    """Tokens go past no block to a head that reads those of the precuneus alone."""
    fine = ModelConfig(patch_mm=12, frames=4, embed_dim=8, depths=(1,), decoder_depths=(), d_state=4, backend="torch")
    classifier = Classifier(
        load_backbone(write_encoder(model=fine), "tokens_std"), AdhdDiagnosis(), AdapterConfig(kind="probe")
    )
    classifier.network.stages[0].blocks = torch.nn.ModuleList()
    names = [parts.names.index(f"Precuneus_{side}") for side in "LR"]
    inside_V = parts.shares(names).sum(dim=0)
    patch_SP = classifier.network.patch_voxels
    share_S = torch.cat([inside_V, torch.zeros(1)])[patch_SP].mean(dim=1)
    read_S = share_S > 0.5
    assert 8 < int(read_S.sum()) < 40
    read_V = torch.zeros(len(inside_V) + 1, dtype=torch.bool)
    read_V[patch_SP[read_S]] = True
    weights_SC = torch.zeros(len(share_S), 8)
    weights_SC[read_S] = 1.0
    with torch.no_grad():
        # Means over time first, then deviations.
        classifier.head.linear.weight.copy_(torch.cat([0 * weights_SC, weights_SC]).reshape(1, -1))
    score, values, flat_V = class_score(classifier), values_BTV[:1], torch.zeros(len(inside_V))
    with gradients_through(classifier):
        found_V = integrated_gradients(score, values, flat_V, steps=24, batch_size=8)[0]
    assert (found_V[~read_V[:-1].numpy()] == 0).all() and np.count_nonzero(found_V) > 0.9 * int(read_V.sum())
    with torch.no_grad():
        whole, nothing = float(score(values)), float(score(flat_V.expand(1, 4, -1)))
    assert found_V.sum() == pytest.approx(whole - nothing, rel=0.01)
    regions = range(parts.kinds.count("region"))
    fallen_R = occlusion(score, values, flat_V, parts, 16, np.array([whole]))[0][regions]
    summed_R = parts.sums(found_V)[regions]
    elsewhere_R = np.array([not bool(parts.shares([i])[0][read_V[:-1]].any()) for i in regions])
    assert elsewhere_R.sum() > 100 and (summed_R[elsewhere_R] == 0).all()
    assert np.abs(fallen_R[elsewhere_R]).max() < 1e-4 < fallen_R.max(), "but for the rounding of a batch"
    for rows_R in (summed_R, fallen_R):
        assert set(np.argsort(-rows_R)[:2]) == set(names)


def test_several_classes_are_attributed_one_against_the_others():
    outputs = torch.tensor([[1.0, 4.0, 9.0]])
    assert float(class_score(lambda _: outputs, 2)(outputs)) == pytest.approx(9 - 2.5)
    assert float(class_score(lambda _: outputs[:, :1])(outputs)) == 1


def test_every_subject_is_asked_of_the_one_model_that_has_not_seen_it(finetuned, attributed):
    out, results, seen = attributed
    tested = [
        json.loads((finetuned / "folds" / str(k) / "task.json").read_text())["figures"]["test"] for k in (1, 2, 3)
    ]
    assert sorted(name for part in tested for name in part) == [f"sub-{i:04d}" for i in range(1, 23)]
    assert results["n_subjects"] == 22 and results["n_folds"] == 3 and seen[-1] == (22, 22)
    # The scores are those of the predictions, but for the number of clips: the same models saw the same people.
    predicted = {row["subject"]: row for row in _table(finetuned / "predictions.tsv")}
    assert [set(part) for part in tested] == [
        {name for name, row in predicted.items() if row["fold"] == fold} for fold in "123"
    ]
    for row in _table(out / "occlusion-subjects.tsv"):
        assert all(row[name] == predicted[row["subject"]][name] for name in ("fold", "label")), "one name, one person"
    scores = [float(row["score"]) for row in _table(out / "occlusion-subjects.tsv")]
    labels = [float(row["label"]) for row in _table(out / "occlusion-subjects.tsv")]
    assert np.mean([s for s, y in zip(scores, labels, strict=True) if y]) > np.mean(scores)
    assert "person" not in (out / "occlusion-subjects.tsv").read_text() + (out / "attribution.json").read_text()


def test_a_pooling_that_averages_over_the_brain_cannot_say_where_and_the_verdict_says_so(attributed):
    _, results, _ = attributed
    for found in results["methods"].values():
        assert "pooling, multiscale, averages over the brain" in found["verdict"]
        assert "cannot say where" in found["verdict"] and "pool tokens or tokens_std" in found["verdict"]
    row = {"kind": "region", "name": "A", "p": 0.001, "p_within_sites": None}
    for pool in ("tokens", "tokens_std", None):
        assert _verdict("occlusion", [row], 1, 0.05, pool) == (
            "By occlusion, 1 of 1 regions go with the label (family-wise p ≤ 0.05): A."
        )


def test_regions_and_the_rest_make_up_the_separation_of_the_classes(attributed):
    out, results, _ = attributed
    rows = _table(out / "integrated-gradients.tsv")
    assert results["methods"]["integrated-gradients"]["gap"] < 0.3
    total = sum(float(row["attribution"]) for row in rows if row["kind"] != "group")
    assert total == pytest.approx(results["score"]["separation"], rel=0.1)
    sizes = [abs(float(row["attribution"])) for row in rows if row["kind"] == "region"]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == results["n_regions"]
    by_name = {row["name"]: float(row["attribution"]) for row in rows}
    assert by_name["back"] == pytest.approx(by_name["cerebellum"] + by_name["occipital"], rel=1e-4)
    voxels = np.asarray(nib.load(out / "integrated-gradients-voxels.nii.gz").dataobj)
    assert np.nansum(voxels) == pytest.approx(total, rel=1e-3)


def test_the_map_lies_where_the_atlas_does(attributed, cohort):
    out, results, _ = attributed
    image, manifest = nib.load(out / "occlusion.nii.gz"), load_manifest(cohort)
    np.testing.assert_allclose(image.affine, manifest.grid.affine)
    values = {row["name"]: row["attribution"] for row in results["methods"]["occlusion"]["table"]}
    for name, mm in {"cerebellum": (38, -67, -30), "occipital": (-10, -90, 4), "frontal": (30, 40, 28)}.items():
        voxel = np.round(np.linalg.inv(image.affine) @ [*mm, 1]).astype(int)[:3]
        assert np.asarray(image.dataobj)[tuple(voxel)] == pytest.approx(values[name], rel=0.01), name


def test_the_same_command_writes_the_same_bytes(finetuned, attributed, lobes, tmp_path):
    out, _, _ = attributed
    (tmp_path / ".clips-of-a-killed-run").mkdir()
    attribute_regions(load_config(AttributionConfig, {"model": finetuned, "out": tmp_path, **QUICK, **lobes}))
    names = sorted(path.name for path in out.iterdir())
    assert len(names) == 8 and names == sorted(path.name for path in tmp_path.iterdir())
    for name in set(names) - {"attribution.json"}:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_an_adapter_on_new_subjects_but_never_on_its_own(finetuned, cohort, encoder, build_cohort, lobes, tmp_path):
    asked = {"model": finetuned / "adapter", "backbone": encoder, "out": tmp_path, "methods": ["occlusion"], **QUICK}
    asked |= {"baseline": "cohort", **lobes}
    with pytest.raises(BoldForgeError, match="was trained on these very subjects"):
        attribute_regions(load_config(AttributionConfig, {**asked, "shards": cohort}))
    with pytest.raises(BoldForgeError, match="is one adapter; give shards="):
        attribute_regions(load_config(AttributionConfig, asked))
    new = build_cohort(subjects=6, effect=2.0, seed=4)
    results = attribute_regions(load_config(AttributionConfig, {**asked, "shards": new}))
    assert results["n_subjects"] == 6 and results["asked"] == "one adapter about subjects new to it"
    assert list(results["methods"]) == ["occlusion"]


def test_what_does_not_fit_is_said_in_one_sentence(finetuned, cohort, build_cohort, tmp_path):
    def refused(**changes):
        with pytest.raises(BoldForgeError) as caught:
            attribute_regions(load_config(AttributionConfig, {"model": finetuned, "out": tmp_path, **QUICK, **changes}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "give the folder of a finished boldforge finetune" in refused(model=tmp_path)
    assert "leave it out" in refused(target="ADHD")
    images = tmp_path / "images"
    images.mkdir()
    results = json.loads((finetuned / "metrics.json").read_text())
    results["settings"] |= {"shards": None, "images": {"table": "maps.tsv"}}
    (images / "metrics.json").write_text(json.dumps(results))
    assert "is a study of images; regions are attributed to studies of shards only" in refused(model=images)
    assert "was trained on other shards" in refused(shards=build_cohort(subjects=4, effect=0.0))
    copied = shutil.copytree(finetuned, tmp_path / "copy")
    shutil.rmtree(copied / "folds" / "2")
    assert "finetune again with this boldforge and keep_folds=true" in refused(model=copied)
    (copied / "metrics.json").write_text("{")
    assert "is damaged" in refused(model=copied)
    assert "nothing.txt" in refused(groups=tmp_path / "nothing.txt")
