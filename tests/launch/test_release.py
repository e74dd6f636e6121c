import getpass
import hashlib
import io
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import boldforge
from boldforge.configs import BoldForgeError
from boldforge.data_shards import DataRecipe, build_shards, find_runs
from boldforge.finetune import AdapterConfig, Classifier, load_backbone, save_adapter
from boldforge.finetune.tasks.columns import Number, SeveralClasses
from boldforge.finetune.tasks.reidentification import Reidentification
from boldforge.finetune.tasks.retrieval import ImageRetrieval
from boldforge.finetune.tasks.states import TaskState
from boldforge.launch.release import ReleaseError, check_release, from_pretrained, probe, write_release

VOXELS = 29773


@pytest.fixture(scope="module")
def release(pretraining, adapter, tmp_path_factory):
    return write_release(pretraining, tmp_path_factory.mktemp("releases") / "v1", adapter)


@pytest.fixture
def copy(release, tmp_path):
    return shutil.copytree(release, tmp_path / "copy")


@pytest.fixture(scope="module")
def clips():
    return torch.from_numpy(np.random.default_rng(7).standard_normal((2, 4, VOXELS), dtype=np.float32))


def test_a_release_embeds_bit_for_bit_as_the_run_it_came_from(release, pretraining, clips):
    ours, theirs = boldforge.from_pretrained(release), from_pretrained(pretraining / "export")
    embedding = ours.embed(clips)
    assert embedding.shape[0] == 2
    assert embedding.std() > 0
    assert torch.equal(embedding, from_pretrained(release).embed(clips))
    assert torch.equal(embedding, theirs.embed(clips))


def test_a_fold_s_model_and_one_with_its_own_network_are_no_release(pretraining, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "run" / "folds" / "2")
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(task | {"figures": {"fold": 2, "test": ["p1"]}}))
    with pytest.raises(ReleaseError, match=r"folds/2: is the model of fold 2, .*; release a model of all subjects"):
        write_release(pretraining, tmp_path / "v1", folder)
    (folder / "task.json").write_text(json.dumps(task | {"figures": {"outer_fold": 1}}))
    with pytest.raises(ReleaseError, match=r"is the model of outer fold 1, .*; release a model of all subjects"):
        write_release(pretraining, tmp_path / "v1", folder)
    (folder / "task.json").write_text(json.dumps(task | {"network": {"kind": "resnet-rnn"}}))
    with pytest.raises(ReleaseError, match=r"a network of its own \(resnet-rnn\)"):
        write_release(pretraining, tmp_path / "v1", folder)
    assert not (tmp_path / "v1").exists()


def test_of_a_broken_adapter_the_user_s_own_file_is_named(pretraining, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "mine")
    (folder / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(BoldForgeError, match=r"/mine/head\.safetensors"):
        write_release(pretraining, tmp_path / "v1", folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_only_a_base_that_had_to_be_forced_is_called_so(release, pretraining, adapter, tmp_path):
    asked = write_release(pretraining, tmp_path / "asked", adapter, force_base=True)
    assert (asked / "config.json").read_text() == (release / "config.json").read_text()
    other = shutil.copytree(adapter, tmp_path / "other")
    task = json.loads((other / "task.json").read_text())
    (other / "task.json").write_text(json.dumps(task | {"base_weights_hash": "0" * 64}))
    forced = write_release(pretraining, tmp_path / "forced", other, force_base=True)
    assert json.loads((forced / "config.json").read_text())["adapter"]["forced_base"] is True
    assert from_pretrained(forced).classifier is not None


def test_the_recorded_probe_is_what_a_fresh_load_computes(release):
    recorded = json.loads((release / "config.json").read_text())["probe"]
    assert recorded == probe(from_pretrained(release))


def test_the_pooling_is_the_releases_own_and_not_this_versions_default(pretraining, adapter, clips, tmp_path):
    export = shutil.copytree(pretraining / "export", tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"embedding": {"pool": "mean"}}))
    release = write_release(export, tmp_path / "v1")
    assert json.loads((release / "config.json").read_text())["embedding"] == {"pool": "mean", "dim": 16}
    assert from_pretrained(release).embed(clips).shape == (2, 16)


