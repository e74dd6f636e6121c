"""What people were doing, from BIDS events: simulated blocks always, Haxby's real ones where they are at hand."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from boldforge.configs import load_config
from boldforge.data_shards import DataRecipe, brain_mask, build_shards, find_runs, get_grid
from boldforge.finetune import FinetuneConfig, finetune, load_classifier
from boldforge.finetune.errors import FinetuneError, FoldError
from boldforge.finetune.events import REST, Event, EventFiles, find_blocks, frame_conditions, read_events
from boldforge.finetune.folds import group_folds
from boldforge.launch.cli import app
from boldforge.pretrain import ModelConfig

HAXBY = Path(__file__).parents[2] / "../shared/data/local/haxby"
CONDITIONS = ("face", "house", "cat")
TR, FRAMES, DELAY = 2.0, 48, 4.0
SETTINGS = {
    "task": "states",
    "pool": "tokens",
    "clips": 2,
    "adapter": {"rank": 0},
    "training": {"epochs": 30, "patience": 10, "head_lr": 0.002},
}


def _write_bids(folder: Path, people: int, runs: int, strength: float) -> Path:
    """Blocks of 12 s with 4 s between them; every condition lifts its own corner of the brain, 4 s late."""
    grid = get_grid("mni4mm")
    mask = brain_mask(grid)
    place = np.argwhere(mask)
    corners = (place[:, 0] < 20, place[:, 0] > 28, place[:, 1] > 30)
    generator = np.random.default_rng(1)
    for person in range(people):
        for run in range(runs):
            name = f"sub-p{person}_task-objects_run-{run + 1:02d}"
            order = generator.permutation(len(CONDITIONS) * 2) % len(CONDITIONS)
            values_TV = generator.standard_normal((FRAMES, len(place)), dtype=np.float32)
            rows = []
            for number, condition in enumerate(order):
                onset = 16.0 * number
                rows.append((onset, 12.0, CONDITIONS[condition]))
                at = slice(round((onset + DELAY) / TR), round((onset + DELAY + 12) / TR))
                values_TV[at, corners[condition]] += strength
            volume = np.zeros((*grid.shape, FRAMES), dtype=np.float32)
            volume[mask] = values_TV.T
            image = nib.Nifti1Image(volume, grid.affine)
            image.header.set_zooms((4, 4, 4, TR))
            image.header.set_xyzt_units("mm", "sec")
            image.header["descrip"] = "simulated by BoldForge"
            (folder / f"sub-p{person}").mkdir(parents=True, exist_ok=True)
            nib.save(image, folder / f"sub-p{person}" / f"{name}_space-MNI152_bold.nii")
            with (folder / f"sub-p{person}" / f"{name}_events.tsv").open("w") as stream:
                table = csv.writer(stream, delimiter="\t")
                table.writerows([("onset", "duration", "trial_type"), *rows])
    return folder


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Three people with two runs each: the folder and its shards."""
    folder = _write_bids(tmp_path_factory.mktemp("objects"), people=3, runs=2, strength=0.7)
    recipe = DataRecipe(grid="mni4mm", tr=TR, normalisation="residual-z", dtype="int16")
    build_shards(find_runs(folder), folder / "shards", recipe)
    return folder


def _measure(objects, encoder, out, **changes):
    settings = {"shards": objects / "shards", "backbone": encoder, "out": out, "folds": 3, **SETTINGS}
    events = {"folder": objects, "delay": DELAY} | changes.pop("events", {})
    return finetune(load_config(FinetuneConfig, settings | {"events": events} | changes))


