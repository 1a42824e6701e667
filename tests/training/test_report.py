"""The log of a resumed run reads like that of one that was never interrupted."""

import json

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
    assert out.splitlines()[0] == "step       1  loss 1.33333  text a"
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
