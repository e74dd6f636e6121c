"""Run a sweep's trials one after the other in this process, without Ray."""

from collections.abc import Iterator
from pathlib import Path

import torch

from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.sweep_rungs import Report, Segment, failed, one_line
from boldforge.finetune.trial import TrialSpec


def run_serially(
    spec: TrialSpec,
    rounds: Iterator[list[Segment]],
    folder: Path,
    on_epoch: Report,
) -> None:
    """Do all rounds of work.

    Parameters
    ----------
    spec
        What the trials have in common.
    rounds
        See `Rounds`.
    folder
        Of the trials.
    on_epoch
        Called with trial id, inner fold and epoch after every epoch of every trial.

    Raises
    ------
    SweepError
        With the failing trial's own message.
    """
    threads = torch.get_num_threads()
    try:
        for segments in rounds:
            for segment in segments:
                try:
                    segment.run(spec, folder, on_epoch)
                except (FinetuneError, OSError, RuntimeError) as error:
                    raise failed(segment.trial, one_line(error)) from error
    finally:
        torch.set_num_threads(threads)
