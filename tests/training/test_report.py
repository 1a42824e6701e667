"""The log of a resumed run reads like that of one that was never interrupted."""

import json
import subprocess
import sys

import pytest

from ldm.training.report import Report


def write(tmp_path, start: int, steps: range) -> None:
    report = Report(tmp_path, start, 10)
    for step in steps:
        report.line(step, {"loss": 1 / 3 + step, "text": "a"})
    report.close()


def test_a_line_for_each_logged_step(tmp_path, capsys):
    write(tmp_path, 0, range(1, 3))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.33333, "text": "a"}, {"step": 2, "loss": 2.33333, "text": "a"}]
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "step       1  loss 1.33333  text a  left 0:00:00"
    assert err == ""  # no bar in a pipe


def test_lines_after_the_state_and_half_a_line_are_dropped(tmp_path):
    write(tmp_path, 0, range(1, 6))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "loss": 0.')  # the run was killed in the middle of a write
    write(tmp_path, 3, range(4, 6))
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_a_run_that_begins_anew_begins_its_log_anew(tmp_path):
    write(tmp_path, 0, range(1, 6))
    write(tmp_path, 0, range(1, 2))
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_disk_that_does_not_take_a_line_gets_it_later(tmp_path, capsys):
    """Here by a limit on the size of files, which cuts a line in its middle as a full disk does."""
    code = f"""
import resource, signal
from pathlib import Path
from ldm.training.report import Report
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
report = Report(Path({str(tmp_path)!r}), 0, 9)
report.line(1, {{"loss": 1.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))
report.line(2, {{"loss": 2.0}})
report.line(3, {{"loss": 3.0}})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
report.line(4, {{"loss": 4.0}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "log.jsonl waits with 2 lines: File too large" in done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses == [1.0, 2.0, 3.0, 4.0]


def test_what_is_not_finite_is_a_word_for_json_has_no_number_for_it(tmp_path):
    report = Report(tmp_path, 0, 10)
    report.line(1, {"loss": float("nan")})
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)["loss"] == "nan"


def test_a_run_that_goes_back_forgets_what_came_after(tmp_path):
    report = Report(tmp_path, 0, 10)
    for step in (2, 4, 6):
        report.line(step, {"loss": 1.0})
    report.back_to(2)
    report.line(4, {"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.0), (4, 2.0)]
