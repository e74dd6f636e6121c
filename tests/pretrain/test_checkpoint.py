"""Which checkpoints stay, and a run folder whose record of the recipe is damaged."""

from pathlib import Path

import pytest
import yaml

from boldforge.configs import ConfigError, load_config
from boldforge.pretrain import PretrainConfig, checkpoint
from boldforge.pretrain.run_folder import check_same_run, newest_checkpoint, record


@pytest.fixture
def save(one_rank: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(checkpoint, "write_state", lambda engine, folder: (folder / "state-0.bin").write_bytes(b"x"))

    def save(step: int, keep: int) -> list[str]:
        checkpoint.save_checkpoint(None, tmp_path, step, {}, keep)
        return sorted(path.name for path in tmp_path.glob("step-*"))

    return save


def test_the_newest_are_kept(save):
    assert [save(step, 2) for step in (2, 4, 6)][-1] == ["step-00000004", "step-00000006"]


def test_one_just_written_outlives_a_damaged_later_one(save, tmp_path: Path):
    save(2, 3)
    save(4, 3)
    (tmp_path / "step-00000004" / "state-0.bin").write_bytes(b"damaged")
    assert save(3, 1) == ["step-00000003"]
    assert newest_checkpoint(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\udcff"])
def test_a_damaged_record_of_the_recipe_is_one_sentence(tmp_path: Path, content: str):
    config = load_config(PretrainConfig, "pretrain/tiny.yaml", ["shards=s", f"out={tmp_path}"])
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"config.yaml: is missing, .* put the recipe back there, or use another out"):
        check_same_run(config, {})
    path.write_text(yaml.safe_dump(record(config, {})))
    check_same_run(config, {})
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config.yaml: is damaged, .* put the recipe back there, or use another out"):
        check_same_run(config, {})
