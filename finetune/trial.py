"""One trial of a sweep: train epoch by epoch, each kept on disk before the next begins. Knows nothing of Ray."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from boldforge.finetune.fit import DivergedError, Fit, TrainingConfig
from boldforge.finetune.sweep_journal import Journal, SweepError, checksum, read_journal, write_whole
from boldforge.finetune.tasks import get_task

_JOURNAL, _STATE, _BEST = "epochs.jsonl", "state-{:04d}.safetensors", "best-{:04d}.safetensors"
# The process of a driver that was killed ends within moments of it.
_PATIENCE_S = 60.0

Report = Callable[[int], None]


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


def run_trial(spec: TrialSpec, folder: Path, until: int, report: Report) -> None:
    """Train one adapter to an epoch; go on from what the folder holds, to the same bits as in one go.

    A trial whose loss is no longer finite has diverged: that too is recorded, and it trains no further.

    Parameters
    ----------
    spec
        The trial; its curve is a pure function of it.
    folder
        The trial's own. After every epoch a line is added to ``epochs.jsonl``: ``epoch``, ``train_loss``,
        ``validation_loss``, the selection figure, ``improved`` and the numbers of parameters.
    until
        Epoch to stop after, counted from 1.
    report
        Called with the epoch after every epoch.

    Raises
    ------
    SweepError
        If another process does not stop working on this trial.
    """
    with _own(folder):
        journal = Journal(folder / _JOURNAL)
        with contextlib.closing(journal):
            if len(journal.records) >= until or has_diverged(journal.records):
                return
            torch.set_num_threads(spec.threads)
            for figures in _epochs(spec, folder, journal, until):
                report(figures["epoch"])


def read_curve(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return what was recorded of a trial's epochs so far."""
    return tuple(read_journal(folder / _JOURNAL))


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
    state = _read_state(folder / _BEST.format(best["epoch"]), best["best"])
    if state is None:
        raise SweepError(
            f"{folder / _BEST.format(best['epoch'])}: is missing or damaged; remove {folder} and run the same command "
            "again."
        )
    return state


def _epochs(spec: TrialSpec, folder: Path, journal: Journal, until: int) -> Iterator[dict[str, Any]]:
    state = _last_state(folder, journal)
    if state is None and journal.records:
        # The files behind the lines are gone or damaged: the same epochs again give the same lines.
        journal.clear()
    records = journal.records
    best = next((record for record in reversed(records) if record["improved"]), None)
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
        best=(best[task.selects_by], best["validation_loss"]) if best and spec.validation else None,
    )
    sizes = {"trainable_parameters": classifier.trainable, "total_parameters": classifier.total + kept_elsewhere}
    while len(records) < until:
        try:
            epoch = fitting.step()
        except DivergedError as error:
            journal.append({"epoch": len(records) + 1, "diverged": str(error)} | sizes)
            return
        figures = {
            "epoch": epoch.number,
            "train_loss": epoch.train_loss,
            "validation_loss": epoch.validation_loss,
            task.selects_by: None if epoch.figures is None else float(epoch.figures[task.selects_by]),
            "improved": epoch.improved,
            **sizes,
        }
        yield _keep(folder, journal, figures, fitting.state(), classifier.state() if epoch.improved else None)


def _prepare(spec: TrialSpec) -> tuple[Classifier, ClipSet, int]:
    """Return what is trained, what on, and how many parameters of the network need not be here."""
    task = get_task(spec.task, classes=spec.classes)
    if spec.embedded is not None and spec.adapter.frozen:
        clips = spec.embedded.load(*read_labels(spec.clips))
        return head_on_embeddings(task, clips.x.shape[1], spec.seed).to(spec.device), clips, spec.embedded.parameters
    classifier = Classifier(load_backbone(spec.backbone, spec.pool, spec.data), task, spec.adapter, spec.seed)
    return classifier.to(spec.device), ClipSet.load(spec.clips), 0


def _keep(
    folder: Path,
    journal: Journal,
    figures: dict[str, Any],
    state: Mapping[str, Tensor],
    best: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """Files first, then the line that names them: a line never stands for what is not there."""
    number = figures["epoch"]
    sums = {"state": write_whole(folder / _STATE.format(number), safetensors.torch.save(dict(state)))}
    if best is not None:
        sums["best"] = write_whole(folder / _BEST.format(number), safetensors.torch.save(dict(best)))
    record = journal.append(figures | sums)
    for pattern, kept in (("state-*", _STATE), ("best-*", _BEST if best is not None else None)):
        for path in folder.glob(pattern):
            if kept is not None and path.name != kept.format(number):
                path.unlink()
    return record


def _last_state(folder: Path, journal: Journal) -> dict[str, Tensor] | None:
    if not journal.records:
        return None
    last = journal.records[-1]
    best = next(record for record in reversed(journal.records) if record["improved"])
    if _read_state(folder / _BEST.format(best["epoch"]), best["best"]) is None:
        return None
    return _read_state(folder / _STATE.format(last["epoch"]), last["state"])


def _read_state(path: Path, expected: str) -> dict[str, Tensor] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return safetensors.torch.load(content) if checksum(content) == expected else None


@contextlib.contextmanager
def _own(folder: Path) -> Iterator[None]:
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
