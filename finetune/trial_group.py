"""Some trials of a sweep trained as one batched model, each with the journal and the files that it would have alone.

How trials are grouped changes the last bits of what they compute. So a group that was killed begins again where all of
its trials had arrived, with all of them, and the lines that some had written already come out once more.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from boldforge.finetune.backbone import load_backbone
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.fit import DivergedError, Fit
from boldforge.finetune.lockstep import Lockstep, embed_untrained
from boldforge.finetune.stacked_lora import share_backbone
from boldforge.finetune.sweep_journal import Journal, SweepError
from boldforge.finetune.tasks import get_task
from boldforge.finetune.trial import (
    JOURNAL,
    STATE,
    TrialSpec,
    best_so_far,
    drop_older,
    has_diverged,
    keep_epoch,
    own_folder,
    read_state,
)


@dataclass(frozen=True)
class Member:
    """A trial of a group: its id, what it trains, its own folder, and that of the whole sweep."""

    number: int
    spec: TrialSpec
    folder: Path
    sweep: Path


def run_group(members: Sequence[Member], until: int, report: Callable[[int, int], None]) -> None:
    """Train several trials to an epoch side by side; go on from what their folders hold, to the same bits.

    Parameters
    ----------
    members
        Trials that differ in the adapter, the training's rates or the seed alone, and have come to the same epoch
        (or, where the group was killed, one epoch further).
    until
        Epoch to stop after, counted from 1. A trial that diverges leaves the others before it.
    report
        Called with trial id and epoch after every epoch of every trial.

    Raises
    ------
    SweepError
        If another process does not stop working on one of the trials, or a trial's state is missing or damaged.
    """
    with contextlib.ExitStack() as held:
        journals = []
        for member in members:
            held.enter_context(own_folder(member.folder))
            journals.append(held.enter_context(contextlib.closing(Journal(member.folder / JOURNAL))))
        left = [len(journal.records) for journal in journals if not has_diverged(journal.records)]
        done = min(left, default=until)
        if done >= until:
            return
        torch.set_num_threads(members[0].spec.threads)
        # One that diverged in the epoch that the others have to do again was still among them then.
        there = [place for place, journal in enumerate(journals) if len(journal.records) >= done + left_behind(journal)]
        members, journals = [members[place] for place in there], [journals[place] for place in there]
        fits, lockstep = _begin(members, journals, done)
        _train(members, journals, fits, lockstep, range(done + 1, until + 1), report)


def left_behind(journal: Journal) -> int:
    """How many lines beyond the group's last common epoch a trial must have to take part in the next: 1 if diverged."""
    return int(has_diverged(journal.records))


def _begin(members: Sequence[Member], journals: Sequence[Journal], done: int) -> tuple[list[Fit], Lockstep]:
    """Bring all trials to the same epoch."""
    first = members[0].spec
    backbone = load_backbone(first.backbone, first.pool, first.data)
    backbone.network.to(first.device)
    clips = ClipSet.load(first.clips)
    train, validation = clips.select(first.train), clips.select(first.validation) if first.validation else None
    untrained = None
    if done == 0:
        untrained = embed_untrained(backbone, train, first.adapter.first_stage, first.training.batch_size)
    fits = []
    for member, journal in zip(members, journals, strict=True):
        spec, records = member.spec, journal.records[:done]
        task = get_task(spec.task, classes=spec.classes)
        classifier = Classifier(share_backbone(backbone), task, spec.adapter, spec.seed).to(spec.device)
        state = None
        if done:
            path = member.folder / STATE.format(done)
            state = read_state(path, records[-1]["state"])
            if state is None:
                raise SweepError(
                    f"{path}: is missing or damaged, and its trial trains beside others from there; remove "
                    f"{member.sweep} and run the same command again."
                )
        best = best_so_far(records, task.selects_by) if validation else None
        fits.append(
            Fit(
                classifier,
                train,
                validation,
                spec.training,
                spec.seed,
                state=state,
                done=done,
                best=best,
                embeddings=untrained,
            )
        )
    return fits, Lockstep(backbone, fits)


def _train(
    members: Sequence[Member],
    journals: Sequence[Journal],
    fits: Sequence[Fit],
    lockstep: Lockstep,
    epochs: range,
    report: Callable[[int, int], None],
) -> None:
    trials = list(range(len(members)))
    for number in epochs:
        ended = lockstep.step(trials)
        for trial, epoch in zip(trials, ended, strict=True):
            if len(journals[trial].records) < number:
                member = members[trial]
                keep_epoch(member.folder, journals[trial], fits[trial], epoch, scores=bool(member.spec.inner))
        # The states before this epoch go only when no trial needs to do it again.
        for trial, epoch in zip(trials, ended, strict=True):
            drop_older(members[trial].folder, journals[trial].records)
            if not isinstance(epoch, DivergedError):
                report(members[trial].number, number)
        trials = [trial for trial, epoch in zip(trials, ended, strict=True) if not isinstance(epoch, DivergedError)]
        if not trials:
            return
