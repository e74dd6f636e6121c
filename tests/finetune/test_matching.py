"""Whose brain it is, and which image was shown: simulated recordings, through what a user runs."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from boldforge.configs import load_config
from boldforge.data_shards import DataRecipe, Run, brain_mask, build_shards, get_grid
from boldforge.finetune import FinetuneConfig, FinetuneError, finetune, get_task, load_classifier
from boldforge.finetune.tasks import reidentification
from boldforge.finetune.tasks.reidentification import Reidentification
from boldforge.finetune.tasks.retrieval import ImageRetrieval
from boldforge.pretrain import ModelConfig

GRID, FRAMES, PEOPLE, IMAGES = "mni4mm", 24, 10, 6
SETTINGS = {"clips": 3, "folds": 2, "adapter": {"kind": "probe"}, "training": {"epochs": 15, "patience": 15}}


def _save(folder, name, values_TV, mask, affine):
    volume = np.zeros((*mask.shape, len(values_TV)), dtype=np.float32)
    volume[mask] = values_TV.T
    image = nib.Nifti1Image(volume, affine)
    image.header.set_zooms((4, 4, 4, 2))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Two sessions of ten people; everybody's brain fluctuates in a pattern of its own."""
    folder = tmp_path_factory.mktemp("sessions")
    grid = get_grid(GRID)
    mask = brain_mask(grid)
    block = np.argwhere(mask) // 12
    place = (block[:, 0] * 16 + block[:, 1] * 4 + block[:, 2]) % 64
    generator = np.random.default_rng(0)
    runs = []
    for person in range(PEOPLE):
        own = 0.3 + 1.5 * generator.random(64)
        for session in ("1", "2"):
            shared = generator.standard_normal((FRAMES, 64)).astype(np.float32)
            values_TV = generator.standard_normal((FRAMES, len(place)), dtype=np.float32) + (own * shared)[:, place]
            path = _save(folder, f"{person}-{session}.nii", values_TV.astype(np.float32), mask, grid.affine)
            runs.append(Run(f"person{person}", session, "one", 2.0, path, simulated=True))
    build_shards(runs, folder / "shards", DataRecipe(grid=GRID, tr=2.0))
    return folder / "shards"


@pytest.fixture(scope="module")
def viewing(tmp_path_factory):
    """Six runs of one person who looks at each of six images once per run; embeddings of these and of one more."""
    folder = tmp_path_factory.mktemp("viewing")
    grid = get_grid(GRID)
    mask = brain_mask(grid)
    block = np.argwhere(mask) // 12
    place = (block[:, 0] * 16 + block[:, 1] * 4 + block[:, 2]) % 64
    generator = np.random.default_rng(1)
    embeddings = generator.standard_normal((IMAGES + 1, 5))
    to_brain = generator.standard_normal((5, 64)) * 0.6
    runs = []
    for run in range(6):
        values_TV = generator.standard_normal((6 * IMAGES, len(place)), dtype=np.float32)
        rows = []
        for at, image in enumerate(generator.permutation(IMAGES)):
            rows.append((12.0 * at, 8.0, f"image{image}.png"))
            values_TV[6 * at + 2 : 6 * at + 6] += (embeddings[image] @ to_brain)[place].astype(np.float32)
        path = _save(folder, f"run{run}.nii", values_TV, mask, grid.affine)
        with (folder / f"sub-one_task-view_run-{run + 1}_events.tsv").open("w") as stream:
            csv.writer(stream, delimiter="\t").writerows([("onset", "duration", "stim_file"), *rows])
        runs.append(Run("one", None, None, 2.0, path, task="view", number=str(run + 1), simulated=True))
    with (folder / "images.tsv").open("w") as stream:
        table = csv.writer(stream, delimiter="\t")
        table.writerow(["image", *(f"e{i}" for i in range(5))])
        table.writerows([f"image{i}.png", *values] for i, values in enumerate(embeddings))
    build_shards(runs, folder / "shards", DataRecipe(grid=GRID, tr=2.0))
    return folder


def _view(viewing, encoder, out, **changes):
    events = {"folder": viewing, "column": "stim_file", "delay": 4.0, "embeddings": viewing / "images.tsv"}
    settings = {"shards": viewing / "shards", "backbone": encoder, "out": out, "task": "retrieval", "pool": "tokens"}
    events |= changes.pop("events", {})
    return finetune(load_config(FinetuneConfig, settings | SETTINGS | {"folds": 3, "events": events} | changes))


