import builtins
import collections
import shutil

import pytest
from typer.testing import CliRunner

from boldforge.kernels import available_backends
from boldforge.launch import doctor
from boldforge.launch.cli import app
from boldforge.launch.doctor import examine


def _named(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_doctor_prints_every_scan_backend_and_ends_well_here():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "Everything essential works." in result.output
    assert all(f"scan: {name}" in result.output for name in available_backends())


def test_a_backend_that_does_not_work_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("boldforge.kernels.available_backends", lambda: {"torch": "", "mamba_ssm": "not installed"})
    findings = examine(tmp_path)
    assert _named(findings, "scan: torch").status == "ok"
    assert _named(findings, "scan: mamba_ssm").status == "note"
    assert _named(findings, "scan: mamba_ssm").found == "not installed"
    assert not any(finding.name == "scan backends" for finding in findings)


def test_no_working_backend_is_essential(monkeypatch, tmp_path):
    monkeypatch.setattr("boldforge.kernels.available_backends", lambda: {"torch": "broken"})
    assert _named(examine(tmp_path), "scan backends").status == "missing"


def test_a_missing_package_makes_the_doctor_end_with_1_and_say_the_mend(monkeypatch):
    known = doctor.importlib.metadata.version

    def version(name):
        if name == "deepspeed":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "deepspeed: run make install" in result.output
    assert "Everything essential works" not in result.output


def test_without_a_compiler_the_mend_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda *arguments, **options: None)
    finding = _named(examine(tmp_path), "C++ compiler")
    assert finding.status == "missing"
    assert "install g++" in finding.mend


def test_too_little_room_is_a_note_that_names_the_place(monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 2**30))
    finding = _named(examine(tmp_path / "not" / "yet" / "there"), "disk")
    assert finding.status == "note"
    assert str(tmp_path) in finding.found
    assert "free some space" in finding.mend


def test_torch_that_does_not_import_is_a_finding_and_not_a_crash(monkeypatch, tmp_path):
    imported = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "torch" or name.startswith("boldforge.kernels"):
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return imported(name, *arguments, **options)

    def refuse_module(name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(doctor.importlib, "import_module", refuse_module)
    findings = examine(tmp_path)
    assert "libcudart" in _named(findings, "torch").found
    assert _named(findings, "torch").status == "missing"
    assert _named(findings, "accelerator").status == "note"


@pytest.mark.parametrize("status", ["ok", "note", "missing"])
def test_only_something_missing_fails(monkeypatch, status):
    monkeypatch.setattr(doctor, "examine", lambda folder: [doctor.Finding("x", status, "y")])
    assert CliRunner().invoke(app, ["doctor"]).exit_code == (1 if status == "missing" else 0)
