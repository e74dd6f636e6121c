"""Real recordings, sharded once per test session."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def real_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the two real runs at 4 mm (110 and 82 frames at their own TRs, resampled to 2 s)."""
    from boldforge.data_shards import DataRecipe, build_shards, find_runs

    out = tmp_path_factory.mktemp("real-shards")
    build_shards(find_runs(DATA).runs, out, DataRecipe(grid="mni4mm", tr=2.0))
    return out
