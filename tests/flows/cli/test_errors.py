"""Error messages of the command line: one line for the user's errors, a bug report for ours."""

import json
import logging
import re
import sqlite3
import stat
import sys
import zipfile
from pathlib import Path

import pyarrow
import pytest
from botocore.exceptions import NoCredentialsError

from layerwise.flows.cli.bug_report import KEPT
from layerwise.flows.cli.errors import explain
from layerwise.flows.cli.main import main
from layerwise.sparse.speed_settings import SpeedSettings
from layerwise.tasks.running import log_lines
from layerwise.tasks.running.log_lines import LineFormatter


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "layerwise"


def caught(fault) -> Exception:
    with pytest.raises(Exception) as information:  # noqa: PT011
        fault()
    return information.value


def raise_(error: Exception) -> None:
    raise error


NESTED = "[" * 100_000
OF_THE_USER = {
    "no file": (lambda: Path("/nowhere/file").read_text(), "No such file or directory"),
    "no text": (lambda: b"\xff".decode(), "can't decode byte 0xff"),
    "no JSON": (lambda: json.loads("{"), "Expecting property name .*JSONDecodeError"),
    "deep JSON": (lambda: json.loads(NESTED), "nested too deeply"),
    "no archive": (lambda: zipfile.ZipFile(__file__), "not a zip file"),
    "no table": (lambda: pyarrow.ipc.open_file(pyarrow.py_buffer(b"no table")), "ArrowInvalid"),
    "a locked database": (
        lambda: raise_(sqlite3.OperationalError("database is locked")),
        "database is locked",
    ),
    "no credentials": (lambda: raise_(NoCredentialsError()), "Unable to locate credentials"),
    "an error without words": (lambda: raise_(TimeoutError()), "TimeoutError"),
}


@pytest.mark.parametrize("name", OF_THE_USER)
def test_a_library_error_that_input_can_cause_gives_its_message_and_class(name, state):
    fault, message = OF_THE_USER[name]
    line = explain(caught(fault), debug=False)
    assert re.search(message, line)
    assert "bug in layerwise" not in line
    assert not state.exists()


def test_a_message_of_ours_is_printed_unchanged():
    assert explain(caught(lambda: SpeedSettings(rounds=1001)), debug=False) == (
        "rounds is 1001; it must be 1000 or less."
    )


FAULTS = {
    "a number from text": lambda: int("x"),
    "a missing key": lambda: {}["x"],
    "unequal lengths": lambda: list(zip([1], [], strict=True)),
    "a wrong type": lambda: len(5),
    "an assertion": lambda: raise_(AssertionError("never")),
    "a recursion": lambda: recurse(),
}


def recurse() -> None:
    recurse()


@pytest.mark.parametrize("name", FAULTS)
def test_an_unexpected_error_is_called_a_bug_and_written_to_a_report(name, state):
    error = caught(FAULTS[name])
    line = explain(error, debug=False)
    (report,) = state.iterdir()
    assert line.startswith(f"this is a bug in layerwise: {type(error).__name__}: ")
    assert str(report) in line
    assert "report the bug" in line
    assert "Traceback (most recent call last):" in report.read_text()
    assert stat.S_IMODE(report.stat().st_mode) == 0o600


def test_neither_the_report_nor_the_terminal_shows_credentials(state, monkeypatch, capsys):
    places = "s3://key:SECRET@bucket https://host/x?X-Amz-Signature=SECRET"
    monkeypatch.setattr(sys, "argv", ["layerwise", "ls", places])
    line = explain(caught(lambda: raise_(TypeError(f"{places} \udcff"))), debug=True)
    (report,) = state.iterdir()
    for shown in (line, capsys.readouterr().err, report.read_text()):
        assert "SECRET" not in shown
        assert "s3://***@bucket" in shown
        assert "https://host/x?***" in shown


def test_only_the_newest_reports_are_kept(state):
    state.mkdir(parents=True)
    for number in range(KEPT + 5):
        (state / f"bug-20200101T0000{number:02}Z-1.txt").write_text("old")
    explain(caught(FAULTS["a wrong type"]), debug=False)
    names = sorted(path.name for path in state.iterdir())
    assert len(names) == KEPT
    assert names[0] == "bug-20200101T000006Z-1.txt"
    assert not names[-1].startswith("bug-2020")


def test_the_line_says_if_the_report_cannot_be_written(state):
    state.parent.write_text("a file where the folder should be")
    line = explain(caught(FAULTS["a wrong type"]), debug=False)
    assert "could not be written" in line
    assert "--debug" in line


def test_debug_prints_the_traceback_with_control_characters_escaped(capsys):
    explain(caught(lambda: raise_(ValueError("\x1b[2J"))), debug=True)
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("ValueError: \\x1b[2J\n")


def test_a_log_line_has_no_traceback_and_control_characters_escaped():
    error = caught(lambda: raise_(ValueError("wrong")))
    record = logging.makeLogRecord(
        {
            "msg": "name \x1b[2J\nforged",
            "levelname": "WARNING",
            "exc_info": (ValueError, error, error.__traceback__),
        }
    )
    line = LineFormatter(debug=False).format(record)
    time, _, rest = line.partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time)  # standard error is no terminal
    assert rest == "WARNING name \\x1b[2J\n  forged (ValueError: wrong)"
    assert "Traceback" in LineFormatter(debug=True).format(record)


def test_a_closed_standard_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["layerwise"])
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after ``>&-``
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code in (0, None)


@pytest.mark.parametrize("before", [True, False])
def test_an_error_is_one_json_object(monkeypatch, tmp_path, capsys, before):
    monkeypatch.setattr(log_lines.formatter, "log_format", "text")  # as before, after this test
    command, how = ["status", str(tmp_path / "missing")], ["--log-format", "json"]
    monkeypatch.setattr(sys, "argv", ["layerwise", *(how + command if before else command + how)])
    with pytest.raises(SystemExit) as ending:
        main()
    said = json.loads(capsys.readouterr().err)
    assert ending.value.code == said["exit_status"] == 1
    assert said["level"] == "ERROR"
    assert "is not a store: nothing is there" in said["message"]
