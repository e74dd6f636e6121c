import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from boldforge import __version__
from boldforge.configs import ConfigError
from boldforge.launch import cli
from boldforge.launch.cli import app

VERBS = (
    "attribute",
    "demo",
    "inspect",
    "shard",
    "simulate",
    "pretrain",
    "finetune",
    "sweep",
    "release",
    "load",
    "report",
    "doctor",
)
DATA = Path(__file__).parents[1] / "data"
REAL = DATA / "sub-happy_task-rest_space-MNI152_res-4_bold.nii.gz"


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    """One real run among files that are broken in the usual ways."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copy(REAL, folder / "sub-good_task-rest_space-MNI152_bold.nii.gz")
    whole = REAL.read_bytes()
    affine = np.diag([4.0, 4, 4, 1])
    (folder / "sub-cut_task-rest_space-MNI152_bold.nii.gz").write_bytes(whole[: len(whole) // 3])
    (folder / "sub-empty_task-rest_space-MNI152_bold.nii.gz").write_bytes(b"")
    (folder / "sub-text_task-rest_space-MNI152_bold.nii.gz").write_bytes(
        gzip.compress(b"this is a letter, not a brain")
    )
    flat = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), affine)
    nib.save(flat, folder / "sub-flat_task-rest_space-MNI152_bold.nii.gz")
    five = nib.Nifti1Image(np.zeros((4, 4, 4, 3, 2), np.int16), affine)
    nib.save(five, folder / "sub-five_task-rest_space-MNI152_bold.nii.gz")
    timeless = nib.Nifti1Image(np.zeros((4, 4, 4, 9), np.int16), affine)
    timeless.header["pixdim"][4] = 0
    nib.save(timeless, folder / "sub-timeless_task-rest_space-MNI152_bold.nii.gz")
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_that_is_valid(verb):
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "500", "TERMINAL_WIDTH": "500"})
    assert result.exit_code == 0
    example = re.search(rf"Example: boldforge ({verb}\b[^\n│]*)", result.output)
    assert example, "no example"
    options = re.findall(r"--[a-z-]+", example.group(1))
    assert all(option in result.output.replace(example.group(0), "") for option in options)


def test_the_verbs_are_those_of_the_design():
    assert sorted(command.callback.__name__ for command in app.registered_commands) == sorted(VERBS)


def test_help_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from boldforge.launch.cli import app\n"
        "assert CliRunner().invoke(app, ['pretrain', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'ray', 'deepspeed', 'nibabel', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_task():
    from boldforge.finetune.tasks import _NAMED, OF_PARTS

    said = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "300"}).output
    assert [name for name in (*_NAMED, *OF_PARTS, "classify:COLUMN", "regress:COLUMN") if name not in said] == []


def test_every_baseline_is_named_on_the_page_of_finetuning():
    from boldforge.finetune.baselines import BASELINES

    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    plain = [name for name in BASELINES if not name.endswith("+combat")]
    assert [name for name in plain if f"`{name}`" not in page] == []


def test_the_version_is_printed():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "stepz=3"], "unknown key 'stepz'; did you mean 'steps'?"),
        (["pretrain", "optimizer.lr=fast"], "key 'optimizer.lr' is 'fast'"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml: no such recipe; give a YAML file, or one of:"),
        (["pretrain", "shards=nowhere", "out=x"], "nowhere"),
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["shard", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (["shard", "nowhere"], "boldforge shard needs --out FOLDER"),
        (
            ["shard", ".", "--verify", "--out", "x"],
            "--verify reads the folder of shards it is given, and takes no --out",
        ),
        (["shard", "nowhere", "--export-zarr", "z"], "nowhere: no such folder of shards"),
        (["shard", "nowhere", "--verify"], "nowhere: no such folder of shards; check the name"),
        (["shard", ".", "--verify"], "manifest.json: no manifest here"),
        (["shard", ".", "--out", "nowhere", "--append"], "nowhere: no such folder of shards"),
        (["shard", ".", "--out", "."], ".: is the input itself, which is only read; choose an --out elsewhere"),
        (["shard", ".", "--out", "sub/shards"], "sub/shards: lies in the input ., which is only read"),
        (["inspect", ".", "--source-tr", "0"], "--source-tr is 0, expected seconds from 0.02 to 100"),
        (["inspect", ".", "--source-tr", "nan"], "--source-tr is nan, expected seconds"),
        (["shard", "nowhere", "--out", "x", "--source-tr", "-2"], "--source-tr is -2, expected seconds"),
        (["inspect", ".", "--layout", "adhd200"], ".: holds no runs in the layout adhd200; expected ADHD-200 Athena"),
        (["inspect", ".", "--layout", "bids"], ".: holds no runs in the layout bids; expected fMRIPrep names"),
        (["inspect", ".", "--layout", "hcp"], ".: holds no runs in the layout hcp; expected HCP folders"),
        (["shard", ".", "--out", "x", "--append", "--overwrite"], "pass one of them"),
        (["simulate", "x", "--region", "Atlantis"], "no region named Atlantis"),
        (["release", "nowhere", "--out", "x"], "nowhere/config.json: no such file"),
        (["load", "nowhere"], "nowhere/config.json: no such file"),
        (["report", "nowhere"], "nowhere: nothing here that a report can show"),
        (["demo", "--data", "nowhere"], "nowhere: the demo's two real runs are not here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["boldforge", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert expected in error
    assert "Traceback" not in error
    # Progress lines may come first; the mistake is the last line.
    assert expected in error.strip().splitlines()[-1]


def test_the_real_command_tells_a_mistake_without_a_traceback(boldforge):
    done = boldforge("pretrain", "stepz=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean 'steps'?" in done.stderr


@pytest.mark.parametrize("arguments", [["frobnicate"], ["shard"], ["shard", "x", "--grid", "mni7mm", "--out", "y"]])
def test_wrong_usage_is_exit_code_2(arguments):
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.json"), 2, "a.json: No such file or directory; check"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied; check the permissions."),
        (OSError(28, "No space left on device"), 2, "No space left on device; free some space and run the same"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_trouble_with_the_system_is_one_sentence_too(error, code, sentence, monkeypatch, capsys):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("boldforge.launch.report.write_report", fail)
    monkeypatch.setattr(sys, "argv", ["boldforge", "report", "x"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(sentence)


def test_a_fault_of_our_own_is_not_dressed_up_as_the_users(monkeypatch):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("boldforge.launch.report.write_report", fail)
    monkeypatch.setattr(sys, "argv", ["boldforge", "report", "x"])
    with pytest.raises(OSError, match="Input/output error"):
        cli.main()


def test_inspect_shows_what_is_usable_and_why_the_rest_is_not(mixed_folder):
    result = CliRunner().invoke(app, ["inspect", str(mixed_folder)])
    assert result.exit_code == 0
    assert "layout bids, 2 usable runs, 5 skipped." in result.output, "a cut gzip shows only when it is read"
    assert re.search(r"sub-good_task-rest +110 +1\.16", result.output)
    lines = {line.split(":")[0]: line for line in result.output.splitlines() if line.startswith("skipped")}
    reasons = {"empty": "0 bytes", "text": "cannot be read as NIfTI", "flat": "4×4×4", "five": "4×4×4×3×2"}
    reasons["timeless"] = "--source-tr"
    for name, reason in reasons.items():
        assert reason in lines[f"skipped sub-{name}_task-rest_space-MNI152_bold.nii.gz"]


def test_inspect_names_links_and_pending_people(tmp_path):
    for number in (1, 2, 3):
        name = f"sfnwmrda000000{number}_session_1_rest_1.nii.gz"
        image = nib.Nifti1Image(np.ones((4, 4, 4, 5), dtype=np.int16), np.eye(4))
        image.header.set_zooms((1, 1, 1, 2))
        nib.save(image, tmp_path / name if number < 3 else tmp_path.parent / name)
    link = tmp_path / "sfnwmrda0000003_session_1_rest_1.nii.gz"
    link.symlink_to(tmp_path.parent / link.name)
    (tmp_path / "phenotypes.csv").write_text("ScanDir ID,Site,DX\n1,5,3\n2,2,pending\n3,5,0\n")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert "layout adhd200, 1 usable run, 2 skipped." in result.output
    assert "1 of 3 people in phenotypes.csv have a pending DX and are left out." in result.output
    assert re.search(r"run +site +frames +TR \(s\) +shape +diagnosis", result.output), "nothing comes with the runs"
    assert "Phenotype columns: age: empty; diagnosis: 1; dx: 3; sex: empty." in result.output
    assert f"skipped {link.name}: leads out of {tmp_path}" in result.output
    wider = CliRunner().invoke(app, ["inspect", str(tmp_path), "--root", str(tmp_path.parent)])
    assert "2 usable runs, 1 skipped." in wider.output


def test_the_recipes_options_reach_the_manifest(mixed_folder, tmp_path):
    from boldforge.data_shards import load_manifest

    out = tmp_path / "shards"
    options = ["--normalisation", "min-max", "--detrend", "--antialias", "--time-filter", "sinc"]
    result = CliRunner().invoke(app, ["shard", str(mixed_folder), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    recipe = load_manifest(out).recipe
    assert (recipe.normalisation, recipe.time_filter) == ("min-max", "sinc")
    assert recipe.detrend and recipe.antialias
    wrong = CliRunner().invoke(app, ["shard", str(mixed_folder), "--out", str(tmp_path / "x"), "--scrub-fd", "-1"])
    assert "key 'scrub_fd' is -1" in str(wrong.exception)


def test_shard_leaves_bad_runs_out_lists_them_and_finishes_the_rest(mixed_folder, tmp_path):
    from boldforge.data_shards import load_manifest

    out = tmp_path / "shards"
    result = CliRunner().invoke(app, ["shard", str(mixed_folder), "--out", str(out), "--tr", "2.0"])
    assert result.exit_code == 0, result.output
    assert "6 files left out; the reasons are in" in result.output
    assert [run.key for run in load_manifest(out).runs] == ["sub-good_task-rest"]
    listed = (out / "rejected.tsv").read_text()
    assert all(f"sub-{name}_" in listed for name in ("cut", "empty", "text", "flat", "five", "timeless"))


def test_a_dataset_is_verified_appended_to_and_exported_from_the_command_line(mixed_folder, tmp_path):
    from boldforge.data_shards import load_manifest

    def boldforge(*arguments):
        result = CliRunner().invoke(app, ["shard", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    out = tmp_path / "shards"
    assert boldforge(mixed_folder, "--out", out, "--dtype", "int8")[0] == 0
    code, text = boldforge(out, "--verify")
    assert (code, "1 runs in 1 shards, every byte as it was written" in text) == (0, True)

    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(REAL, more / "sub-new_task-rest_space-MNI152_bold.nii.gz")
    with pytest.raises(ConfigError, match="was built with dtype int8, so runs at int16 cannot be added"):
        boldforge(more, "--out", out, "--append", "--dtype", "int16")
    code, text = boldforge(more, "--out", out, "--append")
    assert (code, "1 runs added, 0 were there already, 2 in all" in text) == (0, True)
    assert load_manifest(out).recipe.dtype == "int8"

    code, text = boldforge(out, "--export-zarr", tmp_path / "study.zarr")
    assert (code, "2 runs as Zarr v3, read back equal" in text) == (0, True)

    with (out / "shard-000001.tar").open("r+b") as file:
        file.seek(10_000)
        file.write(b"damage")
    (out / "shard-000000.tar").unlink()
    code, text = boldforge(out, "--verify")
    assert code == 2
    assert "shard-000000.tar: is missing" in text
    assert "shard-000001.tar: run sub-new_task-rest: frame 0 damaged" in text


@pytest.mark.parametrize("verb", ["inspect", "shard"])
def test_a_folder_of_nothing_but_bad_runs_is_an_error(verb, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "study", tmp_path / "shards"
    folder.mkdir()
    (folder / "sub-empty_task-rest_space-MNI152_bold.nii.gz").write_bytes(b"")
    options = ["--out", str(out)] if verb == "shard" else []
    monkeypatch.setattr(sys, "argv", ["boldforge", verb, str(folder), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert f"none of the 1 files {'could' if verb == 'shard' else 'found can'} be used" in said.err.splitlines()[-1]
    assert "the file is empty" in (said.err if verb == "shard" else said.out)


def test_nothing_is_written_into_the_input_and_nothing_done_is_called_done(mixed_folder, tmp_path, boldforge):
    before = sorted(mixed_folder.rglob("*"))
    (tmp_path / "link").symlink_to(mixed_folder)
    for out in (mixed_folder, mixed_folder / "sub" / "shards", tmp_path / "link" / "shards"):
        done = boldforge("shard", mixed_folder, "--out", out)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "the input" in done.stderr and "which is only read" in done.stderr
    assert sorted(mixed_folder.rglob("*")) == before
    done = boldforge("shard", tmp_path / "nosuch", "--verify")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "nosuch: no such folder of shards" in done.stderr


def test_simulate_says_that_it_simulated(tmp_path):
    arguments = ["simulate", str(tmp_path / "cohort"), "--subjects", "2", "--frames", "8", "--region", "Caudate_L"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 simulated subjects written to" in result.output


def test_release_load_and_report_work_one_after_the_other(pretraining, adapter, sweep, tmp_path, boldforge):
    release, page = tmp_path / "v1", tmp_path / "report.html"
    written = CliRunner().invoke(app, ["release", str(pretraining), "--adapter", str(adapter), "--out", str(release)])
    assert written.exit_code == 0, written.output
    # Read back by another process, as a reader on another day would.
    loaded = boldforge("load", release)
    assert loaded.returncode == 0, loaded.stderr
    assert "equals the recorded one, bit for bit" in loaded.stdout
    folders = [str(pretraining), str(sweep), str(release)]
    assert CliRunner().invoke(app, ["report", *folders, "--out", str(page)]).exit_code == 0
    assert page.stat().st_size > 50_000


def test_inspect_shows_what_comes_with_a_run(tmp_path):
    stem = "sub-01_task-rest"
    shutil.copy(REAL, tmp_path / f"{stem}_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz")
    (tmp_path / f"{stem}_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz").write_bytes(b"")
    (tmp_path / f"{stem}_desc-confounds_timeseries.tsv").write_text("trans_x\n")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert re.search(r"sub-01_task-rest +110 +1\.16 +49×58×47 +mask confounds", result.output)


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    folder, out = tmp_path / "[/study]", tmp_path / "[/shards]"
    folder.mkdir(parents=True)
    shutil.copy(REAL, folder / "sub-01_task-rest_space-MNI152_bold.nii.gz")
    (folder / "participants.tsv").write_text("participant_id\tsite\tdx\nsub-01\t[/A]\t[bold]x\n")
    for arguments in (
        ["inspect", folder],
        ["shard", folder, "--out", out],
        ["inspect", out],
        ["shard", out, "--verify"],
    ):
        result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "500"})
        assert result.exit_code == 0, result.exception
        assert "[/" in result.output
        assert arguments != ["inspect", folder] or re.search(r"\[/A\] .*\[bold\]x", result.output)


def test_an_interruption_is_said(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: sys.exit(130))
    with pytest.raises(SystemExit):
        cli.main()
    assert "Stopped. What is whole stays" in capsys.readouterr().err
