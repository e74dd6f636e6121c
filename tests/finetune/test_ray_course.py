"""What Ray's trials are given to do and what becomes of those that die: the course of a sweep, without Ray."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from boldforge.configs import load_config
from boldforge.data_shards.ray_session import session_folder
from boldforge.finetune import SweepConfig, ray_driver
from boldforge.finetune.ray_driver import _Course
from boldforge.finetune.ray_processes import RayProcesses
from boldforge.finetune.sweep_journal import Journal, SweepError
from boldforge.finetune.sweep_rungs import Segment, Trial
from boldforge.launch import cli, training


def _segments(*numbers, until=1):
    return [Segment(Trial(number, {"rank": number}), until) for number in numbers]


def _course(tmp_path, first, *rest):
    return _Course(first, iter(rest), tmp_path)


def _die_twice_an_epoch(course, journal, watched):
    """Let Ray die twice in each of three epochs, which is as often as it may."""
    for epoch in range(3):
        for _ in range(2):
            course.watch()
            course.take("a")
            watched[-1].ended = True
            course.put_back()
        journal.append({"epoch": epoch + 1})


def test_the_next_round_starts_when_all_of_this_one_are_done(tmp_path):
    course = _course(tmp_path, _segments(0, 1), _segments(1, until=2))
    first, second = course.take("a"), course.take("b")
    assert [first.trial.number, second.trial.number] == [0, 1]
    assert course.take("c") is None and not course.finished
    course.done("b", {}, error=False)
    assert course.take("c") is None
    course.done("a", {}, error=False)
    third = course.take("c")
    assert (third.trial.number, third.until) == (1, 2)
    course.done("c", None, error=False)
    assert course.finished and course.error is None


def test_a_worker_that_dies_is_replaced_until_it_gets_nowhere(tmp_path):
    course = _course(tmp_path, _segments(0, until=9))
    journal = Journal(tmp_path / "0000" / "epochs.jsonl")
    tune_id = 0
    # Two deaths in each of five epochs: the trial goes on every time.
    for epoch in range(5):
        for _ in range(2):
            assert course.take(str(tune_id)).trial.number == 0
            course.done(str(tune_id), None, error=True)
            tune_id += 1
        journal.append({"epoch": epoch + 1})
    assert course.error is None
    for _ in range(3):
        assert not course.finished
        course.take(str(tune_id))
        course.done(str(tune_id), None, error=True)
        tune_id += 1
    journal.close()
    assert course.finished and "was killed 3 times in the same epoch" in str(course.error)


def test_deaths_in_different_inner_folds_are_counted_apart(tmp_path):
    trial = Trial(0, {"rank": 0})
    course = _course(tmp_path, [Segment(trial, 9, inner=1), Segment(trial, 9, inner=2)])
    for death in range(4):
        assert course.take(str(death)).inner == 1 + death % 2
        course.done(str(death), None, error=True)
    assert course.error is None
    course.take("last")
    course.done("last", None, error=True)
    assert "was killed 3 times in the same epoch" in str(course.error)


def test_epochs_of_inner_folds_count_when_ray_itself_dies(tmp_path, watched):
    course = _course(tmp_path, [Segment(Trial(0, {"rank": 0}), 9, inner=2)])
    journal = Journal(tmp_path / "0000" / "2" / "epochs.jsonl")
    _die_twice_an_epoch(course, journal, watched)
    journal.close()
    assert course.error is None and not course.finished


def test_a_trial_that_fails_ends_the_course_with_its_message(tmp_path):
    course = _course(tmp_path, _segments(0, 1), _segments(2))
    course.take("a"), course.take("b")
    course.done("a", {"failed": "no such file"}, error=False)
    assert course.finished and str(course.error) == "The trial at rank 0 failed: no such file"
    course.done("b", {}, error=False)
    assert course.take("c") is None


class _Watched:
    """Stands for `RayProcesses`: says that Ray has ended when told to."""

    ended = False


@pytest.fixture
def watched(monkeypatch):
    made = []

    def watch():
        made.append(_Watched())
        return made[-1]

    monkeypatch.setattr(ray_driver, "RayProcesses", watch)
    return made


def test_when_ray_itself_dies_its_work_is_put_back_and_what_tune_then_says_is_not_believed(tmp_path, watched):
    course = _course(tmp_path, _segments(0, 1, 2), _segments(2, until=2))
    course.watch()
    course.take("a"), course.take("b")
    watched[-1].ended = True
    # Tune calls the one done and the other failed; neither is.
    course.done("a", {}, error=False)
    course.done("b", None, error=True)
    course.put_back()
    course.watch()
    assert not course.finished and course.error is None
    assert [course.take(name).trial.number for name in "cde"] == [0, 1, 2]
    for name in "cde":
        course.done(name, {}, error=False)
    assert course.take("f").until == 2
    course.put_back()
    assert course.take("g") is None, "Ray is alive, nothing is put back"


def test_a_ray_that_dies_again_and_again_in_the_same_epoch_ends_the_course(tmp_path, watched):
    course = _course(tmp_path, _segments(0, until=9))
    journal = Journal(tmp_path / "0000" / "epochs.jsonl")
    _die_twice_an_epoch(course, journal, watched)
    for _ in range(3):
        assert not course.finished
        course.watch()
        course.take("a")
        watched[-1].ended = True
        course.put_back()
    journal.close()
    assert "Ray's own processes died 3 times in the same epoch" in str(course.error) and course.finished


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are read from /proc")
def test_ray_has_ended_when_a_child_of_that_name_is_gone_or_waits_to_be_reaped(tmp_path):
    raylet = tmp_path / "raylet"
    raylet.symlink_to("/bin/sleep")
    with subprocess.Popen([raylet, "60"]) as process:
        watch = RayProcesses()
        assert not watch.ended and not RayProcesses().ended
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert watch.ended, "dead, and not reaped yet"
    assert watch.ended and not RayProcesses().ended


def test_a_damaged_journal_met_between_rounds_ends_the_course(tmp_path):
    def rounds():
        yield from ()
        raise SweepError("journal.jsonl: line 2 of 3 is damaged")

    course = _Course(_segments(0), rounds(), tmp_path)
    course.take("a")
    course.done("a", {}, error=False)
    assert course.finished and "line 2 of 3" in str(course.error)


def test_the_files_that_a_killed_sweep_left_for_ray_are_removed(tmp_path, monkeypatch):
    above = tmp_path / "tmp"
    above.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(above))
    record = tmp_path / ".ray-session"
    left = above / "bf-left"
    (left / "session").mkdir(parents=True)
    record.write_text(str(left))
    with session_folder(record) as session:
        assert not left.exists() and Path(session).is_dir() and record.read_text() == session
    assert list(above.iterdir()) == [] and not record.exists()


@pytest.mark.parametrize("name", ["elsewhere/bf-mine", "tmp/other", "tmp/bf-link"])
def test_no_other_folder_is_removed_whatever_the_record_says(tmp_path, monkeypatch, name):
    above, other = tmp_path / "tmp", tmp_path / name
    above.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(above))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    other.parent.mkdir(exist_ok=True)
    if name.endswith("link"):
        other.symlink_to(precious)
    else:
        precious.rename(other)
    record = tmp_path / ".ray-session"
    record.write_text(str(other))
    with session_folder(record):
        assert [path.name for path in other.iterdir()] == ["file"]


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://10.0.0.1:10001", "1:1"])
def test_the_command_line_s_address_reaches_the_recipe_as_it_was_given(monkeypatch, address):
    seen = []
    monkeypatch.setattr(training, "sweep_and_print", lambda recipe, overrides, console: seen.append(overrides))
    cli.sweep(address=address)
    cli.sweep()
    assert load_config(SweepConfig, "sweep/demo.yaml", seen[0]).address == address
    assert load_config(SweepConfig, "sweep/demo.yaml", seen[1]).address is None
