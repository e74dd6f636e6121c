import html
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from boldforge.launch.figures import Example, loss_figure, slice_rows
from boldforge.launch.release import write_release
from boldforge.launch.report import ReportError, write_report


@pytest.fixture(scope="module")
def page(pretraining, sweep, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    release = write_release(pretraining, folder / "v1", adapter)
    return write_report([pretraining, sweep, release], folder / "deep" / "report.html").read_text()


def test_the_page_asks_nothing_of_any_other_place(page):
    references = re.findall(r'(?:src|href|action|data|poster)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import\s+(\S+)', page)
    targets = ["".join(found) for found in references]
    outside = [target for target in targets if not target.startswith(("data:image/", "#", '"#', "'#"))]
    assert outside == []
    assert len(targets) > 10, "the images are in the page"
    assert "<script" not in page
    assert "<link" not in page
    # An address that the browser does not fetch: the namespace of an inline SVG.
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_real_and_simulated_figures_are_told_apart_in_words(page):
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))
    assert "Real recordings: pretraining." in text
    assert "Simulated subjects: adapter sweep." in text
    assert "say nothing about people" in text
    assert "On 8 simulated test subjects, 4 of them positive" in text


def test_the_figures_are_those_of_the_runs(page):
    assert "0.700" in page
    assert "30 %" in page, "less error than the mean frame"
    assert "Rank 2 was best." in page
    assert re.search(r'class="best"><td>2</td>', page)
    assert "AUC 0.81, n = 8" in page


def test_left_and_right_are_stated(page):
    assert "the left of the picture is the left of" in page


def test_no_subject_is_named(page):
    assert "secret" not in page


def test_no_folder_of_the_author_is_named(page, pretraining, sweep):
    assert "boldforge.from_pretrained(&#34;v1&#34;)" in page or 'boldforge.from_pretrained("v1")' in page
    assert not [path for path in (pretraining, sweep) if str(path.parent) in page]


def test_text_from_outside_is_escaped(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "a<b>&c")
    results = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(results | {"sentence": "<img src=x onerror=alert(1)>"}))
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "a&lt;b&gt;&amp;c" in page


def test_a_run_that_is_still_going_is_shown(pretraining, tmp_path):
    going = tmp_path / "going"
    going.mkdir()
    for name in ("metrics.csv", "config.yaml"):
        shutil.copy(pretraining / name, going / name)
    page = write_report([going], tmp_path / "report.html").read_text()
    assert "the run has not ended" in page


@pytest.mark.parametrize(
    ("simulated", "said"),
    [(True, "Simulated subjects:"), (False, "Real recordings:"), (None, "Unknown whether real or simulated:")],
)
def test_an_unfinished_run_is_real_only_if_its_shards_say_so(pretraining, tmp_path, monkeypatch, simulated, said):
    going = tmp_path / "going"
    going.mkdir()
    for name in ("metrics.csv", "config.yaml"):
        shutil.copy(pretraining / name, going / name)
    if simulated is not None:
        manifest = SimpleNamespace(simulated=simulated, content_hash="cd" * 32)
        monkeypatch.setattr("boldforge.launch.report.load_manifest", lambda folder: manifest)
    page = write_report([going], tmp_path / "report.html").read_text()
    assert re.findall(r"<strong>(.*?:)</strong>", page) == [said]


def test_shards_that_were_exchanged_since_say_nothing_about_a_run(pretraining, tmp_path, monkeypatch):
    for name in ("metrics.csv", "config.yaml"):
        shutil.copy(pretraining / name, tmp_path / name)
    others = SimpleNamespace(simulated=False, content_hash="ef" * 32)
    monkeypatch.setattr("boldforge.launch.report.load_manifest", lambda folder: others)
    assert "Unknown whether real" in write_report([tmp_path], tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("error", "said"), [(0.8, "20 %</b><span>less error"), (1.25, "25 %</b><span>more error")])
