"""ADHD against typically developing controls."""

from boldforge.finetune.tasks.columns import TwoClasses


class AdhdDiagnosis(TwoClasses):
    """Tell subjects with ADHD (1) from typically developing controls (0), by the phenotype column ``diagnosis``."""

    def __init__(self) -> None:
        super().__init__("adhd", "diagnosis", (0, 1), ("control", "ADHD"))
