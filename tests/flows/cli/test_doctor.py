"""`layerwise doctor` on this machine: one screen, an exit status, and nothing left behind."""

import os
import subprocess
import sys

import pytest

from layerwise.flows.cli.doctor import find_kernel
from layerwise.flows.cli.main import main
from layerwise.storage.files.filesystem import open_filesystem

LINES = 24  # of a screen


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Run the command; return its exit status, its lines, and what it printed on stderr."""

    def run(*options: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["layerwise", "doctor", *options])
        with pytest.raises(SystemExit) as ending:
            main()
        out, err = capsys.readouterr()
        return ending.value.code, out.splitlines(), err

    return run


def line_of(name: str, lines: list[str]) -> str:
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return line


def test_a_local_store_and_a_model_fit_on_one_screen_and_nothing_is_left(doctor, workshop, tmp_path):
    status, lines, _ = doctor("--store", str(tmp_path / "store"), "--model", str(workshop.model))
    assert status == 0
    assert len(lines) <= LINES
    assert "layerwise 0.1.0" in line_of("versions", lines)
    assert str(tmp_path / "store") in line_of("store", lines)
    assert any("creates files exclusively" in line for line in lines)
    assert "3 decoder layers" in line_of("model", lines)
    assert "memory " in line_of("search needs", lines)
    assert " capture " in line_of("takes", lines)
    assert list(tmp_path.iterdir()) == []


def test_a_store_on_s3_is_measured(doctor, s3_bucket):
    status, lines, _ = doctor("--store", f"s3://{s3_bucket}/doctor")
    assert status == 0
    assert os.environ["AWS_ENDPOINT_URL"] in line_of("store", lines)
    fs, path = open_filesystem(f"s3://{s3_bucket}/doctor")
    assert not any(row["type"] == "file" for row in fs.find(path, detail=True).values())


def test_a_store_that_cannot_be_written_and_a_refused_model_are_reported(doctor, workshop, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    status, lines, err = doctor(
        "--store", str(tmp_path / "file" / "store"), "--model", str(workshop.folder / "recurrent")
    )
    assert status == 1
    store, model = (line for line in lines if line.startswith("  error: "))
    assert "the store cannot be used: " in store
    assert "rwkv passes more than hidden states" in model
    assert "Traceback" not in err
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_no_secret_is_shown(doctor, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    status, lines, err = doctor("--store", "s3://key:SECRET@bucket/store", "--model", "s3://a:SECRET@b/model")
    assert status == 1
    assert len(lines) <= LINES
    assert "with a token" in line_of("hub", lines)
    assert "SECRET" not in "\n".join([*lines, err])
    assert "s3://bucket/store" in line_of("store", lines)


def test_a_missing_kernel_has_a_reason_and_advice(tmp_path, monkeypatch):
    found = find_kernel(tmp_path / "kernel.so")
    assert (found.level, found.reason) == (None, f"{tmp_path}/kernel.so does not exist")
    monkeypatch.setenv("CXX", "no-such-compiler")
    advice = find_kernel(tmp_path / "kernel.so").advice
    assert advice.startswith("a C++ compiler was not found (no-such-compiler). Install one")
    assert advice.endswith("then build it with `python -m layerwise.sparse.build`.")


def test_prefect_settings_that_cannot_be_read_are_one_problem(pytestconfig):
    done = subprocess.run(
        [sys.executable, "-m", "layerwise", "doctor", "--model", "demo"],
        cwd=pytestconfig.rootpath,
        env=os.environ | {"PREFECT_CLIENT_MAX_RETRIES": "many"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (error,) = (line for line in done.stdout.splitlines() if line.startswith("  error: "))
    assert "Prefect cannot read its settings (max_retries: " in error
    assert "Traceback" not in done.stderr
