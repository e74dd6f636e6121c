import os
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray.exceptions import WorkerCrashedError

from boldforge.data_shards import BuildError, DataRecipe, build_shards, find_runs, plan, ray_build
from boldforge.data_shards.ray_session import ray_session
from boldforge.data_shards.tasks import RunTask

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


class Reference:
    def __init__(self, function, task):
        self.function, self.task = function, task


class FewCpus:
    """Stands in for ray on two CPUs: tasks run when they are waited for, and some of them crash."""

    def __init__(self, crash):
        self.crash = crash
        self.in_flight = 0
        self.most_in_flight = 0
        self.beside = []

    def remote(self, **options):
        assert options == {"num_cpus": 1, "max_retries": 0}
        return lambda function: SimpleNamespace(remote=lambda task: self.submit(function, task))

    def submit(self, function, task):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return Reference(function, task)

    def cluster_resources(self):
        return {"CPU": 2.0}

    def wait(self, references, num_returns):
        return [references[-1]], references[:-1]

    def get(self, reference):
        self.in_flight -= 1
        if self.crash(reference.task):
            self.beside.append(self.in_flight)
            raise WorkerCrashedError
        return reference.function(reference.task)


@pytest.fixture
def few_cpus(monkeypatch):
    def start(crash):
        ray = FewCpus(crash)
        monkeypatch.setattr(ray_build, "ray_session", lambda *arguments: nullcontext(ray))
        return ray

    return start


def test_tasks_in_flight_are_bounded_and_change_no_byte(folder, tmp_path, few_cpus):
    ray = few_cpus(lambda task: False)
    build_shards(find_runs(folder), tmp_path / "ray", RECIPE, workers=2)
    build_shards(find_runs(folder), tmp_path / "here", RECIPE)
    assert files(tmp_path / "ray") == files(tmp_path / "here")
    assert ray.most_in_flight == 4


def test_a_crash_is_tried_again_and_the_last_time_alone(folder, tmp_path, few_cpus):
    deadly = find_runs(folder).runs[3]
    ray = few_cpus(lambda task: isinstance(task, RunTask) and task.planned.run.key == deadly.key)
    report = build_shards(find_runs(folder), tmp_path / "out", RECIPE, workers=2)
    assert len(ray.beside) == 3
    assert ray.beside[-1] == 0
    assert report.manifest.n_runs == 5
    assert "ended 3 times" in dict(report.rejected)[deadly.path]


def test_a_single_crash_costs_nothing(folder, tmp_path, few_cpus):
    crashes = iter([True])
    few_cpus(lambda task: next(crashes, False))
    build_shards(find_runs(folder), tmp_path / "ray", RECIPE, workers=2)
    build_shards(find_runs(folder), tmp_path / "here", RECIPE)
    assert files(tmp_path / "ray") == files(tmp_path / "here")


def test_few_runs_do_not_start_ray(folder, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ray_build, "ray_session", lambda *arguments: started.append(arguments))
    runs = find_runs(folder).runs
    few = build_shards(runs[:2], tmp_path / "few", RECIPE, workers=2)
    one = build_shards(runs, tmp_path / "one", RECIPE, workers=1)
    assert not started and (len(few.manifest.runs), len(one.manifest.runs)) == (2, len(runs) - 1)


def test_an_address_without_a_cluster_is_told_in_one_sentence(folder, tmp_path):
    with pytest.raises(BuildError, match=r"Ray could not be reached at 127.0.0.1:1 .*refused"):
        build_shards(find_runs(folder), tmp_path / "out", RECIPE, address="127.0.0.1:1")


def test_a_ray_of_the_users_own_is_left_running_and_the_environment_as_it_was(monkeypatch):
    import ray

    stopped, before = [], dict(os.environ)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(True))
    with pytest.raises(BuildError, match=r"already running in this process; call ray.shutdown\(\) before a build"):
        ray_session(None, 1, BuildError, "a build").__enter__()
    assert not stopped and dict(os.environ) == before
