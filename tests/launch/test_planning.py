"""`boldforge pretrain --dry-run` as a user sees it: the real command on real shards."""

import re

import pytest

from boldforge.configs import load_config
from boldforge.launch import planning
from boldforge.pretrain import PretrainConfig
from boldforge.pretrain.speed_estimate import Speed

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
    speed = r"About ([\d.,]+) frames/s on this machine, where 2 ranks of \d+ threads? run on \d+ cores? "
    speed = (
        speed.rstrip()
        + r", [\d.,]+ \w+ for 200 steps: an estimate from single blocks, without reading and communication\. "
    )
    speed += r"7 measurements of the blocks gave ([\d.,]+) to ([\d.,]+), which is the range of the probes"
    found = re.search(speed, done.stdout)
    assert found
    rate, low, high = (float(number.replace(",", "")) for number in found.groups())
    assert 0 < low <= rate <= high
    assert re.search(r"data +[\d,]+ frames to train on; 200 steps see each about [\d.]+ times", done.stdout)


def test_a_grid_does_for_shards(dry_run, tmp_path):
    done = dry_run("--grid", "mni4mm", f"shards={tmp_path / 'none'}")
    assert done.returncode == 0, done.stderr
    assert "grid mni4mm, no shards looked at" in done.stdout


@pytest.mark.parametrize(
    ("ranks", "cores", "rate", "lasts"),
    [
        (1, 4, "0.50", "3.3 hours"),
        (4, 4, "2.0", "50 minutes"),
        (64, 4, "2.0", "50 minutes"),
        (3, 1, "0.50", "3.3 hours"),
    ],
)
def test_ranks_that_the_machine_has_no_core_for_add_no_speed(monkeypatch, ranks, cores, rate, lasts):
    monkeypatch.setattr(planning, "usable_cores", lambda: cores)
    monkeypatch.setattr(planning.torch, "get_num_threads", lambda: 1)
    said = planning._speed(Speed(median=2.0, shortest=1.0, longest=4.0), ranks, "cpu", 300, 6000)
    assert said.startswith(f"About {rate} frames/s on this machine, where {ranks} rank")
    assert f"{lasts} for 300 steps" in said


@pytest.mark.parametrize(("key", "name"), [("redundancy_dropout", "STRD"), ("prompts", "prompts")])
def test_what_the_estimate_leaves_out_is_said(key, name):
    config = load_config(PretrainConfig, "pretrain/tiny.yaml", ["shards=s", "out=o", f"model.{key}=1"])
    said = planning._speed(Speed(2.0, 1.0, 4.0), 1, "cpu", 0, 0, planning._left_out(config))
    assert f"without reading and communication, {name} (not counted in operations and memory either)." in said


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.00123, "0.0012"), (0.996, "1.0"), (1.14, "1.1"), (9.96, "10"), (99.7, "100"), (128, "130"), (7961, "8,000")],
)
def test_numbers_have_two_digits(number, text):
    assert planning.two_digits(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.02, "0.020 seconds"),
        (45, "45 seconds"),
        (95, "1.6 minutes"),
        (7200, "2.0 hours"),
        (3e5, "3.5 days"),
        (3e8, "9.5 years"),
    ],
)
def test_a_time_has_the_unit_that_suits_it(seconds, text):
    assert planning.duration(seconds) == text


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
