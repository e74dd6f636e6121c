"""``boldforge attribute`` as a user runs it, on a fine-tuning of simulated subjects."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from boldforge.data_shards import DataRecipe, SimulationConfig, build_shards, find_runs, load_atlas, simulate_cohort
from boldforge.launch.attribution_page import shown_methods
from boldforge.launch.cli import app
from boldforge.launch.report import ReportError, write_report

TUNING = ["clips=1", "folds=2", "adapter.rank=0", "training.epochs=2", "baselines=[]"]


def _run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def tuned(pretraining, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribute")
    simulate_cohort(folder / "athena", SimulationConfig(n_subjects=10, n_frames=8, effect=2.0))
    build_shards(find_runs(folder / "athena").runs, folder / "shards", DataRecipe(grid="mni4mm", tr=2.0))
    data = [f"shards={folder / 'shards'}", f"backbone={pretraining}", f"out={folder / 'run'}"]
    done = _run("finetune", *data, *TUNING)
    assert done.exit_code == 0, done.output
    return folder / "run"


@pytest.fixture(scope="module")
def attributed(tuned, tmp_path_factory):
    """What the command printed, and the folder it wrote."""
    folder, atlas = tmp_path_factory.mktemp("atlas"), load_atlas("aal3")
    halves = np.where(atlas.volume > 0, np.where(atlas.volume > 94, 2, 1), 0).astype(np.int16)
    nib.save(nib.Nifti1Image(halves, atlas.affine), folder / "atlas.nii.gz")
    (folder / "names.txt").write_text("1 cortex\n2 <below>\n")
    settings = [f"atlas={folder / 'atlas.nii.gz'}", f"labels={folder / 'names.txt'}", "clips=1", "steps=4"]
    done = _run("attribute", tuned, *settings, "permutations=99", "resamples=100")
    assert done.exit_code == 0, done.output
    return done.output, tuned / "attribution"


def test_regions_are_printed_and_drawn(attributed):
    printed, out = attributed
    assert "Asked each fold's model about its own test subjects: 10 simulated subjects" in printed
    assert f"Tables, maps and figures: {out}" in printed
    for method in ("integrated-gradients", "occlusion"):
        with (out / f"{method}.tsv").open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream, delimiter="\t") if row["kind"] == "region"]
        assert {row["name"] for row in rows} == {"cortex", "<below>"}
        assert f"{float(rows[0]['attribution']):+.4f}" in printed
        picture = imread(out / f"{method}.png")[..., :3]
        assert picture.shape[0] > 250 and picture.shape[1] > 800
        # Red and blue where regions are, on white.
        assert (np.ptp(picture, axis=2) > 0.3).mean() > 0.01 and (picture.min(axis=2) > 0.99).mean() > 0.3
    page = (out / "attribution.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "Simulated subjects." in page
    assert "&lt;below&gt;" in page and "<below>" not in page and "http" not in page and "<script" not in page


def test_the_report_of_a_finetuning_shows_its_attribution(tuned, attributed, tmp_path):
    table = json.loads((attributed[1] / "attribution.json").read_text())["methods"]["occlusion"]["table"]
    page = write_report([tuned], tmp_path / "report.html").read_text()
    assert "Which regions the model reads" in page and page.count("data:image/png;base64,") == 2
    assert f"{table[0]['attribution']:+.4f}" in page and "&lt;below&gt;" in page and "<below>" not in page
    # By itself, and without figures where nobody drew any.
    copied = shutil.copytree(attributed[1], tmp_path / "copied", ignore=shutil.ignore_patterns("*.png"))
    page = write_report([copied], tmp_path / "report.html").read_text()
    assert f"{table[0]['attribution']:+.4f}" in page and "data:image" not in page
    assert "<strong>Simulated subjects:</strong> attribution." in page


def test_the_report_shows_no_attribution_of_an_earlier_finetuning(tuned, attributed, tmp_path):
    copied = shutil.copytree(tuned, tmp_path / "again")
    metrics = copied / "metrics.json"
    metrics.write_text(metrics.read_text() + " ")
    page = write_report([copied], tmp_path / "report.html").read_text()
    assert "is of an earlier fine-tuning" in page and "data:image" not in page
    shutil.rmtree(copied / "attribution")
    assert "earlier" not in write_report([copied], tmp_path / "report.html").read_text()


def test_the_region_with_the_lowest_p_is_shown_however_small_its_attribution(tmp_path):
    rows = [{"kind": "region", "name": f"region {number}", "p": 1.0} for number in range(5)]
    rows[4]["p"] = 0.13
    results = {"methods": {"occlusion": {"verdict": "", "table": rows}}}
    (shown,) = shown_methods(tmp_path, results, 2)
    assert [row["name"] for row in shown["regions"]] == ["region 0", "region 1", "region 4"]
    rows[1]["p"] = 0.13
    (shown,) = shown_methods(tmp_path, results, 2)
    assert [row["name"] for row in shown["regions"]] == ["region 0", "region 1"]


def test_a_damaged_attribution_is_one_sentence(tuned, attributed, tmp_path):
    copied = shutil.copytree(tuned, tmp_path / "damaged")
    (copied / "attribution" / "attribution.json").write_text('{"methods":')
    with pytest.raises(ReportError, match="its files cannot be shown"):
        write_report([copied], tmp_path / "report.html")


def test_a_mistake_is_one_sentence_and_exit_code_2(tuned, boldforge, tmp_path):
    done = boldforge("attribute", tmp_path)
    assert done.returncode == 2 and "give the folder of a finished boldforge finetune or of a" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 2, "that it started, and the sentence"
    for override, sentence in {
        "step=3": "unknown key 'step'",
        "model=x": "both say what to attribute",
        "methods=[lime]": "methods",
        "atlas=nowhere.nii": "nowhere.nii",
        "target=ADHD": "leave it out",
    }.items():
        refused = _run("attribute", tuned, override)
        assert refused.exit_code != 0 and sentence in str(refused.exception), override
