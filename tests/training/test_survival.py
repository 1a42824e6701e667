"""Killed at random moments, in one process and in several, on one node and on two: the same end, bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.training.state import load_state

from .toys import ICONS, LOOP, ToyStage, log_of, run

ROOT = Path(__file__).parents[2]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": os.devnull}
WORDS = ["model.context_width=0", "model.in_channels=3", "model.out_channels=3", "model.attention_levels=[]"]
WORDS += [f"data.shards={ICONS}/train-*.tar", "data.size=16", "sample.prompts=[]", "loop.save_every=2"]
WORDS += ["loop.log_every=1", "loop.validate_every=1000", "loop.threads=1"]


def crew(*words: str) -> str:
    command = [sys.executable, "-m", "training.crew", *words]
    done = subprocess.run(command, cwd=ROOT / "tests", env=ALONE, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same(a: Any, b: Any) -> bool:
    """Containers of tensors, numbers and strings, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in log_of(output) if "loss" in line]


def state(output: Path) -> dict[str, Any]:
    found = load_state(output)
    assert found is not None
    return {"step": found[0], **found[1]}


@pytest.mark.slow
def test_twenty_kills_in_a_row_leave_no_trace(tmp_path):
    """Weights, optimizer, averages, position in the data, half-full meters and the log are those of a run that
    nobody killed; the files have the same hashes."""
    assert crew("kills", str(tmp_path), "20").endswith("kills 20\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert same(state(whole), state(killed))
    assert log_of(whole) == log_of(killed)
    for part in ("unet.safetensors", "ema/unet-0.1000-00000100.safetensors"):
        assert (whole / part).read_bytes() == (killed / part).read_bytes()
    assert not list((killed / "state").glob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_killed_six_times_leave_no_trace(tmp_path):
    """One dies a moment before the other; averages are compared on both."""
    assert crew("pair", str(tmp_path), "6").endswith("kills 6\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert same(state(whole), state(killed))
    assert log_of(whole) == log_of(killed)
    ends = [torch.load(run / f"averages-{rank}.pt", weights_only=True) for run in (whole, killed) for rank in (0, 1)]
    assert all(same(ends[0], end) for end in ends[1:])
    newest = "state/00000024.sha256"
    assert (whole / newest).read_bytes() == (killed / newest).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_or_more(tmp_path):
    """Weights and averages of every process are to 1e-12 those of one process that was never interrupted."""
    crew("elastic", str(tmp_path))
    whole = torch.load(tmp_path / "whole" / "weights-0.pt", weights_only=True)
    for name, world in (("fewer", 1), ("more", 2)):
        for rank in range(world):
            other = torch.load(tmp_path / name / f"weights-{rank}.pt", weights_only=True)
            for a, b in zip(whole, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if a.dtype == torch.float64 else 1e-6)
        images, theirs = ([e["images"] for e in log_of(tmp_path / n) if "images" in e] for n in ("whole", name))
        assert images == theirs
        assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / name), rel=1e-5)


@pytest.mark.slow
def test_what_happens_to_one_process_is_a_sentence_on_the_other(tmp_path):
    """Its data are bad; it is killed; its store hangs when the queue's time is up; it sees another folder; another run
    writes there."""
    said: dict[str, list[str]] = {}
    for line in crew("trouble", str(tmp_path)).splitlines():
        if line in ("bad", "dead", "stalled", "elsewhere", "held"):
            said[line] = []
        elif line.startswith(("rank", "stopped")):
            said[list(said)[-1]].append(line)
    bad = "rank 0: another process of the run could not read its data; its own output says why"
    assert sorted(said["bad"]) == [bad, "rank 1: these data are bad"]
    assert (
        len(said["dead"]) == 1
        and "rank 0: process 0 has lost the connection to another process of the run" in said["dead"][0]
    )
    stopped = "stopped at step 4 as asked; --resume auto goes on from there"
    assert sorted(said["stalled"]) == ["rank 0: ended", "rank 1: ended", stopped]
    assert state(tmp_path / "stalled")["batches"] == {"drawn": 4}
    assert len(said["elsewhere"]) == 2
    assert all("process 1 cannot read the state of step 4 in" in line for line in said["elsewhere"])
    assert all("output must lie on storage that all nodes see" in line for line in said["elsewhere"])
    assert len(said["held"]) == 2 and all("has been writing into" in line for line in said["held"])


@pytest.mark.slow
def test_one_times_four_two_times_two_and_four_times_one(tmp_path):
    """Processes x accumulation: the same weights to 1e-6 (in float64: to 1e-12), and the same rate at every step."""
    crew("worlds", str(tmp_path))
    one = torch.load(tmp_path / "1" / "weights-0.pt", weights_only=True)
    lines = log_of(tmp_path / "1")
    for world in (2, 4):
        for rank in range(world):  # and all processes have the same
            other = torch.load(tmp_path / str(world) / f"weights-{rank}.pt", weights_only=True)
            assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(one, other, strict=True))
        theirs = log_of(tmp_path / str(world))
        assert [line.get("rate") for line in lines] == [line.get("rate") for line in theirs]
        assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / str(world)), rel=1e-5)
        average, other = (state(tmp_path / str(w))["averages"]["net"]["average"] for w in (1, world))
        assert all(torch.allclose(average[key], other[key], rtol=0, atol=1e-6) for key in average)


