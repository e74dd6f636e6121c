import json
from pathlib import Path

import pytest
import torch

from boldforge.data_shards import brain_mask, get_grid
from boldforge.pretrain import ExportError, ModelConfig, build_model, load_pretrained, write_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    grid = get_grid("mni4mm")
    config = ModelConfig(frames=2, embed_dim=8, depths=(1, 1), decoder_depths=(1,), d_state=2, backend="torch")
    torch.manual_seed(0)
    model = build_model(config, brain_mask(grid), grid.voxel_size)
    content = {"model": config.model_dump(mode="json"), "data": {"grid": grid.name}}
    return write_export(model.state_dict(), content, tmp_path_factory.mktemp("export"))


def copy_of(export: Path, folder: Path) -> Path:
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_reads_back_the_same_bits(export: Path) -> None:
    first, second = load_pretrained(export), load_pretrained(export)
    clip = torch.randn(1, 2, first.model.token_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(first.model.encode(clip), second.model.encode(clip))
    assert not first.model.training


def test_a_flipped_bit_is_noticed(export: Path, tmp_path: Path) -> None:
    folder = copy_of(export, tmp_path)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ExportError, match="the file is damaged or was exchanged"):
        load_pretrained(folder)


def test_weights_of_another_shape_are_refused(export: Path, tmp_path: Path) -> None:
    folder = copy_of(export, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["depths"] = [1, 2]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"missing \['stages.1.blocks.1"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ('{"model_type": "bert"}', "not a BoldForge config"),
        ('{"model_type": "boldforge", "format_version": 99}', "format_version is 99, this version reads 1"),
    ],
)
def test_a_folder_that_is_no_export_says_why(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ExportError, match=message):
        load_pretrained(tmp_path)
