"""Adapt a pretrained encoder to a question about people, and measure it on subjects it has not seen.

A backbone gives one vector per clip, an adapter (LoRA) changes it, a task reads it; folds keep subjects apart.
"""

from boldforge.finetune.adapters import (
    AdapterConfig,
    AdapterError,
    AdapterInfo,
    adapter_state,
    attach_adapter,
    merge_adapter,
    unmerge_adapter,
)
from boldforge.finetune.attribution_results import same_model
from boldforge.finetune.attribution_study import AttributionConfig, attribute_regions
from boldforge.finetune.backbone import Backbone, NeuroStormBackbone, load_backbone
from boldforge.finetune.classifier import (
    ADAPTER_FILES,
    Classifier,
    load_adapter,
    load_classifier,
    read_task,
    save_adapter,
)
from boldforge.finetune.cross_validation import FinetuneConfig, finetune
from boldforge.finetune.errors import FinetuneError, FoldError
from boldforge.finetune.fit import TrainingConfig
from boldforge.finetune.folds import Fold, subject_folds
from boldforge.finetune.metrics import binary_metrics, roc_points
from boldforge.finetune.nested_sweep import sweep
from boldforge.finetune.rank_sweep import SweepConfig
from boldforge.finetune.sweep_journal import SweepError
from boldforge.finetune.tasks import AdhdDiagnosis, Task, get_task

__all__ = [
    "Backbone",
    "NeuroStormBackbone",
    "load_backbone",
    "AdapterConfig",
    "AdapterInfo",
    "AdapterError",
    "attach_adapter",
    "adapter_state",
    "merge_adapter",
    "unmerge_adapter",
    "Classifier",
    "ADAPTER_FILES",
    "save_adapter",
    "load_adapter",
    "load_classifier",
    "read_task",
    "Task",
    "AdhdDiagnosis",
    "get_task",
    "Fold",
    "subject_folds",
    "binary_metrics",
    "roc_points",
    "TrainingConfig",
    "FinetuneConfig",
    "finetune",
    "SweepConfig",
    "sweep",
    "AttributionConfig",
    "attribute_regions",
    "same_model",
    "FinetuneError",
    "FoldError",
    "SweepError",
]
