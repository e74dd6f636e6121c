"""A scan is read once: whoever it is said to be of, however its file was written, whatever the task."""

import csv
import gzip
import itertools
import shutil

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boldforge.configs import load_config
from boldforge.data_shards import DataRecipe, Run, build_shards, load_manifest
from boldforge.finetune import AdhdDiagnosis, FinetuneConfig, FinetuneError, finetune
from boldforge.finetune.cohort import find_cohort
from boldforge.finetune.events import EventsConfig
from boldforge.finetune.images import ImagesConfig, ImageTable
from boldforge.finetune.same_scans import find_same_scans
from boldforge.finetune.tasks import open_rows

FRAMES, CLIP, PEOPLE = 24, 4, 6
AFFINE = np.array([[16.0, 0, 0, -96], [0, 16, 0, -128], [0, 0, 16, -84], [0, 0, 0, 1]])


def _volume(seed, frames=FRAMES):
    return np.random.default_rng(seed).standard_normal((13, 15, 13, frames), dtype=np.float32)


def _save(path, values):
    image = nib.Nifti1Image(values, AFFINE)
    image.header.set_zooms((16, 16, 16, 2))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def _twice_the_scale(path, copy):
    _save(copy, 2 * nib.load(path).get_fdata(dtype=np.float32))


COPIES = {
    "byte for byte": ("nii", shutil.copyfile),
    "compressed": ("nii.gz", lambda path, copy: copy.write_bytes(gzip.compress(path.read_bytes(), 1))),
    "on another scale": ("nii", _twice_the_scale),
}


@pytest.fixture(scope="module", params=list(COPIES))
def twins(request, tmp_path_factory):
    """Two sessions of six people; p5's first is p0's, too, and p1 has a third that is the first once more."""
    folder = tmp_path_factory.mktemp("twins")
    ending, copy = COPIES[request.param]
    runs = []
    for person in range(PEOPLE):
        for session in ("1", "2", "3") if person == 1 else ("1", "2"):
            path = folder / f"{person}-{session}.nii"
            source = {(5, "1"): "0-1.nii", (1, "3"): "1-1.nii"}.get((person, session))
            if source is None:
                _save(path, _volume([person, int(session)]))
            else:
                path = path.with_suffix(f".{ending}")
                copy(folder / source, path)
            phenotype = {"diagnosis": float(person % 2), "events": "events.tsv"}
            site = "NYU" if (person, session) == (2, "2") else "KKI"
            runs.append(Run(f"p{person}", session, site, 2.0, path, phenotype=phenotype, task="view", simulated=True))
    (folder / "events.tsv").write_text("onset\tduration\ttrial_type\n0\t16\tface\n20\t16\thouse\n")
    (folder / "images.tsv").write_text("image\te0\te1\nface\t1\t0\nhouse\t0\t1\n")
    build_shards(runs, folder / "shards", DataRecipe(grid="mni4mm", tr=2.0, normalisation="residual-z"), workers=1)
    return folder


@pytest.mark.parametrize("task", ["adhd", "states", "retrieval", "reidentify"])
def test_no_task_reads_a_scan_twice(twins, task, caplog):
    manifest = load_manifest(twins / "shards")
    events = EventsConfig(folder=twins, embeddings=twins / "images.tsv")
    opened = open_rows(task, manifest, events, CLIP)
    cohort = find_cohort(manifest, AdhdDiagnosis(), CLIP) if opened is None else opened[1]
    people = {row.person for row in cohort.subjects}
    assert people == {"p0", "p1", "p2", "p3", "p4"} and cohort.n_duplicates == 1
    read = {position for row in cohort.subjects for position in row.runs}
    assert {manifest.runs[position].key for position in read if manifest.runs[position].subject == "p1"} == {
        "sub-p1_ses-1_task-view",
        "sub-p1_ses-2_task-view",
    }
    assert cohort.n_repeated == 1 and cohort.n_unlabelled == cohort.n_too_short == 0
    assert "1 subject whose scan is also another subject's" in caplog.text
    assert "1 recording whose scan the same subject has under another name" in caplog.text


def test_a_subject_with_two_sites_is_counted_and_leaves_no_site_out(twins, encoder, tmp_path, caplog):
    cohort = find_cohort(load_manifest(twins / "shards"), AdhdDiagnosis(), CLIP)
    assert [(row.name, row.site, row.sites) for row in cohort.subjects][2] == ("p2", "KKI", ("KKI", "NYU"))
    assert cohort.n_several_sites == 1 and "the site of the first run counts: 1 subject" in caplog.text
    settings = {"shards": twins / "shards", "backbone": encoder, "out": tmp_path / "out", "folds": 2}
    with pytest.raises(FinetuneError, match=r"needs every subject's site.*but 1 was scanned at several; set protocol"):
        finetune(load_config(FinetuneConfig, settings | {"protocol": "leave-one-site-out"}))
    assert not (tmp_path / "out").exists()


