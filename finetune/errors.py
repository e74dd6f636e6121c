"""Mistakes in a fine-tuning's inputs that a user can mend."""

from boldforge.configs import BoldForgeError


class FinetuneError(BoldForgeError):
    """The data, the backbone, an adapter folder or a search do not fit together."""


class FoldError(FinetuneError):
    """Too few subjects, or contradicting labels, for subject-disjoint folds."""