def test_embed_leaves_the_adapter_out_and_predict_uses_it(release, pretraining, adapter, clips, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "adapter")
    path = other / "adapter_model.safetensors"
    save_file({name: tensor + 0.05 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    before, after = from_pretrained(release), from_pretrained(write_release(pretraining, tmp_path / "v2", other))
    assert torch.equal(before.embed(clips), after.embed(clips))
    assert not torch.equal(before.predict(clips), after.predict(clips))
    assert ((after.predict(clips) >= 0) & (after.predict(clips) <= 1)).all()


@pytest.mark.parametrize(
    ("task", "shape", "said"),
    [
        (SeveralClasses("classify:dx", "dx", ("a", "b", "c")), (2, 3), "`classify:dx` (a, b or c)"),
        (TaskState(("face", "house")), (2, 2), "gives [clips, 2], probabilities in the order of"),
        (ImageRetrieval(("cat", "dog", "key"), {"candidates": torch.eye(3, 4)}), (2, 3), "which of 3 images was shown"),
        (Reidentification(), (2, 64), "gives [clips, 64], unit vectors to compare by cosine"),
        (Number("age", "age"), (2,), "predicts age"),
    ],
    ids=["classes", "states", "retrieval", "reidentify", "age"],
)
def test_a_release_predicts_what_its_task_asks(pretraining, clips, say, tmp_path, task, shape, said):
    classifier = Classifier(load_backbone(pretraining / "export"), task, AdapterConfig(rank=2))
    expected = classifier.predict(clips)
    folder = write_release(pretraining, tmp_path / "v1", save_adapter(classifier, tmp_path / "adapter"))
    predicted = from_pretrained(folder).predict(clips)
    assert predicted.shape == shape
    assert torch.equal(predicted, expected)
    assert check_release(folder, say) == 0
    assert "bit for bit" in say.file.getvalue()
    assert said in " ".join((folder / "README.md").read_text().split())


def test_a_prediction_of_another_length_does_not_reproduce(copy, say):
    recorded = json.loads((copy / "config.json").read_text())["probe"]
    _edit_config(copy, probe={"prediction": [recorded["prediction"]] * 3})
    assert check_release(copy, say) == 1


def test_peft_puts_the_adapter_on_the_public_network(release, pretraining, adapter, clips, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "adapter")
    path = other / "adapter_model.safetensors"
    save_file({name: tensor + 0.05 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    folder = write_release(pretraining, tmp_path / "v2", other)
    model = from_pretrained(folder)
    plain = model.embed(clips)
    peft.PeftModel.from_pretrained(model.network, folder / "adapter")
    adapted = model.classifier.backbone.embed(clips)
    # peft multiplies by W and by the update in turn, which rounds elsewhere.
    torch.testing.assert_close(model.embed(clips), adapted, rtol=1e-4, atol=1e-5)
    assert (plain - adapted).abs().max() > 1e-3
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == f"sha256:{model.backbone.weights_hash}"


def test_the_weights_are_read_once(release, monkeypatch):
    read = []
    monkeypatch.setattr("boldforge.pretrain.export.load_file", lambda path: read.append(path) or load_file(path))
    from_pretrained(release)
    assert len(read) == 1


@pytest.fixture
def say():
    return Console(file=io.StringIO(), width=400)


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config[key] | value
    (folder / "config.json").write_text(json.dumps(config))


def _negate_head(folder):
    path = folder / "adapter" / "head.safetensors"
    save_file({name: -tensor if "linear" in name else tensor for name, tensor in load_file(path).items()}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_exchanged_head_is_noticed(copy, say):
    _negate_head(copy)
    with pytest.raises(ReleaseError, match=r"head\.safetensors: SHA-256 is .*damaged or was exchanged"):
        check_release(copy, say)


def test_a_head_that_predicts_otherwise_does_not_reproduce_even_where_its_hash_is_right(copy, say):
    digest = _negate_head(copy)
    files = json.loads((copy / "config.json").read_text())["adapter"]["files"]
    _edit_config(copy, adapter={"files": files | {"head.safetensors": digest}})
    assert check_release(copy, say) == 1
    assert "more than rounding explains" in say.file.getvalue()


@pytest.mark.parametrize(("factor", "code"), [(1 + 1e-5, 0), (1.01, 1), (-1, 1)])
def test_rounding_is_told_from_another_function(copy, say, factor, code):
    recorded = json.loads((copy / "config.json").read_text())["probe"]
    values = [value * factor for value in recorded["first_values"]]
    _edit_config(copy, probe={"first_values": values, "embedding_sha256": "0" * 64, "torch": "1.0"})
    assert check_release(copy, say) == code
    text = say.file.getvalue()
    assert "recorded with torch 1.0" in text
    assert ("rounds differently" in text) == (code == 0)


def test_another_version_of_torch_with_the_same_bits_reproduces(copy, say):
    _edit_config(copy, probe={"torch": "1.0"})
    assert check_release(copy, say) == 0
    assert "bit for bit" in say.file.getvalue()


def test_the_readmes_python_runs_as_it_stands(release, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    (tmp_path / "runs").mkdir()
    shutil.copytree(release, tmp_path / "runs" / "release")
    recording = next((root / "tests" / "data").glob("sub-happy*_bold.nii.gz"))
    (tmp_path / "study").mkdir()
    shutil.copy(recording, tmp_path / "study" / recording.name)
    monkeypatch.chdir(tmp_path)
    build_shards(find_runs("study"), tmp_path / "runs" / "shards", DataRecipe(grid="mni4mm", tr=2.0))
    (program,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(program, "README.md", "exec"), names)
    assert names["values"].shape == (2, 4, VOXELS)
    assert names["embedding"].shape[0] == names["score"].shape[0] == 2


def test_numpy_clips_are_accepted(release, clips):
    model = from_pretrained(release)
    assert torch.equal(model.embed(clips.numpy()), model.embed(clips))


def test_nothing_in_a_release_names_a_machine_a_path_or_a_person(release, pretraining):
    text = b"\n".join(path.read_bytes() for path in release.rglob("*") if path.is_file()).decode("latin-1")
    names = [socket.gethostname(), str(pretraining), str(pretraining.parent), "/home/", "/tmp/", "sub-secret"]
    # A short account name such as "root" may occur in any text.
    names += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    assert [name for name in names if name in text] == []


def test_absolute_paths_in_a_recipe_are_reduced_to_their_last_part(pretraining, tmp_path):
    export = shutil.copytree(pretraining / "export", tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    config["training"]["mask"]["atlas"] = "/data/lab/private/atlas.nii.gz"
    (export / "config.json").write_text(json.dumps(config))
    written = write_release(export, tmp_path / "release")
    assert json.loads((written / "config.json").read_text())["training"]["mask"]["atlas"] == "atlas.nii.gz"


def test_the_card_says_simulated_and_how_to_load(release):
    card = (release / "README.md").read_text()
    assert "trained and tested on simulated subjects; its figures say nothing about any real diagnosis" in card
    assert "40 simulated subjects" in card
    assert "0.7000" in card, "held-out error"
    assert "1.0000" in card, "its baseline"
    assert "| AUC | 0.812 | not recorded |" in card and "No plain models stand beside these figures." in card
    assert 'boldforge.from_pretrained("' in card
    assert "`batch.dequantise()` is `values`" in card, "a stream yields quantised batches"
    assert "Not a medical device" in card
    assert "Rolls" in card
    assert "2 runs of 2 subjects, 154 frames" in card


def test_the_card_of_a_release_without_adapter_speaks_of_none(pretraining, tmp_path):
    card = (write_release(pretraining, tmp_path / "plain") / "README.md").read_text()
    assert "adapter" not in card
    assert "imulated" not in card


@pytest.fixture
def card_with(pretraining, adapter, tmp_path):
    """Release the adapter with other content of ``figures``, and read its card as one line."""

    def write(figures):
        changed = shutil.copytree(adapter, tmp_path / "adapter")
        task = json.loads((changed / "task.json").read_text())
        (changed / "task.json").write_text(json.dumps(task | {"figures": figures}))
        release = write_release(pretraining, tmp_path / "v1", changed)
        return " ".join((release / "README.md").read_text().split())

    return write


@pytest.fixture
def recorded(adapter):
    return json.loads((adapter / "task.json").read_text())["figures"]


def test_the_card_of_a_cross_validated_adapter_says_who_was_measured(card_with, recorded):
    subjects = {"n": 40, "n_positive": 20}
    card = card_with(recorded | {"subjects": subjects, "measured_by": "5-fold cross-validation over subjects"})
    assert "neither" not in card, "the adapter that is released was trained on all subjects"
    assert (
        "By models of the same recipe, each on subjects it had not seen (5-fold cross-validation over subjects); the "
        "adapter in this release was then trained on all of them; n = 8, 4 of them ADHD."
    ) in card


def test_the_card_of_a_sweep_says_who_was_measured(card_with, recorded):
    card = card_with(recorded)
    assert "On subjects seen neither in the adapter's training nor in its selection (test subjects held out" in card
    assert "trained on all of them" not in card


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"pretrained_on_these_shards": True}, "on these same shards, test subjects included"),
        ({"pretrained_on_these_shards": False}, "pretrained on other shards"),
        ({}, "scans is not recorded"),
    ],
    ids=["same", "other", "unknown"],
)
def test_the_card_says_whether_the_encoder_met_the_test_subjects(card_with, recorded, known, said):
    assert said in card_with(recorded | known)


def test_the_card_gives_intervals_plain_models_and_the_verdict(card_with, recorded):
    against = {"difference": -0.1234, "interval": [-0.3, 0.1], "p": 0.25}
    beside = {"says": "site alone", "figures": {"auc": 0.9}, "intervals": {"auc": [0.7, 1.0]}}
    more = {
        "compared_by": "auc",
        "intervals": {"auc": [0.45, 0.96], "sensitivity": [0.15, 0.85]},
        "baselines": {"site": beside | {"model_minus_baseline": against}},
        "verdict": "AUC 0.81: not shown to be better than chance.",
    }
    card = card_with(recorded | more)
    assert "| AUC | 0.812 | 0.450 to 0.960 |" in card and "| sensitivity | 0.500 | 0.150 to 0.850 |" in card
    assert "| site alone | 0.900 | 0.700 to 1.000 | −0.123 | 0.250 |" in card
    assert "**AUC 0.81: not shown to be better than chance.**" in card and "planted in named regions" in card


def test_an_adapter_without_figures_is_released_and_its_card_claims_nothing(card_with):
    card = card_with({})
    assert "No test figures came with the adapter." in card
    assert "people or simulated is not recorded" in card
    assert "seen neither" not in card


def test_predict_without_an_adapter_says_how_to_get_one(pretraining, clips, tmp_path):
    model = from_pretrained(write_release(pretraining, tmp_path / "plain"))
    with pytest.raises(ReleaseError, match=r"no adapter.*boldforge finetune"):
        model.predict(clips)


@pytest.mark.parametrize("shape", [(4, VOXELS), (1, 3, VOXELS), (1, 4, VOXELS - 1)])
def test_clips_of_another_shape_are_refused_with_the_expected_one(release, shape):
    with pytest.raises(ReleaseError, match=r"expected \[clips, 4 frames, 29773 brain voxels of mni4mm\]"):
        from_pretrained(release).embed(torch.zeros(shape))


def test_an_existing_folder_is_left_alone_unless_asked(release, pretraining, tmp_path):
    with pytest.raises(ReleaseError, match="already there"):
        write_release(pretraining, release)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(ReleaseError, match="holds no release"):
        write_release(pretraining, other, replace=True)
    assert (other / "chapter.txt").read_text() == "years of work"


def test_replacing_a_release_leaves_nothing_of_the_old_one(copy, pretraining):
    write_release(pretraining, copy, replace=True)
    assert sorted(path.name for path in copy.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_release_that_fails_leaves_nothing_behind(pretraining, adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "adapter")
    task = json.loads((broken / "task.json").read_text())
    (broken / "task.json").write_text(json.dumps(task | {"base_weights_hash": "0" * 64}))
    with pytest.raises(BoldForgeError, match=r"was trained on .* instead of 0000"):
        write_release(pretraining, tmp_path / "out" / "v1", broken)
    assert list((tmp_path / "out").iterdir()) == []


def test_one_flipped_bit_in_the_weights_is_noticed(copy):
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(BoldForgeError, match=r"model\.safetensors: SHA-256 is .*damaged"):
        from_pretrained(copy)


def test_a_format_of_the_future_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(BoldForgeError, match="format_version is 99"):
        from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter/task.json", "adapter/head.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(BoldForgeError, match=name.replace(".", r"\.")):
        from_pretrained(copy)