def test_conditions_are_told_apart_in_people_never_seen(objects, encoder, tmp_path):
    results = _measure(objects, encoder, tmp_path)
    assert results["rows"] == "blocks" and results["compared_by"] == "accuracy"
    assert results["chance"] == pytest.approx(1 / 3)
    assert results["figures"]["n"] == 36 and results["figures"]["accuracy"] > 0.6
    assert results["permutation"]["p"] < 0.01 and "better than chance in these" in results["verdict"]
    assert results["intervals"] == {} and "3 subjects are too few for an interval" in results["verdict"]
    assert set(results["baselines"]) == {"regions", "image"}
    assert results["measured_by"] == "3-fold cross-validation over subjects"
    assert [row["n"] for row in results["people"]] == [12, 12, 12]
    with (tmp_path / "predictions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert list(rows[0])[:5] == ["subject", "run", "site", "fold", "label"]
    of_person = {row["subject"]: {r["fold"] for r in rows if r["subject"] == row["subject"]} for row in rows}
    assert sorted(of_person) == ["sub-0001", "sub-0002", "sub-0003"]
    assert all(len(folds) == 1 for folds in of_person.values()), "a person is tested in one fold only"
    assert "p0" not in (tmp_path / "predictions.tsv").read_text() + json.dumps(results["people"])
    classifier = load_classifier(encoder, tmp_path / "adapter")
    assert classifier.task.name == "states" and classifier.task.classes == ("cat", "face", "house")


def test_runs_are_left_out_one_after_the_other(objects, encoder, tmp_path):
    results = _measure(objects, encoder, tmp_path, protocol="leave-one-run-out", baselines=[])
    assert [fold["n_test"] for fold in results["folds"]] == [18, 18]
    assert results["measured_by"] == "leave-one-run-out"


def test_rest_is_a_class_where_it_is_asked_for(objects, encoder, tmp_path):
    results = _measure(objects, encoder, tmp_path, events={"rest": "class", "share": 0.4}, baselines=[], folds=2)
    assert set(results["subjects"]["n_per_class"]) == {"cat", "face", "house", "rest"}
    assert results["subjects"]["n_per_class"]["rest"] > 0


def test_without_the_delay_the_blocks_are_told_less_well(objects, encoder, tmp_path):
    """The signal comes late; labels that ignore it fall on frames that do not show it yet."""
    quick = {"training": {"epochs": 8, "head_lr": 0.005}, "baselines": [], "folds": 2}
    late = _measure(objects, encoder, tmp_path / "late", events={"delay": 12.0}, **quick)
    right = _measure(objects, encoder, tmp_path / "right", **quick)
    assert late["figures"]["auc"] < right["figures"]["auc"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"events": {"folder": None}}, "events.folder is not set"),
        ({"events": {"folder": "nowhere"}}, "nowhere: no such folder of events"),
        ({"events": {"column": "stimulus"}}, "has no column 'stimulus'; its columns are onset, duration, trial_type"),
        ({"events": {"rest_names": list(CONDITIONS)}}, "holds 0 conditions, expected 2 to 50"),
        ({"protocol": "leave-one-site-out"}, "does not fit task 'states', whose rows are blocks"),
        ({"folds": 9}, "there are 3 groups of rows that must stay together"),
    ],
)
def test_events_that_do_not_fit_are_a_sentence(objects, encoder, tmp_path, changes, sentence):
    with pytest.raises(FinetuneError, match=sentence):
        _measure(objects, encoder, tmp_path, **changes)


def test_a_task_of_people_has_no_runs_to_leave_out(cohort, encoder, tmp_path):
    settings = {"shards": cohort, "backbone": encoder, "out": tmp_path, "protocol": "leave-one-run-out"}
    with pytest.raises(FoldError, match="does not fit task 'adhd', whose rows are subjects"):
        finetune(load_config(FinetuneConfig, settings))


def test_frames_get_the_condition_that_reaches_them():
    events = [(Event(0.0, 4.0, {}), 0), (Event(6.0, 0.0, {}), 1)]
    assert frame_conditions(events, 8, tr=2.0, first=0.0, delay=2.0).tolist() == [REST, 0, 0, REST, 1, REST, REST, REST]
    assert frame_conditions(events, 4, tr=2.0, first=4.0, delay=2.0).tolist() == [0, REST, 1, REST]