def test_a_model_worse_than_the_mean_frame_is_called_so(pretraining, tmp_path, error, said):
    run = shutil.copytree(pretraining, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"heldout_error": error}))
    assert said in write_report([run], tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (
            {"strategy": "random"},
            "of the brain is hidden, patches of 48 mm drawn at random, every frame by itself,",
        ),
        ({"strategy": "random", "time": "tube"}, "patches of 48 mm drawn at random, in all frames,"),
        ({"strategy": "tube"}, "patches of 48 mm drawn at random, in all frames,"),
        ({"strategy": "window"}, "hidden, whole windows of 4 × 4 × 4 patches of 48 mm, 4 frames,"),
        ({"strategy": "region"}, "hidden, whole AAL3 regions at a time, in all frames,"),
        ({"strategy": "pair"}, "hidden, whole AAL3 regions together with those of the other side, in all frames,"),
        ({"strategy": "group"}, "hidden, whole groups of AAL3 regions (lobes and the like) at a time, in all frames,"),
        ({"strategy": "atlas"}, "of which\n50 % of the AAL3 regions are hidden in all frames, however large they are,"),
        ({"strategy": "region", "atlas": "/home/ada/mine.nii.gz"}, "whole mine regions at a time"),
    ],
)
def test_what_was_hidden_is_said_for_every_strategy(pretraining, tmp_path, mask, said):
    run = shutil.copytree(pretraining, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["mask"] |= mask
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    page = write_report([run], tmp_path / "report.html").read_text()
    assert said in page and "/home/ada" not in page
    assert ("whole AAL3 regions at a time" in page) == (mask == {"strategy": "region"})


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ({"pretrained_on_these_shards": True}, "pretrained, without labels, on these same shards, test subjects"),
        ({"pretrained_on_these_shards": False}, "The encoder was pretrained on other shards;"),
        ({}, "scans is not recorded."),
    ],
    ids=["same", "other", "unknown"],
)
def test_whether_the_encoder_met_the_test_subjects_is_said(sweep, tmp_path, recorded, said):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    results = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(results | recorded))
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert said in page
    assert page.count("The encoder was pretrained") == bool(recorded)


def test_what_one_subject_is_worth_follows_the_number_tested(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    results = json.loads((folder / "sweep.json").read_text())
    results["figures"] |= {"n": 2000, "n_positive": 900}
    (folder / "sweep.json").write_text(json.dumps(results))
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "With so few" not in page
    assert "moves the accuracy by 0.1 percentage points" in page


def test_an_undefined_figure_is_a_dash(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    results = json.loads((folder / "sweep.json").read_text())
    results["figures"] |= {"auc": None, "sensitivity": None}
    del results["roc"]
    (folder / "sweep.json").write_text(json.dumps(results))
    assert "<b>–</b>" in write_report([folder], tmp_path / "report.html").read_text()


def test_a_folder_with_nothing_to_show_says_what_was_expected(tmp_path):
    with pytest.raises(ReportError, match="nothing here that a report can show; expected a pretraining run"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ReportError, match="its files cannot be shown") as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert "\n" not in str(caught.value)


def test_the_same_runs_give_the_same_curves(pretraining):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    assert loss_figure(rows) == loss_figure(rows)


def _example(affine, flip):
    """A brain whose left half alone is hidden, stored in either direction."""
    x = np.arange(20)[:, None, None] * 8 - 76.0
    left = np.broadcast_to(x < 0, (20, 24, 12))
    original = np.where(left, 2.0, -2.0).astype(np.float32)
    volumes = [np.flip(v, 0) if flip else v for v in (original, original * 0, left.copy(), left.astype(np.int16))]
    return Example(*volumes, np.array(affine, dtype=float))


def test_a_volume_stored_right_to_left_gives_the_same_picture():
    upright = [[8, 0, 0, -76], [0, 8, 0, -100], [0, 0, 8, -40], [0, 0, 0, 1]]
    mirrored = [[-8, 0, 0, 76], [0, 8, 0, -100], [0, 0, 8, -40], [0, 0, 0, 1]]
    assert slice_rows(_example(upright, flip=False)) == slice_rows(_example(mirrored, flip=True))


def test_the_brains_left_is_on_the_pictures_left():
    import base64
    import io

    import matplotlib.image

    affine = [[8, 0, 0, -76], [0, 8, 0, -100], [0, 0, 8, -40], [0, 0, 0, 1]]
    encoded = slice_rows(_example(affine, flip=False))[0].original.split(",", 1)[1]
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)), format="png")
    height, width, _ = picture.shape
    left, right = picture[height // 2, int(width * 0.3)], picture[height // 2, int(width * 0.7)]
    assert left[0] > left[2], "the hidden left half is red (+2)"
    assert right[2] > right[0], "the right half is blue (−2)"


def test_a_sweep_of_any_task_is_shown_or_refused_in_a_sentence(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    results = json.loads((folder / "sweep.json").read_text())
    trials = [trial | {"validation_top1": 0.5} for trial in results["trials"]]
    told = {"figures": {"top1": 0.4, "n": 10}, "intervals": {"top1": [0.2, 0.6]}, "roc": None, "best": trials[0]}
    (folder / "sweep.json").write_text(json.dumps(results | told | {"trials": trials}))
    assert "top-1" in write_report([folder], tmp_path / "page.html").read_text()
    (folder / "sweep.json").write_text(json.dumps(results | {"figures": {"n": 10}}))
    with pytest.raises(ReportError, match=r"sweep: its files cannot be shown .*none of auc, r2 and top1"):
        write_report([folder], tmp_path / "page.html")
