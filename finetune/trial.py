"""One trial of a sweep: train epoch by epoch, each kept on disk before the next begins. Knows nothing of Ray."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from boldforge.configs import FolderInUseError, folder_lock
from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.backbone import Pool, load_backbone
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.embedded import EmbeddedClips, head_on_embeddings, read_labels
from boldforge.finetune.fit import DivergedError, Epoch, Fit, TrainingConfig
from boldforge.finetune.sweep_journal import Journal, SweepError, checksum, read_journal, write_whole
from boldforge.finetune.tasks import get_task

JOURNAL, STATE, BEST = "epochs.jsonl", "state-{:04d}.safetensors", "best-{:04d}.safetensors"
# The process of a driver that was killed ends within moments of it.
_PATIENCE_S = 60.0

Report = Callable[[int], None]


@dataclass(frozen=True)
class Split:
    """Positions of the subjects that train and of those that validate."""

    train: tuple[int, ...]
    validation: tuple[int, ...]


@dataclass(frozen=True)
class TrialSpec:
    """All that a trial needs; what is not in here, such as the test subjects' labels, it cannot know.

    Attributes
    ----------
    data
        What `boldforge.finetune.networks.shard_data` gave.
    clips
        Folder written by `gather_clips`; holds training and validation subjects only.
    train, validation
        Positions of the subjects in that folder's labels; without validation subjects every epoch is the best so far.
    device
        ``cuda``, where the trial was given a share of a GPU, or ``cpu``.
    embedded
        Embeddings of the clips, for a trial that trains a head alone; None where it computes them itself.
    inner
        Where a trial trains once in each of several inner folds: their splits, of which `train` and `validation` are
        the first. Its epochs then keep the validation subjects' scores.
    """

    backbone: Path
    pool: Pool
    data: Mapping[str, Any]
    task: str
    classes: tuple[str, ...]
    clips: Path
    train: tuple[int, ...]
    validation: tuple[int, ...]
    adapter: AdapterConfig
    training: TrainingConfig
    seed: int
    threads: int
    device: str
    embedded: EmbeddedClips | None = None
    inner: tuple[Split, ...] = ()

    @property
    def inner_numbers(self) -> tuple[int, ...]:
        """Numbers of the inner folds, from 1; a single split is number 0."""
        return tuple(range(1, len(self.inner) + 1)) or (0,)

    def in_fold(self, number: int) -> "TrialSpec":
        """Return the trial in one of its inner folds."""
        if number == 0:
            return self
        split = self.inner[number - 1]
        return replace(self, train=split.train, validation=split.validation)

    def anew(self) -> "TrialSpec":
        """Return the trial on all that it may see: training and validation subjects together."""
        return replace(self, train=(*self.train, *self.validation), validation=(), inner=())


def run_trial(spec: TrialSpec, folder: Path, until: int, report: Report) -> None:
    """Train one adapter to an epoch; go on from what the folder holds, to the same bits as in one go.

    A trial whose loss is no longer finite has diverged: that too is recorded, and it trains no further.

    Parameters
    ----------
    spec
        The trial; its curve is a pure function of it.
    folder
        The trial's own. After every epoch a line is added to ``epochs.jsonl``: ``epoch``, ``train_loss``,
        ``validation_loss``, the selection figure, ``improved`` and the numbers of parameters; in an inner fold also
        the validation subjects' ``scores`` where there are two classes.
    until
        Epoch to stop after, counted from 1.
    report
        Called with the epoch after every epoch.

    Raises
    ------
    SweepError
        If another process does not stop working on this trial.
    """
    with own_folder(folder):
        journal = Journal(folder / JOURNAL)
        with contextlib.closing(journal):
            if len(journal.records) >= until or has_diverged(journal.records):
                return
            torch.set_num_threads(spec.threads)
            for figures in _epochs(spec, folder, journal, until):
                report(figures["epoch"])


def read_curve(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return what was recorded of a trial's epochs so far."""
    return tuple(read_journal(folder / JOURNAL))


def has_diverged(curve: list[dict[str, Any]] | tuple[dict[str, Any], ...]) -> bool:
    """Whether a trial ended because its loss was no longer finite."""
    return bool(curve) and "diverged" in curve[-1]


def read_best(folder: Path, curve: tuple[dict[str, Any], ...]) -> dict[str, Tensor]:
    """Return adapter and head as they were after the trial's best epoch.

    Raises
    ------
    SweepError
        If the file is missing or damaged.
    """
    best = next(record for record in reversed(curve) if record.get("improved"))
    state = read_state(folder / BEST.format(best["epoch"]), best["best"])
    if state is None:
        raise SweepError(
            f"{folder / BEST.format(best['epoch'])}: is missing or damaged; remove {folder} and run the same command "
            "again."
        )
    return state


