"""States on disk: whole or not there, and never executed."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.training.state import KEPT, Keep, load_state, save_state, saved_steps, tidy, write_part

LARGE = {"weights": torch.arange(1_000_000, dtype=torch.float32)}


def files(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "state").iterdir())


def in_a_process_of_its_own(work) -> int:
    """Run `work` in a fork, which shares what is in memory and dies alone; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(3)


def test_what_was_saved_is_loaded_and_the_newest_two_are_kept(tmp_path):
    for step in (2, 4, 10):
        path = save_state(tmp_path, step, {"tensor": torch.full((2,), step), "nested": {"list": [step, "text"]}})
        assert path.name == f"{step:08d}.pt"
    found = load_state(tmp_path)
    assert found is not None
    step, state = found
    assert step == 10 and state["tensor"].tolist() == [10, 10] and state["nested"] == {"list": [10, "text"]}
    assert KEPT == 2 and files(tmp_path) == ["00000004.pt", "00000004.sha256", "00000010.pt", "00000010.sha256"]


def test_states_at_multiples_are_kept_for_ever(tmp_path):
    for step in range(1, 9):
        save_state(tmp_path, step, {"step": step}, Keep(last=2, every=3))
    assert saved_steps(tmp_path) == [3, 6, 7, 8]
    save_state(tmp_path, 9, {}, Keep(last=1), needed=6)
    assert saved_steps(tmp_path) == [6, 9]


@pytest.mark.parametrize("where", [0.0, 0.5, 0.9])
def test_one_flipped_bit_is_found_by_the_hash_and_the_state_before_is_used(tmp_path, capsys, where):
    """In the tensors' own bytes torch would not notice."""
    save_state(tmp_path, 1, LARGE)
    newest = save_state(tmp_path, 2, {"weights": torch.zeros(100_000)})
    content = bytearray(newest.read_bytes())
    content[1000 + int(where * 350_000)] ^= 1
    newest.write_bytes(content)
    found = load_state(tmp_path)
    assert found is not None and found[0] == 1 and torch.equal(found[1]["weights"], LARGE["weights"])
    assert "its SHA-256 differs" in capsys.readouterr().err


def test_the_hashes_are_those_of_sha256sum(tmp_path):
    save_state(tmp_path, 1, LARGE)
    done = subprocess.run(["sha256sum", "-c", "00000001.sha256"], cwd=tmp_path / "state", capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"00000001.pt: OK\n")


def test_a_state_of_before_there_were_hashes_is_read(tmp_path):
    save_state(tmp_path, 1, {"a": 1})
    (tmp_path / "state" / "00000001.sha256").unlink()
    assert load_state(tmp_path) == (1, {"a": 1})


def test_half_files_go_and_states_of_another_branch_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"step": step}, Keep(last=9))
    (tmp_path / "state" / ".00000004.pt.abc.tmp").write_bytes(b"half")
    tidy(tmp_path, 2)
    assert load_state(tmp_path) == (2, {"step": 2})
    assert "00000003.pt.unused" in files(tmp_path) and not any(name.endswith(".tmp") for name in files(tmp_path))


def test_what_was_set_aside_goes_when_the_run_has_come_by_it_again(tmp_path):
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"step": step}, Keep(last=9))
    tidy(tmp_path, 1)
    save_state(tmp_path, 2, {}, Keep(last=9))
    assert [name for name in files(tmp_path) if "unused" in name] == ["00000003.pt.unused"]
    save_state(tmp_path, 4, {}, Keep(last=9))
    assert not [name for name in files(tmp_path) if "unused" in name]


def test_a_state_that_is_written_anew_can_be_read_between_the_file_and_its_hash(tmp_path):
    """The one that a run went back to, all later ones being set aside already, is the only one there is."""
    for step in (5, 6):
        save_state(tmp_path, step, {"weight": 1.0}, Keep(last=9))
    tidy(tmp_path, 5)
    write_part(tmp_path, 5, "", {"weight": 0.5})  # and no `finish`: it was killed
    assert load_state(tmp_path) == (5, {"weight": 0.5})


def test_snapshots_and_pictures_of_a_branch_that_was_given_up_go(tmp_path):
    names = [f"ema/unet-0.1000-{step:08d}.safetensors" for step in (3, 6)] + ["ema/notes.safetensors"]
    names += ["samples/00000003.png", "samples/00000006.png", "samples/mine.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    tidy(tmp_path, 3)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {name for name in names if "00000006" not in name}


def test_nothing_there(tmp_path):
    assert load_state(tmp_path) is None
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "notes.pt").write_text("not a state")
    assert load_state(tmp_path) is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_newest_state_falls_back_to_the_one_before_with_a_warning(tmp_path, capsys, share):
    save_state(tmp_path, 1, {"tensor": torch.ones(1000)})
    newest = save_state(tmp_path, 2, {"tensor": torch.zeros(1000)})
    newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
    found = load_state(tmp_path)
    assert found is not None and found[0] == 1 and bool(found[1]["tensor"].all())
    assert f"warning: {newest} cannot be read" in capsys.readouterr().err


def test_when_no_state_can_be_read_that_is_said(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, {}).write_bytes(b"torn")
    with pytest.raises(UserError, match="can be read; start in another output folder, or remove it"):
        load_state(tmp_path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_malicious_state_is_not_executed(tmp_path, write):
    (tmp_path / "state").mkdir()
    write({"weights": Malicious(tmp_path / "executed")}, tmp_path / "state" / "00000001.pt")
    with pytest.raises(UserError, match="can be read"):
        load_state(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_process_killed_while_it_saves_leaves_the_state_before(tmp_path):
    def save_for_ever() -> None:
        for step in range(2, 10**6):
            save_state(tmp_path, step, LARGE)

    save_state(tmp_path, 1, LARGE)
    torn = 0
    for _ in range(4):
        child = in_a_process_of_its_own(save_for_ever)
        until = time.monotonic() + 60
        while time.monotonic() < until:  # until a file is being written
            half = [path for path in (tmp_path / "state").glob(".*.tmp") if path.exists() and path.stat().st_size]
            if half:
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += len(list((tmp_path / "state").glob(".*.tmp")))
        found = load_state(tmp_path)
        assert found is not None and torch.equal(found[1]["weights"], LARGE["weights"])
    assert torn, "no kill came in the middle of a save"


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_disk_that_is_full_is_one_sentence_and_keeps_the_state_before(tmp_path):
    """The limit on a file's size stands for the disk's: the write fails in its middle in the same way."""

    def save_with_a_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_state(tmp_path, 2, LARGE)
        except UserError as error:
            (tmp_path / "message").write_text(str(error))
            os._exit(0)

    save_state(tmp_path, 1, LARGE)
    _, status = os.waitpid(in_a_process_of_its_own(save_with_a_limit), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    message = (tmp_path / "message").read_text()
    assert message.startswith("the file-size limit was reached while writing") and "\n" not in message
    assert files(tmp_path) == ["00000001.pt", "00000001.sha256"]
    found = load_state(tmp_path)
    assert found is not None and found[0] == 1
