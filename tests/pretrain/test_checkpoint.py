"""Which checkpoints stay, and a run folder whose record of the recipe is damaged."""

from pathlib import Path

import pytest

from boldforge.configs import ConfigError, load_config
from boldforge.pretrain import PretrainConfig, checkpoint
from boldforge.pretrain.run import _claim_folder


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
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("content", ["", "- a\n", "a: [", "\udcff"])
def test_a_damaged_record_of_the_recipe_is_one_sentence(save, tmp_path: Path, monkeypatch, content: str):
    config = load_config(PretrainConfig, "pretrain/tiny.yaml", ["shards=s", f"out={tmp_path / 'run'}"])
    _claim_folder(config, {})
    _claim_folder(config, {})
    record = config.out / "config.yaml"
    record.write_bytes(content.encode(errors="surrogateescape"))
    monkeypatch.setattr("boldforge.pretrain.run.newest_checkpoint", lambda folder: folder)
    with pytest.raises(ConfigError, match=r"config.yaml: is damaged, .* put the recipe back there, or use another out"):
        _claim_folder(config, {})
    assert record.read_bytes() == content.encode(errors="surrogateescape")
