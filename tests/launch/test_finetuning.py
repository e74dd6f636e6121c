"""``boldforge finetune`` as a user runs it, on simulated subjects."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from boldforge.data_shards import DataRecipe, Run, RunList, SimulationConfig, simulate_cohort
from boldforge.launch import cli, finetuning
from boldforge.launch.cli import app

QUICK = ["clips=2", "folds=2", "adapter.rank=1", "adapter.first_stage=1", "training.epochs=2"]


@pytest.fixture(scope="module")
def athena(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "athena"
    return simulate_cohort(folder, SimulationConfig(n_subjects=12, n_frames=12, effect=1.0))


def _run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)], env={"COLUMNS": "160"}, catch_exceptions=False)


def test_a_folder_of_scans_becomes_a_tested_adapter_in_one_command(athena, pretraining, tmp_path):
    out = tmp_path / "adhd"
    arguments = ["--task", "adhd", "--data", athena, f"backbone={pretraining}", f"out={out}", *QUICK]
    arguments += ["baselines=[site, image]"]
    done = _run(*arguments)
    assert done.exit_code == 0, done.output
    results = json.loads((out / "metrics.json").read_text())
    parts = results["trainable_by_part"]
    assert f"Trainable parameters: lora {parts['lora']:,}".replace(",", " ") in done.output
    assert sum(parts.values()) == results["trainable_parameters"]
    tested = f"{results['figures']['n']} simulated subjects, {results['figures']['n_positive']} ADHD (positive)"
    assert f"Test on {tested}, 2-fold cross-validation" in done.output
    low, high = results["intervals"]["auc"]
    assert f"{results['figures']['auc']:.3f}" in done.output and f"{low:.3f} to {high:.3f}" in done.output
    for entry in results["baselines"].values():
        assert entry["says"] in done.output
    assert results["verdict"] in done.output and f"Adapter: {out / 'adapter'}" in done.output
    (shards,) = tmp_path.glob("athena-shards-*")
    written = (shards / "manifest.json").stat().st_mtime_ns

    again = _run(*arguments)
    assert f"{shards}: kept from before" in again.output and results["verdict"] in again.output
    assert (shards / "manifest.json").stat().st_mtime_ns == written

    given = _run(
        "--task", "adhd", "--data", shards, f"backbone={pretraining}", f"out={tmp_path / 'two'}", *QUICK, "baselines=[]"
    )
    assert "athena-shards" not in given.output.split("Trainable")[0], "shards are taken as they are"
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["figures"] == results["figures"]


def test_who_was_left_out_is_said_and_all_of_it_is_100_percent():
    kept = {"n_unlabelled": 3, "n_too_short": 0, "n_duplicates": 2}
    assert finetuning._left_out(kept) == " (left out: 3 without a label, 2 with a scan that is also another's)"
    assert finetuning._left_out({"n_unlabelled": 0}) == ""
    assert [finetuning._percent(share) for share in (1, 0.995, 0.5, 0.0213)] == ["100", "100", "50", "2.1"]


def test_another_phenotype_makes_other_shards(athena, pretraining, tmp_path):
    data = shutil.copytree(athena, tmp_path / "athena")
    arguments = ["--task", "age", "--data", data, f"backbone={pretraining}", f"out={tmp_path / 'age'}", *QUICK]
    arguments += ["adapter.rank=0", "baselines=[]"]
    done = _run(*arguments)
    assert "Trainable parameters: head " in done.output and "mean absolute error, years" in done.output
    table = next(data.glob("*phenotypic*"))
    lines = table.read_text().splitlines()
    cells = lines[1].split("\t")
    cells[lines[0].split("\t").index("Age")] = "17.5"
    table.write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")
    again = [f"out={tmp_path / 'again'}" if "out=" in str(word) else word for word in arguments]
    done = _run(*again)
    assert done.exit_code == 0 and "kept from before" not in done.output
    assert len(list(tmp_path.glob("athena-shards-*"))) == 2


@pytest.mark.parametrize("name", ["mask", "confounds"])
def test_another_mask_or_other_confounds_make_other_shards(tmp_path, name):
    paths = {name: tmp_path / f"{name}.txt" for name in ("scan", "mask", "confounds")}
    for path in paths.values():
        path.write_text("one")
    run = Run("p", "1", "KKI", 2.0, paths["scan"], paths["mask"], confounds_path=paths["confounds"])
    found, recipe = RunList((run,), (), "bids"), DataRecipe(grid="mni4mm", tr=2.0)
    before = finetuning._digest(found, recipe)
    assert finetuning._digest(found, recipe) == before
    paths[name].write_text("another")
    assert finetuning._digest(found, recipe) != before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "adhd", "task=sex"], "--task and task= both say what to predict; pass one of them."),
        (["--data", "x", "shards=y"], "--data and shards= both say what to read; pass one of them."),
        (["--task", "horoscope", "--data", "ATHENA", "backbone=PRE"], "task is 'horoscope', expected one of: adhd"),
        (["--task", "adhd", "--data", "nowhere", "backbone=PRE"], "nowhere: no such folder or table of runs."),
        (
            ["--task", "classify:Sex", "--data", "ATHENA", "backbone=PRE"],
            "no phenotype column 'Sex'; did you mean 'sex'?",
        ),
        (
            ["--task", "regress:Full4 IQ", "--data", "ATHENA", "backbone=PRE"],
            "'Full4 IQ'; did you mean 'full4_iq'? The columns are adhd_index, age,",
        ),
        (["--task", "adhd", "--data", "ATHENA", "backbone=nothing"], "nothing/config.json"),
        (["--task", "adhd", "--data", "ATHENA", "folds=one"], "key 'folds' is 'one'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments, sentence, athena, pretraining, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    names = {"ATHENA": str(athena), "backbone=PRE": f"backbone={pretraining}"}
    monkeypatch.setattr(sys, "argv", ["boldforge", "finetune", *(names.get(word, word) for word in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and sentence in error.strip().splitlines()[-1] and "Traceback" not in error
    assert not list(tmp_path.rglob("*-shards-*")), "nothing was sharded for a question that cannot be asked"
