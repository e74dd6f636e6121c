"""FMCIB with 3D LoRA on a table of images, through the command; images are simulated, weights 1/32 as wide."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from boldforge.configs import load_config
from boldforge.finetune import FinetuneConfig, FinetuneError, finetune, load_classifier
from boldforge.finetune.beside import Beside
from boldforge.finetune.fmcib import TRUNK, build_fmcib
from boldforge.finetune.study import open_study
from boldforge.launch.cli import app

QUICK = ["folds=2", "head_hidden=8", "training.epochs=2", "training.batch_size=4", "images.cube.spacing=2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "fmcib.torch"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({TRUNK: build_fmcib(1 / 32).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Anisotropy maps of 12 subjects, one of them twice; class 1 has more of it on one side."""
    folder = tmp_path_factory.mktemp("maps")
    generator = np.random.default_rng(0)
    rows = [("path", "subject", "site", "diagnosis", "age", "sex")]
    for number in range(12):
        values = 0.3 + 0.05 * generator.standard_normal((25, 25, 25))
        values[:12] += 0.4 * (number % 2)
        for image in range(2 if number == 3 else 1):
            name = f"s{number}-{image}.nii.gz"
            picture = nib.Nifti1Image(np.clip(values + 0.01 * image, 0, 1).astype(np.float32), np.diag([4.0, 4, 4, 1]))
            picture.header["descrip"] = "simulated by BoldForge"
            nib.save(picture, folder / name)
            rows.append(
                (name, f"s{number}", ("KKI", "NYU")[number // 2 % 2], number % 2, 8 + number / 4, "FM"[number % 2])
            )
    with (folder / "fa.tsv").open("w") as stream:
        csv.writer(stream, delimiter="\t").writerows(rows)
    return folder / "fa.tsv"


def _config(table, weights, out, **changes):
    settings = {
        "images": {"table": table, "cube": {"kind": "fa", "spacing": 2}},
        "backbone": {"kind": "fmcib", "weights": weights},
        "out": out,
        "folds": 2,
        "adapter": {"kind": "probe"},
        "training": {"epochs": 2},
    }
    return load_config(FinetuneConfig, settings | changes)


def test_a_table_of_images_becomes_a_tested_adapter_in_one_command(maps, weights, tmp_path):
    arguments = [
        "finetune",
        "--config",
        "configs/finetune/fmcib-lora.yaml",
        "--data",
        str(maps),
        f"out={tmp_path / 'out'}",
    ]
    arguments += [f"backbone.weights={weights}", *QUICK]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    parts = results["trainable_by_part"]
    assert set(parts) == {"lora", "head"} and parts["head"] == 64 * 8 + 8 + 8 + 1
    assert results["figures"]["n"] == 12 and set(results["baselines"]) == {"site", "demographics", "volume"}
    assert results["baselines"]["volume"]["figures"]["auc"] == 1.0, "the difference is there to be found"
    assert results["verdict"] in done.output
    classifier = load_classifier(weights, tmp_path / "out" / "adapter")
    assert classifier.head.hidden is not None
    with torch.no_grad():
        score = classifier.predict(torch.rand(1, 1, 50, 50, 50))
    assert 0 <= score.item() <= 1
    recorded = json.loads((tmp_path / "out" / "adapter" / "task.json").read_text())["data"]
    assert recorded["cube"]["kind"] == "fa" and recorded["orientation"] == "LPS"


def test_a_subject_s_images_are_embedded_and_averaged(maps, weights, tmp_path):
    study = open_study(_config(maps, weights, tmp_path / "out"))
    adapter, subjects = study.lifted(study.config.adapter), study.cohort.subjects
    clips = study.gather(subjects, tmp_path / "clips", adapter=adapter)
    beside = Beside(study, ["embedding", "site"])
    beside.read(lambda: None, lambda: (clips, adapter))
    found = beside._features["embedding"]
    twice = next(i for i, subject in enumerate(subjects) if len(subject.runs) == 2)
    cubes = [cube for number, cube in study.source.cubes(subjects, 4) if number == twice]
    with torch.no_grad():
        embedded = [study.backbone().embed(cube)[0] for cube in cubes]
    assert found.shape == (12, 64) and len(embedded) == 2
    np.testing.assert_allclose(found[twice], torch.stack(embedded).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_the_published_sizes_train_as_many_parameters_as_published():
    """The recipe itself, on the network without its values."""
    from boldforge.finetune import AdapterConfig, AdhdDiagnosis, Classifier
    from boldforge.finetune.fmcib import FmcibBackbone

    recipe = load_config(FinetuneConfig, "configs/finetune/fmcib-lora.yaml")
    with torch.device("meta"):
        backbone = FmcibBackbone(build_fmcib(), "none")
        adapter = AdapterConfig.model_validate(recipe.adapter.model_dump())
        classifier = Classifier(backbone, AdhdDiagnosis(), adapter, hidden=recipe.head_hidden)
    assert classifier.trainable == 1_638_831


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("gone.nii.gz\ts20\tKKI\t1\t9\tF", r"line 15 \(gone\.nii\.gz\): names no file that is there"),
        ("../x.nii.gz\ts20\tKKI\t1\t9\tF", r"line 15 .*leads out of"),
        ("s3-1.nii.gz\ts3\tKKI\t0\t9\tF", "subject s3 has different adhd labels"),
        ("s1-0.nii.gz\t\tKKI\t0\t9\tF", "no subject; correct the line"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(maps, weights, tmp_path, line, sentence):
    table = maps.with_name(f"{abs(hash(line))}.tsv")
    table.write_text(maps.read_text() + line + "\n")
    with pytest.raises(FinetuneError, match=sentence):
        finetune(_config(table, weights, tmp_path))
    table.unlink()


def test_a_volume_of_another_kind_is_named(maps, weights, tmp_path):
    with pytest.raises(FinetuneError, match="a CT in Hounsfield units holds air near -1000"):
        finetune(_config(maps, weights, tmp_path, images={"table": maps, "cube": {"kind": "ct"}}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": None}, "a study reads shards or images; set exactly one of the two keys"),
        ({"shards": "x"}, "a study reads shards or images; set exactly one of the two keys"),
        ({"backbone": "runs/pretrain"}, r"images are read by backbone \{kind: fmcib\} and by no other"),
        ({"baselines": ["connectivity"]}, "images have no connectivity"),
        ({"adapter": {"kind": "prompts"}}, "no windows to put prompts before"),
    ],
)
def test_keys_that_do_not_fit_together_are_a_sentence(maps, weights, tmp_path, changes, sentence):
    from boldforge.configs import BoldForgeError

    with pytest.raises(BoldForgeError, match=sentence):
        finetune(_config(maps, weights, tmp_path, **changes))
