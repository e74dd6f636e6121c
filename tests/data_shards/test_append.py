import pytest

from boldforge.data_shards import (
    DataRecipe,
    ShardError,
    ShardReader,
    append_shards,
    build_shards,
    find_runs,
    load_manifest,
    plan,
    tasks,
)
from boldforge.data_shards.verify import verify_shards

RECIPE = DataRecipe(grid="mni4mm", tr=2.0, dtype="int8")


def name(subject):
    return f"data/sub-{subject}_task-rest_space-MNI152_bold.nii.gz"


@pytest.fixture
def dataset(write_bold, tmp_path, monkeypatch):
    """Three runs in two shards, and a folder to which more can be added."""
    monkeypatch.setattr(plan, "SHARD_RUNS", 2)
    paths = [write_bold(name(f"{i:02d}"), seed=i) for i in (1, 3, 5)]
    build_shards(find_runs(paths[0].parent), tmp_path / "out", RECIPE)
    return tmp_path / "out"


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_new_runs_go_into_new_shards_and_old_ones_are_not_touched(dataset, write_bold):
    before, old = {path: path.stat() for path in dataset.glob("*.tar")}, load_manifest(dataset)
    for i in (0, 2, 4):
        path = write_bold(name(f"{i:02d}"), seed=i)
    path.write_bytes(b"")
    report = append_shards(find_runs(path.parent), dataset)
    assert (report.added, report.known, len(report.rejected)) == (2, 3, 1)
    new = load_manifest(dataset)
    assert new == report.manifest
    assert [run.subject for run in new.runs] == ["01", "03", "05", "00", "02"]
    assert tuple(new.runs[:3]) == tuple(old.runs)
    assert new.recipe == old.recipe
    assert new.content_hash != old.content_hash
    for path, state in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (state.st_ino, state.st_mtime_ns)
    assert verify_shards(dataset) == ()
    assert [ShardReader(new).read(i, 0, 12).q.shape[0] for i in range(5)] == [12] * 5
    assert "sub-04" in (dataset / "rejected.tsv").read_text()
    assert {path.name for path in dataset.iterdir()} == {
        *(shard.file for shard in new.shards),
        *(table.file for table in new.tables.values()),
        *("manifest.json", "mask.npy", "rejected.tsv"),
    }


def test_appended_runs_are_what_a_build_would_have_stored(dataset, write_bold, tmp_path):
    path = write_bold(name("07"), seed=7)
    appended = append_shards(find_runs(path.parent), dataset).manifest
    built = build_shards(find_runs(path.parent), tmp_path / "other", RECIPE).manifest
    one = {run.key: ShardReader(appended).read(i, 0, 12) for i, run in enumerate(appended.runs)}
    two = {run.key: ShardReader(built).read(i, 0, 12) for i, run in enumerate(built.runs)}
    assert one.keys() == two.keys()
    for key, clip in one.items():
        assert all((a == b).all() for a, b in zip(clip, two[key], strict=True))


def test_nothing_new_changes_nothing(dataset, tmp_path):
    before = contents(dataset)
    report = append_shards(find_runs(tmp_path / "data"), dataset)
    assert (report.added, report.known) == (0, 3)
    assert contents(dataset) == before
    assert not list(dataset.glob(".*"))


def test_new_runs_that_cannot_be_used_are_listed_and_the_dataset_stays_as_it_was(dataset, write_bold):
    before = contents(dataset)
    path = write_bold(name("09"))
    path.write_bytes(b"")
    for _ in range(2):
        report = append_shards(find_runs(path.parent), dataset)
        assert (report.added, report.known, len(report.rejected)) == (0, 3, 1)
    after = contents(dataset)
    assert (
        after.pop("rejected.tsv")
        == f"path\treason\n{path}\t{report.rejected[0].reason.removeprefix(f'{path}: ')}\n".encode()
    )
    before.pop("rejected.tsv")
    assert after == before


def test_stored_splits_stay_for_the_subjects_that_were_there(dataset, write_bold):
    from boldforge.data_shards import SplitPlan, split_runs, store_splits

    plan = SplitPlan(fractions={"test": 0.5}, seed=1)
    old = store_splits(dataset, plan)
    members = {name: {old.runs[s.run].subject for s in split_runs(old, name)} for name in plan.names}
    for i in range(10, 20):
        path = write_bold(name(str(i)), seed=i)
    new = append_shards(find_runs(path.parent), dataset).manifest
    for split, subjects in members.items():
        assert {new.runs[s.run].subject for s in split_runs(new, split)} & {"01", "03", "05"} == subjects


@pytest.mark.parametrize("at", ["shard-000003.tar", "index", "manifest.json"])
def test_an_append_that_is_killed_while_it_publishes_keeps_the_old_dataset_and_goes_on(
    dataset, write_bold, monkeypatch, at
):
    from pathlib import Path

    old = load_manifest(dataset)
    for i in (0, 2, 4):
        path = write_bold(name(f"{i:02d}"), seed=i)
    found = find_runs(path.parent)
    replace_file = Path.replace

    def replace_until_killed(path, target):
        if Path(target).parent == dataset and Path(target).name.startswith(at):
            raise KeyboardInterrupt
        return replace_file(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_until_killed)
        append_shards(found, dataset)
    assert load_manifest(dataset) == old
    assert ShardReader(load_manifest(dataset)).read(2, 0, 12).q.any()

    def not_again(run, recipe):
        raise AssertionError("the runs were finished before")

    monkeypatch.setattr(tasks, "store_run", not_again)
    assert append_shards(found, dataset).manifest.n_runs == 6
    assert verify_shards(dataset) == ()
    assert not list(dataset.glob(".*"))


def test_there_must_be_a_dataset(tmp_path, write_bold):
    found = find_runs(write_bold(name("01")).parent)
    with pytest.raises(ShardError, match="no such folder of shards"):
        append_shards(found, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_recording_of_a_known_name_is_named_and_not_taken_for_the_known_one(write_bold, tmp_path):
    def table(subject, path):
        (tmp_path / "runs.tsv").write_text(f"path\tsubject\n{path.name}\t{subject}\n")
        return find_runs(tmp_path / "runs.tsv")

    first, other = write_bold("a_bold.nii.gz", seed=1), write_bold("b_bold.nii.gz", seed=2)
    build_shards(table("01", first), tmp_path / "out", RECIPE)
    report = append_shards(table("0-1", other), tmp_path / "out")  # a key has no dashes
    assert (report.added, report.known) == (0, 0)
    assert "is taken by another run" in report.rejected[0].reason
    assert other.name in (tmp_path / "out" / "rejected.tsv").read_text()
    assert append_shards(table("01", first), tmp_path / "out").known == 1
