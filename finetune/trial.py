"""One trial of a sweep: train at one rank and report after every epoch. Knows nothing of Ray."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.backbone import Pool, load_backbone
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.fit import TrainingConfig, fit
from boldforge.finetune.tasks import get_task

Report = Callable[[dict[str, Any], Mapping[str, Tensor] | None], None]


@dataclass(frozen=True)
class TrialSpec:
    """All that a trial needs; what is not in here, such as the test subjects' labels, it cannot know.

    Attributes
    ----------
    clips
        Folder written by `gather_clips`; holds training and validation subjects only.
    train, validation
        Positions of the subjects in that folder's labels.
    device
        ``cuda``, where the trial was given a share of a GPU, or ``cpu``.
    """

    backbone: Path
    pool: Pool
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


def run_trial(spec: TrialSpec, report: Report) -> None:
    """Train one adapter; the curve it reports is a pure function of the spec.

    Parameters
    ----------
    spec
        The trial.
    report
        Called after every epoch with ``epoch``, ``train_loss``, ``validation_loss``, the selection figure, ``improved``
        and the numbers of parameters; and with the weights where the epoch is the best so far, else None.
    """
    torch.set_num_threads(spec.threads)
    task = get_task(spec.task, classes=spec.classes)
    backbone = load_backbone(spec.backbone, spec.pool)
    classifier = Classifier(backbone, task, spec.adapter, spec.seed)
    classifier.to(spec.device)
    clips = ClipSet.load(spec.clips)
    train, validation = clips.select(spec.train), clips.select(spec.validation)
    for epoch in fit(classifier, train, validation, spec.training, spec.training.epochs, spec.seed):
        assert epoch.figures is not None
        figures = {
            "epoch": epoch.number,
            "train_loss": epoch.train_loss,
            "validation_loss": epoch.validation_loss,
            task.selects_by: epoch.figures[task.selects_by],
            "improved": epoch.improved,
            "trainable_parameters": classifier.trainable,
            "total_parameters": classifier.total,
        }
        report(figures, classifier.state() if epoch.improved else None)