@pytest.mark.slow
def test_parameters_spread_by_fsdp(tmp_path):
    """FSDP2 on two processes trains as DDP on two; its state is in shares, from which four processes go on; what is
    exported is whole. Matrices only: a bias before a norm has no gradient, and Adam makes whole steps of its rounding.
    """
    crew("spread", str(tmp_path))
    files = {path.name for path in (tmp_path / "spread" / "state").iterdir()}
    assert {"00000008.pt", "00000008.0of2.pt", "00000008.1of2.pt", "00000008.sha256"} <= files
    plain = load_file(tmp_path / "plain" / "unet.safetensors")
    for other in ("spread", "parts"):
        theirs = load_file(tmp_path / other / "unet.safetensors")
        assert plain.keys() == theirs.keys()
        for name, tensor in plain.items():
            assert tensor.shape == theirs[name].shape
            if tensor.ndim > 1:
                torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / other), rel=1e-4)
        ends = [log_of(tmp_path / each)[-1]["validation/loss"] for each in ("plain", other)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.slow
def test_processes_that_see_different_shards_do_not_begin(tmp_path):
    said = crew("strangers", str(tmp_path)).splitlines()
    why = "process 1 reads another order of samples than process 0 (shards differ); let all of them"
    assert [line.split(": ")[0] for line in sorted(said)] == ["rank 0", "rank 1"]
    assert all(why in line for line in said)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def launched(*options: str, words: list[str]) -> subprocess.Popen:
    script = [str(ROOT / "scripts" / "train_diffusion.py"), "--config", str(ROOT / "configs/diffusion/tiny.yaml")]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *script, *WORDS, *words]
    return subprocess.Popen(command, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes of one node make of it."""
    output = tmp_path_factory.mktemp("two") / "run"
    code, _, err = ended(launched("--standalone", "--nproc_per_node=2", words=["loop.steps=8", f"output={output}"]))
    assert code == 0, err[-3000:]
    return output


@pytest.mark.slow
def test_a_rank_that_is_killed_under_elastic_restart(two, tmp_path):
    """torchrun starts both again, they go on by themselves, and nobody can tell."""
    output = tmp_path / "run"
    words = ["loop.steps=8", f"output={output}", "--resume", "auto"]
    process = launched("--standalone", "--nproc_per_node=2", "--max-restarts=2", words=words)
    until = time.monotonic() + 200
    while time.monotonic() < until and not (output / "state" / "00000004.sha256").exists():
        time.sleep(0.005)
    victims = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(victims[-1]), 9)
    code, out, err = ended(process)
    assert code == 0, err[-3000:]
    plans = [line for line in out.splitlines() if line.startswith("steps ")]
    assert len(plans) == 2 and plans[0] != plans[1], plans
    assert same(state(two), state(output))
    assert log_of(two) == log_of(output)


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_ranks_behind(tmp_path):
    """They save, and end."""
    output = tmp_path / "run"
    process = launched("--standalone", "--nproc_per_node=2", words=["loop.steps=1000000", f"output={output}"])
    until = time.monotonic() + 200
    while time.monotonic() < until and not (output / "state" / "00000004.sha256").exists():
        time.sleep(0.005)
    process.kill()
    _, out, err = ended(process)  # when both have closed their ends
    gone = err.count(f"warning: process {process.pid}, which began this one, is gone, so it ends too")
    assert 1 <= gone <= 2  # the first that sees it ends both, maybe before the other has looked
    step = state(output)["step"]
    assert f"stopped at step {step} as asked" in out and log_of(output)[-1]["step"] <= step
    assert not (output / ".lock").exists()


@pytest.mark.slow
def test_two_nodes_are_one_node_of_two(two, tmp_path):
    """Two launchers that know each other by address and port alone, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = tmp_path / "run"
    nodes = []
    for node in (0, 1):
        where = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        words = ["loop.steps=8", f"output={output}"]
        nodes.append(launched(*where, f"--master_port={port}", words=words))
    for code, _, err in [ended(node) for node in nodes]:
        assert code == 0, err[-3000:]
    assert same(state(two), state(output))
    assert log_of(two) == log_of(output)


def test_the_clock_may_jump(tmp_path, monkeypatch):
    """Summer time, a time server, a virtual machine that slept: only a monotonic clock is asked."""
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 + (-1) ** next(jumps) * 1e8)
    stage = ToyStage()
    run(stage, LOOP.__class__(**{**LOOP.__dict__, "max_minutes": 1e6}), tmp_path)
    assert state(tmp_path)["step"] == LOOP.steps
    lines = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "images_per_s" in line]  # 1, 3, 6
    assert len(lines) == 3 and '"images_per_s": -' not in "".join(lines)
