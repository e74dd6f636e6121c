"""`boldforge pretrain --dry-run` as a user sees it: the real command on real shards."""

import re

import pytest

SMALL = [
    *("model.frames=4", "model.embed_dim=8", "model.depths=[1,2]", "model.decoder_depths=[1]", "model.d_state=4"),
    *("batch_size=4", "micro_batch_size=2", "holdout.fraction=0.2"),
]


@pytest.fixture
def dry_run(boldforge, tmp_path):
    def run(*arguments: object):
        line = ("pretrain", "--config", "pretrain/tiny.yaml", "--dry-run", *arguments, f"out={tmp_path / 'out'}")
        done = boldforge(*line, *SMALL)
        assert not (tmp_path / "out").exists(), "nothing may be written"
        return done

    return run


def test_it_prints_memory_operations_and_speed_and_writes_nothing(dry_run, real_shards):
    done = dry_run("--ranks", "2", f"shards={real_shards}")
    assert done.returncode == 0, done.stderr
    assert "2 runs on mni4mm; 2 CPU ranks" in done.stdout
    parameters = re.search(r"parameters +([\d,]+), of them ([\d,]+) in the encoder", done.stdout)
    assert parameters and int(parameters[1].replace(",", "")) > int(parameters[2].replace(",", "")) > 1000
    rows = re.findall(r"^ +([0-3])((?: +\d+\.\d{3}){6})", done.stdout, flags=re.MULTILINE)
    assert [stage for stage, _ in rows] == list("0123")
    for _, numbers in rows:
        *parts, total = map(float, numbers.split())
        assert total == pytest.approx(sum(parts), abs=0.004)
    assert re.search(r"GFLOP a frame, forward and backward; \d+% of them in scans", done.stdout)
    assert re.search(r"About [\d.]+ frames/s a rank on this CPU, .* an estimate", done.stdout)
    assert re.search(r"data +[\d,]+ frames to train on; 200 steps see each about [\d.]+ times", done.stdout)


def test_a_grid_does_for_shards(dry_run, tmp_path):
    done = dry_run("--grid", "mni4mm", f"shards={tmp_path / 'none'}")
    assert done.returncode == 0, done.stderr
    assert "grid mni4mm, no shards looked at" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ranks", "3"], "batch_size is 4, which 3 ranks cannot share"),
        (["mask.ratio=0.9999"], "mask.ratio is 0.9999, which hides all"),
        (["--grid", "mni3mm"], "Unknown grid 'mni3mm'"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_2(dry_run, real_shards, arguments, sentence):
    done = dry_run(f"shards={real_shards}", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_a_grid_alone_is_no_run(boldforge):
    done = boldforge("pretrain", "--grid", "mni2mm")
    assert done.returncode == 2 and "--grid goes with --dry-run" in done.stderr