def _epochs(spec: TrialSpec, folder: Path, journal: Journal, until: int) -> Iterator[dict[str, Any]]:
    state = _last_state(folder, journal)
    if state is None and journal.records:
        # The files behind the lines are gone or damaged: the same epochs again give the same lines.
        journal.clear()
    records = journal.records
    classifier, clips, kept_elsewhere = _prepare(spec)
    task = classifier.task
    fitting = Fit(
        classifier,
        clips.select(spec.train),
        clips.select(spec.validation) if spec.validation else None,
        spec.training,
        spec.seed,
        state=state,
        done=len(records),
        best=best_so_far(records, task.selects_by) if spec.validation else None,
    )
    while len(records) < until:
        try:
            epoch: Epoch | DivergedError = fitting.step()
        except DivergedError as error:
            epoch = error
        record = keep_epoch(folder, journal, fitting, epoch, kept_elsewhere, scores=bool(spec.inner))
        if has_diverged(records):
            return
        drop_older(folder, records)
        yield record


def _prepare(spec: TrialSpec) -> tuple[Classifier, ClipSet, int]:
    """Return what is trained, what on, and how many parameters of the network need not be here."""
    task = get_task(spec.task, classes=spec.classes)
    if spec.embedded is not None and spec.adapter.frozen:
        clips = spec.embedded.load(*read_labels(spec.clips))
        return head_on_embeddings(task, clips.x.shape[1], spec.seed).to(spec.device), clips, spec.embedded.parameters
    classifier = Classifier(load_backbone(spec.backbone, spec.pool, spec.data), task, spec.adapter, spec.seed)
    return classifier.to(spec.device), ClipSet.load(spec.clips), 0


def best_so_far(records: Sequence[dict[str, Any]], figure: str) -> tuple[float, float] | None:
    """Return the selection figure and the validation loss of the best of these epochs; None where there is none."""
    best = next((record for record in reversed(records) if record["improved"]), None)
    return None if best is None else (best[figure], best["validation_loss"])


def keep_epoch(
    folder: Path,
    journal: Journal,
    fitting: Fit,
    epoch: Epoch | DivergedError,
    kept_elsewhere: int = 0,
    scores: bool = False,
) -> dict[str, Any]:
    """Put an epoch on the disk and return its line, if asked with the scores of which a threshold is made.

    Files first, then the line that names them: a line never stands for what is not there.
    """
    classifier = fitting.classifier
    sizes = {"trainable_parameters": classifier.trainable, "total_parameters": classifier.total + kept_elsewhere}
    if isinstance(epoch, DivergedError):
        return journal.append({"epoch": len(journal.records) + 1, "diverged": str(epoch)} | sizes)
    figure = classifier.task.selects_by
    figures = {
        "epoch": epoch.number,
        "train_loss": epoch.train_loss,
        "validation_loss": epoch.validation_loss,
        figure: None if epoch.figures is None else float(epoch.figures[figure]),
        "improved": epoch.improved,
    }
    if scores and epoch.scores is not None and classifier.task.kind == "binary":
        figures["scores"] = epoch.scores.tolist()
    sums = {"state": write_whole(folder / STATE.format(epoch.number), safetensors.torch.save(fitting.state()))}
    if epoch.improved:
        sums["best"] = write_whole(folder / BEST.format(epoch.number), safetensors.torch.save(classifier.state()))
    return journal.append(figures | sizes | sums)


def drop_older(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Remove the files that no epoch to come and no reader needs."""
    trained = [record for record in records if "diverged" not in record]
    if not trained:
        return
    best = next(record for record in reversed(trained) if record["improved"])
    for pattern, kept in (("state-*", STATE.format(trained[-1]["epoch"])), ("best-*", BEST.format(best["epoch"]))):
        for path in folder.glob(pattern):
            if path.name != kept:
                path.unlink()


def _last_state(folder: Path, journal: Journal) -> dict[str, Tensor] | None:
    if not journal.records:
        return None
    last = journal.records[-1]
    best = next(record for record in reversed(journal.records) if record["improved"])
    if read_state(folder / BEST.format(best["epoch"]), best["best"]) is None:
        return None
    return read_state(folder / STATE.format(last["epoch"]), last["state"])


def read_state(path: Path, expected: str) -> dict[str, Tensor] | None:
    """Return the tensors of a file with this checksum; None where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return safetensors.torch.load(content) if checksum(content) == expected else None


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Hold the trial's folder; the worker of a driver that was killed may still be letting go of it."""
    deadline = time.monotonic() + _PATIENCE_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder_lock(folder, "training this trial"))
                break
            except FolderInUseError as error:
                if time.monotonic() > deadline:
                    raise SweepError(str(error)) from None
                time.sleep(0.1)
        yield