def test_clips_lie_on_their_blocks():
    conditions = np.array([REST] * 3 + [0] * 9 + [REST] * 2 + [1] * 4 + [REST] * 2)
    blocks, mixed = find_blocks(conditions, clip_length=4, share=0.5, rest=False)
    assert [(b.condition, b.start, b.stop, b.clips) for b in blocks] == [(0, 3, 12, (3, 7)), (1, 14, 18, (14,))]
    assert mixed == 0
    blocks, mixed = find_blocks(conditions, clip_length=8, share=0.5, rest=True)
    assert [(b.condition, b.clips) for b in blocks] == [(0, (3,))], "half of the frames is no majority"
    assert mixed == 4
    for block in blocks:
        for at in block.clips:
            inside = conditions[at : at + 8]
            assert (inside == block.condition).sum() > max((inside == other).sum() for other in {-1, 0, 1} - {0})


def test_no_group_is_in_two_parts_of_a_fold():
    generator = np.random.default_rng(0)
    runs = [f"r{number // 8}" for number in range(96)]
    people = [f"p{number // 48}" for number in range(96)]
    labels = [int(label) for _ in range(12) for label in generator.permutation(8)]
    rows = [f"{number:02d}" for number in range(96)]
    of_run, of_person = dict(zip(rows, runs, strict=True)), dict(zip(rows, people, strict=True))
    for groups, n_folds, of in ((runs, 5, of_run), (runs, None, of_run), (people, 2, of_person)):
        folds = group_folds(rows, labels, groups, runs, n_folds, seed=3)
        assert sorted(row for fold in folds for row in fold.test) == rows
        for fold in folds:
            test, rest = {of[row] for row in fold.test}, {of[row] for row in fold.train + fold.validation}
            assert not test & rest and fold.train and fold.validation
            assert not {of_run[row] for row in fold.train} & {of_run[row] for row in fold.validation}


def test_an_events_file_is_found_by_what_its_name_says(objects, tmp_path):
    from boldforge.data_shards import load_manifest

    files = EventFiles(objects)
    runs = load_manifest(objects / "shards").runs
    for run in runs:
        found = files.of(run)
        assert found is not None and f"sub-{run.subject}_" in found.name and f"run-0{run.key[-1]}" in found.name
    (tmp_path / "task-other_events.tsv").write_text("onset\tduration\ttrial_type\n")
    assert EventFiles(tmp_path).of(runs[0]) is None
    (tmp_path / "task-objects_events.tsv").write_text("onset\tduration\ttrial_type\n1\tn/a\tface\nn/a\t1\tcat\n")
    shared = EventFiles(tmp_path).of(runs[0])
    assert shared is not None
    assert [(event.onset, event.duration) for event in read_events(shared, "trial_type")] == [(1.0, 0.0)]
    outside = runs[0].model_copy(update={"phenotype": {"events": "../elsewhere.tsv"}})
    with pytest.raises(FinetuneError, match="no such file in the folder"):
        files.of(outside)


@pytest.mark.slow
@pytest.mark.skipif(not HAXBY.is_dir(), reason="Haxby's data (not part of the repository) are not at hand")
def test_haxby_s_objects_are_told_apart_above_chance(write_encoder, tmp_path):
    """Eight classes of objects, one subject, twelve runs of one slice, a probe on an encoder that was never trained."""
    shape = ModelConfig(
        patch_mm=12, frames=8, embed_dim=24, depths=(1,), decoder_depths=(), d_state=4, mlp_ratio=2.0, backend="torch"
    )
    encoder = write_encoder(0, shape, tr=2.5)
    arguments = ["finetune", "--task", "states", "--data", str(HAXBY), f"backbone={encoder}", f"out={tmp_path / 'out'}"]
    done = CliRunner().invoke(
        app, [*arguments, "folds=4", "training.epochs=10"], env={"COLUMNS": "160"}, catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["figures"]["n"] == 96 and results["simulated"] is False and results["chance"] == 1 / 8
    low, _ = results["intervals"]["accuracy"]
    assert low > 1 / 8 and results["permutation"]["p"] < 0.05
    assert "better than chance" in results["verdict"] and "runs of one subject" not in results["verdict"]
