"""`boldforge import neurostorm` on checkpoints of the published keys and shapes, and on bad ones.

No published file is at hand; the key names are those that the paper's code gives its parameters.
"""

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from boldforge.data_shards import DataRecipe, brain_mask, get_grid, mask_hash
from boldforge.finetune import load_backbone
from boldforge.finetune.cohort import check_recipe
from boldforge.finetune.errors import FinetuneError
from boldforge.launch import cli
from boldforge.pretrain import load_pretrained
from boldforge.pretrain.import_checkpoint import ImportCheckpointError
from boldforge.pretrain.import_neurostorm import import_neurostorm
from tests.pretrain.neurostorm_transcription import Shape, Transcription, hyper_parameters, lightning

# The full cube and every published key, but blocks and channels enough for a second: patches of 24 voxels.
TINY = Shape(image=(96, 96, 96, 4), patch=12, dim=6, depths=(1, 2), window=(4, 4, 4, 4))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def save(path: Path, network: nn.Module, shape: Shape, settings: dict | None = None, **keys: Tensor) -> Path:
    torch.save(lightning(network, {**hyper_parameters(shape), **(settings or {})}, **keys), path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> SimpleNamespace:
    monkeypatch.setattr(sys, "argv", ["boldforge", "import", "neurostorm", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return SimpleNamespace(code=code, out=captured.out, err=captured.err)


def published(decoder: bool, tokens: str = "new") -> Transcription:
    with torch.device("meta"):
        return Transcription(Shape(tokens=tokens), decoder)


@pytest.mark.parametrize(
    ("decoder", "tokens", "parameters"),
    [(True, "new", 7_712_964), (True, "old", 7_712_892), (False, "new", 5_173_020)],
    ids=["autoencoder", "autoencoder of the old kind", "encoder"],
)
def test_a_checkpoint_of_the_published_shape_becomes_a_model_of_the_published_size(
    decoder: bool, tokens: str, parameters: int, tmp_path: Path
) -> None:
    shape = Shape(tokens=tokens)
    network = published(decoder, tokens).to_empty(device="cpu")
    for tensor in network.parameters():
        nn.init.normal_(tensor)
    model = "neurostorm" if tokens == "new" else "fmrifound"
    imported = import_neurostorm(save(tmp_path / "x.ckpt", network, shape, {"model": model}))
    assert sum(tensor.numel() for name, tensor in imported.weights.items() if name != "brain_mask_bits") == parameters
    assert {key.theirs for key in imported.keys} == {f"model.{name}" for name in network.state_dict()}
    assert len({key.ours for key in imported.keys}) == len(imported.keys) == len(imported.weights) - 1
    names = {key.theirs: key for key in imported.keys}
    assert names["model.pos_embeds.3.pos_embed"].shape == (1, 288, 2, 2, 2, 1)
    assert names["model.layers.2.downsample.reduction.weight"].shape == (288, 1152)
    model_config = imported.config["model"]
    assert tuple(model_config["last_window"]) == (2, 2, 2, 4) and model_config["last_shifted"] is False


def test_the_command_writes_a_release_that_gives_the_transcriptions_numbers(tmp_path, monkeypatch, capsys) -> None:
    network = Transcription(TINY).eval()
    checkpoint = save(tmp_path / "a.ckpt", network, TINY)
    done = run(monkeypatch, capsys, checkpoint, "--out", tmp_path / "release")
    assert done.code == 0, done.err
    for name in network.state_dict():
        assert f"model.{name} -> " in done.out
    assert "img_size=[96, 96, 96, 4]" in done.out and "learning_rate" not in done.out
    assert (tmp_path / "release" / "README.md").read_text().count("imported from a NeuroSTORM checkpoint") == 1
    model = load_pretrained(tmp_path / "release").model
    clips = torch.randn(1, 96, 96, 96, 4)
    with torch.no_grad():
        wanted = network(clips).flatten(1, 4)
        found = model(clips.flatten(1, 3).transpose(1, 2))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    shards = DataRecipe(grid="neurostorm", tr=0.8, normalisation="neurostorm")
    manifest = SimpleNamespace(
        recipe=shards, mask_sha256=mask_hash(brain_mask(get_grid("neurostorm"))), folder=tmp_path
    )
    backbone = load_backbone(tmp_path / "release", pool="mean")
    check_recipe(backbone, manifest)
    manifest.recipe = shards.model_copy(update={"grid": "mni2mm"})
    with pytest.raises(FinetuneError, match=r"--grid neurostorm --tr 0\.8 --normalisation neurostorm"):
        check_recipe(backbone, manifest)
    again = run(monkeypatch, capsys, checkpoint, "--out", tmp_path / "release")
    assert again.code == 2 and "is already there; choose another --out, or add --replace" in again.err
    monkeypatch.setattr(sys, "argv", ["boldforge", "load", str(tmp_path / "release")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0


def test_a_head_is_left_out_only_when_asked(tmp_path, monkeypatch, capsys) -> None:
    network = Transcription(TINY, decoder=False)
    head = {"output_head.hidden.weight": torch.zeros(1, 12)}
    checkpoint = save(tmp_path / "a.ckpt", network, TINY, **head)
    done = run(monkeypatch, capsys, checkpoint, "--out", tmp_path / "release")
    assert done.code == 2 and "1 left over (output_head.hidden.weight)" in done.err and "--leave-out" in done.err
    assert not (tmp_path / "release").exists()
    done = run(monkeypatch, capsys, checkpoint, "--out", tmp_path / "release", "--leave-out", "output_head")
    assert done.code == 0 and "output_head.hidden.weight -> left out" in done.out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"depths": None}, {"depth": [1, 2]}),
        ({"model": "swin4d_mae"}, {"use_mamba": True}),
        ({}, {}),
    ],
    ids=["depth", "swin4d", "as it is"],
)
def test_old_names_of_hyperparameters_are_known(old: dict, new: dict, tmp_path: Path) -> None:
    settings = {**hyper_parameters(TINY), **old, **new}
    settings = {name: value for name, value in settings.items() if value is not None}
    torch.save(lightning(Transcription(TINY), settings), tmp_path / "a.ckpt")
    imported = import_neurostorm(tmp_path / "a.ckpt")
    assert tuple(imported.config["model"]["depths"]) == (1, 2)
    assert set(new) <= set(imported.settings)


BAD_SETTINGS = {
    "another network": ({"model": "swift"}, "the network is 'swift', expected one of neurostorm"),
    "attention": ({"use_mamba": False}, "use_mamba is False, expected True"),
    "another image": ({"img_size": [48, 48, 48, 4]}, r"img_size is \[48, 48, 48, 4\], expected \[96, 96, 96, 4\]"),
    "padded windows": ({"img_size": [96, 96, 96, 6]}, "stage 1 has 6 tokens along an axis with windows of 4"),
    "no window": ({"window_size": None}, "hyper_parameters has no 'window_size'"),
    "nonsense": ({"depths": "many"}, "its hyper_parameters cannot be used"),
    "deeper": ({"depths": [1, 3]}, "keys are missing"),
    "shallower": ({"depths": [1, 1]}, r"left over \(model\.layers\.1\.blocks\.1"),
    "wider": ({"embed_dim": 8}, r"model\.\S+ has shape \[.*\], expected \[.*\] for its hyper_parameters"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_checkpoint_of_another_shape_is_refused_in_a_sentence(name: str, tmp_path, monkeypatch, capsys) -> None:
    change, message = BAD_SETTINGS[name]
    settings = {key: value for key, value in {**hyper_parameters(TINY), **change}.items() if value is not None}
    torch.save(lightning(Transcription(TINY), settings), tmp_path / "a.ckpt")
    with pytest.raises(ImportCheckpointError, match=message):
        import_neurostorm(tmp_path / "a.ckpt")
    done = run(monkeypatch, capsys, tmp_path / "a.ckpt", "--out", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1 and "a.ckpt" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["mask_token", "window_mask_token", "atlas_mask_token", "layers.1.blocks.0.mamba.D"])
def test_a_key_that_is_missing_is_named(key: str, tmp_path: Path) -> None:
    content = lightning(Transcription(TINY), hyper_parameters(TINY))
    del content["state_dict"][f"model.{key}"]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ImportCheckpointError, match=rf"keys are missing .*model\.{key}\b"):
        import_neurostorm(tmp_path / "a.ckpt")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("where", ["weights", "hyper_parameters", "file"])
def test_a_pickle_bomb_does_not_go_off(where: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    content = lightning(Transcription(TINY), hyper_parameters(TINY))
    if where == "file":
        (tmp_path / "a.ckpt").write_bytes(pickle.dumps(Bomb()))
    else:
        place = content["state_dict"] if where == "weights" else content["hyper_parameters"]
        place["extra"] = Bomb()
        torch.save(content, tmp_path / "a.ckpt")
    done = run(monkeypatch, capsys, "a.ckpt", "--out", "out")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "could run any program, so nothing of it was loaded" in done.err
    assert where == "file" or "posix.mkdir" in done.err
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


BAD_FILES = {
    "missing": (None, "no such file; give the .ckpt file"),
    "empty": (b"", "a.ckpt"),
    "text": (b"not a checkpoint at all\n" * 50, "a.ckpt"),
    "cut": ("cut", "is no checkpoint that torch can read, or is damaged"),
    "weights alone": ("weights", "has no 'state_dict'"),
    "no settings": ("settings", "has no 'hyper_parameters'"),
    "NaN": ("nan", "holds NaN or infinity"),
    "a number among the weights": ("number", "holds something other than tensors"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_checkpoint_is_told_in_a_sentence(name: str, tmp_path, monkeypatch, capsys) -> None:
    made, message = BAD_FILES[name]
    path = tmp_path / "a.ckpt"
    network = Transcription(TINY)
    content = lightning(network, hyper_parameters(TINY))
    if isinstance(made, bytes):
        path.write_bytes(made)
    elif made == "cut":
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:20_000])
    elif made == "weights":
        torch.save(network.state_dict(), path)
    elif made is not None:
        content["state_dict"]["model.patch_embed.fc.bias"][0] = float("nan") if made == "nan" else 0.0
        content["state_dict"] |= {"model.number": 3} if made == "number" else {}
        content.pop("hyper_parameters") if made == "settings" else None
        torch.save(content, path)
    done = run(monkeypatch, capsys, path, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done.err
    assert "Traceback" not in done.err and not (tmp_path / "out").exists()