def test_people_are_found_again_among_people_never_seen(sessions, write_encoder, tmp_path):
    # One stage: a merging's LayerNorm takes away how strongly a place fluctuates.
    shape = ModelConfig(
        patch_mm=48, frames=8, embed_dim=16, depths=(1,), decoder_depths=(), d_state=4, mlp_ratio=2.0, backend="torch"
    )
    encoder = write_encoder(0, shape)
    settings = {"shards": sessions, "backbone": encoder, "out": tmp_path, "task": "reidentify", **SETTINGS}
    results = finetune(load_config(FinetuneConfig, settings | {"pool": "tokens_std"}))
    assert results["rows"] == "recordings" and results["measured_by"] == "2-fold cross-validation over subjects"
    # Five people and ten recordings in a test fold: each is compared with nine, one of them the right one.
    assert results["chance"] == pytest.approx(1 / 9) and results["figures"]["n_candidates"] == 9
    assert results["figures"]["top1"] > 3 / 9 and results["permutation"]["p"] < 0.05
    assert results["figures"]["top5"] >= results["figures"]["top1"]
    assert set(results["baselines"]) == {"connectivity", "image"}
    assert results["baselines"]["image"]["figures"]["top1"] > 0.5, "the pattern is one of amplitude"
    assert results["subjects"] == {"n": 20, "n_people": 10} and "chance is 0.111" in results["verdict"]
    with (tmp_path / "predictions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert {"score_rank", "score_candidates", "score_matches"} <= set(rows[0])
    assert np.mean([float(row["score_rank"]) == 1 for row in rows]) == results["figures"]["top1"]
    for person in {row["subject"] for row in rows}:
        assert len({row["fold"] for row in rows if row["subject"] == person}) == 1
    classifier = load_classifier(encoder, tmp_path / "adapter")
    embedded = classifier.predict(torch.randn(2, 8, classifier.network.token_grid.n_voxels))
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))


def test_images_are_found_among_all_that_were_shown(viewing, encoder, tmp_path):
    results = _view(viewing, encoder, tmp_path)
    assert results["rows"] == "blocks" and results["chance"] == pytest.approx(1 / IMAGES)
    figures = results["figures"]
    assert figures["n"] == 36 and figures["n_candidates"] == IMAGES, "an image that nobody saw is no candidate"
    assert figures["top1"] > 2 / IMAGES and figures["top5"] >= figures["top1"]
    assert results["permutation"]["p"] < 0.05 and results["baselines"]["regions"]["figures"]["top1"] > 2 / IMAGES
    with (tmp_path / "predictions.tsv").open() as stream:
        row = next(csv.DictReader(stream, delimiter="\t"))
    assert {f"score_image{i}.png" for i in range(IMAGES)} <= set(row) and "score_image6.png" not in row
    classifier = load_classifier(encoder, tmp_path / "adapter")
    scores = classifier.predict(torch.randn(2, 4, classifier.network.token_grid.n_voxels))
    assert scores.shape == (2, IMAGES) and scores.abs().max() <= 1 + 1e-6
    task = json.loads((tmp_path / "adapter" / "task.json").read_text())
    assert task["task"] == "retrieval" and (tmp_path / "adapter" / "candidates.safetensors").is_file()
    _given_again_for_the_same_content_only(viewing, encoder, tmp_path, results)


def _given_again_for_the_same_content_only(viewing, encoder, out, results):
    """Where events and embeddings lie is nothing; what is in them is all."""
    moved = out / "moved"
    moved.mkdir()
    for path in (*viewing.glob("*_events.tsv"), viewing / "images.tsv"):
        shutil.copy(path, moved)
    events = {"folder": moved, "embeddings": moved / "images.tsv"}
    assert _view(viewing, encoder, out, events=events)["figures"] == results["figures"]
    lines = (moved / "images.tsv").read_text().splitlines()
    (moved / "images.tsv").write_text(
        "\n".join([*lines[:2], lines[2].replace(lines[2].split("\t")[1], "0.5"), *lines[3:]])
    )
    with pytest.raises(FinetuneError, match=r"holds a fine-tuning with other settings \(embeddings\)"):
        _view(viewing, encoder, out, events=events)
    shutil.copy(viewing / "images.tsv", moved)
    first = moved / "sub-one_task-view_run-1_events.tsv"
    first.write_text(first.read_text().replace("12.0\t", "14.0\t"))
    with pytest.raises(FinetuneError, match=r"other settings \(rows\)"):
        _view(viewing, encoder, out, events=events)
    for path in (*viewing.glob("*_events.tsv"), viewing / "images.tsv"):
        (moved / path.name).write_text(path.read_text().replace("image0.png", "image0.jpg"))
    with pytest.raises(FinetuneError, match=r"other settings \(classes\)"):
        _view(viewing, encoder, out, events=events)


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ({"embeddings": None}, "events.embeddings is not set"),
        ({"embeddings": "none.tsv"}, r"none\.tsv: no such table of embeddings"),
        ({"column": "onset"}, "names 0 of the images in column 'onset'"),
        ({"embeddings": "BAD"}, r"line 3 \(b\): expected a name that occurs once, and finite numbers"),
    ],
)
def test_embeddings_that_do_not_fit_are_a_sentence(viewing, encoder, tmp_path, events, sentence):
    if events.get("embeddings") == "BAD":
        (tmp_path / "bad.csv").write_text("image,e0,e1\na,1,2\nb,1,two\n")
        events = {"embeddings": tmp_path / "bad.csv"}
    with pytest.raises(FinetuneError, match=sentence):
        _view(viewing, encoder, tmp_path, events=events)


