"""A diagnosis of several classes, from the phenotype table as ADHD-200 has it."""

import csv

import nibabel as nib
import numpy as np
import pytest

from boldforge.configs import load_config
from boldforge.data_shards import DataRecipe, build_shards, find_runs
from boldforge.data_shards.layout_adhd200 import PHENOTYPE_COLUMNS, SIMULATION_FILE
from boldforge.finetune import FinetuneConfig, FinetuneError, finetune, get_task


@pytest.fixture(scope="module")
def athena(tmp_path_factory):
    """Noise named as Athena's volumes are; controls (0), combined (1) and inattentive (3) in turn."""
    folder = tmp_path_factory.mktemp("data") / "athena"
    (folder / "NYU").mkdir(parents=True)
    (folder / SIMULATION_FILE).write_text("{}")
    generator = np.random.default_rng(0)
    affine = np.diag([16.0, 16, 16, 1])
    affine[:3, 3] = -96
    lines = ["\t".join(PHENOTYPE_COLUMNS)]
    for number in range(12):
        image = nib.Nifti1Image(generator.standard_normal((13, 15, 13, 8), dtype=np.float32), affine)
        image.header.set_zooms((16, 16, 16, 2))
        image.header.set_xyzt_units("mm", "sec")
        nib.save(image, folder / "NYU" / f"sfnwmrda00100{number:02d}_session_1_rest_1.nii.gz")
        row = {"ScanDir ID": f"100{number:02d}", "Site": "5", "Age": "9", "DX": "013"[number % 3]}
        lines.append("\t".join(row.get(name, "-999") for name in PHENOTYPE_COLUMNS))
    (folder / "ADHD200_preprocessed_phenotypics.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_adhd_subtypes_of_an_adhd200_folder_are_told_apart(athena, encoder, tmp_path):
    found = find_runs(athena)
    assert {(run.phenotype["dx"], run.phenotype["diagnosis"]) for run in found.runs} == {(0, 0), (1, 1), (3, 1)}
    build_shards(found, tmp_path / "shards", DataRecipe(grid="mni4mm", tr=2.0, normalisation="residual-z"), workers=1)
    settings = {"task": "classify:dx", "clips": 1, "folds": 2, "adapter": {"rank": 0}, "training": {"epochs": 1}}
    settings |= {"shards": tmp_path / "shards", "backbone": encoder, "out": tmp_path / "out", "baselines": []}
    results = finetune(load_config(FinetuneConfig, settings))
    assert results["subjects"] == {"n": 12, "n_per_class": {"0": 4, "1": 4, "3": 4}}
    assert len(results["figures"]["confusion"]) == 3
    with (tmp_path / "out" / "predictions.tsv").open(newline="") as stream:
        row = next(csv.DictReader(stream, delimiter="\t"))
    assert {"score_0", "score_1", "score_3"} <= set(row)


@pytest.mark.parametrize("codes", [(1000001.0, 1000002.0), (1000001.0, 1000002.0, 5.0), (0.1234567, 0.1234568, 2.0)])
def test_long_codes_stay_apart(codes):
    task = get_task("classify:code", [{"code": code} for code in codes])
    assert len(set(task.classes)) == len(codes)
    assert sorted(task.label({"code": code}) for code in codes) == list(range(len(codes)))
    assert [float(name) for name in task.classes] == sorted(codes), "a class is named by its whole code"


def test_a_number_and_a_text_of_the_same_name_are_refused():
    with pytest.raises(FinetuneError, match="column 'code' holds '5' both as a number and as a text"):
        get_task("classify:code", [{"code": 5.0}, {"code": "5"}, {"code": "6"}])
