"""Real processes that are interrupted, killed, or run out of disk, and what is left of them."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.training.state import load_state

from .toys import ICONS, log_of

ROOT = Path(__file__).parents[2]
WORDS = [
    f"data.shards={ICONS}/train-*.tar",
    "data.size=16",
    "data.workers=2",
    "model.multipliers=[1]",
    "loss.perceptual=0",
    "loss.adversarial=0",
    "loop.log_every=2",
    "loop.validate_every=1000000",
    "loop.ema=0.9",
    "scale_samples=8",
]

pytestmark = pytest.mark.slow


def command(output: Path, *words: str) -> list[str]:
    script = ROOT / "scripts" / "train_autoencoder.py"
    recipe = ROOT / "configs" / "autoencoder" / "tiny.yaml"
    return [sys.executable, str(script), "--config", str(recipe), *WORDS, f"output={output}", *words]


def under_way(output: Path, *words: str, before: tuple[str, ...] = ()) -> tuple[subprocess.Popen, str]:
    """A run of far too many steps that has logged twice, in a group of its own; what it said until then."""
    process = subprocess.Popen(
        [*before, *command(output, "loop.steps=1000000", "optimizer.law=constant", *words)[bool(before) :]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which tests under nohup would ignore
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step       4"):
            break
    return process, said


def interrupted(number: int, output: Path, *words: str) -> tuple[int, str, str]:
    """Send signal `number` to a run and its readers, as a terminal does; exit code, stdout, stderr."""
    process, said = under_way(output, *words)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)  # that its data readers end too, or the pipes would stay open
    return process.returncode, said + out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_saves_exits_0_and_the_run_goes_on(tmp_path, number):
    code, out, err = interrupted(number, tmp_path)
    assert (code, err) == (0, "")
    found = load_state(tmp_path)
    assert found is not None
    step = found[0]
    assert f"stopped at step {step} as asked; --resume auto goes on from there" in out
    assert not (tmp_path / "model.json").exists()
    more = ["--resume", "auto", f"loop.steps={step + 4}", "optimizer.law=constant"]
    done = subprocess.run(command(tmp_path, *more), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"steps       {step} to {step + 4}" in done.stdout
    steps = [line["step"] for line in log_of(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == step + 4
    assert (tmp_path / "model.json").exists()


def test_ctrl_c_saves_and_exits_130_with_one_sentence(tmp_path):
    code, _, err = interrupted(signal.SIGINT, tmp_path)
    assert code == 130
    assert err.strip() == "interrupted: what was finished before is on disk, nothing is half-written"
    assert load_state(tmp_path) is not None


def test_ctrl_c_that_ends_the_reader_of_the_log_too_saves(tmp_path):
    """As in `python scripts/train_... | tee log`, where both get it and tee goes first."""
    process, _ = under_way(tmp_path, "loop.log_every=1")
    assert process.stdout and process.stderr
    process.stdout.close()
    before = log_of(tmp_path)[-1]["step"]
    while log_of(tmp_path)[-1]["step"] < before + 3:  # it goes on, though nobody reads what it says
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(timeout=120) == 130
    assert err.strip() == "interrupted: what was finished before is on disk, nothing is half-written"
    found = load_state(tmp_path)
    assert found is not None and found[0] >= before + 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_ends_without_a_word_to_its_run(tmp_path, number):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    process, said = under_way(tmp_path, before=launcher)
    assert process.stdout and process.stderr
    process.send_signal(number)
    said += process.stdout.read()  # until the trainer has closed it
    found = load_state(tmp_path)
    assert found is not None and f"stopped at step {found[0]} as asked; --resume auto goes on from there" in said
    told = f"warning: process {process.pid}, which began this one, is gone, so it ends too\n"
    assert process.stderr.read().endswith(told)
    assert process.wait(timeout=120) == -number
    assert not (tmp_path / ".lock").exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    """Of two that begin at once one goes on, and its log has each line once; who comes later is refused at once."""
    words = command(tmp_path, "loop.steps=1000000", "optimizer.law=constant")
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.05)
    both.sort(key=lambda process: process.poll() is None)
    out, err = both[0].communicate()
    assert (both[0].returncode, out) == (1, "")
    assert err.startswith(f"error: process {both[1].pid} on ") and err.count("\n") == 1
    third = subprocess.run([*words, "--resume", "auto"], capture_output=True, text=True)
    assert (third.returncode, third.stdout) == (1, "") and third.stderr == err
    both[1].terminate()
    _, err = both[1].communicate(timeout=120)
    assert (both[1].returncode, err) == (0, "")
    steps = [line["step"] for line in log_of(tmp_path)]
    assert steps and steps == sorted(set(steps))


def test_a_run_killed_at_any_moment_goes_on_from_its_last_state(tmp_path):
    code, _, _ = interrupted(signal.SIGKILL, tmp_path, "loop.save_every=1")
    assert code == -signal.SIGKILL
    found = load_state(tmp_path)
    assert found is not None and found[0] >= 3  # a step's line is said before its state is saved
    more = ["--resume", "auto", f"loop.steps={found[0] + 1}", "optimizer.law=constant"]
    done = subprocess.run(command(tmp_path, *more), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "autoencoder.safetensors").exists()


def test_a_full_disk_keeps_the_last_state_and_the_run_alive(tmp_path):
    """A limit on the size of files stands for the disk; whoever lifts it while the run goes on loses nothing."""
    whole = subprocess.run(command(tmp_path, "loop.steps=2", "loop.save_every=1"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    before = load_state(tmp_path)
    assert before is not None and before[0] == 2
    often = ["loop.steps=9", "loop.save_every=1", "loop.log_every=1", "--resume", "auto"]
    process = subprocess.Popen(
        command(tmp_path, *often),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step       6"):  # so the states of 3 to 5 were not taken
            break
    after = load_state(tmp_path)
    assert after is not None and after[0] == 2
    for key, tensor in before[1]["modules"]["autoencoder"].items():
        assert torch.equal(tensor, after[1]["modules"]["autoencoder"][key])
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "warning: no state of step 3: the file-size limit was reached while writing" in err
    assert "the last good one is of step 2" in err and "Traceback" not in err
    end = load_state(tmp_path)
    assert end is not None and end[0] == 9
    assert [line["step"] for line in log_of(tmp_path) if "l1" in line][-5:] == [5, 6, 7, 8, 9]


def test_a_disk_that_stays_full_is_said_at_the_end(tmp_path):
    done = subprocess.run(
        command(tmp_path, "loop.steps=2", "loop.save_every=1"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the file-size limit was reached while writing ")
    assert not list((tmp_path / "state").iterdir())
