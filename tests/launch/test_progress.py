import io

import pytest
from rich.console import Console

from boldforge.launch.progress import progress


def _lines(console):
    return console.file.getvalue().splitlines()


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_off_a_terminal_there_is_a_line_per_tenth_with_rate_and_time_left(quiet):
    with progress("shard", "runs", quiet) as on_progress:
        for done in range(101):
            on_progress(done, 100)
    lines = _lines(quiet)
    assert lines[0] == "shard: started"
    assert [line.split(" % ")[0] for line in lines[1:-1]] == [f"shard: {percent}" for percent in range(10, 100, 10)]
    assert "runs/s" in lines[5]
    assert "s left" in lines[5]
    assert lines[-1].startswith("shard: done, 100 runs in ")
    assert not any("\x1b" in line for line in lines)


def test_work_that_failed_is_not_called_done(quiet):
    with pytest.raises(OSError), progress("shard", "runs", quiet) as on_progress:
        on_progress(1, 2)
        raise OSError
    assert not any("done" in line for line in _lines(quiet))


def test_what_was_done_before_a_resume_does_not_count_as_speed(quiet, monkeypatch):
    clock = iter([0.0, 60.0, 60.5, 61.0])
    monkeypatch.setattr("boldforge.launch.progress.time.monotonic", lambda: next(clock))
    with progress("pretrain", "steps", quiet) as on_progress:
        on_progress(89, 100)
        on_progress(90, 100)
    resumed, later = _lines(quiet)[1:3]
    assert resumed == "pretrain: 89 % (89/100 steps)", "one report gives no rate"
    assert later == "pretrain: 90 % (90/100 steps, 2 steps/s, 5 s left)"


def test_the_rate_is_the_last_tenth_s_so_that_quick_reading_promises_nothing(quiet, monkeypatch):
    clock = iter([0.0, *(0.001 * n for n in range(21)), *(float(n) for n in range(1, 12)), 99.0])
    monkeypatch.setattr("boldforge.launch.progress.time.monotonic", lambda: next(clock))
    with progress("finetune", "clips", quiet) as on_progress:
        for done in range(32):
            on_progress(done, 100)
    lines = _lines(quiet)
    assert "20/100 clips, 1e+03 clips/s, 0 s left" in lines[2]
    assert lines[3] == "finetune: 30 % (30/100 clips, 1 clips/s, 70 s left)"


def test_the_last_line_counts_the_steps_of_this_start_alone(quiet):
    with progress("pretrain", "steps", quiet, before=80) as on_progress:
        for done in range(81, 101):
            on_progress(done, 100)
    assert _lines(quiet)[-1].startswith("pretrain: done, 20 steps in ")


def test_on_a_terminal_a_resumed_run_has_no_rate_before_its_first_new_step():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress("pretrain", "steps", console) as on_progress:
        on_progress(5_000_000, 10_000_000)
    assert "5000000/10000000" in console.file.getvalue()
    assert "steps/s" not in console.file.getvalue()


@pytest.mark.parametrize("calls", [[], [(0, 0)], [(3, 3), (3, 3)]])
def test_no_work_repeated_calls_and_an_empty_total_are_fine(quiet, calls):
    with progress("x", "runs", quiet) as on_progress:
        for call in calls:
            on_progress(*call)
    assert _lines(quiet)[-1].startswith("x: done")


def test_a_terminal_gets_a_bar_with_count_and_rate():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress("shard", "runs", console) as on_progress:
        on_progress(1, 4)
        on_progress(4, 4)
    shown = console.file.getvalue()
    assert "4/4" in shown
    assert "━" in shown
