"""Subject-disjoint folds, stratified by diagnosis × site."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from boldforge.configs import count_of
from boldforge.finetune.errors import FoldError


@dataclass(frozen=True)
class Fold:
    """Three disjoint sets of subjects; together they are all subjects. Each is sorted by name.

    ``parts``: the parts into which those not tested were dealt, the validation subjects first; none where whole runs or
    people were dealt.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...] = ()


def subject_folds(
    subjects: Sequence[str],
    labels: Sequence[int],
    sites: Sequence[str | None],
    n_folds: int,
    seed: int,
    classes: Sequence[str] = (),
) -> list[Fold]:
    """Split subjects into folds, each subject tested exactly once.

    Subjects are shuffled inside every diagnosis × site stratum, the strata are laid end to end with those of one
    diagnosis together, and the row is dealt to the folds like cards. So the number of subjects in any two test sets
    differs by at most one, and so do their numbers per diagnosis and per stratum, however small a stratum is. The
    validation subjects are dealt in the same way from those not tested; there are as many as in a test set, or fewer
    parts when a class is too small for that. `inner_folds` lets further parts validate.

    Parameters
    ----------
    subjects
        One name per row (a run, a session or a subject); rows of one subject stay together.
    labels
        Class of each row, a whole number.
    sites
        Site of each row, None where unknown (unknown is a stratum of its own).
    n_folds
        Number of folds, at least 2.
    seed
        Decides the shuffle.
    classes
        What the labels mean, for messages.

    Returns
    -------
    list of Fold
        Train, validation and test hold every class in every fold.

    Raises
    ------
    FoldError
        If a subject's rows disagree on its label, or a class has too few subjects.
    """
    if not len(subjects) == len(labels) == len(sites):
        raise ValueError(f"{len(subjects)} subjects, {len(labels)} labels and {len(sites)} sites differ in length")
    if n_folds < 2:
        raise FoldError(f"folds is {n_folds}, expected 2 or more; one fold would leave nothing to train on.")
    strata = _stratum_of_each(subjects, labels, sites)
    generator = np.random.default_rng([seed, n_folds])
    parts = _deal(strata, list(strata), n_folds, generator)
    _check_enough(strata, n_folds, classes)
    return [
        _fold(strata, set(test), n_folds, np.random.default_rng([seed, n_folds, i])) for i, test in enumerate(parts)
    ]


def inner_folds(fold: Fold, count: int) -> list[Fold]:
    """Split those who are not tested several times: each of their first parts in turn validates, the others train.

    Parameters
    ----------
    fold
        Dealt by `subject_folds` or `site_folds`.
    count
        Number of inner folds. Nobody validates twice and, with as many as there are parts, everybody once.

    Returns
    -------
    list of Fold
        The first is the fold itself. Train and validation hold every class in every one.

    Raises
    ------
    FoldError
        If there are fewer parts, for lack of subjects of a class.
    """
    if count == 1:
        return [fold]
    if count > len(fold.parts):
        raise FoldError(
            f"inner_folds is {count}, but those who are not tested are dealt into {len(fold.parts)} parts, for every "
            f"part needs a subject of every class; set inner_folds to {max(len(fold.parts), 1)} or less, or add "
            "subjects of the smallest class."
        )
    return [
        replace(
            fold,
            train=tuple(sorted(name for part in (*fold.parts[:i], *fold.parts[i + 1 :]) for name in part)),
            validation=fold.parts[i],
        )
        for i in range(count)
    ]


def site_folds(
    subjects: Sequence[str],
    labels: Sequence[int],
    sites: Sequence[str | None],
    n_folds: int,
    seed: int,
    classes: Sequence[str] = (),
) -> list[Fold]:
    """Leave one site out at a time: every site is the test set once, and no model has seen a subject of it.

    Parameters
    ----------
    subjects, labels, sites
        As in `subject_folds`; every site must be known.
    n_folds
        The validation subjects are one part of this many of the subjects of the other sites.
    seed
        Decides which.
    classes
        What the labels mean, for messages.

    Returns
    -------
    list of Fold
        Sites by name. Train and validation hold every class; a test set holds what its site has.

    Raises
    ------
    FoldError
        If a subject has no site, or two; if there are fewer than two sites; or if the other sites have too few
        subjects of a class.
    """
    strata = _stratum_of_each(subjects, labels, sites)
    homes = {(subject, site) for subject, site in zip(subjects, sites, strict=True)}
    unknown = sum(site is None for _, site in homes)
    several = sum(count > 1 for count in Counter(subject for subject, _ in homes).values())
    names = sorted({site for _, site in homes if site is not None})
    if unknown or len(names) < 2 or several:
        found = (
            f"{unknown} {'subject has' if unknown == 1 else 'subjects have'} none"
            if unknown
            else f"there is only {', '.join(names)}"
            if len(names) < 2
            else f"{several} {'was' if several == 1 else 'were'} scanned at several"
        )
        raise FoldError(
            f"leave-one-site-out needs every subject's site, and two sites at least, but {found}; set protocol to "
            "folds, or correct the phenotype table and shard again."
        )
    folds = []
    for number, name in enumerate(names):
        test = {subject for subject, (_, site) in strata.items() if site == name}
        others = Counter(label for subject, (label, _) in strata.items() if subject not in test)
        few = [label for label in sorted({label for label, _ in strata.values()}) if others[label] < 2]
        if few:
            raise FoldError(
                f"without site {name} there {_count(others[few[0]])} of {_called(few[0], classes)}, too few to train "
                "and to validate; set protocol to folds."
            )
        folds.append(_fold(strata, test, max(n_folds, 2), np.random.default_rng([seed, n_folds, number, 1])))
    return folds