def test_people_with_one_recording_cannot_be_found_again(cohort, encoder, tmp_path):
    settings = {"shards": cohort, "backbone": encoder, "out": tmp_path, "task": "reidentify", **SETTINGS}
    with pytest.raises(FinetuneError, match="0 of 24 people have two recordings of 4 frames or more"):
        finetune(load_config(FinetuneConfig, settings))


def test_the_contrastive_loss_is_the_textbook_s():
    task = ImageRetrieval(["a", "b", "c"], {"candidates": torch.eye(3)})
    outputs, labels = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1])
    logits = torch.nn.functional.normalize(outputs, dim=1) @ torch.eye(3)[labels].T / 0.07
    pairs = torch.arange(3)
    expected = sum(torch.nn.functional.cross_entropy(matrix, pairs) for matrix in (logits, logits.T)) / 2
    torch.testing.assert_close(task.criterion([])(outputs, labels), expected)
    twice = torch.cat([outputs, outputs[:1]])
    # The same image twice: neither is the other's negative, so nothing pushes the two apart.
    twice.requires_grad_(True)
    task.criterion([])(twice, torch.tensor([2, 0, 1, 2])).backward()
    torch.testing.assert_close(twice.grad[0], twice.grad[3])


def test_ranks_of_people_count_ties_against_them():
    task = Reidentification()
    labels = [0, 0, 1, 1]
    perfect = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert task.settle(labels, perfect).tolist() == [[1, 3, 1]] * 4
    assert task.headline(labels, task.settle(labels, np.ones((4, 2)))) == 0.0
    # Four recordings can be paired in three ways, so that two people found are little.
    assert task.chance_test(labels, task.settle(labels, perfect), 0)["p"] > 0.05
    assert task.chance_test(labels, task.settle(labels, np.ones((4, 2))), 0)["p"] == 1.0
    many = np.repeat(np.arange(5), 2)
    assert task.chance_test(many, task.settle(many, np.eye(5)[many]), 0)["p"] < 0.05
    drawn = np.array([3, 0, 2, 1])
    assert task.order(np.array(labels), drawn).tolist() == [3, 2, 0, 1]


@pytest.mark.parametrize(("people", "recordings"), [(40, 2), (20, 3)])
def test_embeddings_that_mean_nothing_are_called_a_find_as_rarely_as_p_says(people, recordings, monkeypatch):
    """Two recordings that are each other's best match are one find, not two."""
    monkeypatch.setattr(reidentification, "_DRAWS", 500)
    task, generator = Reidentification(), np.random.default_rng(7)
    labels = np.repeat(np.arange(people), recordings)
    p = []
    for seed in range(300):
        scores = task.settle(labels, generator.standard_normal((len(labels), 64)))
        p.append(task.chance_test(labels, scores, seed)["p"])
    assert np.mean(np.array(p) < 0.05) <= 0.07


def test_a_pair_draws_together_and_a_lonely_clip_does_nothing():
    task = Reidentification()
    outputs = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], requires_grad=True)
    task.criterion([])(outputs, torch.tensor([0, 0, 1])).backward()
    step = outputs - 0.01 * outputs.grad
    before, after = (torch.nn.functional.cosine_similarity(x[0], x[1], dim=0) for x in (outputs, step))
    assert after > before
    lonely = torch.randn(3, 2, requires_grad=True)
    assert task.criterion([])(lonely, torch.tensor([0, 1, 2])).item() == 0.0
    assert get_task("reidentify", classes=("rank",)).n_scores == 3
