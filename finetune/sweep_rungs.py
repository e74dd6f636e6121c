"""Successive halving at synchronous rungs: who trains how far, decided by epochs and trial ids, never by the clock."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from boldforge.finetune.merged_curves import merge_curves
from boldforge.finetune.sweep_journal import Journal, SweepError
from boldforge.finetune.sweep_space import OF_TRAINING
from boldforge.finetune.trial import TrialSpec, has_diverged, read_curve, run_trial
from boldforge.finetune.trial_group import Member, run_group

logger = logging.getLogger(__name__)
# Trial id, inner fold, epoch.
Report = Callable[[int, int, int], None]
Curve = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Trial:
    """One point of the search space; ``number`` is its id."""

    number: int
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """The point in words, as in ``rank 4, lr 0.001``."""
        parts = ((k, "+".join(v) if isinstance(v, list) else f"{v:g}") for k, v in self.values.items())
        return ", ".join(f"{name} {value}" for name, value in parts)

    def folder(self, above: Path, inner: int = 0) -> Path:
        """Where the trial keeps its epochs, or those of an inner fold, counted from 1."""
        own = above / f"{self.number:04d}"
        return own / str(inner) if inner else own

    def spec(self, spec: TrialSpec) -> TrialSpec:
        """Return the trial that trains at this point."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in self.values.items()}
        training = {name: values.pop(name) for name in OF_TRAINING & values.keys()}
        return replace(
            spec,
            adapter=spec.adapter.model_copy(update=values),
            training=spec.training.model_copy(update=training),
        )


