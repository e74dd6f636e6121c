"""Progress of long work: a bar with rate and time left on a terminal, a few quiet lines everywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

OnProgress = Callable[[int, int], None]


class _RateColumn(ProgressColumn):
    """Items per second over the last seconds."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {self.unit}/s" if speed else "", style="dim")


@contextmanager
def progress(title: str, unit: str, console: Console | None = None, before: int = 0) -> Iterator[OnProgress]:
    """Show how far a piece of work is.

    Parameters
    ----------
    title
        What is being done, e.g. ``"shard"``.
    unit
        Plural name of what is counted, e.g. ``"runs"``.
    console
        Where to write; the default is standard error, so that standard output stays clean for results.
    before
        How much of it was done before, by a run that was stopped: shown as done, counted in no rate.

    Yields
    ------
    A callback ``(done, total)`` for the working function's ``on_progress``.
    """
    console = console or Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        with _bar(title, unit, console) as on_progress:
            yield on_progress
    else:
        with _lines(title, unit, console, before) as on_progress:
            yield on_progress


@contextmanager
def _bar(title: str, unit: str, console: Console) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        known = False

        def on_progress(done: int, total: int) -> None:
            nonlocal known
            if not known:  # what the first report brings may have been done before a resume: the rate counts from there
                bar.reset(task, completed=done, total=total)
                known = True
            bar.update(task, completed=done, total=total)

        yield on_progress


@contextmanager
def _lines(title: str, unit: str, console: Console, before: int) -> Iterator[OnProgress]:
    began = time.monotonic()
    last_tenth, last_done = 0, 0
    # The rate is that of the last tenth: reading, compiling and training go at paces of their own. What the first
    # report brings may have been done before a resume, so the first tenth counts from there.
    mark: tuple[float, int] | None = None

    def on_progress(done: int, total: int) -> None:
        nonlocal last_tenth, last_done, mark
        now = time.monotonic()
        since, begun = mark = mark or (now, done)
        last_done = done
        tenth = 10 * done // max(total, 1)
        if tenth <= last_tenth:
            return
        last_tenth, mark = tenth, (now, done)
        if done < total:
            speed = ""
            if done > begun:
                rate = (done - begun) / max(now - since, 1e-9)
                speed = f", {rate:.3g} {unit}/s, {(total - done) / rate:.0f} s left"
            console.print(f"{title}: {100 * done // total} % ({done}/{total} {unit}{speed})", markup=False)

    console.print(f"{title}: started", markup=False)
    yield on_progress
    count = f"{last_done - before} {unit} in " if last_done > before else ""
    console.print(f"{title}: done, {count}{time.monotonic() - began:.1f} s", markup=False)
