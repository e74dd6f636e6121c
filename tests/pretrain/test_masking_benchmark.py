"""benchmarks/masking.py: cells are kept, and figures are those of a case that can be done by hand."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    before, there = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path[:] = before
    for name in set(sys.modules) - there:
        if name.split(".")[0] == "masking_parts":
            sys.modules.pop(name)


def test_a_cell_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    from masking_parts.cells import kept

    made = []

    def make() -> dict[str, object]:
        made.append(len(made))
        return {"figure": len(made)}

    for settings, expected in (({"steps": (1, 2)}, 1), ({"steps": (1, 2)}, 1), ({"steps": (1, 3)}, 2)):
        assert kept(tmp_path / "cell.json", settings, make)["figure"] == expected
    assert made == [0, 1]
    (tmp_path / "other.partial").write_text('{"settings"')  # what a kill leaves is never read
    assert kept(tmp_path / "other.json", {}, make)["figure"] == 3


def test_ratios_and_their_differences_are_pooled_over_clips_and_seeds() -> None:
    from masking_parts.intervals import error_ratios

    clips = [[0, 0], [0, 4], [1, 0], [1, 4]]
    baseline = {"random": [10.0, 20.0, 30.0, 40.0]}
    halves = [{"clips": clips, "baseline": baseline, "error": {"random": [5.0, 10.0, 15.0, 20.0]}} for _ in range(3)]
    wholes = [{"clips": clips, "baseline": baseline, "error": baseline} for _ in range(3)]
    assert error_ratios(halves, "random") == pytest.approx((0.5, 0.5, 0.5))
    assert error_ratios(halves, "random", wholes) == pytest.approx((-0.5, -0.5, -0.5))
    mixed = [halves[0], wholes[0], wholes[1]]
    value, low, high = error_ratios(mixed, "random")
    assert value == pytest.approx(2.5 / 3) and low == pytest.approx(0.5) and high == pytest.approx(1)


def test_aucs_are_the_mean_over_seeds_with_subjects_paired() -> None:
    from masking_parts.intervals import aucs

    labels = [0, 0, 0, 1, 1, 1]
    perfect = {"labels": labels, "scores": {"mean": [[0.1, 0.2, 0.3, 0.7, 0.8, 0.9]]}}
    blind = {"labels": labels, "scores": {"mean": [[0.5] * 6]}}
    assert aucs([perfect, perfect], "mean") == (1, 1, 1)
    assert aucs([perfect, blind], "mean")[0] == pytest.approx(0.75)
    assert aucs([perfect, blind], "mean", [perfect, perfect])[0] == pytest.approx(-0.25)
    assert aucs([perfect], "mean", [perfect]) == (0, 0, 0)