@dataclass(frozen=True)
class Segment:
    """A piece of work: train a trial up to an epoch.

    ``anew``: the chosen trial, from its beginning, on training and validation subjects together. ``beside``: trials
    that train together with it as one batched model. ``inner``: the inner fold, counted from 1; 0 where there is a
    single split.
    """

    trial: Trial
    until: int
    anew: bool = False
    beside: tuple[Trial, ...] = ()
    inner: int = 0

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials that the work is on."""
        return (self.trial, *self.beside)

    def run(self, spec: TrialSpec, folder: Path, report: Report) -> None:
        """Do the work; `folder` is the one of all trials, `report` is called with trial id, inner fold and epoch."""
        spec = spec.anew() if self.anew else spec.in_fold(self.inner)
        if self.beside:
            members = [
                Member(trial.number, trial.spec(spec), place, folder.parent)
                for trial, place in zip(self.trials, self.folders(folder), strict=True)
            ]
            run_group(members, self.until, lambda number, epoch: report(number, self.inner, epoch))
            return
        (place,) = self.folders(folder)
        run_trial(self.trial.spec(spec), place, self.until, lambda epoch: report(self.trial.number, self.inner, epoch))

    def folders(self, above: Path) -> list[Path]:
        """Where the work on each of its trials is kept."""
        return [above / "chosen" if self.anew else trial.folder(above, self.inner) for trial in self.trials]

    def curves(self, above: Path) -> list[Curve]:
        """Return what each of its trials has recorded of this work."""
        return [read_curve(folder) for folder in self.folders(above)]


@dataclass(frozen=True)
class Halving:
    """Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943), the rule that ASHA follows without waiting.

    After ``grace``, ``grace · reduction``, ``grace · reduction²``, … epochs, when all trials of a batch that are still
    in it have come that far, the best 1/reduction of them (rounded up) go on. Compared is the best figure so far; a tie
    goes to the lower trial id.
    """

    figure: str
    epochs: int
    grace: int
    reduction: int

    def rungs(self) -> list[int]:
        """Epochs at which trials are compared; the last epoch is none of them."""
        rungs, epoch = [], self.grace
        while epoch < self.epochs:
            rungs.append(epoch)
            epoch *= self.reduction
        return rungs

    def decide(self, standing: Sequence[tuple[int, float | None]]) -> dict[str, list[Any]]:
        """Say who stays and who stops; a figure of None is a trial that has diverged.

        Returns
        -------
        dict
            ``standing`` as given, sorted by trial id; ``stays`` and ``stops``: trial ids, sorted.
        """
        ordered = sorted(standing)
        order = sorted(((-figure, trial) for trial, figure in ordered if figure is not None))
        places = -(-len(ordered) // self.reduction)
        stays = sorted(trial for _, trial in order[:places])
        return {
            "standing": [list(entry) for entry in ordered],
            "stays": stays,
            "stops": [trial for trial, _ in ordered if trial not in stays],
        }


Propose = Callable[[int, list[tuple[dict[str, Any], float | None]]], list[dict[str, Any]]]


class Rounds:
    """The sweep's course as rounds of work; what is on disk already is not asked for again.

    Parameters
    ----------
    halving
        Who goes on.
    propose
        Called with the batch's number and all points so far with their best figures; returns the points of that batch,
        none to end.
    journal
        Proposals and decisions are recorded here before anything follows from them.
    folder
        Of the trials.
    together
        How many trials train as one batched model; see `batched`.
    inner
        Numbers of the inner folds in which every trial trains; what follows from a trial follows from the mean.
    """

    def __init__(
        self,
        halving: Halving,
        propose: Propose,
        journal: Journal,
        folder: Path,
        together: int = 1,
        inner: Sequence[int] = (0,),
    ) -> None:
        self.trials: list[Trial] = []
        self._together, self._inner = together, tuple(inner)
        self._halving, self._propose, self._journal, self._folder = halving, propose, journal, folder

    def __iter__(self) -> Iterator[list[Segment]]:
        """Yield the segments of a round, sorted by trial id and inner fold.

        All of them must be done before the next round is asked for, also where another inner fold of a trial diverged:
        else what is recorded would depend on which came first.
        """
        batch = 0
        while trials := self._batch(batch):
            alive = {trial.number: trial for trial in trials}
            for epoch in [*self._halving.rungs(), self._halving.epochs]:
                work = batched(list(alive.values()), epoch, self._together, self._inner)
                segments = [each for each in work if not self._there(each)]
                if segments:
                    yield segments
                if epoch == self._halving.epochs:
                    break
                standing = [(number, self.best(trial)) for number, trial in alive.items()]
                stays = self._decide(batch, epoch, standing)
                alive = {number: alive[number] for number in stays}
            batch += 1

    def curve(self, trial: Trial) -> Curve:
        """Return what the trial has recorded, see `merge_curves`."""
        curves = [read_curve(trial.folder(self._folder, inner)) for inner in self._inner]
        return merge_curves(curves, self._halving.figure)

    def best(self, trial: Trial) -> float | None:
        """Return the best figure so far; None if the trial has diverged."""
        curve = self.curve(trial)
        return None if has_diverged(curve) else max(epoch[self._halving.figure] for epoch in curve)

    def _batch(self, batch: int) -> list[Trial]:
        def work() -> dict[str, Any]:
            seen = [(trial.values, self.best(trial)) for trial in self.trials]
            return {"points": self._propose(batch, seen)}

        points = self._journal.once({"propose": batch}, work)["points"]
        first = len(self.trials)
        trials = [Trial(first + place, values) for place, values in enumerate(points)]
        self.trials += trials
        return trials

    def _decide(self, batch: int, epoch: int, standing: list[tuple[int, float | None]]) -> list[int]:
        decided = self._journal.once({"decide": batch, "epoch": epoch}, lambda: self._halving.decide(standing))
        stopped = [number for number in decided["stops"] if number in dict(standing)]
        logger.info("after epoch %d trials %s go on, %s stop", epoch, decided["stays"], stopped)
        return decided["stays"]

    def _there(self, work: Segment) -> bool:
        return all(len(curve) >= work.until or has_diverged(curve) for curve in work.curves(self._folder))


def batched(trials: Sequence[Trial], until: int, together: int, inner: Sequence[int] = (0,)) -> list[Segment]:
    """Put neighbouring trials into groups of at most so many, which train as one batched model in every inner fold.

    A head alone (rank 0) trains by itself. The groups depend on the trials alone, never on what is done already.
    """
    alone = [(trial,) for trial in trials if together == 1 or trial.values["rank"] == 0]
    rest = [trial for trial in trials if together > 1 and trial.values["rank"] > 0]
    groups = [*alone, *(tuple(rest[first : first + together]) for first in range(0, len(rest), together))]
    segments = [Segment(first, until, beside=tuple(others), inner=part) for first, *others in groups for part in inner]
    return sorted(segments, key=lambda segment: (segment.trial.number, segment.inner))


def failed(trial: Trial, message: str) -> SweepError:
    """Say which trial failed, and why."""
    return SweepError(f"The trial at {trial.name} failed: {message}")


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