def test_names_that_share_scans_through_a_third_are_one_person():
    found = find_same_scans(["a", "b", "c", "c", "d"], range(5), [("x",), ("y",), ("x",), ("y",), ("z",)])
    assert found.people == {"b", "c"} and not found.recordings
    found = find_same_scans(["a"] * 4, ["1", "1", "2", "3"], [("x", "s"), ("y", "s"), ("y", "t"), ("t",)])
    assert found.recordings == {2, 3}, "parts of one recording are no copies of each other"


def test_of_two_names_for_one_scan_the_labelled_one_is_kept():
    scans = [("x",), ("x",), ("y",), ("y",), ("y",)]
    found = find_same_scans(["a", "b", "c", "d", "e"], range(5), scans, [False, True, False, True, True])
    assert found.people == {"a", "c", "e"}
    recordings = ["1", "2", "3", "3", "4"]
    found = find_same_scans(
        ["a"] * 5, recordings, [("x",), ("x",), ("y",), ("z",), ("z",)], [False, True] * 2 + [False]
    )
    assert found.recordings == {0, 4}


_SCANS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3), st.booleans()), max_size=10)


@given(_SCANS)
def test_of_every_scan_one_is_kept_and_a_labelled_one_where_there_is_one(scans):
    owners, marks, labelled = ([scan[i] for scan in scans] for i in range(3))
    found = find_same_scans(owners, range(len(scans)), [(mark,) for mark in marks], labelled)
    kept = [i for i in range(len(scans)) if owners[i] not in found.people and i not in found.recordings]
    assert len({marks[i] for i in kept}) == len(kept)
    with_label = {owner for owner, known in zip(owners, labelled, strict=True) if known}
    assert all(
        not labelled[i] or any(labelled[j] for j in kept if marks[j] == marks[i])
        for i in range(len(scans))
        if owners[i] not in found.people
    )
    # Whoever was left out shares scans, over others perhaps, with somebody who was kept and has a label if they have.
    linked = {owner: {owner} for owner in owners}
    for _ in owners:
        for i, j in itertools.product(range(len(scans)), repeat=2):
            if marks[i] == marks[j]:
                linked[owners[i]] |= linked[owners[j]]
    for name in found.people:
        (stays,) = linked[name] - found.people
        assert stays in with_label or not linked[name] & with_label


def test_a_cohort_keeps_the_labelled_of_two_copies(tmp_path):
    """a and b, of whom only b has a diagnosis, have one scan; c has one twice, labelled the second time only."""
    _save(tmp_path / "x.nii", _volume(0))
    _save(tmp_path / "y.nii", _volume(1))
    given = [("a", "1", "x", None), ("b", "1", "x", 1.0), ("c", "1", "y", None), ("c", "2", "y", 0.0)]
    runs = [
        Run(name, session, "KKI", 2.0, tmp_path / f"{scan}.nii", phenotype={"diagnosis": label}, simulated=True)
        for name, session, scan, label in given
    ]
    build_shards(runs, tmp_path / "shards", DataRecipe(grid="mni4mm", tr=2.0, normalisation="residual-z"), workers=1)
    manifest = load_manifest(tmp_path / "shards")
    cohort = find_cohort(manifest, AdhdDiagnosis(), CLIP)
    kept = {(row.name, row.label, tuple(manifest.runs[i].session for i in row.runs)) for row in cohort.subjects}
    assert kept == {("b", 1.0, ("1",)), ("c", 0.0, ("2",))}
    assert (cohort.n_duplicates, cohort.n_repeated, cohort.n_unlabelled) == (1, 1, 0)


def test_an_image_is_known_again_when_it_was_compressed_stored_otherwise_or_turned(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2, (5, 6, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "a.nii")
    nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image(values.astype(np.int16)[..., None], AFFINE), tmp_path / "c.nii")
    turned = AFFINE @ np.array([[-1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values[::-1], turned), tmp_path / "d.nii")
    nib.save(nib.Nifti1Image(values[::-1], AFFINE), tmp_path / "mirrored.nii")
    nib.save(nib.Nifti1Image(values, AFFINE + np.eye(4)), tmp_path / "elsewhere.nii")
    files = ("a.nii", "b.nii.gz", "c.nii", "d.nii", "mirrored.nii", "elsewhere.nii", "mirrored.nii")
    rows = [(name, f"s{min(number, 5)}", "KKI", number % 2) for number, name in enumerate(files)]
    rows[6] = ("mirrored.nii", "s4", "NYU", 0)
    with (tmp_path / "table.tsv").open("w") as stream:
        csv.writer(stream, delimiter="\t").writerows([("path", "subject", "site", "diagnosis"), *rows])
    config = load_config(ImagesConfig, {"table": tmp_path / "table.tsv", "cube": {"kind": "fa"}})
    cohort = ImageTable(config).find_cohort(AdhdDiagnosis())
    assert [(row.name, row.runs) for row in cohort.subjects] == [("s0", (0,)), ("s4", (4,)), ("s5", (5,))]
    assert (cohort.n_duplicates, cohort.n_repeated) == (3, 1)
