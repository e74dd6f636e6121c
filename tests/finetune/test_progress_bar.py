import pytest

from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.cross_validation import _Progress


@pytest.mark.parametrize(
    ("adapter", "read"), [({}, 0.02), ({"first_stage": 1}, 0.5), ({"kind": "probe", "first_stage": 2}, 50.0)]
)
def test_a_clip_that_is_read_weighs_what_it_takes_beside_one_that_is_trained(adapter, read):
    calls = []
    bar = _Progress(lambda done, total: calls.append((done, total)), 200, 1000, AdapterConfig(**adapter))
    for _ in range(200):
        bar.read()
    assert calls[-1][0] / calls[-1][1] == pytest.approx(200 * read / (200 * read + 1000), abs=0.02)
    bar.train(300)
    bar.skip(400)
    bar.train(250)
    assert calls[-1][0] < calls[-1][1], "fewer clips than were expected"
    bar.finish()
    assert calls[-1][0] == calls[-1][1]
    assert all(done <= total for done, total in calls) and [done for done, _ in calls] == sorted(
        done for done, _ in calls
    )
