import html
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from boldforge.data_shards import DataRecipe, Run, build_shards, get_grid, load_manifest
from boldforge.data_shards.quality import measure_quality
from boldforge.launch import cli, quality
from boldforge.launch.cli import app
from boldforge.launch.quality import chosen_runs, render_quality, write_quality_page
from boldforge.launch.quality_figures import Look, slices

AFFINE = np.diag([14.0, 14.0, 14.0, 1.0])
AFFINE[:3, 3] = (-77, -105, -70)
SECRET_SITES = ("Hospital<i>A</i>", "HospitalB")


@pytest.fixture(scope="module", autouse=True)
def _few_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "MOST_CHOSEN", 2)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve small runs from two sites, one of them shorter and with jumps, and a file that is left out."""
    root = tmp_path_factory.mktemp("study")
    runs = []
    for number in range(12):
        frames = 12 if number == 4 else 30
        values = 1000 + 20 * np.random.default_rng(number).standard_normal((12, 14, 12, frames))
        if number == 4:
            values[..., [3, 8]] += 400
        image = nib.Nifti1Image(values.astype(np.int16), AFFINE)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 2.0
        path = root / f"secret{number:02d}.nii.gz"
        nib.save(image, path)
        runs.append(Run(f"secret{number:02d}", None, SECRET_SITES[number % 2], None, path, task="rest"))
    broken = root / "secret99.nii.gz"
    broken.write_bytes(b"")
    runs.append(Run("secret99", None, SECRET_SITES[0], None, broken, task="rest"))
    return build_shards(runs, root / "study-of-Jones", DataRecipe(grid="mni4mm", tr=2.0)).manifest.folder


@pytest.fixture(scope="module")
def page(shards, tmp_path_factory):
    return write_quality_page(shards, tmp_path_factory.mktemp("page") / "deep" / "quality.html").read_text()


def text_of(page):
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)))


def test_the_page_asks_nothing_of_any_other_place(page):
    references = re.findall(r'(?:src|href|action|data|poster)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import\s+(\S+)', page)
    targets = ["".join(found) for found in references]
    assert [target for target in targets if not target.startswith(("data:image/", "#"))] == []
    assert sum(target.startswith("data:image/png") for target in targets) > 20
    assert "<script" not in page and "<link" not in page
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_no_two_figures_share_an_id(page):
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) > 10 and len(ids) == len(set(ids))


def test_the_page_says_what_the_dataset_holds(page):
    text = text_of(page)
    for found in ("12 runs", "12 subjects", "2 sites", "342 frames, one every 2 s", "0.19 hours", "1 file left out"):
        assert found in text
    assert "Data quality study-of-Jones" in text
    assert "Real recordings." in text
    assert "tSNR , a voxel's mean over time by its standard deviation: not defined here, because residual-z" in text
    assert "The mean image is gone" in text


def test_the_planted_outlier_is_flagged_and_shown_first_with_the_rule(page):
    text = text_of(page)
    assert "robust z lies beyond 3.5 on the bad side" in text
    assert "DVARS lower or higher 5 % of the median" in text
    assert re.search(r"sub-secret04_task-rest Hospital<i>A</i> frames 12 30 -12\.0", text)
    assert "1 runs flagged" in text
    first = re.search(r'<div class="run flagged">\s*<h3>(\S+)', page)
    assert first and first[1] == "sub-secret04_task-rest"
    assert page.count('<div class="run flagged">') == 1


def test_names_are_escaped_and_the_page_says_that_it_holds_them(page):
    assert "<i>A</i>" not in page and "Hospital&lt;i&gt;A" in page
    assert "This page holds identifiers: run keys with subject labels, and names of sites." in text_of(page)


def test_an_anonymous_page_holds_no_label(shards, tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(shards), "--html", str(tmp_path / "q.html"), "--anonymous"])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "q.html").read_text()
    for label in ("secret", "Hospital", "Jones", "sub-"):
        assert label not in page
    assert re.search(r"run 5 site 1 frames 12 30", text_of(page))
    assert "Without labels." in text_of(page)


def test_the_same_dataset_gives_the_same_page(shards, page):
    assert render_quality(measure_quality(load_manifest(shards))) == page


def test_a_large_datasets_page_stays_a_page(shards, monkeypatch):
    measured = measure_quality(load_manifest(shards))
    monkeypatch.setattr(quality, "MOST_CHOSEN", 3)
    assert chosen_runs(measured) == [4, 0, 6, 11]
    for name, most in (("MOST_FLAGGED", 0), ("MOST_FLAGS", 1), ("MOST_SITES", 1), ("MOST_RUNS", 2)):
        monkeypatch.setattr(quality, name, most)
    text = text_of(render_quality(measured))
    assert "3 of 12 runs" in text
    assert f"The 1 furthest of {len(measured.flags)} flags" in text
    assert "The 1 largest of 2 sites." in text
    assert "The first 2 of 12 runs in numbers" in text


def test_the_two_real_runs_are_too_few_to_flag_and_show_their_mean(tmp_path):
    from boldforge.data_shards import find_runs

    recipe = DataRecipe(grid="mni4mm", tr=2.0, normalisation="global-z")
    found = find_runs(Path(__file__).parents[1] / "data")
    text = text_of(render_quality(measure_quality(build_shards(found, tmp_path / "real", recipe).manifest)))
    assert "2 runs are too few to compare: the rule needs 5" in re.sub(r" ?: ?", ": ", text)
    assert "Mean image, average of all runs" in text
    assert "1.16, 2.2" in text, "both TRs"
    assert "cerebellum" in text and "deep grey" in text


def test_without_html_a_folder_of_shards_gives_a_short_table(shards, monkeypatch):
    from boldforge.data_shards import ShardReader

    monkeypatch.setattr(ShardReader, "__init__", None)  # no shard is opened for it
    for path in (shards, shards / "manifest.json"):
        result = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        lines = dict(re.findall(r"^(\S.*?) {2,}(.*?) *$", result.output, flags=re.M))
        assert lines["runs"] == "12 of 12 subjects, 2 sites"
        assert lines["frames"] == "342, 0.19 hours"
        assert lines["source TR (s)"] == "2 (12)"
        assert lines["left out"].startswith("1 file,")
        assert lines["simulated"] == "0 runs"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["SHARDS", "--html", "page.txt"], "page.txt: --html writes a page; give a name that ends in .html"),
        (["SHARDS", "--html", "SHARDS/manifest.json"], "give a name that ends in .html"),
        (["SHARDS", "--html", "folder.html"], "is a folder; give --html the name of a file"),
        (["SHARDS", "--anonymous"], "pass --html OUT.html too"),
        (["SHARDS", "--html", "page.html", "--layout", "bids"], "takes no --layout"),
        (["empty", "--html", "page.html"], "no manifest here; build the shards with"),
        (["nowhere", "--html", "page.html"], "nowhere: no such folder of shards; check the name"),
        (["damaged", "--html", "page.html"], "does not match its checksum"),
        (["SHARDS", "--html", "file/page.html"], "file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(shards, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "folder.html"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    with (damaged / "shard-000000.tar").open("r+b") as file:
        file.seek(load_manifest(damaged).runs[2].offset + 99)
        file.write(b"\x55\x55\x55")
    (tmp_path / "page.html").write_text("the page of last week")
    arguments = [option.replace("SHARDS", str(shards)) for option in options]
    monkeypatch.setattr(sys, "argv", ["boldforge", "inspect", *arguments])
    before = (shards / "manifest.json").read_bytes()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("inspect ", "left)"))]
    assert len(lines) == 1 and said in lines[0]
    assert (tmp_path / "page.html").read_text() == "the page of last week"
    assert (shards / "manifest.json").read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_leaves_the_old_page(shards, tmp_path, monkeypatch):
    (tmp_path / "q.html").write_text("old")

    def full(path, data):
        path.with_name(f".{path.name}.partial").write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quality, "write_atomic", full)
    monkeypatch.setattr(quality, "render_quality", lambda *arguments: "a page")
    with pytest.raises(OSError, match="No space left"):
        write_quality_page(shards, tmp_path / "q.html")
    assert [path.name for path in tmp_path.iterdir()] == ["q.html"]
    assert (tmp_path / "q.html").read_text() == "old"


@pytest.mark.parametrize("name", ["mni4mm", "neurostorm"])
def test_the_brains_left_is_on_the_pictures_left_and_the_front_on_top(name):
    grid = get_grid(name)
    mask = np.zeros(grid.shape, dtype=bool)
    centre = np.argwhere(np.ones(grid.shape, dtype=bool)) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
    mask[(np.abs(centre) < 30).all(axis=1).reshape(grid.shape)] = True
    x, y, z = centre[mask.ravel()].T
    # Bright: left and front, in the lower half of the brain alone.
    values = np.where((x < 0) & (y > 0) & (z < 0), 1.0, 0.0)
    drawn = slices(values, mask, mask, grid, 4, Look("gray", (0.0, 1.0)))
    heights = [picture.z_mm for picture in drawn]
    assert heights == sorted(heights) and heights[0] < -15 < 15 < heights[-1]
    low, high = drawn[0].rgba, drawn[-1].rgba
    rows, columns, _ = low.shape
    bright = low[..., 0] > 128
    assert bright[: rows // 2, : columns // 2].mean() > 0.7
    assert not bright[rows // 2 + 3 :].any() and not bright[:, columns // 2 + 3 :].any()
    assert (high[..., 0] < 128).all() and low[0, 0, 3] == 0
