import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from boldforge.data_shards import DataRecipe, Run, build_shards, find_runs, load_manifest, plan, tasks
from boldforge.data_shards.verify import verify_shards

RECIPE = DataRecipe(grid="mni4mm", tr=2.0)

# One process imports everything once; each attempt is a fork of it that is killed after a random while.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from boldforge.data_shards import DataRecipe, append_shards, brain_mask, build_shards, find_runs, get_grid, plan

data, root, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
plan.SHARD_RUNS = 3
recipe = DataRecipe(grid="mni4mm", tr=2.0)
brain_mask(get_grid("mni4mm"))
found = find_runs(data)


def attempt(out, append, seen):
    if append:
        append_shards(found, out, on_progress=seen)
    else:
        build_shards(found, out, recipe, on_progress=seen)


def killed(out, append, after):
    pid = os.fork()
    if pid == 0:
        attempt(out, append, None)
        os._exit(0)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


began = time.perf_counter()
attempt(root / "whole", False, None)
took = time.perf_counter() - began
draw = random.Random(7)
hit = kept = 0
for name in ("build", "append"):
    out = root / name
    if name == "append":
        build_shards(found.runs[:2], out, recipe)
        build_shards(found.runs[:2], root / "appended", recipe)
        append_shards(found, root / "appended")
    for _ in range(kills):
        if name == "build" and (out / "manifest.json").exists():
            break
        hit += killed(out, name == "append", draw.uniform(0, 0.6 * took))
        kept += any((out / ".building").rglob("*.json"))
    if not (name == "build" and (out / "manifest.json").exists()):
        attempt(out, name == "append", None)
print(json.dumps({"hit": hit, "kept": kept}))
"""


@pytest.fixture
def data(write_bold):
    """Nine runs, one of them bad."""
    paths = [write_bold(f"data/sub-{i:02d}_task-rest_space-MNI152_bold.nii.gz", seed=i) for i in range(9)]
    paths[4].write_bytes(paths[4].read_bytes()[:-2000])
    return paths[0].parent


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(data, tmp_path):
    root = tmp_path / "sets"
    root.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(data), str(root), "12"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["hit"] >= 2
    assert counts["kept"] >= 1
    assert files(root / "build") == files(root / "whole")
    assert files(root / "append") == files(root / "appended")
    assert verify_shards(root / "append") == ()
    assert not [path for path in root.rglob("*") if path.name.startswith(".")]


def test_finished_runs_are_not_read_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_RUNS", 3)
    found = find_runs(data)
    store, read = tasks.store_run, []

    def until_the_sixth(run, *rest):
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(run.key)
        return store(run, *rest)

    monkeypatch.setattr(tasks, "store_run", until_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        build_shards(found, tmp_path / "out", RECIPE)
    before = list(read)
    seen = []
    monkeypatch.setattr(tasks, "store_run", lambda run, *rest: read.append(run.key) or store(run, *rest))
    build_shards(found, tmp_path / "out", RECIPE, on_progress=lambda *state: seen.append(state))
    # The bad run has left nothing, so it alone is read twice.
    assert sorted(read[len(before) :]) == sorted({run.key for run in found.runs} - set(before) | {found.runs[4].key})
    assert seen[0] == (4, 9)


def test_a_changed_source_or_recipe_is_read_again(data, tmp_path, monkeypatch):
    found = find_runs(data)
    store = tasks.store_run
    stopped = {"at": 3}

    def interrupted(run, *rest):
        if stopped["at"] == 0:
            raise KeyboardInterrupt
        stopped["at"] -= 1
        return store(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tasks, "store_run", interrupted)
        build_shards(found, tmp_path / "out", RECIPE)
    path = found.runs[1].path
    os.utime(path, ns=(1, 1))
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "store_run", lambda run, *rest: read.append(run.path) or store(run, *rest))
        build_shards(found, tmp_path / "out", RECIPE)
    assert path in read
    assert found.runs[0].path not in read


def test_a_fragment_that_never_reached_the_disk_is_written_again(data, tmp_path, monkeypatch):
    found = find_runs(data)
    build_shards(found, tmp_path / "whole", RECIPE)
    join = tasks.join_fragments

    def powerless(path, fragments):
        monkeypatch.setattr(tasks, "join_fragments", join)
        with fragments[2].path.open("r+b") as file:
            file.seek(5000)
            file.write(bytes(4096))
        return join(path, fragments)

    monkeypatch.setattr(tasks, "join_fragments", powerless)
    build_shards(found, tmp_path / "out", RECIPE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert load_manifest(tmp_path / "out").n_runs == 8


def test_a_finished_shard_that_lost_its_end_is_written_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_RUNS", 3)
    found = find_runs(data)
    build_shards(found, tmp_path / "whole", RECIPE)
    replace_file = Path.replace

    def until_the_manifest(path, target):
        if Path(target).name == "manifest.json" and Path(target).parent.name == ".building":
            raise KeyboardInterrupt
        return replace_file(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", until_the_manifest)
        build_shards(found, tmp_path / "out", RECIPE)
    shard = tmp_path / "out/.building/shard-000001.tar"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 4096)
    build_shards(found, tmp_path / "out", RECIPE)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_other_voxels_beside_the_same_header_make_another_fingerprint(write_bold, tmp_path):
    image = nib.load(write_bold())
    nib.Nifti1Pair(np.asarray(image.dataobj), image.affine, image.header).to_filename(tmp_path / "pair.hdr")

    def fingerprint():
        run = Run("01", None, None, 2.0, tmp_path / "pair.hdr")
        return plan.plan_shards([run], DataRecipe(grid="mni4mm"), 100)[0][0].runs[0].fingerprint

    before, voxels = fingerprint(), tmp_path / "pair.img"
    assert fingerprint() == before
    voxels.write_bytes(voxels.read_bytes()[::-1])
    os.utime(voxels, (1, 1))
    assert fingerprint() != before