def group_folds(
    rows: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str],
    runs: Sequence[str],
    n_folds: int | None,
    seed: int,
    every_class: bool = True,
    classes: Sequence[str] = (),
) -> list[Fold]:
    """Split rows into folds that share no group: no person, or within one person no run.

    Parameters
    ----------
    rows, labels
        Names and classes, one per row.
    groups
        What must not be in two parts: a person, a run.
    runs
        The run of each row. The validation rows are whole groups too, or, where only one group is left to train on,
        whole runs of it.
    n_folds
        Number of folds; None leaves one group out at a time.
    seed
        Decides who is dealt where.
    every_class
        Whether every label must occur among a fold's training rows.
    classes
        What the labels mean, for messages.

    Raises
    ------
    FoldError
        If there are fewer groups than folds, or a class would be missing among the training rows.
    """
    names = sorted(set(groups))
    count = len(names) if n_folds is None else n_folds
    if len(names) < max(count, 2):
        raise FoldError(
            f"there are {len(names)} groups of rows that must stay together (people, or runs of one person), too few "
            f"for {max(count, 2)} folds; set folds to {max(len(names), 2)} or less, or add runs."
        )
    shuffled = [names[i] for i in np.random.default_rng([seed, count, 2]).permutation(len(names))]
    folds = []
    for number in range(count):
        test = set(shuffled[number::count])
        rest = [group for group in shuffled if group not in test]
        held, by = (
            (rest, groups)
            if len(rest) > 1
            else (sorted({r for r, g in zip(runs, groups, strict=True) if g in rest}), runs)
        )
        if len(held) < 2:
            raise FoldError("one run is left to train and to validate on, which needs two; add runs.")
        drawn = np.random.default_rng([seed, count, number, 3]).permutation(len(held))
        validation = {held[i] for i in drawn[: max(1, round(len(held) / max(count - 1, 2)))]}
        parts: tuple[list[str], list[str], list[str]] = ([], [], [])
        kept = set()
        for row, label, group, place in zip(rows, labels, groups, by, strict=True):
            part = 2 if group in test else 1 if place in validation else 0
            parts[part].append(row)
            kept |= {label} if part == 0 else set()
        if every_class and kept != set(labels):
            raise FoldError(
                f"fold {number + 1} would train without {_called(min(set(labels) - kept), classes)}; set folds higher, "
                "or add runs in which it occurs."
            )
        train, checked, tested = (tuple(sorted(part)) for part in parts)
        folds.append(Fold(train, checked, tested))
    return folds


def _stratum_of_each(
    subjects: Sequence[str], labels: Sequence[int], sites: Sequence[str | None]
) -> dict[str, tuple[int, str]]:
    strata: dict[str, tuple[int, str]] = {}
    for subject, label, site in sorted(zip(subjects, labels, (s or "" for s in sites), strict=True)):
        known = strata.setdefault(subject, (int(label), site))
        if known[0] != label:
            raise FoldError(
                f"subject {subject} is labelled both {known[0]} and {label}; give every run of a subject one label."
            )
    return strata


def _count(subjects: int) -> str:
    return f"{'is' if subjects == 1 else 'are'} {count_of(subjects, 'subject')}"


def _called(label: int, classes: Sequence[str]) -> str:
    """Name a class; groups of near numbers have no name."""
    return f"class {classes[label]!r}" if classes else f"label {label}"


def _check_enough(strata: dict[str, tuple[int, str]], n_folds: int, classes: Sequence[str]) -> None:
    counts = Counter(label for label, _ in strata.values())
    # The fullest test set takes ceil(count / n_folds) of a class; two more are needed, to train and to validate.
    for label, count in sorted(counts.items()):
        if count < n_folds or count - -(-count // n_folds) < 2:
            raise FoldError(
                f"there {_count(count)} of {_called(label, classes)}, too few for {n_folds} folds with training, "
                f"validation and test subjects of every class; add subjects of that class or set folds lower (at least "
                "4 are needed for 2 folds, and one per fold for more)."
            )


def _fold(strata: dict[str, tuple[int, str]], test: set[str], n_folds: int, generator: np.random.Generator) -> Fold:
    rest = [subject for subject in strata if subject not in test]
    smallest = min(Counter(strata[subject][0] for subject in rest).values())
    n_parts = max(2, min(n_folds - 1, smallest))
    parts = _deal(strata, rest, n_parts, generator)
    train = sorted(subject for part in parts[1:] for subject in part)
    dealt = tuple(tuple(sorted(part)) for part in parts)
    return Fold(tuple(train), dealt[0], tuple(sorted(test)), dealt)


def _deal(
    strata: dict[str, tuple[int, str]], subjects: list[str], n_parts: int, generator: np.random.Generator
) -> list[list[str]]:
    shuffled = [subjects[i] for i in generator.permutation(len(subjects))]
    row = sorted(shuffled, key=strata.__getitem__)
    return [row[part::n_parts] for part in range(n_parts)]
