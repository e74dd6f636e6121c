from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.finetune.errors import FoldError
from boldforge.finetune.folds import group_folds, inner_folds, site_folds, subject_folds


@st.composite
def cohorts(draw):
    n_folds = draw(st.integers(2, 6))
    fewest = max(n_folds, 4 if n_folds == 2 else 3)
    labels = [0] * draw(st.integers(fewest, 25)) + [1] * draw(st.integers(fewest, 25))
    sites = draw(st.lists(st.sampled_from(["KKI", "NYU", "Peking", None]), min_size=len(labels), max_size=len(labels)))
    return [f"s{i:03d}" for i in range(len(labels))], labels, sites, n_folds


@settings(deadline=None, max_examples=150)
@given(cohorts(), st.integers(0, 2**31))
def test_every_subject_is_tested_once_and_never_trained_on_in_the_same_fold(cohort, seed):
    subjects, labels, sites, n_folds = cohort
    label_of = dict(zip(subjects, labels, strict=True))
    folds = subject_folds(subjects, labels, sites, n_folds, seed)
    assert len(folds) == n_folds
    assert sorted(s for fold in folds for s in fold.test) == subjects
    for fold in folds:
        assert sorted(fold.train + fold.validation + fold.test) == subjects
        for part in (fold.train, fold.validation, fold.test):
            assert {label_of[s] for s in part} == {0, 1}


@settings(deadline=None, max_examples=100)
@given(cohorts(), st.integers(0, 2**31))
def test_test_sets_are_balanced_to_within_one_by_size_class_and_stratum(cohort, seed):
    subjects, labels, sites, n_folds = cohort
    stratum_of = dict(zip(subjects, zip(labels, sites, strict=True), strict=True))
    folds = subject_folds(subjects, labels, sites, n_folds, seed)

    def spread(keep):
        counts = [sum(keep(stratum_of[s]) for s in fold.test) for fold in folds]
        return max(counts) - min(counts)

    assert spread(lambda stratum: True) <= 1
    for label in (0, 1):
        assert spread(lambda stratum, label=label: stratum[0] == label) <= 1
    for wanted in set(stratum_of.values()):
        assert spread(lambda stratum, wanted=wanted: stratum == wanted) <= 1


@settings(deadline=None, max_examples=60)
@given(cohorts(), st.integers(0, 2**31), st.data())
def test_in_inner_folds_nobody_validates_twice_and_with_all_of_them_everybody_once(cohort, seed, data):
    subjects, labels, sites, n_folds = cohort
    label_of = dict(zip(subjects, labels, strict=True))
    stratum_of = dict(zip(subjects, zip(labels, sites, strict=True), strict=True))
    count = data.draw(st.integers(1, n_folds - 1))
    for fold in subject_folds(subjects, labels, sites, n_folds, seed):
        inner = inner_folds(fold, count)
        assert inner[0] == fold and len(inner) == count
        for one in inner:
            assert one.test == fold.test
            assert sorted(one.train + one.validation + one.test) == subjects
            for part in (one.train, one.validation):
                assert list(part) == sorted(part) and {label_of[s] for s in part} == {0, 1}
        times = Counter(s for one in inner for s in one.validation)
        assert set(times.values()) == {1} and not times.keys() & set(fold.test)
        if 2 < n_folds == count + 1:
            assert sorted(times) == sorted(set(subjects) - set(fold.test))
        for kept in [None, 0, 1, *set(stratum_of.values())]:
            sizes = [sum(kept in (None, label_of[s], stratum_of[s]) for s in one.validation) for one in inner]
            assert max(sizes) - min(sizes) <= 1


def test_more_inner_folds_than_there_are_parts_are_refused():
    names = [f"s{i}" for i in range(12)]
    folds = site_folds(names, [0, 1] * 6, ["a"] * 4 + ["b"] * 8, 5, seed=0)
    assert [len(fold.parts) for fold in folds] == [4, 2]
    assert [len(inner_folds(fold, 2)) for fold in folds] == [2, 2]
    with pytest.raises(FoldError, match=r"inner_folds is 3, but .* dealt into 2 parts.*; set inner_folds to 2 or less"):
        inner_folds(folds[1], 3)
    whole = group_folds(names, [0, 1] * 6, [n[-1] for n in names], names, 3, seed=0)[0]
    assert inner_folds(whole, 1) == [whole]
    with pytest.raises(FoldError, match="set inner_folds to 1 or less"):
        inner_folds(whole, 2)


def test_runs_of_a_subject_stay_together_and_row_order_does_not_matter():
    subjects = [f"s{i}" for i in range(12)] * 2
    labels = [i % 2 for i in range(12)] * 2
    sites = ["A"] * 24
    folds = subject_folds(subjects, labels, sites, 3, seed=1)
    assert Counter(s for fold in folds for s in fold.test) == Counter(set(subjects))
    assert subject_folds(subjects[::-1], labels[::-1], sites, 3, seed=1) == folds
    assert subject_folds(subjects, labels, sites, 3, seed=2) != folds


def test_too_few_subjects_of_a_class_says_which():
    with pytest.raises(FoldError, match=r"are 2 subjects of label 1.*5 folds"):
        subject_folds([f"s{i}" for i in range(12)], [0] * 10 + [1] * 2, ["A"] * 12, 5, seed=0)


def test_contradicting_labels_name_the_subject():
    with pytest.raises(FoldError, match="subject b is labelled both 0 and 1"):
        subject_folds(["a", "b", "b"], [0, 0, 1], ["A"] * 3, 2, seed=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(3, 6), st.integers(2, 4))
def test_leaving_one_site_out_tests_every_site_once(seed, per_stratum, n_sites):
    rows = [
        (f"{site}{label}{i}", label, f"site{site}")
        for site in range(n_sites)
        for label in (0, 1)
        for i in range(per_stratum)
    ]
    folds = site_folds(*zip(*rows, strict=True), 5, seed)
    home = {name: site for name, _, site in rows}
    label = {name: number for name, number, _ in rows}
    assert [{home[name] for name in fold.test} for fold in folds] == [{f"site{i}"} for i in range(n_sites)]
    for fold in folds:
        assert not {home[name] for name in fold.test} & {home[name] for name in fold.train + fold.validation}
        assert sorted(fold.train + fold.validation + fold.test) == sorted(home)
        for part in (fold.train, fold.validation):
            assert {label[name] for name in part} == {0, 1}


def test_sites_that_cannot_be_left_out_are_named():
    names, labels = [f"s{i}" for i in range(8)], [0, 1] * 4
    for sites, message in [
        (["a"] * 8, "there is only a"),
        ([None, *["a"] * 4, *["b"] * 3], "1 subject has none"),
        (["a"] * 5 + ["b"] * 3, "without site a there is 1 subject of label 0, too few"),
    ]:
        with pytest.raises(FoldError, match=message):
            site_folds(names, labels, sites, 5, 0)
    with pytest.raises(FoldError, match="but 1 was scanned at several"):
        site_folds(["s", "s", "t"], [0, 0, 1], ["a", "b", "a"], 5, 0)
