"""What a sweep proposes and who goes on: pure functions, on a bent surface and on planted curves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.configs import ConfigError, load_config
from boldforge.finetune import SweepConfig, SweepError, fit, sweep
from boldforge.finetune.sweep_journal import Journal, read_journal
from boldforge.finetune.sweep_rungs import Halving, Rounds
from boldforge.finetune.sweep_space import SpaceConfig, ask_tpe, draw, grid

WIDE = {
    "rank": {"low": 1, "high": 64, "log": True},
    "alpha": [8.0, 32.0],
    "dropout": {"low": 0.05, "high": 0.3},
    "targets": [["in_proj"], ["fc1", "fc2"]],
    "lr": {"low": 1e-4, "high": 1e-1, "log": True},
}
pytestmark = pytest.mark.usefixtures("few_draws")
RECIPE = {"shards": "shards", "backbone": "encoder", "out": "out"}


def _inside(point):
    assert isinstance(point["rank"], int) and 1 <= point["rank"] <= 64
    assert point["alpha"] in (8.0, 32.0) and point["targets"] in (["in_proj"], ["fc1", "fc2"])
    assert 0.05 <= point["dropout"] <= 0.3 and 1e-4 <= point["lr"] <= 1e-1


def test_a_grid_holds_every_combination_once():
    space = load_config(SpaceConfig, {"dropout": [0.0, 0.1], "lr": [1e-3, 1e-2]})
    points = grid(space, (2, 4))
    assert len(points) == 8 == len({tuple(point.items()) for point in points})
    assert points[0] == {"rank": 2, "dropout": 0.0, "lr": 1e-3} and points[-1] == {
        "rank": 4,
        "dropout": 0.1,
        "lr": 1e-2,
    }


def test_drawn_points_lie_inside_and_depend_on_seed_and_number_alone():
    space = load_config(SpaceConfig, WIDE)
    points = [draw(space, (), 3, number) for number in range(300)]
    for point in points:
        _inside(point)
    assert points[7] == draw(space, (), 3, 7) != draw(space, (), 4, 7)
    # Log: as many points in every order of magnitude; both ends of the ranks occur.
    per_decade = np.histogram(np.log10([point["lr"] for point in points]), bins=3, range=(-4, -1))[0]
    assert per_decade.min() > 70
    ranks = {point["rank"] for point in points}
    assert min(ranks) == 1 and max(ranks) > 56


def test_tpe_lies_inside_repeats_itself_and_finds_a_summit():
    space = load_config(SpaceConfig, WIDE)

    def figure(point):
        return 1 - 0.1 * abs(math.log10(point["lr"]) + 3) - 0.1 * abs(math.log2(point["rank"]) - 3)

    def search():
        seen = []
        for _ in range(5):
            points = ask_tpe(space, (), 0, seen, 8)
            assert len({point["lr"] for point in points}) == 8
            seen += [(point, figure(point) if point["lr"] < 0.05 else None) for point in points]
        return seen

    seen = search()
    assert seen == search()
    for point, _ in seen:
        _inside(point)
    first, last = ([value for _, value in part if value is not None] for part in (seen[:16], seen[16:]))
    assert np.mean(last) > np.mean(first)
    assert sum(value is None for _, value in seen[16:]) <= 2


@given(
    figures=st.lists(st.one_of(st.none(), st.sampled_from([0.5, 0.6, 0.7, 0.8])), max_size=12),
    reduction=st.integers(2, 4),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_a_decision_keeps_the_best_and_knows_no_order_of_arrival(figures, reduction, order):
    standing = list(enumerate(figures))
    halving = Halving("auc", 20, 3, reduction)
    decided = halving.decide(standing)
    order.shuffle(standing)
    assert halving.decide(standing) == decided
    stays, stops = decided["stays"], decided["stops"]
    assert sorted(stays + stops) == list(range(len(figures)))
    whole = [figure for figure in figures if figure is not None]
    assert len(stays) == min(len(whole), math.ceil(len(figures) / reduction))
    for stay in stays:
        for stop in stops:
            assert figures[stop] is None or (-figures[stay], stay) < (-figures[stop], stop)


def test_rungs_lie_between_grace_and_the_end():
    assert Halving("auc", 20, 4, 2).rungs() == [4, 8, 16]
    assert Halving("auc", 16, 4, 2).rungs() == [4, 8]
    assert Halving("auc", 3, 4, 2).rungs() == []


@given(cut=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_journal_cut_anywhere_gives_its_whole_lines_and_goes_on(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    records = [{"epoch": number, "loss": 1 / (number + 1), "called": "é\n"} for number in range(5)]
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) + 1)])
    journal = Journal(path)
    kept = list(journal.records)
    assert kept == records[: len(kept)]
    for record in records[len(kept) :]:
        journal.append(record)
    journal.close()
    assert path.read_bytes() == content and read_journal(path) == records


def test_a_line_changed_in_the_middle_is_told(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(3):
        journal.append({"epoch": number})
    journal.close()
    content = journal.path.read_bytes()
    journal.path.write_bytes(content.replace(b'"epoch": 1', b'"epoch": 7'))
    with pytest.raises(SweepError, match=r"line 2 of 3 is damaged; remove"):
        Journal(journal.path)


def test_rounds_wait_for_all_and_a_second_batch_learns_from_the_first(tmp_path):
    told = []

    def propose(batch, seen):
        told.append([figure for _, figure in seen])
        return [{"rank": rank} for rank in (1, 2, 3)] if batch < 2 else []

    journal = Journal(tmp_path / "journal.jsonl")
    rounds = Rounds(Halving("auc", 4, 1, 2), propose, journal, tmp_path / "trials")
    course = []
    for segments in rounds:
        course.append([(segment.trial.number, segment.until) for segment in segments])
        for segment in segments:
            own = Journal(segment.trial.folder(tmp_path / "trials") / "epochs.jsonl")
            while len(own.records) < segment.until:
                own.append({"epoch": len(own.records) + 1, "auc": 0.1 * segment.trial.number, "improved": True})
            own.close()
    one_batch = [[(0, 1), (1, 1), (2, 1)], [(1, 2), (2, 2)], [(2, 4)]]
    assert course == [*one_batch, *[[(trial + 3, until) for trial, until in segments] for segments in one_batch]]
    assert told[1] == pytest.approx([0.0, 0.1, 0.2]) and len(told[2]) == 6
    # On disk already: nothing is asked for again, and nothing is proposed anew.
    again = Rounds(Halving("auc", 4, 1, 2), None, journal, tmp_path / "trials")
    assert list(again) == [] and len(again.trials) == 6
    journal.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"rank": [1, 2]}}, "it takes bounds, {low, high}; list ranks in the key ranks instead"),
        ({"space": {"lr": [1e-3]}, "training": {"lr": 1e-3}}, "space.lr is searched, so training.lr has no meaning"),
        ({"space": {"alpha": [8.0]}, "adapter": {"alpha": 8}}, "space.alpha is searched, so adapter.alpha has no"),
        ({"space": {"lr": {"low": 1e-4, "high": 1e-3}}}, "a grid needs lists, but space.lr has bounds"),
        (
            {"sampler": "tpe", "ranks": [2], "space": {"rank": {"low": 1, "high": 4}}},
            "space.rank is searched, so ranks",
        ),
        ({"space": {"lr": [1e-3, 1e-3]}}, "lr must list at least one value, each once"),
        ({"space": {"dropout": [1.5]}}, "dropout must lie from 0 and at most 0.999"),
        ({"space": {"rank": {"low": 0.5, "high": 4}}}, "rank must lie from 1 and at most 256"),
        ({"adapter": {"kind": "full"}}, "needs adapter.kind lora"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(SweepConfig, RECIPE | changes)


def test_a_searched_recipe_is_recorded_so_that_it_can_be_read_again():
    config = load_config(SweepConfig, "finetune/adhd_lora_sweep.yaml")
    assert load_config(SweepConfig, config.settings()) == config


def test_tpe_over_all_dimensions_end_to_end(cohort, encoder, tmp_path):
    recipe = {
        "shards": cohort,
        "backbone": encoder,
        "out": tmp_path,
        "clips": 1,
        "folds": 3,
        "driver": "serial",
        "baselines": [],
    }
    recipe |= {"adapter": {"first_stage": 1}, "training": {"epochs": 2}, "grace": 1}
    recipe |= {"sampler": "tpe", "trials": 5, "batch": 3, "space": WIDE}
    results = sweep(load_config(SweepConfig, recipe))
    assert [trial["trial"] for trial in results["trials"]] == [0, 1, 2, 3, 4]
    assert results["sentence"].startswith("Of 5 trials at LoRA ranks from")
    best = results["best"]
    _inside(best)
    assert best["validation_auc"] == max(trial["validation_auc"] for trial in results["trials"])
    header, *rows = (tmp_path / "trials.tsv").read_text().splitlines()
    assert header.split("\t")[:2] == ["rank", "trainable_parameters"] and len(rows) == 5
    assert {"trial", "alpha", "dropout", "targets", "lr", "diverged"} <= set(header.split("\t"))


def test_a_trial_that_diverges_stops_and_the_others_go_on(cohort, encoder, tmp_path, monkeypatch):
    end_epoch = fit.Fit.end_epoch

    def explode(fitting, loss, embed):
        burst_now = fitting.classifier.adapter.rank == burst and fitting._number == 2
        return end_epoch(fitting, math.nan if burst_now else loss, embed)

    monkeypatch.setattr(fit.Fit, "end_epoch", explode)
    recipe = {
        "shards": cohort,
        "backbone": encoder,
        "clips": 1,
        "folds": 3,
        "driver": "serial",
        "baselines": [],
        "ranks": [0, 1],
    }
    recipe |= {"adapter": {"first_stage": 1}, "training": {"epochs": 3}, "grace": 3}
    burst = 1
    results = sweep(load_config(SweepConfig, recipe | {"out": tmp_path / "one"}))
    assert [(t["diverged"], t["epochs"]) for t in results["trials"]] == [(False, 3), (True, 1)]
    assert results["best"]["rank"] == 0
    burst = 0
    with pytest.raises(SweepError, match="all 1 trials diverged: their training loss did not stay finite; set"):
        sweep(load_config(SweepConfig, recipe | {"out": tmp_path / "all", "ranks": [0]}))
