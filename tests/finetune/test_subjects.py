from dataclasses import dataclass, replace

import pytest

from boldforge.finetune.subjects import Subject, rows_hash

ROW = Subject("person1", 1.0, "NYU", (0, 2), starts=(0, 4), sites=("NYU", "KKI"))


def test_rows_keep_their_hash_when_rows_get_a_new_field():
    """Else every finished result would be of other rows under the next release."""

    @dataclass(frozen=True)
    class Later(Subject):
        session: str | None = None

    later = Later(**vars(ROW))
    assert rows_hash([later]) == rows_hash([ROW])
    assert rows_hash([replace(later, session="2")]) != rows_hash([ROW])

    assert rows_hash([ROW]) == "5a85d12c2fe072acf6f682e941db59e5d517f708c434257ae75cd3450bccbc53"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "person2"},
        {"label": 0.0},
        {"site": None},
        {"runs": (0,)},
        {"part_of": "person1"},
        {"starts": ()},
        {"sites": ("NYU",)},
    ],
)
def test_all_that_a_row_says_is_in_the_hash(change):
    assert rows_hash([replace(ROW, **change)]) != rows_hash([ROW])
    assert rows_hash([ROW, replace(ROW, **change)]) != rows_hash([replace(ROW, **change), ROW])
