import os
from dataclasses import replace

import pytest

from boldforge.data_shards import DataRecipe, build_shards, find_runs, plan

RECIPE = DataRecipe(grid="mni4mm", tr=2.0)


@pytest.fixture
def folder(write_bold):
    """Seven runs, one of them bad."""
    paths = [write_bold(f"data/sub-{i:02d}_task-rest_space-MNI152_bold.nii.gz", seed=i) for i in range(7)]
    paths[2].write_bytes(paths[2].read_bytes()[:-2000])
    return paths[0].parent


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_byte(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_RUNS", 3)
    one = build_shards(find_runs(folder), tmp_path / "one", RECIPE)
    two = build_shards(find_runs(folder), tmp_path / "two", RECIPE, workers=2)
    assert len(one.manifest.shards) == 3
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert one.manifest.content_hash == two.manifest.content_hash


class KillsItsReader(str):
    """Ends the process that unpickles it, as the kernel does when memory runs out."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_a_run_that_kills_its_worker_is_tried_again_then_rejected(folder, tmp_path):
    found = find_runs(folder)
    deadly = replace(found.runs[3], phenotype={"x": KillsItsReader("x")})
    runs = [deadly if run.key == deadly.key else run for run in found.runs]
    report = build_shards(runs, tmp_path / "out", RECIPE, workers=2)
    assert [run.subject for run in report.manifest.runs] == ["00", "01", "04", "05", "06"]
    (reason,) = (reason for path, reason in report.rejected if path == deadly.path)
    assert "ended 3 times (killed, most likely because memory ran out)" in reason
